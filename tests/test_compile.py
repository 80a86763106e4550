"""torch.compile: one graph a depth and use, no break, and nothing compiled while a clock runs.

Training and evaluation are traced forward and backward as on a GPU ("aot_eager" generates no code). For test-time training
see test_ttt_compiled.py.
"""
from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from tiny import SETTINGS, documents

import train_gpt

LAYERS = {"NUM_LAYERS": 2, "LOOP_START": 0, "LOOP_END": 0, "PARALLEL_START_LAYER": 1, "TRAIN_LOOP_PHASE_DEPTHS": "1,2",
          "TRAIN_LOOP_PREWARM_DEPTHS": "2", "EVAL_LOOP_DEPTH": "1", "NUM_LOOPS": 1, "TTT_BATCH_SIZE": 4, "VAL_BATCH_TOKENS": 2048}


@pytest.fixture
def compiled_run(monkeypatch: pytest.MonkeyPatch) -> train_gpt.Run:
    """A run of few layers that compiles, one graph for each use."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    cfg = train_gpt.Config.from_env({name: str(value) for name, value in (SETTINGS | LAYERS).items()})
    return train_gpt.Run(cfg, train_gpt.Ranks(), train_gpt.Log(None, enabled=False), compile=True)


def make_model(run: train_gpt.Run) -> train_gpt.GPT:
    model = train_gpt.GPT(run.cfg, run.dtype)
    model.init_weights(3)
    return model


def make_trainer(run: train_gpt.Run) -> train_gpt.Trainer:
    stream = [np.concatenate(documents(300, seed=1)).astype(np.uint16)]
    loader = train_gpt.TrainLoader(stream, run.cfg, run.ranks)
    return train_gpt.Trainer(run, make_model(run), loader)


def graph_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def test_training_has_one_graph_a_depth_whatever_the_packing(compiled_run: train_gpt.Run) -> None:
    trainer = make_trainer(compiled_run)
    trainer.warm_up()
    assert train_gpt.graphs_made(compiled_run) == 2 and graph_breaks() == 0
    segments = {len(batch.cu_seqlens) for _ in range(4) for batch in trainer.loader.next()}
    assert len(segments) > 2, "the packings differ"
    losses = [trainer.train_step(depth, 1.0).item() for depth in (1, 1, 2, 1, 2)]
    assert trainer.late_graphs == 0 and train_gpt.graphs_made(compiled_run) == 2
    eager = make_trainer(train_gpt.Run(compiled_run.cfg, compiled_run.ranks, compiled_run.log, compile=False))
    for _ in range(4):
        eager.loader.next()
    assert losses == pytest.approx([eager.train_step(depth, 1.0).item() for depth in (1, 1, 2, 1, 2)], rel=1e-5)


def test_a_graph_that_the_warm_up_left_out_is_counted(compiled_run: train_gpt.Run) -> None:
    trainer = make_trainer(compiled_run)
    trainer.train_step(1, 1.0)
    trainer.train_step(1, 1.0)
    assert trainer.late_graphs == 1


def test_evaluation_has_one_graph(compiled_run: train_gpt.Run) -> None:
    model, tokens = make_model(compiled_run), np.concatenate(documents(60, seed=2)).astype(np.uint16)
    val = train_gpt.ValData(tokens, np.ones_like(tokens), 60)
    train_gpt.evaluate(compiled_run, model, val, "first", 2)
    train_gpt.evaluate(compiled_run, model, val, "second", 2)
    assert train_gpt.graphs_made(compiled_run) == 1
