"""bench/gptq.py at a size for a test: the published algorithm written there and ours give the same codes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import gptq as bench  # noqa: E402


def test_both_ways_give_the_same_codes() -> None:
    for row in bench.main(["--rounds", "1", "--shapes", "40x96,64x300"]):
        assert row.codes < 1e-3 and abs(row.error - 1) < 1e-3 and row.published_s > 0 < row.ours_s


def test_dead_columns_too() -> None:
    shape = bench.one_matrix("32x200")
    weights, hessian = bench.problem(shape, torch.device("cpu"))
    hessian[:, 17] = hessian[:, :, 17] = 0
    ours, published = bench.ours_all(weights, hessian, shape), bench.published_all(weights, hessian, shape)
    assert (ours.codes == published.codes).float().mean() > 0.999 and torch.equal(ours.scales, published.scales)
    assert not ours.codes[..., 17].any()


def test_the_shapes_are_those_of_the_record() -> None:
    assert sum(s.count * s.rows * s.cols for s in bench.record_shapes(11)) == 35_913_728
