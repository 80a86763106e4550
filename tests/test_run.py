"""Section 13: whole runs as their users start them: what must hold at the end, and what a wrong start is told."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny

import train_gpt as tg


def scores(log: str) -> dict[str, dict[str, str]]:
    return {e["name"]: {k: v for k, v in e.items() if k != "time_ms"} for e in tiny.records(log, "eval")}


def test_loss_falls_quantization_costs_little_and_ttt_gains(one_rank) -> None:
    losses = [float(r["loss"]) for r in tiny.records(one_rank.log, "train")]
    assert losses[-1] < losses[0] - 1
    bpb = {name: float(e["val_bpb"]) for name, e in scores(one_rank.log).items()}
    assert abs(bpb["quantized"] - bpb["ema"]) < 0.05 and bpb["quantized_ttt"] < bpb["quantized"]
    final = tiny.records(one_rank.log, "final")[0]
    assert float(final["val_bpb"]) == bpb["quantized_ttt"] and float(final["pre_ttt_bpb"]) == bpb["quantized"]


def test_artifact_in_a_fresh_process_without_training_data_scores_what_the_log_says(one_rank, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(one_rank.data, data, ignore=shutil.ignore_patterns("*_train_*"))
    shutil.copy(one_rank.out / "run.artifact", tmp_path / "elsewhere")
    model_settings = {name.upper() for name in tg.MODEL_SETTINGS}
    env = tiny.environment(data, tmp_path / "out", EVAL_ONLY=1, ARTIFACT_PATH=tmp_path / "elsewhere")
    done = tiny.run({k: v for k, v in env.items() if k not in model_settings})
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = scores(done.stdout), scores(one_rank.log)
    assert found == {name: expected[name] for name in ("quantized", "quantized_ttt")}


def test_two_ranks_score_the_same_artifact_the_same(one_rank, tmp_path: Path) -> None:
    env = tiny.environment(one_rank.data, tmp_path, EVAL_ONLY=1, ARTIFACT_PATH=one_rank.out / "run.artifact", LOSSES_PATH=tmp_path / "losses.npz")
    done = tiny.run(env, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    expected = scores(one_rank.log)
    losses = np.load(tmp_path / "losses.npz")  # of all ranks, in one file
    assert sorted(losses) == ["quantized", "quantized_ttt"]
    assert all(float(nats.mean()) == pytest.approx(float(expected[name]["val_loss"]), abs=1e-6) for name, nats in losses.items())
    for name, entry in scores(done.stdout).items():
        assert float(entry["val_loss"]) == pytest.approx(float(expected[name]["val_loss"]), abs=1e-6)
        assert (entry["tokens"], entry["bytes"]) == (expected[name]["tokens"], expected[name]["bytes"])


def test_same_seed_same_figures(one_rank, tmp_path: Path) -> None:
    done = tiny.run(tiny.environment(one_rank.data, tmp_path, RUN_ID="again"))
    assert scores(done.stdout) == scores(one_rank.log)
    assert (tmp_path / "again.artifact").read_bytes() == (one_rank.out / "run.artifact").read_bytes()
    assert [r["loss"] for r in tiny.records(done.stdout, "train")] == [r["loss"] for r in tiny.records(one_rank.log, "train")]


def test_log_says_what_ran(one_rank) -> None:
    code = tiny.records(one_rank.log, "code")[0]
    source = (tiny.ROOT / "train_gpt.py").read_bytes()
    assert int(code["bytes"]) == len(source) and code["sha256"] == tg.hashlib.sha256(source).hexdigest()
    artifact = tiny.records(one_rank.log, "artifact")[0]
    assert int(artifact["model_bytes"]) == (one_rank.out / "run.artifact").stat().st_size
    assert int(artifact["total_bytes"]) == int(artifact["model_bytes"]) + len(source)
    starred = [line for line in one_rank.log.splitlines() if line.startswith("setting *")]
    assert f"setting *MODEL_DIM value:32 default:{tg.Config.model_dim}" in starred and not any("ROPE_BASE" in s for s in starred)
    phases = [(r["step"], r["depth"]) for r in tiny.records(one_rank.log, "phase")]
    assert phases == [("0", "1"), ("7", "3"), ("14", "4")]


def told(env: dict[str, str], ranks: int = 1) -> str:
    """What a run that must refuse says, having written no artifact."""
    done = tiny.run(env, ranks)
    assert done.returncode == (tg.EXIT_USER_ERROR if ranks == 1 else 1), done.stdout + done.stderr
    assert "Traceback" not in done.stdout and (ranks > 1 or "Traceback" not in done.stderr)
    assert not list(Path(env["ARTIFACT_DIR"]).glob("*.artifact"))
    return done.stdout + done.stderr


def test_a_wrong_setting_ends_before_anything_else(tiny_data: Path, tmp_path: Path) -> None:
    assert "MATRIX_LR='x' is not allowed" in told(tiny.environment(tiny_data, tmp_path, MATRIX_LR="x"))
    assert not list(tmp_path.iterdir()), "not even a log"


def test_missing_data_and_a_token_out_of_range_are_told(tiny_data: Path, tmp_path: Path) -> None:
    assert "error: no data" in told(tiny.environment(tmp_path / "none", tmp_path))
    assert "but VOCAB_SIZE is 60" in told(tiny.environment(tiny_data, tmp_path, VOCAB_SIZE=60))


def test_more_ranks_than_the_batch_allows_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    said = told(tiny.environment(tiny_data, tmp_path, TRAIN_BATCH_TOKENS=8), ranks=2)
    assert "2 ranks do not divide TRAIN_BATCH_TOKENS=8" in said


def test_a_misspelt_setting_is_a_warning(one_rank, tmp_path: Path) -> None:
    env = tiny.environment(one_rank.data, tmp_path, EVAL_ONLY=1, ARTIFACT_PATH=one_rank.out / "run.artifact", TTT_ENABLED=0, TTT_LORA_RNK=3)
    done = tiny.run(env)
    assert done.returncode == 0 and "warning: TTT_LORA_RNK is no setting; did you mean TTT_LORA_RANK?" in done.stdout


def test_a_damaged_or_other_artifact_is_told(one_rank, tmp_path: Path) -> None:
    whole = (one_rank.out / "run.artifact").read_bytes()
    short = tmp_path / "short"
    short.write_bytes(whole[:-100])
    out = tmp_path / "out"
    out.mkdir()
    assert "cut short" in told(tiny.environment(one_rank.data, out, EVAL_ONLY=1, ARTIFACT_PATH=short))
    assert "no artifact at" in told(tiny.environment(one_rank.data, out, EVAL_ONLY=1, ARTIFACT_PATH=tmp_path / "none"))
    said = told(tiny.environment(one_rank.data, out, EVAL_ONLY=1, ARTIFACT_PATH=one_rank.out / "run.artifact", NUM_HEADS=2))
    assert "NUM_HEADS=2 contradicts" in said and "made with 4" in said


def test_a_log_is_never_overwritten(one_rank) -> None:
    done = tiny.run(tiny.environment(one_rank.data, one_rank.out, RUN_ID="run"))
    assert done.returncode == tg.EXIT_USER_ERROR and "choose another RUN_ID" in done.stderr
    assert (one_rank.out / "run.log").read_text() == one_rank.log


def test_a_folder_that_cannot_be_written_is_told_at_once(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = tiny.run(tiny.environment(tiny_data, tmp_path / "file" / "out"))
    assert done.returncode == tg.EXIT_USER_ERROR and "set ARTIFACT_DIR" in done.stderr


def test_a_disk_with_no_room_for_the_artifact_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(tg.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert tg.main({"ARTIFACT_DIR": str(tmp_path / "out")}) == tg.EXIT_USER_ERROR
    assert "only 1 MB free" in capsys.readouterr().err and not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_the_old_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.artifact"
    path.write_bytes(b"old")
    monkeypatch.setattr(tg.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="free some space"):
        tg.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.artifact"]


def test_over_the_cap_or_budget_says_so_and_exits_non_zero_after_writing(one_rank, tmp_path: Path, monkeypatch) -> None:
    env = tiny.environment(one_rank.data, tmp_path, EVAL_ONLY=1, ARTIFACT_PATH=one_rank.out / "run.artifact", EVAL_BUDGET_SECONDS=0.001)
    done = tiny.run(env)
    assert done.returncode == tg.EXIT_OVER_LIMIT and "error: evaluation took" in done.stdout and "final seed:7" in done.stdout


def test_record_settings_on_a_cpu_say_what_they_need_and_what_to_run(tiny_data: Path, tmp_path: Path) -> None:
    env = tiny.environment(tiny_data, tmp_path)
    for name in tiny.SETTINGS:
        if name != "VOCAB_SIZE":
            del env[name]
    said = told(env)
    assert "98304 tokens needs about" in said and "bash run.sh" in said and "MICRO_BATCH_TOKENS=" in said


def test_importing_has_no_side_effects(tmp_path: Path) -> None:
    done = tg_import(tmp_path)
    assert done.stdout == "" and done.stderr == "" and not list(tmp_path.iterdir())


def tg_import(folder: Path):
    import subprocess
    import sys

    return subprocess.run([sys.executable, "-c", "import train_gpt"], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tiny.ROOT), "PYTHONDONTWRITEBYTECODE": "1"})


def interrupted(data: Path, out: Path, how: int, **changes: object) -> tuple[int, str]:
    """A run that gets signal `how` after its checkpoint of step 8, and then goes on; exit status of the first, log of both."""
    import subprocess
    import sys
    import time

    env = tiny.environment(data, out, RUN_ID="run", TTT_ENABLED=0, **changes)
    first = subprocess.Popen([sys.executable, str(tiny.ROOT / "train_gpt.py")], env=env, stdout=subprocess.DEVNULL)
    for _ in range(1200):
        if (out / "run.log").exists() and "train step:10/20" in (out / "run.log").read_text():
            break
        time.sleep(0.05)
    first.send_signal(how)
    status = first.wait(60)
    assert tiny.run(env).returncode == 0
    return status, (out / "run.log").read_text()


def figures(log: str) -> list[str]:
    return [r["loss"] for r in tiny.records(log, "train") if r["step"] in ("15/20", "20/20")] + [scores(log)["quantized"]["val_loss"]]


def test_a_killed_run_resumes_with_the_losses_of_one_never_interrupted(one_rank, tmp_path: Path) -> None:
    status, log = interrupted(one_rank.data, tmp_path, signal.SIGKILL, CHECKPOINT_EVERY=8)
    assert status == -signal.SIGKILL and "resumed from step 8" in log
    assert figures(log) == figures(one_rank.log)
    assert not list(tmp_path.glob("*checkpoint*")), "nothing is left behind"


def test_sigterm_writes_a_checkpoint_and_ends_cleanly(one_rank, tmp_path: Path) -> None:
    status, log = interrupted(one_rank.data, tmp_path, signal.SIGTERM)
    assert status == 0 and "stopped by SIGTERM" in log and "resumed from step 1" in log
    assert figures(log) == figures(one_rank.log)


def test_a_checkpoint_of_other_settings_is_refused(one_rank, tmp_path: Path) -> None:
    (tmp_path / "run.checkpoint").write_text('{"step": 8, "ranks": 1, "settings": "other"}')
    assert "choose another RUN_ID" in told(tiny.environment(one_rank.data, tmp_path, RUN_ID="run"))


def test_two_copies_in_one_process_do_not_share_operators(tmp_path: Path) -> None:
    import importlib.util
    import sys

    import torch

    spec = importlib.util.spec_from_file_location("another_train_gpt", shutil.copy(tiny.ROOT / "train_gpt.py", tmp_path))
    other = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = other
    try:
        spec.loader.exec_module(other)
        assert other.cross_entropy_op._qualname.startswith("another_train_gpt::") and tg.cross_entropy_op._qualname.startswith("train_gpt::")
        logits, targets = torch.zeros(3, 8), torch.zeros(3, dtype=torch.long)
        assert torch.equal(other.softcapped_cross_entropy(logits, targets, 30.0), tg.softcapped_cross_entropy(logits, targets, 30.0))
    finally:
        del sys.modules[spec.name]
