"""The model and its training once more, in float64, one document and one parameter at a time, written from the formulas.

Slow and plain, to test against.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def turn(x: Tensor, dims: int, base: float) -> Tensor:
    """Rotary embedding of x (T, H, D), position by position."""
    out = x.clone()
    for t in range(x.size(0)):
        for i in range(dims // 2):
            angle = t * base ** (-2 * i / dims)
            a, b = x[t, :, i], x[t, :, dims // 2 + i]
            out[t, :, i] = a * math.cos(angle) + b * math.sin(angle)
            out[t, :, dims // 2 + i] = b * math.cos(angle) - a * math.sin(angle)
    return out


def attend(weights: dict[str, Tensor], layer: int, n: Tensor, cfg) -> Tensor:
    layers, heads, kv_heads = cfg.num_layers, cfg.num_heads, cfg.num_kv_heads
    size, group = cfg.model_dim // heads, heads // kv_heads
    q = (n @ weights["qo_bank"][layer].T).view(-1, heads, size)
    k = (n @ weights["kv_bank"][layer].T).view(-1, kv_heads, size)
    v = (n @ weights["kv_bank"][layers + layer].T).view(-1, kv_heads, size)
    q, k = turn(norm(q), cfg.rope_dims, cfg.rope_base), turn(norm(k), cfg.rope_dims, cfg.rope_base)
    q = q * weights[f"blocks.{layer}.attn.q_gain"][:, None]
    gates = torch.sigmoid(n @ weights[f"blocks.{layer}.attn.attn_gate_w"].T)
    y = torch.zeros_like(q)
    for head in range(heads):
        for t in range(len(n)):
            scores = (k[: t + 1, head // group] @ q[t, head]) / math.sqrt(size)
            out = torch.softmax(scores, 0) @ v[: t + 1, head // group]
            unit = v[t, head // group] / v[t, head // group].norm()
            y[t, head] = (out - (out @ unit) * unit) * gates[t, head]
    return y.flatten(1) @ weights["qo_bank"][layers + layer].T


def feed(weights: dict[str, Tensor], layer: int, n: Tensor) -> Tensor:
    h = n @ weights["mlp_up_bank"][layer].T
    return torch.where(h > 0, h, 0.5 * h).square() @ weights["mlp_down_bank"][layer].T


def document_losses(weights: dict[str, Tensor], tokens: Tensor, targets: Tensor, cfg, depth: int) -> Tensor:
    """Losses (T,) of one document at `depth`."""
    order = [*range(cfg.loop_start), *list(range(cfg.loop_start, cfg.loop_end + 1)) * depth, *range(cfg.loop_end + 1, cfg.num_layers)]
    half = len(order) // 2
    rows = weights["skip_weights"].size(0)
    x = x0 = norm(weights["tok_emb.weight"][tokens])
    pushed, lanes = [], None
    for place, layer in enumerate(order):
        w = {name: weights[f"blocks.{layer}.{name}"] for name in ("attn_scale", "mlp_scale", "resid_mix")}
        depth_scale = 1 / math.sqrt(layer + 1)
        j = place - half
        skip = pushed.pop() if 0 <= j < rows and pushed else None
        if layer >= cfg.parallel_start_layer and lanes is None:
            lanes = [x, x]
        if skip is not None:
            gate = torch.sigmoid(weights["skip_gates"][j])
            stream = x if lanes is None else lanes[0]
            mixed = (1 - gate) * weights["skip_weights"][j] * skip + gate * stream
            x, lanes = (mixed, None) if lanes is None else (x, [mixed, lanes[1]])
        if lanes is None:
            u = w["resid_mix"][0] * x + w["resid_mix"][1] * x0
            u = u + w["attn_scale"] * attend(weights, layer, norm(u) * depth_scale, cfg)
            x = u + w["mlp_scale"] * feed(weights, layer, norm(u) * depth_scale)
        else:
            r, p = weights["parallel_resid_lambdas"][layer], weights["parallel_post_lambdas"][layer]
            read = w["resid_mix"][0] * lanes[0] + w["resid_mix"][1] * x0
            a = w["attn_scale"] * attend(weights, layer, norm(read) * depth_scale, cfg)
            m = w["mlp_scale"] * feed(weights, layer, norm(lanes[1]) * depth_scale)
            lanes = [r[i] * lanes[i] + p[0, i] * a + p[1, i] * m for i in (0, 1)]
        if place < half:
            pushed.append(x)
    final = norm(x if lanes is None else (lanes[0] + lanes[1]) / 2)
    logits = cfg.logit_softcap * torch.tanh(final @ weights["tok_emb.weight"].T / cfg.logit_softcap)
    return torch.logsumexp(logits, -1) - logits.gather(1, targets[:, None]).squeeze(1)


class Trajectory(NamedTuple):
    """Where a training run ends, and the norm of each step's gradient before it was clipped."""

    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    norms: list[float]


