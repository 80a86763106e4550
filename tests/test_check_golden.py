"""The golden comparison itself, on files that this program computed: it must see a difference, and must not pass on nothing."""

from __future__ import annotations

import json
from pathlib import Path

import check_golden
import numpy as np
import pytest
import tiny

SETTINGS = {name: tiny.SETTINGS[name] for name in ("VOCAB_SIZE", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "ROPE_DIMS")}


def write_folder(folder: Path, error: float) -> None:
    """model_small.npz of a model of ours, its losses off by `error` in one place."""
    model = check_golden.tg.GPT(check_golden.start(SETTINGS).cfg)
    model.init_weights(0)
    tokens = np.concatenate(tiny.documents(2, seed=3, longest=20))
    targets, cu_seqlens = np.append(tokens[1:], 1), np.append(np.flatnonzero(tokens == 1), [len(tokens)] * 2)
    losses = check_golden.losses_of(model, check_golden.batch_of(tokens, targets, cu_seqlens), 2).detach().numpy()
    losses[3] += error
    params = {f"param/{name}": value.numpy() for name, value in check_golden.params_of(model).items()}
    np.savez(folder / "model_small.npz", config=json.dumps(SETTINGS), input_ids=tokens, target_ids=targets, cu_seqlens=cu_seqlens,
             **{"loss/depth2": losses}, **params)


@pytest.mark.parametrize("error, status", [(0.0, 0), (2e-4, 1), (float("nan"), 1)])
def test_a_difference_is_seen(tmp_path: Path, error: float, status: int) -> None:
    write_folder(tmp_path, error)
    assert check_golden.main([str(tmp_path)]) == status


def test_a_folder_without_golden_files_is_a_fault(tmp_path: Path) -> None:
    assert check_golden.main([str(tmp_path)]) == 1


def test_every_lever_that_is_built_is_compared() -> None:
    for lever in check_golden.LEVERS:
        built = len(check_golden.known_settings(lever.settings)) == len(lever.settings)
        assert lever.check is not None or not built, lever.name
