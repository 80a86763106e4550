"""The fit of the tilt's betas: where the loss is least, by the program's own bins."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import train_gpt as g

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import tilt  # noqa: E402


def test_betas_are_where_the_loss_is_least() -> None:
    rng = np.random.default_rng(0)
    q = rng.uniform(0.05, 0.9, 4000)
    tilted = q * np.exp(1.7) / (1 + q * np.expm1(1.7))
    hit = rng.random(4000) < tilted
    beta = tilt.best_beta(q, hit)
    assert beta == pytest.approx(1.7, abs=0.15)
    gains = [tilt.gain(np.full(4000, b), q, hit) for b in (beta - 0.2, beta, beta + 0.2)]
    assert gains[1] > max(gains[0], gains[2]) and gains[1] > 0
    assert tilt.best_beta(q, np.zeros(4000, bool)) == 0, "a hint that is never right is not raised"
    certain = tilt.best_beta(q, np.ones(4000, bool))
    assert certain == pytest.approx(np.log(4000), abs=2.5) and tilt.best_beta(q[:40], np.ones(40, bool)) < certain - 3


def test_every_bin_is_fitted_by_itself_and_small_ones_together() -> None:
    hints = g.NgramHints(*np.array([(1, 5, 1, 1)] * 300 + [(2, 5, 1, 2)] * 300 + [(3, 5, 20, 20)] * 10).T)
    bins, q = tilt.bins_of(hints), np.full(610, 0.3)
    hit = np.concatenate([np.arange(300) < 240, np.arange(300) < 90, np.ones(10)]).astype(bool)
    betas = tilt.fit(bins, q, hit, 200)
    assert sorted(set(bins)) == [4, 7, 24]
    assert betas[4] == pytest.approx(np.log(0.8 / 0.2 / (0.3 / 0.7)), abs=0.02) and betas[7] == pytest.approx(0, abs=0.02)
    assert betas[24] == betas[9] == tilt.best_beta(q[600:], hit[600:]) and betas[0] == 0
