"""Sections 6 and 7: schedules, warm-up that leaves nothing, ranks that agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import train_gpt as tg


def config(**changes: object) -> tg.Config:
    return tg.Config.from_env({name: str(value) for name, value in {**tiny.SETTINGS, **changes}.items()})


def trainer(data: Path, **changes: object) -> tg.Trainer:
    cfg, ranks = config(**changes), tg.Ranks()
    model = tg.GPT(cfg)
    model.init_weights(cfg.seed)
    loader = tg.TrainLoader(tg.Dataset(data).read("train"), cfg, ranks)
    return tg.Trainer(tg.Run(cfg, ranks, tg.Log(None, enabled=False)), model, loader)


def test_curriculum_cuts_the_run_into_thirds() -> None:
    cfg = tg.Config()
    depths = [tg.depth_at(cfg, f) for f in (0, 0.333, 0.3334, 0.666, 0.667, 1.0)]
    assert depths == [1, 1, 3, 3, 4, 4]
    assert tg.depth_at(config(TRAIN_LOOP_PHASE_FRACTIONS="0.5,0.25,0.25"), 0.49) == 1
    assert [tg.depth_at(config(TRAIN_LOOP_PHASE_DEPTHS="none"), f) for f in (0.34, 0.36)] == [1, 3]


def test_learning_rate_is_flat_then_linear_down_to_its_floor() -> None:
    cfg = tg.Config()
    scales = [tg.learning_rate_scale(cfg, f) for f in (0, 0.25, 0.625, 1.0)]
    assert scales == pytest.approx([1, 1, 0.5, 0])
    assert [tg.learning_rate_scale(config(MIN_LR=0.2), f) for f in (0.625, 0.9, 1.0)] == pytest.approx([0.5, 0.2, 0.2])


def test_warm_up_leaves_no_trace(tiny_data: Path) -> None:
    warmed, cold = trainer(tiny_data, WARMUP_STEPS=2), trainer(tiny_data, WARMUP_STEPS=0)
    warmed.warm_up()
    cold.warm_up()
    for depth in (1, 3):
        assert torch.equal(warmed.train_step(depth, 1.0), cold.train_step(depth, 1.0))
    states = [t.optimizers.state() for t in (warmed, cold)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert all(torch.equal(a, b) for a, b in zip([*warmed.params, *warmed.ema], [*cold.params, *cold.ema]))
    assert warmed.step == 2 and warmed.loader.position == cold.loader.position


def test_newton_schulz_brings_singular_values_near_one() -> None:
    update = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    for wide in (update, update.mT):
        values = torch.linalg.svdvals(tg.orthogonalize(wide, 5, torch.float32))
        assert values.min() > 0.3 and values.max() < 1.3


def test_average_follows_the_weights(tiny_data: Path) -> None:
    subject = trainer(tiny_data, EMA_DECAY=0.75)
    start = [p.clone() for p in subject.params]
    subject.train_step(1, 1.0)
    for before, now, average in zip(start, subject.params, subject.ema):
        torch.testing.assert_close(average, 0.75 * before + 0.25 * now)


def test_two_ranks_train_as_one(one_rank, two_ranks) -> None:
    ours, theirs = (tiny.records(r.log, "train") for r in (one_rank, two_ranks))
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert ours[0]["loss"] == theirs[0]["loss"] and ours[-1]["step"] == "20/20"
    assert float(ours[-1]["loss"]) == pytest.approx(float(theirs[-1]["loss"]), abs=1e-4)


def test_two_ranks_make_the_same_artifact_and_scores(one_rank, two_ranks) -> None:
    files = [tg.unpack_artifact((r.out / "run.artifact").read_bytes()) for r in (one_rank, two_ranks)]
    assert files[0][0] == files[1][0]
    for name, tensor in files[0][1].items():
        other = files[1][1][name]
        if isinstance(tensor, tg.Quantized):
            step = tensor.scales.float().max()
            assert (tg.dequantize(tensor) - tg.dequantize(other)).abs().max() <= 1.01 * step, name
            assert (tensor.codes != other.codes).float().mean() < 0.02, name
        else:
            torch.testing.assert_close(tensor, other, atol=2e-3, rtol=2e-3, msg=name)
    scores = [{e["name"]: float(e["val_loss"]) for e in tiny.records(r.log, "eval")} for r in (one_rank, two_ranks)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_the_clock_stands_still_while_it_is_stopped() -> None:
    clock = tg.Clock(torch.device("cpu"))
    clock.start()
    first = clock.stop()
    assert clock.elapsed_ms() == first == clock.total_ms


def test_time_cap_ends_training_before_the_reserve(tiny_data: Path, tmp_path: Path) -> None:
    env = tiny.environment(tiny_data, tmp_path, RUN_ID="t", MAX_WALLCLOCK_SECONDS=20, GPTQ_RESERVE_SECONDS=14, ITERATIONS=100000,
                           TTT_ENABLED=0, EVAL_BUDGET_SECONDS=600, GPTQ_CALIBRATION_BATCHES=1)
    done = tiny.run(env)
    assert done.returncode == 0, done.stderr
    phases = [(r["depth"], float(r["frac"])) for r in tiny.records(done.stdout, "phase")]
    assert [d for d, _ in phases] == ["1", "3", "4"] and phases[1][1] >= 0.333 and phases[2][1] >= 0.666
    assert int(tiny.records(done.stdout, "final")[0]["train_ms"]) < 20000
