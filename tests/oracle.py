"""The model once more, in float64, one document at a time, written from its formulas; slow and plain, to test against."""

from __future__ import annotations

import math

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
