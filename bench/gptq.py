"""GPTQ side by side: train_gpt.gptq against the published record's algorithm, on matrices of the record's shapes.

    python bench/gptq.py [--layers 11] [--rounds 3] [--device cpu] [--shapes up,2048x512]

The two alternate and each shows its fastest round, because other work on a machine slows now the one, now the other. "speed" is the
published time over ours; "codes" is the share that differs, where float32 rounds a tie otherwise; "error" is our Hessian-weighted
error over the published one's. The weights are Gaussian, the Hessians those of correlated inputs with a falling spectrum.
The published algorithm is written here from its description: a matrix at a time, the inverse Hessian's factor by two Cholesky
factorisations and an inversion, blocks of 128 columns, no look at rounding to nearest.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from train_gpt import Config, Log, Quantized, dequantize, gptq, hessian_error, parameter_table

BLOCK = 128


class Shape(NamedTuple):
    """Matrices quantized together: a name, how many, rows and columns, bits and clip."""

    name: str
    count: int
    rows: int
    cols: int
    bits: int
    clip_sigmas: float


def record_shapes(layers: int) -> list[Shape]:
    """Every matrix of the record, of `layers` layers."""
    groups = [(row.shape, group) for row in parameter_table(Config(num_layers=layers)) for group in row.matrices]
    return [Shape(name, group.last - group.first, *shape[-2:], group.bits, group.clip_sigmas)
            for name, (shape, group) in zip(("embedding", "q", "proj", "k", "v", "up", "down"), groups, strict=True)]


def one_matrix(text: str) -> Shape:
    """"2048x512": one matrix of this size, by the MLP's rule."""
    rows, cols = map(int, text.split("x"))
    return Shape(text, 1, rows, cols, Config().matrix_bits, Config().mlp_clip_sigmas)


def problem(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weights (N, R, C) and Hessians (N, C, C)."""
    generator = torch.Generator().manual_seed(0)
    weights = 0.04 * torch.randn(shape.count, shape.rows, shape.cols, generator=generator)
    hessian = torch.empty(shape.count, shape.cols, shape.cols)
    for i in range(shape.count):
        inputs = torch.randn(2 * shape.cols, shape.cols, generator=generator) * torch.logspace(0, -1.5, shape.cols)
        inputs = inputs[:, torch.randperm(shape.cols, generator=generator)] + 0.1 * torch.randn(2 * shape.cols, 1, generator=generator)
        hessian[i] = inputs.T @ inputs
    return weights.to(device), hessian.to(device)


def published_gptq(weights: Tensor, hessian: Tensor, bits: int, clip_sigmas: float) -> tuple[Tensor, Tensor]:
    """Codes (R, C) int8 and scales (R,) float16 of one matrix weights (R, C) by its Hessian (C, C)."""
    limit = 2 ** (bits - 1) - 1
    scales = (clip_sigmas * weights.std(dim=1) / limit).clamp_min(1e-10).half()
    steps = scales.float()
    hessian = hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True)
    work, hessian = weights[:, order], hessian[order][:, order]
    work[:, dead[order]] = 0
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    codes = torch.zeros_like(work, dtype=torch.int8)
    for begin in range(0, work.size(1), BLOCK):
        end = min(begin + BLOCK, work.size(1))
        part, local = work[:, begin:end].clone(), factor[begin:end, begin:end]
        errors = torch.zeros_like(part)
        for j in range(end - begin):
            rounded = (part[:, j] / steps).round().clamp(-limit, limit)
            codes[:, begin + j] = rounded.to(torch.int8)
            errors[:, j] = (part[:, j] - rounded * steps) / local[j, j]
            part[:, j:] -= errors[:, j, None] * local[j, None, j:]
        work[:, end:] -= errors @ factor[begin:end, end:]
    return codes[:, order.argsort()], scales


def published_all(weights: Tensor, hessian: Tensor, shape: Shape) -> Quantized:
    """The published way for all matrices of a shape, one after the other."""
    codes, scales = zip(*(published_gptq(w, h, shape.bits, shape.clip_sigmas) for w, h in zip(weights, hessian)))
    return Quantized(torch.stack(codes).cpu(), torch.stack(scales).cpu())


def ours_all(weights: Tensor, hessian: Tensor, shape: Shape) -> Quantized:
    return gptq(weights, hessian, shape.bits, shape.clip_sigmas, Log(None, enabled=False))


class Row(NamedTuple):
    """What one shape gave: seconds, and how the results compare."""

    published_s: float
    ours_s: float
    codes: float
    error: float


def measure(shape: Shape, rounds: int, device: torch.device) -> Row:
    """Alternate the two, a round of warming up first."""
    weights, hessian = problem(shape, device)
    ways: list[Callable[..., Quantized]] = [published_all, ours_all]
    seconds: list[float] = [float("inf")] * 2
    results: list[Any] = [None] * 2
    for _ in range(rounds + 1):
        for i, way in enumerate(ways):
            began = time.perf_counter()
            results[i] = way(weights, hessian, shape)  # ends on the host, so nothing is left to wait for
            seconds[i] = min(seconds[i], time.perf_counter() - began)
    errors = [hessian_error(dequantize(found).to(device) - weights, hessian).sum() for found in results]
    return Row(*seconds, float((results[0].codes != results[1].codes).float().mean()), float(errors[1] / errors[0]))


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description="GPTQ against the published algorithm")
    parser.add_argument("--layers", type=int, default=Config().num_layers)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--shapes", default="", help="names of the record's matrices, ROWSxCOLS, with commas (default: all, and 2048x512)")
    options = parser.parse_args(arguments)
    shapes = [*record_shapes(options.layers), one_matrix("2048x512")]
    if options.shapes:
        named = {shape.name: shape for shape in shapes}
        shapes = [named.get(word) or one_matrix(word) for word in options.shapes.split(",")]
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads")
    print(f"{'matrices':<12} {'number':>6} {'published s':>12} {'ours s':>8} {'speed':>6} {'codes':>9} {'error':>8}")
    rows = [measure(shape, options.rounds, options.device) for shape in shapes]
    for shape, row in zip(shapes, rows):
        speed = row.published_s / row.ours_s
        print(f"{shape.name:<12} {shape.count:6} {row.published_s:12.3f} {row.ours_s:8.3f} {speed:6.2f} {row.codes:9.1e} {row.error:8.5f}")
    whole = [row for shape, row in zip(shapes, rows) if not shape.name[0].isdigit()]
    if whole:
        published_s, ours_s = (sum(getattr(row, name) for row in whole) for name in ("published_s", "ours_s"))
        print(f"gptq_bench published_s:{published_s:.3f} ours_s:{ours_s:.3f} speed:{published_s / ours_s:.3f}")
    return rows


if __name__ == "__main__":
    main()
