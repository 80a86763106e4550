"""What the tests of test-time training share: tiny runs, a model in which every parameter matters, and an oracle."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import tiny
import torch
from torch import Tensor

import train_gpt as g

CONTEXTS = ("window", "cache")
CPU = torch.device("cpu")


def make_run(compile: bool = False, **changes: object) -> g.Run:
    """A tiny run at depth 2 without global SGD, unless `changes` say otherwise."""
    settings = {**tiny.SETTINGS, "EVAL_LOOP_DEPTH": 2, "PHASED_TTT_ENABLED": 0, **{k.upper(): v for k, v in changes.items()}}
    return g.Run(g.Config.from_env({name: str(value) for name, value in settings.items()}), g.Ranks(), g.Log(None, enabled=False), compile)


def make_model(run: g.Run, seed: int = 3) -> g.GPT:
    """A model in which every parameter matters: no zeros, no ones."""
    model = g.GPT(run.cfg)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator), alpha=0.1)
    return model.requires_grad_(False)


def make_val(docs: list[np.ndarray]) -> g.ValData:
    tokens = np.concatenate(docs).astype(np.uint16)
    return g.ValData(tokens, np.where(tokens == g.BOS_ID, 0, 2).astype(np.uint16), len(docs))


def quantized(run: g.Run) -> g.Tensors:
    """The tensors of an artifact that holds make_model, from a little calibration."""
    tokens = np.concatenate(tiny.documents(8, seed=1))
    calibration, model = g.Calibration(run.cfg, CPU), make_model(run)
    calibration.add(model, [g.make_batch(tokens[:-1], tokens[1:], np.array([0]), len(tokens), CPU)])
    return g.quantize(run, model, calibration.hessians)[0]


def score_all(run: g.Run, val: g.ValData, model: g.GPT | None = None) -> np.ndarray:
    """Losses of every target, from the function that a run calls; the default model is always the same."""
    return g.score_with_ttt(run, model or make_model(run), val).losses


class Oracle:
    """TTT of one document, written from the description: plain autograd, AdamW spelled out, Python lists for the cache."""

    def __init__(self, run: g.Run, model: g.GPT) -> None:
        self.cfg, self.model = run.cfg, model
        self.schedule = g.loop_schedule(run.cfg, run.cfg.eval_loop_depth)
        self.widths = {"q": run.cfg.model_dim, "k": run.cfg.kv_dim, "v": run.cfg.kv_dim, "attn": run.cfg.model_dim,
                       "mlp": run.cfg.model_dim, "head": run.cfg.vocab_size}
        self.lora: dict[tuple[str, int], list[Tensor]] = {}
        for name, values in g.Adapters(run, 1).initial.items():
            for visit, a in enumerate(values[0]):
                self.lora[name, visit] = [a.clone(), torch.zeros(self.widths[name], run.cfg.ttt_lora_rank)]
        for pair in self.lora.values():
            for tensor in pair:
                tensor.requires_grad_()
        self.second = {key: [torch.zeros_like(t) for t in pair] for key, pair in self.lora.items()}
        self.updates = 0

    def linear(self, site: g.Site, x: Tensor, w: Tensor | None) -> Tensor | None:
        """What the site gives; q, k and v, which one product makes, have an adapter each, and the head gates behind them none."""
        _, visit, place = site
        y = None if w is None else x @ w.T
        names = {"attn_in": ["q", "k", "v"], "attn_bypass": ["attn"], "mlp_bypass": ["mlp"], "head": ["head"]}.get(place, [])
        extra = [x @ self.lora[n, visit][0].T @ self.lora[n, visit][1].T if (n, visit) in self.lora else x.new_zeros(len(x), self.widths[n])
                 for n in names]
        if not extra:
            return y
        extra = torch.cat(extra, 1)
        if y is None:
            return extra
        return y + torch.cat([extra, extra.new_zeros(len(x), y.size(1) - extra.size(1))], 1)

    def update(self, loss: Tensor) -> None:
        """AdamW with beta1 = 0: the gradient over the root of its debiased second moment, decay decoupled."""
        cfg = self.cfg
        loss.backward()
        self.updates += 1
        for key, pair in self.lora.items():
            for tensor, second in zip(pair, self.second[key]):
                second.mul_(cfg.ttt_beta2).addcmul_(tensor.grad, tensor.grad, value=1 - cfg.ttt_beta2)
                debiased = second / (1 - cfg.ttt_beta2**self.updates)
                lr = cfg.ttt_lora_lr * self.updates**cfg.ttt_lora_lr_power
                with torch.no_grad():
                    tensor.mul_(1 - lr * cfg.ttt_weight_decay)
                    tensor.addcdiv_(tensor.grad, debiased.sqrt() + 1e-10, value=-lr)
                tensor.grad = None

    def losses(self, entries: np.ndarray, first: int, end: int, attend: g.Attend | None) -> Tensor:
        """Losses of the targets first+1 .. end of `entries`, from a forward over the tokens first .. end-1.

        With a cache (`attend`) the tokens go on from those before them; a window begins anew.
        """
        goes_on = first if attend is not None else 0
        batch = g.make_batch(entries[first:end], entries[first + 1: end + 1], np.array([0]), end - first, CPU, goes_on,
                             entries[first - 1: first] if goes_on else None)
        return self.model(batch, self.schedule, self.linear, attend)

    def score(self, entries: np.ndarray) -> np.ndarray:
        """Losses of a document; `entries` ends with the last target."""
        length, limit, doubles = len(entries) - 1, self.cfg.ttt_eval_seq_len, self.cfg.ttt_chunk_doubles_at
        largest = self.cfg.ttt_chunk_size * 2**len(doubles)
        places = -(-limit // largest) * largest
        kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        result: list[Tensor] = []
        end = 0
        while end < length:
            begin, size = end, self.cfg.ttt_chunk_size * 2**sum(end >= position for position in doubles)
            end = min(begin + size, length)
            fresh: dict[int, tuple[Tensor, Tensor]] = {}
            if self.cfg.ttt_context == "cache":
                forward = partial(self.losses, entries, begin, end, self.cached_attention(kept, fresh, begin, begin + size - places))
            else:
                first = max(0, end - limit)
                forward = lambda: self.losses(entries, first, end, None)[begin - first:]  # noqa: E731, B023
            result.append(forward().detach())
            scored_with = dict(fresh)
            for _ in range(self.cfg.ttt_grad_steps if end < length else 0):
                self.update(forward().mean())
            for visit, pair in scored_with.items():
                kept.setdefault(visit, []).append(pair)
        return torch.cat(result).numpy()

    @staticmethod
    def cached_attention(kept: dict, fresh: dict, begin: int, lowest: int) -> g.Attend:
        """Attention by a loop over query positions and heads; keys below position `lowest` are out of sight."""

        def attend(visit: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            fresh[visit] = (k.detach(), v.detach())
            keys = torch.cat([pair[0] for pair in kept.get(visit, [])] + [k])
            values = torch.cat([pair[1] for pair in kept.get(visit, [])] + [v])
            group, rows = q.size(1) // k.size(1), []
            for i in range(len(q)):
                seen = slice(max(0, lowest), begin + i + 1)
                heads = []
                for h in range(q.size(1)):
                    p = (keys[seen, h // group] @ q[i, h] / math.sqrt(q.size(2))).softmax(0)
                    heads.append(p @ values[seen, h // group])
                rows.append(torch.stack(heads))
            return torch.stack(rows)

        return attend
