"""What a byte buys: LQER, AWQ-lite, loop-aware clips and tighter clips on one trained model, in the same artifact under the same coder.

    python bench/lqer.py WEIGHTS.pt [--quantizer scalar] [--tokens 16384]

WEIGHTS.pt holds a run's averaged weights and Hessians; if it is not there, a run with the settings of the environment makes it
(DATA_PATH, TOKENIZER_PATH, ...). Every row is the whole model quantized one way: bytes of the artifact (rans), the sum of the matrices'
Hessian-weighted errors (each over its outputs' energy), and the divergence in nats a token of its predictions from the unquantized
model's, on validation tokens (this is what a loss goes up by, with a hundredth of the noise). "by clips" is the divergence that a
model of as many bytes has when all clip sigmas are scaled by one factor: the row is worth its bytes if its own is smaller.

LQER (low-rank correction of what GPTQ left, E ~ A B): `published`, one scale for A; `column`, one for each of its columns; `hessian`,
column, and A B minimise the error of the layer's outputs, not of the weights. "damped": GPTQ of the embedding with a larger share of
the mean diagonal than 0.01, for its rows are read as inputs too, which its Hessian does not know.
AWQ-lite: the most salient group of columns of all matrices, by the inputs' rms times the mean weight, gets the range of 8 bits.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as g  # noqa: E402

SILENT = g.Log(None, enabled=False)
Place = tuple[str, int]  # a bank and a matrix in it


class Matrix(NamedTuple):
    """A matrix and how it is quantized."""

    weights: Tensor
    hessian: Tensor
    bits: int
    clip_sigmas: float
    layer: int  # -1: the embedding


def low_rank(error: Tensor, hessian: Tensor | None, cfg: g.Config) -> g.LowRank:
    """As the program does it, or with the error of the layer's outputs in place of that of the weights."""
    if hessian is None:
        return g.LowRank.of(0, *g.best_product(error, cfg.lqer_rank), cfg)
    factor = g.damped_factor(hessian[None].clone(), SILENT)[0]
    a, b = g.best_product(error @ factor, cfg.lqer_rank)
    return g.LowRank.of(0, a, torch.linalg.solve_triangular(factor, b, upper=False, left=False), cfg)


def term_bytes(terms: list[g.LowRank]) -> int:
    """What they take: the entropy of their codes, one table a factor, and the scales."""
    bits = sum(g.entropy_bits(np.bincount(t.numpy().ravel() + 8, minlength=16)) for term in terms for t in (term.a, term.b))
    return int(bits / 8) + sum(2 * (term.a_scales.numel() + term.b_scales.numel()) + 24 for term in terms)


# ---------------------------------------------------------------------------------------------------------------- the model


def make_weights(path: Path) -> None:
    """Train with the settings of the environment and keep averaged weights and Hessians."""

    def export(run: g.Run, model: g.GPT, hessians: dict[str, Tensor], *_: object) -> None:
        torch.save({"params": {n: p.detach().clone() for n, p in model.named_parameters()}, "hessians": hessians}, path)
        raise SystemExit(0)

    g.export = export
    try:
        g.main()
    except SystemExit as done:
        if done.code:
            raise


