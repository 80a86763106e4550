"""tools/make_record.py: a folder from the logs, which runs anywhere, and everything that it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_record
from tiny_record import SEEDS, made, make_record, verify

import logs


def collect(runs: Path, records: Path, *more: str, seeds: tuple[int, ...] = SEEDS) -> int:
    """make_record on finished runs; the exit status."""
    return make_record.main(["--slug", "Again", "--seeds", ",".join(map(str, seeds)), "--runs", str(runs), "--code", str(made().code),
                             "--records", str(records), *more])


def folders(records: Path) -> list[str]:
    return [path.name for track in records.glob("*") for path in track.iterdir()]


def test_every_number_of_the_folder_is_of_the_logs() -> None:
    folder = made().record
    page, text = json.loads((folder / "submission.json").read_text()), (folder / "README.md").read_text()
    runs = [logs.read_log(folder / f"train_seed{seed}.log") for seed in SEEDS]
    assert page["val_bpb"] == pytest.approx(sum(run.final.val_bpb for run in runs) / 3, abs=1e-12)
    assert page["seeds"] == list(SEEDS) and page["track"] == verify.OTHER_TRACK and page["val_bpb_std"] > 0
    for run in runs:
        row = page["seed_results"][str(run.seed)]
        assert row["val_bpb"] == run.evals["quantized_ttt"].val_bpb and row["pre_ttt_bpb"] == run.evals["quantized"].val_bpb
        assert row["artifact_bytes"] == int(run.artifact["total_bytes"]) and row["steps"] == 8
        assert f"{run.final.val_bpb:.5f}" in text
    assert f"**val_bpb {page['val_bpb']:.5f}** (mean of 3 seeds" in text
    assert "| validation documents score no better than others |" in text and "| the distribution adds up to 1 |" in text
    assert "**This is no record**" in text and "not scored on the published validation set" in text
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_Tiny", folder.name)
    assert (folder / "source" / "train_gpt.py").read_bytes() == (tiny.ROOT / "train_gpt.py").read_bytes()
    assert 5 * (folder / "train_gpt.py").stat().st_size < (folder / "source" / "train_gpt.py").stat().st_size
    names = {path.name for path in folder.iterdir()}
    assert names >= {*make_record.CODE, "tokenizers", "run.sh", "README.md", "submission.json", "plot.png", "report.html"}


def test_the_folder_runs_where_it_is_copied_to(tmp_path: Path) -> None:
    """One seed again, in an empty folder with nothing of the repository, gives the figures of its log."""
    folder = tiny_record.copy_of(made().record, tmp_path / "elsewhere")
    environ = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environ |= {"PYTHON": sys.executable, "DATA_PATH": str(made().data)}
    prepare = [sys.executable, "prepare_caseops_data.py", "--help"]
    assert subprocess.run(prepare, cwd=folder, env=environ, capture_output=True, check=False).returncode == 0
    done = subprocess.run(["bash", str(folder / "run.sh"), "4"], cwd="/", env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    again, before = logs.read_log(folder / "runs" / "train_seed4.log"), logs.read_log(folder / "train_seed4.log")
    assert {name: score[:4] for name, score in again.evals.items()} == {name: score[:4] for name, score in before.evals.items()}
    assert (folder / "runs" / "train_seed4.artifact").read_bytes() == (folder / "train_seed4.artifact").read_bytes()


def test_a_try_without_data_stands_in_nobodys_way(tmp_path: Path) -> None:
    """run.sh says what is missing and leaves no log; the log of a run that found no data counts as none."""
    folder = tiny_record.copy_of(made().record, tmp_path / "elsewhere")
    environ = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "DATA_PATH": str(tmp_path / "nothing")}
    done = subprocess.run(["bash", str(folder / "run.sh"), "4"], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no data in" in done.stderr and not (folder / "runs").exists()
    text = (folder / "train_seed4.log").read_text()
    (folder / "train_seed4.log").write_text(text[: text.index("train step")])
    (folder / "empty.log").write_text("")
    assert make_record.begun(folder / "train_seed3.log")
    assert not make_record.begun(folder / "train_seed4.log") and not make_record.begun(folder / "empty.log")


def test_it_runs_the_seeds_that_are_missing_and_no_others(tmp_path: Path) -> None:
    runs = tiny_record.copy_of(made().runs, tmp_path / "runs")
    before = (runs / "train_seed3.log").stat().st_mtime_ns
    for path in runs.glob("train_seed5.*"):
        path.unlink()
    environment = tmp_path / "tiny.env"
    lines = [f"{name}={value}" for name, value in tiny_record.settings().items()]
    environment.write_text("# the tiny run\n" + "\n".join([*lines, f"DATA_PATH={made().data}", "OMP_NUM_THREADS=1"]) + "\n")
    done = subprocess.run([sys.executable, str(tiny.ROOT / "tools" / "make_record.py"), "--slug", "Run", "--seeds", "3,4,5", "--env",
                           str(environment), "--runs", str(runs), "--non-record", "--code", str(made().code), "--records",
                           str(tmp_path / "records")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (runs / "train_seed5.log").exists() and (runs / "train_seed3.log").stat().st_mtime_ns == before
    assert "export OMP_NUM_THREADS=1" in next((tmp_path / "records").glob("*/*/run.sh")).read_text()


def spoilt(tmp_path: Path, name: str, old: str, new: str) -> Path:
    runs = tiny_record.copy_of(made().runs, tmp_path / "runs")
    path = runs / name
    text, count = re.subn(old, new, path.read_text(), flags=re.MULTILINE)
    assert count, f"{name} has no {old}"
    path.write_text(text)
    return runs


REFUSALS = {
    "mixed settings": ("train_seed4.log", r"^setting \*TTT_LORA_RANK value:4", "setting *TTT_LORA_RANK value:8", "TTT_LORA_RANK is"),
    "mixed machines": ("train_seed4.log", r"ranks:1", "ranks:2", "ranks is 1 / 2"),
    "another Python": ("train_seed4.log", r"python:\S+", "python:3.1.4", "python is"),
    "other threads": ("train_seed4.log", r"threads:\d+", "threads:64", "threads is 1 / 64"),
    "other code in a seed": ("train_seed5.log", r" sha256:\w+ source", f" sha256:{'0' * 64} source", "is not the code of train_seed5.log"),
    "no end": ("train_seed5.log", r"^final .*\n", "", "did not end"),
    "over the cap": ("train_seed3.log", r"total_bytes:\d+", "total_bytes:16000001", "within the cap"),
    "an error": ("train_seed3.log", r"\Z", "error: training took 700.0 s, over the budget of 600 s\n", "over the budget"),
    "a better last line": ("train_seed3.log", r"^(final .*?) val_bpb:\S+", r"\1 val_bpb:0.9", "its last line says 0.9"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_refuses(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, old, new, reason = REFUSALS[name]
    assert collect(spoilt(tmp_path, file, old, new), tmp_path / "records", "--non-record") == 1
    assert reason in capsys.readouterr().err
    assert folders(tmp_path / "records") == []


def test_it_refuses_a_missing_and_a_doubled_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect(made().runs, tmp_path / "records", "--non-record", seeds=(3, 4, 6)) == 1
    assert "no log of seed 6" in capsys.readouterr().err
    runs = tiny_record.copy_of(made().runs, tmp_path / "runs")
    (runs / "train_seed33.log").write_bytes((runs / "train_seed3.log").read_bytes())
    assert collect(runs, tmp_path / "records", "--non-record") == 1
    assert "several logs" in capsys.readouterr().err


def test_it_refuses_a_record_that_breaks_the_limits_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds within 600 s; --non-record lifts both, and the README says so."""
    monkeypatch.setattr(make_record, "draw", lambda groups, folder: None)
    assert collect(made().runs, tmp_path / "records", seeds=(3, 4)) == 1
    assert "a record needs 3 seeds" in capsys.readouterr().err
    runs = spoilt(tmp_path, "train_seed3.log", r"train_ms:\d+", "train_ms:600001")
    assert collect(runs, tmp_path / "records") == 1
    assert "training within 600 s: 600.0 s at most" in capsys.readouterr().err
    assert folders(tmp_path / "records") == []
    assert collect(runs, tmp_path / "records", "--non-record") == 0
    folder = next((tmp_path / "records" / verify.OTHER_TRACK).iterdir())
    assert "training took 600 s, over the 600 s of a record" in (folder / "README.md").read_text()


