"""Compare settings of test-time training on one artifact: paired by document, with standard errors.

    python bench/ttt.py --artifact A --data FOLDER --out FOLDER --rows ROWS.txt [--first 0 --last 150] [--base NAME]

Every line of ROWS is a name and settings (`cache16 TTT_CONTEXT=cache TTT_CHUNK_SIZE=16`); settings for all rows come from
the environment. A row is scored by train_gpt's own score_with_ttt; its losses, one a target, go to OUT/NAME.npz, and a row that
is there already is only read (also one of more documents: without global SGD and meta, documents do not depend on each other, and
the first ones are compared). Words in small letters are experiments that are no settings of the program:

    sites=k,o,mlp,head     adapters on these sites only
    meta=0.5               after each batch of documents the initial A and B move by this share to where the batch ended
    mix=ROW1,ROW2          no run: the mean of the probabilities that two rows gave to each target
    positions=64:ROW1,ROW2 no run: each document's first 64 targets from the one row, the rest from the other (an estimate
                           of chunks that grow: the second part would really start from the adapters of the first)
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as g  # noqa: E402


@dataclass
class Row:
    """What one line of the table rests on."""

    name: str
    losses: np.ndarray  # (targets,) float32 nats, in data order
    cpu_seconds: float
    forwards_per_target: float


class ExperimentalAdapters(g.Adapters):
    """Adapters with the experiments of one row; `options` is set on the class before the row runs."""

    options: dict[str, str] = {}

    def __init__(self, run: g.Run, schedule: g.Schedule, documents: int) -> None:
        super().__init__(run, schedule, documents)
        self.used = False
        self.initial_b = {name: torch.zeros_like(b[:, :1]) for name, b in self.b.items()}
        if sites := self.options.get("sites"):
            for table in (self.initial, self.initial_b, self.a, self.b):
                for name in set(table) - set(sites.split(",")):
                    del table[name]
            self.params = [*self.a.values(), *self.b.values()]
            self.adamw = torch.optim.AdamW(self.params, lr=self.adamw.param_groups[0]["lr"], betas=(run.cfg.ttt_beta1, run.cfg.ttt_beta2),
                                           eps=1e-10, weight_decay=run.cfg.ttt_weight_decay, fused=True)

    @torch.no_grad()
    def reset(self) -> None:
        share = float(self.options.get("meta", 0))
        if share and self.used:
            for initial, current in ((self.initial, self.a), (self.initial_b, self.b)):
                for name, value in current.items():
                    initial[name].lerp_(value.mean(1, keepdim=True), share)
        super().reset()
        for name, initial in self.initial_b.items():
            self.b[name].copy_(initial.expand_as(self.b[name]))
        self.used = True


def part_of(val: g.ValData, first: int, last: int) -> g.ValData:
    """Documents first..last-1 of a validation set, in data order."""
    starts = np.append(val.document_starts(), len(val.tokens))
    begin, end = int(starts[first]), int(starts[min(last, val.documents)])
    return g.ValData(val.tokens[begin:end], val.byte_counts[begin:end], min(last, val.documents) - first)


def run_row(words: list[str], artifact: bytes, data: str, span: tuple[int, int]) -> tuple[np.ndarray, float, float]:
    """Score one row; losses, CPU seconds, forwards a target."""
    changes = dict(word.split("=", 1) for word in words)
    ExperimentalAdapters.options = {k: v for k, v in changes.items() if k.islower()}
    stored, tensors = g.unpack_artifact(artifact)
    environ = {**os.environ, "DATA_PATH": data, **{k: v for k, v in changes.items() if k.isupper()}}
    cfg = replace(g.Config.from_env(environ), **stored)
    run = g.Run(cfg, g.Ranks(), g.Log(None, speaks=False))
    work: dict[str, str] = {}
    run.log.record = lambda word, /, **values: work.update(values) if word == "ttt_work" else None
    model = g.model_from_tensors(cfg, tensors, run)
    val = part_of(g.load_val(cfg), *span)
    began = time.process_time()
    score, _ = g.score_with_ttt(run, model, val)
    return score.losses, time.process_time() - began, float(work["forwards_per_target"])


def combine(words: list[str], rows: dict[str, Row], starts: np.ndarray) -> np.ndarray | None:
    """The losses of a row that is made from others, None if it is not such a row."""
    for word in words:
        key, _, value = word.partition("=")
        if key == "mix":
            parts = [rows[name].losses.astype(np.float64) for name in value.split(",")]
            return -np.log(np.mean([np.exp(-part) for part in parts], axis=0))
        if key == "positions":
            count, _, names = value.partition(":")
            one, other = (rows[name].losses for name in names.split(","))
            place = np.arange(len(one)) - np.repeat(starts, np.diff(np.append(starts, len(one))))
            return np.where(place < int(count), one, other)
    return None


def paired(losses: np.ndarray, base: np.ndarray, starts: np.ndarray) -> tuple[float, float]:
    """Difference in nats a token and its standard error, from the differences by document."""
    differences = np.add.reduceat((losses - base).astype(np.float64), starts)
    tokens = np.diff(np.append(starts, len(losses)))
    mean = differences.sum() / tokens.sum()
    count = len(tokens)
    return mean, math.sqrt(((differences - mean * tokens) ** 2).sum() * count / max(count - 1, 1)) / tokens.sum()


def table_line(row: Row, base: Row, starts: np.ndarray, num_bytes: int) -> str:
    nats = row.losses.sum(dtype=np.float64)
    mean, error = paired(row.losses, base.losses, starts)
    return (f"| {row.name} | {nats / len(row.losses):.4f} | {nats / math.log(2) / num_bytes:.4f} | {mean:+.4f} | {error:.4f} | "
            f"{row.forwards_per_target:.2f} | {row.cpu_seconds:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("artifact", "data", "out", "rows"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--first", type=int, default=0, help="first document, in data order")
    parser.add_argument("--last", type=int, default=10**9, help="document behind the last one")
    parser.add_argument("--base", help="row that the others are compared with (default: the first)")
    options = parser.parse_args()
    artifact = options.artifact.read_bytes()
    g.Adapters = ExperimentalAdapters
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    cfg = g.Config.from_env({**os.environ, "DATA_PATH": str(options.data)})
    val = part_of(g.load_val(cfg), options.first, options.last)
    starts, rows = val.document_starts(), {}
    lines = [line.split() for line in options.rows.read_text().splitlines() if line.strip() and not line.startswith("#")]
    print(f"{val.documents} documents, {len(val.tokens) - 1} targets, {val.num_bytes} bytes", flush=True)
    print("| row | nats/token | bpb | difference | its s.e. | forwards a token | CPU s |\n|---|---|---|---|---|---|---|", flush=True)
    for name, *words in lines:
        path = options.out / f"{name}.npz"
        losses = combine(words, rows, starts)
        if losses is not None:
            rows[name] = Row(name, losses, math.nan, math.nan)
        else:
            if not path.exists():
                losses, seconds, forwards = run_row(words, artifact, str(options.data), (options.first, options.last))
                np.savez(path, losses=losses, seconds=seconds, forwards=forwards)
            saved = np.load(path)
            targets = len(val.tokens) - 1
            if len(saved["losses"]) < targets:
                raise SystemExit(f"{path} holds {len(saved['losses'])} targets, {targets} are asked for: use another --out")
            rows[name] = Row(name, saved["losses"][:targets], float(saved["seconds"]), float(saved["forwards"]))
        base = rows[options.base or lines[0][0]] if (options.base or lines[0][0]) in rows else rows[name]
        print(table_line(rows[name], base, starts, val.num_bytes), flush=True)


if __name__ == "__main__":
    main()