class Bench:
    """A trained model, its matrices, and what they make of validation text when they are quantized."""

    def __init__(self, path: Path, quantizer: str, tokens: int) -> None:
        saved = torch.load(path)
        self.cfg = replace(g.Config.from_env(dict(g.os.environ)), quantizer=quantizer, compressor="rans")
        self.run = g.Run(self.cfg, g.Ranks(), SILENT)
        self.model = g.GPT(self.cfg)
        self.model.load_state_dict(saved["params"])
        self.model.requires_grad_(False)
        self.matrices: dict[Place, Matrix] = {}
        self.rows = g.parameter_table(self.cfg)
        for row in self.rows:
            bank = self.model.get_parameter(row.name).reshape(-1, *row.shape[-2:])
            for group in row.matrices:
                for i in range(group.first, group.last):
                    layer = i - group.first
                    self.matrices[row.name, i] = Matrix(bank[i], saved["hessians"][group.hessian][layer], group.bits, group.clip_sigmas,
                                                        -1 if group.hessian == "head" else layer)
        val = g.load_val(self.cfg)
        stream = val.tokens[: tokens + 1].astype(np.int64)
        starts = g.segment_starts(stream[:-1], tokens, self.cfg.eval_seq_len)
        self.batches = []
        for part in np.array_split(starts, max(1, tokens // 4096)):
            end = starts[np.searchsorted(starts, part[-1]) + 1] if part[-1] != starts[-1] else tokens
            text = stream[part[0]: end + 1]
            self.batches.append(g.make_batch(text[:-1], text[1:], part - part[0], self.cfg.eval_seq_len, torch.device("cpu")))
        self.plain = [self.log_probs(self.model, batch).half() for batch in self.batches]

    def log_probs(self, model: g.GPT, batch: g.Batch) -> Tensor:
        """(T, V)."""
        kept: list[Tensor] = []

        def linear(site: g.Site, x: Tensor, w: Tensor | None) -> Tensor | None:
            y = g.plain_linear(site, x, w)
            if site == g.HEAD_SITE:
                kept.append(y)
            return y

        with torch.no_grad():
            model(batch, g.loop_schedule(self.cfg, self.cfg.eval_loop_depth), linear)
        cap = self.cfg.logit_softcap
        return (cap * torch.tanh(kept[0].float() / cap)).log_softmax(-1)

    def divergence(self, tensors: dict[str, Tensor]) -> float:
        """Mean of KL(unquantized, quantized), nats a token."""
        model = g.GPT(self.cfg)
        model.load_state_dict({**{n: p for n, p in self.model.named_parameters()}, **tensors})
        total = 0.0
        for batch, plain in zip(self.batches, self.plain):
            p = plain.float()
            total += float((p.exp() * (p - self.log_probs(model, batch))).sum())
        return total / sum(len(b.tokens) for b in self.batches)

    def quantize(self, factors: dict[Place, float], damping: float = 0.0) -> dict[Place, g.Quantized]:
        """Every matrix, its clip sigmas times its factor; those of one shape and rule together. The embedding's Hessian has so many of
        its mean diagonals added, because its rows are read as inputs too."""
        done: dict[Place, g.Quantized] = {}
        alike: dict[tuple, list[Place]] = {}
        for place, m in self.matrices.items():
            alike.setdefault((m.weights.shape, m.bits), []).append(place)
        for (_, bits), places in alike.items():
            ms = [self.matrices[p] for p in places]
            clips = torch.tensor([[m.clip_sigmas * factors.get(p, 1.0)] for m, p in zip(ms, places)])
            hessians = torch.stack([m.hessian for m in ms])
            if ms[0].layer < 0:
                hessians = hessians + damping * hessians.diagonal(dim1=1, dim2=2).mean() * torch.eye(hessians.size(-1))
            found = g.gptq(torch.stack([m.weights for m in ms]), hessians, bits, clips, SILENT, self.cfg.quantizer)
            for i, place in enumerate(places):
                done[place] = g.Quantized(found.codes[i], found.scales[i], found.method)
        return done

    def measure(self, quantized: dict[Place, g.Quantized], weights: dict[Place, Tensor] | None = None,
                beside: int = 0) -> tuple[int, float, float]:
        """Bytes of the artifact and `beside`, the relative error, the divergence; `weights` are those that take the place of the codes'."""
        tensors, restored, error = {}, {}, 0.0
        for row in self.rows:
            value = self.model.get_parameter(row.name).detach()
            if not row.matrices:
                tensors[row.name] = value.half() if not row.int8 else g.rows_of_int8(value)
                continue
            parts = [quantized[row.name, i] for group in row.matrices for i in range(group.first, group.last)]
            values = [(weights or {}).get((row.name, i), g.dequantize(q)) for i, q in enumerate(parts)]
            tensors[row.name] = g.Quantized(torch.stack([p.codes for p in parts]).reshape(row.shape),
                                            torch.stack([p.scales for p in parts]).reshape(row.shape[:-1]), self.cfg.quantizer)
            restored[row.name] = torch.stack(values).reshape(row.shape)
            for i, v in enumerate(values):
                m = self.matrices[row.name, i]
                error += float(g.hessian_error((v - m.weights)[None], m.hessian) / g.hessian_error(m.weights[None], m.hessian))
        return len(g.pack_artifact(tensors, self.cfg)) + beside, error / len(self.matrices), self.divergence(restored)

    def awq(self, base: dict[Place, g.Quantized], group: int) -> tuple[Place, int, dict[Place, Tensor], int]:
        """The protected group: its matrix, first column, the weights with it, and the bytes of its finer codes over the usual ones."""
        scores = []
        for place, m in self.matrices.items():
            saliency = m.hessian.diagonal().sqrt() * m.weights.abs().mean(0) / np.sqrt(self.cfg.train_batch_tokens)
            whole = len(saliency) // group * group
            scores += [(float(s), place, i * group) for i, s in enumerate(saliency[:whole].reshape(-1, group).sum(1))]
        _, place, start = max(scores)
        m, shift = self.matrices[place], 2 ** (8 - self.matrices[place].bits)
        weights, codes = protected_gptq(m, start, group, shift)
        usual = base[place].codes[:, start: start + group].numpy().astype(np.int64).ravel() + 128
        fine = codes[:, start: start + group].astype(np.int64).ravel() + 128
        bits = g.entropy_bits(np.bincount(fine)) - g.entropy_bits(np.bincount(usual))
        return place, start, {place: weights}, int(bits / 8) + 2 * len(weights) + 24


def protected_gptq(m: Matrix, start: int, group: int, shift: int) -> tuple[Tensor, np.ndarray]:
    """GPTQ of one matrix (scalar) with columns start.. of a range `shift` times as fine: the weights and the codes."""
    steps = g.row_scales(m.weights, m.bits, m.clip_sigmas, "scalar").float()
    fine = torch.full((m.weights.size(1),), 1.0)
    fine[start: start + group] = (2 ** (m.bits - 1) - 1) / 127
    order = torch.argsort(m.hessian.diagonal(), descending=True, stable=True).flip(0)
    permuted = m.hessian[order][:, order].clone()
    factor, columns = g.damped_factor(permuted[None], SILENT)[0], m.weights.T[order]
    feedback, aims = factor / factor.diagonal(), columns.clone()
    levels, codes, limit = torch.empty_like(columns), torch.empty_like(columns), 2 ** (m.bits - 1) - 1
    for j in reversed(range(len(columns))):
        step, most = steps * fine[order[j]], limit if fine[order[j]] == 1 else 127
        codes[j] = (aims[j] / step).round().clamp(-most, most)
        levels[j] = codes[j] * step
        aims[:j] += feedback[j, :j, None] * (columns[j] - levels[j])
    back = order.argsort()
    return levels[back].T.contiguous(), codes[back].T.numpy()


# ------------------------------------------------------------------------------------------------------------------ the rows


def by_clips(curve: list[tuple[int, float]], size: int) -> float:
    """Divergence at `size` bytes on the curve of one factor for all clips: log-linear between its points."""
    sizes, values = (np.array(v, dtype=float) for v in zip(*sorted(curve)))
    return float(np.exp(np.interp(size, sizes, np.log(values))))


def rows_of(bench: Bench, group: int) -> list[tuple[str, int, float, float]]:
    """(name, bytes, relative error, divergence) of every way."""
    base = bench.quantize({})
    rows = [("base", *bench.measure(base))]
    print_row(rows[-1])

    def add(name: str, *measured: object) -> None:
        rows.append((name, *bench.measure(*measured)))
        print_row(rows[-1])

    for factor in (1.15, 1.05, 0.95, 0.9, 0.85):
        add(f"clips x{factor}", bench.quantize(dict.fromkeys(bench.matrices, factor)))
    looped = range(bench.cfg.loop_start, bench.cfg.loop_end + 1)
    kinds = {"embedding": lambda p, m: m.layer < 0, "mlp": lambda p, m: "mlp" in p[0],
             "attention": lambda p, m: p[0] in ("qo_bank", "kv_bank"),
             "mlp up": lambda p, m: p[0] == "mlp_up_bank", "looped layers": lambda p, m: m.layer in looped,
             "looped mlp": lambda p, m: m.layer in looped and "mlp" in p[0],
             "other layers": lambda p, m: m.layer >= 0 and m.layer not in looped}
    for name, of in kinds.items():
        add(f"{name} x0.85", bench.quantize({p: 0.85 for p, m in bench.matrices.items() if of(p, m)}))
    embedding = ("tok_emb.weight", 0)
    for damping in (0.0, 0.04, 0.1, 0.3):
        quantized = bench.quantize({}, damping)
        if damping:
            add(f"embedding damped by {0.01 + damping}", quantized)
        ways = [(1, 2, "column"), (1, 4, "column")]
        for top, rank, words in ways if damping else [(1, 4, "published"), (3, 4, "published"), *ways, (3, 4, "column"), (1, 4, "hessian")]:
            cfg = replace(bench.cfg, lqer_rank=rank, lqer_column_scales=words != "published")
            errors = {p: bench.matrices[p].weights - g.dequantize(q) for p, q in quantized.items()}
            chosen = sorted(errors, key=lambda p: -float(errors[p].norm()))[:top] if not damping else [embedding]
            terms = {p: low_rank(errors[p], bench.matrices[p].hessian if words == "hessian" else None, cfg) for p in chosen}
            add(f"LQER rank {rank} top {top} {words}" + f", embedding damped by {0.01 + damping}" * bool(damping), quantized,
                {p: g.dequantize(quantized[p]) + term.product() for p, term in terms.items()}, term_bytes(list(terms.values())))
    if bench.cfg.quantizer == "scalar":
        place, start, weights, beside = bench.awq(base, group)
        add(f"AWQ-lite {place[0]}[{place[1]}] columns {start}..{start + group - 1}", base, weights, beside)
    return rows


def print_row(row: tuple[str, int, float, float]) -> None:
    print(f"row {row[0]}: bytes:{row[1]} relative_error:{row[2]:.5e} divergence:{row[3]:.6f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--quantizer", choices=("scalar", "trellis"), default="scalar")
    parser.add_argument("--tokens", type=int, default=16384, help="validation tokens of the divergence")
    parser.add_argument("--group", type=int, default=0, help="columns that AWQ-lite protects (default: an eighth, as 64 of 512)")
    options = parser.parse_args()
    if not options.weights.exists():
        make_weights(options.weights)
    bench = Bench(options.weights, options.quantizer, options.tokens)
    rows = rows_of(bench, options.group or bench.cfg.model_dim // 8)
    curve = [(size, divergence) for name, size, _, divergence in rows if name == "base" or name.startswith("clips")]
    base = rows[0]
    print(f"\n| {options.quantizer} | bytes | to base | relative error | nats | to base | by clips | worth it |")
    print("|---" * 8 + "|")
    for name, size, error, divergence in rows:
        clips = by_clips(curve, size)
        verdict = "" if (size, divergence) in curve else f"{(clips - divergence) / base[3]:+.1%}"
        nats = f"{divergence:.5f} | {divergence - base[3]:+.5f} | {clips:.5f}"
        print(f"| {name} | {size} | {size - base[1]:+d} | {error:.3e} | {nats} | {verdict} |")


if __name__ == "__main__":
    main()