def test_it_refuses_code_that_is_not_the_code_that_ran(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = tiny_record.copy_code(tmp_path / "code")
    (code / "train_gpt.py").write_text((made().code / "train_gpt.py").read_text() + "\n")
    assert make_record.main(["--slug", "Other", "--seeds", "3,4,5", "--runs", str(made().runs), "--non-record", "--code", str(code),
                             "--records", str(tmp_path / "records")]) == 1
    assert "is not the code of" in capsys.readouterr().err


def test_code_that_counted_readable_or_ran_packed_is_shipped_as_it_was(tmp_path: Path) -> None:
    source, digest = b"print('no such option')\n", lambda data: hashlib.sha256(data).hexdigest()
    (tmp_path / "train_gpt.py").write_bytes(source)
    run = logs.RunLog(tmp_path / "x.log", code={"train_gpt.py": {"bytes": str(len(source)), "sha256": digest(source)}})
    assert make_record.counted_code([run], tmp_path) == {"train_gpt.py": source}
    run.code["train_gpt.py"]["source_sha256"] = digest(b"what it holds, unpacked")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train_gpt.py").write_bytes(b"readable")
    assert make_record.counted_code([run], tmp_path) == {"train_gpt.py": source, "source/train_gpt.py": b"readable"}


def test_it_overwrites_nothing_and_leaves_nothing_half_made(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_record, "draw", lambda groups, folder: None)
    assert collect(made().runs, tmp_path / "records", "--non-record") == 0
    before = folders(tmp_path / "records")
    assert collect(made().runs, tmp_path / "records", "--non-record") == 1
    assert "is not overwritten" in capsys.readouterr().err
    assert folders(tmp_path / "records") == before and len(before) == 1


@pytest.mark.parametrize("line, words", [("LEARNING RATE", "is not NAME=VALUE"), ("SEED=3", "named with|name the seeds")])
def test_a_bad_environment_file_is_explained(line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.env").write_text(line + "\n")
    assert collect(made().runs, tmp_path / "records", "--non-record", "--env", str(tmp_path / "bad.env")) == 2
    assert re.search(words, capsys.readouterr().err)
