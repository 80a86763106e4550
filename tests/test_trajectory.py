"""A whole training trajectory against a plain float64 one, by updates: and proof that the comparison sees each rule that it is about.

Parameters start away from their special initial values, so that everything moves from the first step. Compared is what training
adds to them: a wrong decay is a small part of a weight, but a large part of its update.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import oracle
import pytest
import tiny
import torch
from test_model import config, random_model
from torch import Tensor

import train_gpt as tg

SETTINGS = {
    "TRAIN_BATCH_TOKENS": 96, "MICRO_BATCH_TOKENS": 48, "TRAIN_SEQ_LEN": 8, "ITERATIONS": 4, "TRAIN_LOOP_PHASE_DEPTHS": "1,3",
    "TRAIN_LOOP_PREWARM_DEPTHS": "none", "WARMDOWN_FRAC": 0.75, "MIN_LR": 0, "GRAD_CLIP_NORM": 0.3, "EMA_DECAY": 0.8,
    "MUON_MOMENTUM_WARMUP_START": 0.5, "MUON_MOMENTUM": 0.9, "MUON_MOMENTUM_WARMUP_STEPS": 3, "ADAM_WD": 0.1, "SEED": 3,
}
DEPTHS, LR_SCALES = [1, 1, 3, 3], [1, 1, 2 / 3, 1 / 3]  # what these settings say, reckoned by hand
TOLERANCE = 3e-4  # of a group's update; the program's training is in float32. All groups are below 1e-5 but q_gain: of one head's the
# gradient nearly vanishes, and AdamW divides by it
VISIBLE = 1e-2  # what a broken rule must differ by

Updates = dict[str, Tensor]


def stream() -> np.ndarray:
    return np.concatenate(tiny.documents(40, seed=9, shortest=3, longest=20))[: SETTINGS["TRAIN_BATCH_TOKENS"] * len(DEPTHS) + 1]


def start() -> dict[str, Tensor]:
    """The parameters before the first step."""
    return {name: p.detach().clone() for name, p in random_model(config(**SETTINGS)).named_parameters()}


def by_group(after: dict[str, Tensor], before: dict[str, Tensor], kind: str) -> Updates:
    """Updates in float64, joined over the layers: {"kind attn.q_gain": (N,), ...}."""
    groups: dict[str, list[Tensor]] = {}
    for name, value in after.items():
        groups.setdefault(f"{kind} " + re.sub(r"blocks\.\d+\.", "", name), []).append((value.double() - before[name].double()).ravel())
    return {group: torch.cat(parts) for group, parts in groups.items()}


def program(after_step: Callable[[tg.GPT, dict[str, Tensor], float], None] | None = None, **changes: object) -> Updates:
    """The updates of the program's training; `after_step(model, weights before the step, learning rate's scale)` may spoil them."""
    cfg, ranks = config(**SETTINGS | changes), tg.Ranks()
    model, before = tg.GPT(cfg), start()
    model.load_state_dict(before)
    loader = tg.TrainLoader([stream()], cfg, ranks)
    trainer = tg.Trainer(tg.Run(cfg, ranks, tg.Log(None, enabled=False)), model, loader)
    for step in range(cfg.iterations):
        frac = step / cfg.iterations
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer.train_step(tg.depth_at(cfg, frac), tg.learning_rate_scale(cfg, frac))
        if after_step:
            after_step(model, weights, tg.learning_rate_scale(cfg, frac))
    after = {name: p.detach() for name, p in model.named_parameters()}
    return by_group(after, before, "weights") | by_group(dict(zip(after, trainer.ema)), before, "average")


@pytest.fixture(scope="module")
def expected() -> Updates:
    before = {name: value.double() for name, value in start().items()}
    found = oracle.train(before, torch.from_numpy(stream().astype(np.int64)), config(**SETTINGS), DEPTHS, LR_SCALES)
    assert min(found.norms) > 1.5 * SETTINGS["GRAD_CLIP_NORM"], "the clip is active in every step"
    return by_group(found.weights, before, "weights") | by_group(found.average, before, "average")


def errors(found: Updates, expected: Updates) -> dict[str, float]:
    """The norm of each group's difference over that of its expected update."""
    assert found.keys() == expected.keys()
    return {group: float((found[group] - update).norm() / update.norm()) for group, update in expected.items()}


def test_training_follows_the_float64_oracle_through_a_change_of_depth(expected: Updates) -> None:
    found = errors(program(), expected)
    assert max(found.values()) < TOLERANCE, sorted(found.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("changes, group", [
    ({"GRAD_CLIP_NORM": 0}, "weights mlp_up_bank"),
    ({"GRAD_CLIP_NORM": 0}, "weights attn.q_gain"),
    ({"MUON_MOMENTUM": 0.85}, "weights qo_bank"),
    ({"MUON_MOMENTUM_WARMUP_STEPS": 0}, "weights kv_bank"),
    ({"MUON_MOMENTUM_WARMUP_START": 0.55}, "weights kv_bank"),
    ({"MUON_ROW_NORMALIZE": 0}, "weights mlp_down_bank"),
    ({"MUON_WD": 0}, "weights qo_bank"),
    ({"EMBED_WD": 0}, "weights tok_emb.weight"),
    ({"ADAM_WD": 0}, "weights skip_weights"),
    ({"EMA_DECAY": 0.79}, "average mlp_up_bank"),
    ({"WARMDOWN_FRAC": 0.5}, "weights attn_scale"),
    ({"TRAIN_LOOP_PHASE_DEPTHS": "1,2"}, "weights resid_mix"),
])
def test_a_wrong_setting_is_seen(expected: Updates, changes: dict[str, object], group: str) -> None:
    assert errors(program(**changes), expected)[group] > VISIBLE


def test_gates_without_weight_decay_are_seen(expected: Updates) -> None:
    def undo_decay(model: tg.GPT, before: dict[str, Tensor], lr_scale: float) -> None:
        cfg = model.cfg
        for name, param in model.named_parameters():
            if name.endswith("attn_gate_w"):
                param.data += cfg.scalar_lr * lr_scale * cfg.adam_wd * before[name]

    assert errors(program(undo_decay), expected)["weights attn.attn_gate_w"] > VISIBLE


def test_a_missing_scale_of_tall_matrices_is_seen(expected: Updates, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tg.orthogonalize
    monkeypatch.setattr(tg, "orthogonalize", lambda x, *rest: whole(x, *rest) / max(1.0, x.size(-2) / x.size(-1)) ** 0.5)
    assert errors(program(), expected)["weights mlp_up_bank"] > VISIBLE


def test_an_average_that_stands_still_is_seen(expected: Updates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *_: None)
    assert errors(program(), expected)["average tok_emb.weight"] > VISIBLE