def span_segments(span: Tensor, longest: int) -> list[slice]:
    """A span of the stream (T,), cut at every BOS and every `longest` tokens within a document."""
    starts = [0]
    for t in range(1, len(span)):
        if span[t] == 1 or t - starts[-1] == longest:
            starts.append(t)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(span)])]


def gradients(weights: dict[str, Tensor], stream: Tensor, cfg, depth: int, spans: int = 8) -> dict[str, Tensor]:
    """Of the mean loss of a step's tokens: `stream` (T + 1,), in `spans` equal parts that attention does not cross."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    size = (len(stream) - 1) // spans
    for begin in range(0, size * spans, size):
        tokens, targets = stream[begin: begin + size], stream[begin + 1: begin + size + 1]
        losses = [document_losses(leaves, tokens[part], targets[part], cfg, depth) for part in span_segments(tokens, cfg.train_seq_len)]
        (torch.cat(losses).sum() / (size * spans)).backward()
    return {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in leaves.items()}


def train(weights: dict[str, Tensor], stream: Tensor, cfg, depths: list[int], lr_scales: list[float]) -> Trajectory:
    """A run from `weights` (float64) over the tokens of `stream`, step by step, one parameter and one matrix at a time."""
    weights, average, norms = dict(weights), dict(weights), []
    buffers, first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(3))
    size, warm_up = cfg.train_batch_tokens, cfg.muon_momentum_warmup_steps
    for step, (depth, lr_scale) in enumerate(zip(depths, lr_scales)):
        grads = gradients(weights, stream[step * size: (step + 1) * size + 1], cfg, depth)
        norms.append(math.sqrt(sum(float(g.square().sum()) for g in grads.values())))
        done = min(1.0, step / warm_up)
        momentum = cfg.muon_momentum_warmup_start + done * (cfg.muon_momentum - cfg.muon_momentum_warmup_start)
        for name, w in weights.items():
            g = grads[name] * min(1.0, cfg.grad_clip_norm / norms[-1])
            if name.endswith("_bank"):
                buffers[name] = momentum * buffers[name] + g
                direction = torch.stack([muon_direction(matrix) for matrix in g + momentum * buffers[name]])
                lr = cfg.matrix_lr * lr_scale
                weights[name] = w - lr * cfg.muon_wd * w - lr * direction
            else:
                lr, decay = (cfg.tied_embed_lr, cfg.embed_wd) if name == "tok_emb.weight" else (cfg.scalar_lr, cfg.adam_wd)
                first[name] = cfg.beta1 * first[name] + (1 - cfg.beta1) * g
                second[name] = cfg.beta2 * second[name] + (1 - cfg.beta2) * g.square()
                mean, square = first[name] / (1 - cfg.beta1 ** (step + 1)), second[name] / (1 - cfg.beta2 ** (step + 1))
                weights[name] = w - lr * lr_scale * (decay * w + mean / (square.sqrt() + cfg.adam_eps))
            average[name] = cfg.ema_decay * average[name] + (1 - cfg.ema_decay) * weights[name]
    return Trajectory(weights, average, norms)


def muon_direction(update: Tensor) -> Tensor:
    """Muon's update (rows, cols) before the learning rate: unit rows, five Newton-Schulz steps, scaled where it is tall."""
    x = update / update.norm(dim=1, keepdim=True)
    x = x / x.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T @ x) + 2.0315 * (x @ x.T @ x @ x.T @ x)
    return x * math.sqrt(max(1.0, update.size(0) / update.size(1)))
