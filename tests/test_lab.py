"""bench/lab.py: its statistics against numbers computed by hand, what a pair is, and what is run again."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "bench")]

import lab  # noqa: E402
import lab_table  # noqa: E402
import tiny  # noqa: E402
import train_gpt as g  # noqa: E402

BASE = {name: str(value) for name, value in tiny.SETTINGS.items() if name != "SEED"}
# Stands for train_gpt.py: a target costs 0.1 * MATRIX_LR * (1 + its number / 1000) nats, the averaged weights twice that; 7 fails once.
PROGRAM = """
import os, sys
from pathlib import Path
import numpy as np
env, folder = os.environ, Path(os.environ["DATA_PATH"])
out = Path(env["ARTIFACT_DIR"])
with (out / "calls.txt").open("a") as file:
    file.write(" ".join([env["RUN_ID"], env["SEED"], env["CHECKPOINT_EVERY"], env.get("EVAL_ONLY", "0")]) + "\\n")
if env["MATRIX_LR"] == "7" and env["SEED"] == "2" and not (out / "mended").exists():
    sys.exit("error: the loss is nan")
if env.get("EVAL_ONLY"):
    assert Path(env["ARTIFACT_PATH"]).exists()
else:
    (out / (env["RUN_ID"] + ".artifact")).write_text("weights")
count = len(np.fromfile(next(folder.glob("*_val_0*.bin")), "<u2")) - 512 - 1
nats = 0.1 * float(env["MATRIX_LR"]) * (1 + np.arange(count) / 1000) * (float(env["SEED"]) % 1000) + 0.01 * int(env["TTT_LORA_RANK"])
np.savez(env["LOSSES_PATH"], quantized=nats.astype(np.float32), **({} if env.get("EVAL_ONLY") else {"ema": 2 * nats}))
print("code file:x sha256:0123456789abcdef\\nfinal seed:1 val_bpb:1.0 steps:5 train_ms:10 eval_ms:3 total_bytes:99")
"""


def test_the_labs_settings_are_settings_and_keep_the_topology() -> None:
    lines = (ROOT / "bench" / "lab.env").read_text().splitlines()
    cfg, record = g.Config.from_env(lab.settings_of([line for line in lines if line and line[0] != "#"])), g.Config()
    for name in ("num_layers", "loop_start", "loop_end", "train_loop_phase_depths", "eval_loop_depth", "vocab_size"):
        assert getattr(cfg, name) == getattr(record, name), name


def row(bits: list[float], sizes: list[int] | None = None) -> dict:
    sizes = sizes or [10, 20, 30]
    return {"bytes": sizes, "bits": {"ema": bits}, "bpb": {"ema": sum(bits) / sum(sizes)}}


def test_the_difference_and_its_errors_are_those_computed_by_hand() -> None:
    # bits by document: pair 1 differs by (6, 0, 0), pair 2 by (0, 12, 6); 60 bytes
    tried, base = [row([16.0, 20, 30]), row([10.0, 32, 36])], [row([10.0, 20, 30]), row([10.0, 20, 30])]
    found = lab_table.difference(tried, base, "ema")
    assert found.by_pair == pytest.approx([0.1, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.error_by_seed == pytest.approx(0.1)  # standard deviation 0.1414 over the root of 2
    # means by document (3, 6, 3), less 0.2 * bytes (2, 4, 6): (1, 2, -3), squares 14, times 3/2, root, over 60
    assert found.error_by_document == pytest.approx(math.sqrt(21) / 60)
    assert found.bpb == pytest.approx((66 + 78) / 2 / 60)
    rows = dict(zip(["t1", "t2", "b1", "b2"], tried + base))
    several = lab_table.compare(rows, {"a": [("t1", "b1"), ("t2", "b2")], "b": [("t1", "b1"), ("t3", "b3")]})
    sd, freedom = lab_table.spread(several, "ema")
    assert (sd, freedom) == (pytest.approx(math.sqrt(0.02)), 1)  # the try of one pair says nothing about the spread
    assert math.isnan(several["b", "ema"].error_by_seed)


def test_rows_of_other_documents_are_not_compared() -> None:
    with pytest.raises(SystemExit, match="documents"):
        lab_table.difference([row([1.0, 1, 1])], [row([1.0, 1, 1], [10, 21, 29])], "ema")


def test_each_try_stands_alone_and_leave_out_takes_one_from_the_whole(tiny_data: Path) -> None:
    base, texts = BASE | {"DATA_PATH": str(tiny_data)}, ["a: BETA2=0.9 BETA1=0.8", "MATRIX_LR=0.02", "placebo"]
    bases, jobs = lab.plan(base, texts, False, 2)
    assert [b.settings["SEED"] for b in bases] == ["1", "2"] == [j.settings["SEED"] for j in jobs["a"]]
    assert [j.settings["SEED"] for j in jobs["placebo"]] == ["1000001", "1000002"]
    assert jobs["a"][0].settings.items() - bases[0].settings.items() == {("BETA2", "0.9"), ("BETA1", "0.8")}
    assert not jobs["a"][0].of and not jobs["placebo"][0].of
    bases, jobs = lab.plan(base, texts[:2], True, 1)
    assert (bases[0].settings["BETA2"], bases[0].settings["MATRIX_LR"]) == ("0.9", "0.02")
    assert "MATRIX_LR" not in jobs["without MATRIX_LR=0.02"][0].settings and "BETA2" not in jobs["without a"][0].settings
    bases, _ = lab.plan(base, [], False, 2, ttt_pairs=1)
    assert [b.settings.get("TTT_ENABLED") for b in bases] == [None, "0"]
    with pytest.raises(SystemExit, match="EMA_DECEY"):
        lab.plan(base, ["EMA_DECEY=0.9"], False, 1)


def test_what_only_changes_the_scoring_scores_the_artifact_of_its_pair(tiny_data: Path) -> None:
    base = BASE | {"DATA_PATH": str(tiny_data)}
    bases, jobs = lab.plan(base, ["TTT_LORA_RANK=2"], False, 2)
    assert [j.of for j in jobs["TTT_LORA_RANK=2"]] == [b.key for b in bases]
    _, jobs = lab.plan(base, ["TTT_LORA_RANK=2"], False, 1, "given")
    assert jobs["TTT_LORA_RANK=2"][0].of == "given"
    for training in ("BETA2=0.9", "placebo"):
        with pytest.raises(SystemExit, match="trained already"):
            lab.plan(base, [training], False, 1, "given")


def test_a_run_is_known_by_what_it_is_and_not_by_where(tmp_path: Path, tiny_data: Path) -> None:
    def key(**changes: str) -> str:
        return lab.Job(BASE | {"DATA_PATH": str(tiny_data), "SEED": "1"} | changes, 1).key

    copy = tiny.write_dataset(tmp_path / "copy")
    assert key() == key(DATA_PATH=str(copy)) == key(BETA1="0.90")  # a default that is spelled out
    other = tiny.write_dataset(tmp_path / "other", seed=5)
    assert len({key(), key(BETA1="0.8"), key(SEED="2"), key(DATA_PATH=str(other))}) == 4


def test_a_pair_sees_the_same_documents_in_the_same_order_whatever_the_tokens(tmp_path: Path) -> None:
    folders = [tiny.write_dataset(tmp_path / name) for name in ("one", "two")]
    for path in folders[1].glob("*_train_*.bin"):  # the same documents in other tokens
        entries = np.fromfile(path, "<u2")
        entries[512:][entries[512:] > 1] ^= 1
        path.write_bytes(entries.tobytes())

    files = {kind: [{"file": path.name, "entries": len(g.read_shard(path)), "sha256": "0"} for path in paths]
             for kind, paths in g.Dataset(folders[1]).paths.items()}
    (folders[1] / "manifest.json").write_text(json.dumps({"transform": "a_version", "splits": {
        "val": {"files": files["val"] + files["val_bytes"]}, "train": {"files": files["train"]}}}))

    def documents(pair: int, folder: Path) -> list[tuple[int, ...]]:
        result = lab.data_of_pair(folder, pair, tmp_path / "out")
        assert (g.Dataset(result).read("val")[0] == g.Dataset(folder).read("val")[0]).all()
        assert len(g.Dataset(result).read("val_bytes")) == 1
        tokens = np.concatenate(g.Dataset(result).read("train"))
        return [tuple(part) for part in np.split(tokens, np.flatnonzero(tokens == 1)[1:])]

    first, again, other = documents(1, folders[0]), documents(2, folders[0]), documents(1, folders[1])
    assert first != again and sorted(first) == sorted(again) and len(first) == 400
    assert [tuple(t ^ 1 if t > 1 else t for t in part) for part in other] == first
    kept = json.loads((lab.data_of_pair(folders[1], 1, tmp_path / "out") / "manifest.json").read_text())
    assert kept["transform"] == "a_version" and [entry["entries"] for entry in kept["splits"]["train"]["files"]] == [sum(map(len, first))]


def call(monkeypatch: pytest.MonkeyPatch, folder: Path, data: Path, *arguments: str) -> int:
    """The lab with the stand-in for train_gpt.py, two runs side by side."""
    (folder / "program.py").write_text(PROGRAM)
    (folder / "base.env").write_text("# base\n" + "".join(f"{name}={value}\n" for name, value in BASE.items()) + "MATRIX_LR=1\n")
    monkeypatch.setattr(lab, "PROGRAM", folder / "program.py")
    monkeypatch.setenv("DATA_PATH", str(data))
    places = ("--out", str(folder / "out"), "--rows", str(folder / "lab.jsonl"))
    return lab.main([str(folder / "base.env"), *places, "--jobs", "2", *arguments])


def test_a_failed_run_is_reported_and_only_what_is_missing_is_run_again(tmp_path: Path, tiny_data: Path, capsys, monkeypatch) -> None:
    arguments = ("--try", "MATRIX_LR=7", "--try", "more: TTT_LORA_RANK=5", "--seeds", "2", "--plot", str(tmp_path / "p.png"))
    assert call(monkeypatch, tmp_path, tiny_data, *arguments) == 1
    shown = capsys.readouterr()
    assert "the loss is nan" in shown.err
    assert "| MATRIX_LR=7 | ema | 1 |" in shown.out and "| more | quantized | 2 |" in shown.out
    assert (tmp_path / "p.png").stat().st_size > 1000
    calls = (tmp_path / "out" / "calls.txt").read_text().split("\n")
    assert len(calls) - 1 == 6 and all("60s" in words for words in calls[:-1])

    (tmp_path / "out" / "mended").touch()
    lines = (tmp_path / "lab.jsonl").read_text().splitlines()
    assert len(lines) == 5
    (tmp_path / "lab.jsonl").write_text("\n".join(lines[1:]) + "\n")  # as if the lab had been killed before this line
    assert call(monkeypatch, tmp_path, tiny_data, *arguments) == 0
    again = (tmp_path / "out" / "calls.txt").read_text().split("\n")[6:-1]
    failed = [words for words in calls if calls.count(words) + again.count(words) > 1]
    assert len(again) == 1 and again == failed  # under the same name, so that it goes on from its checkpoint
    rows = {line["key"]: line for line in map(json.loads, (tmp_path / "lab.jsonl").read_text().splitlines())}
    assert len(rows) == 6
    out = capsys.readouterr().out

    # 0.1 nats * pair * (1 + number / 1000) a target, seven times that in the try
    val = g.load_val(g.Config(data_path=str(tiny_data), vocab_size=64))
    nats = 0.1 * (1 + np.arange(len(val.tokens) - 1) / 1000).sum()
    expected = nats * 6 * (1 + 2) / 2 / math.log(2) / val.num_bytes
    line = next(line for line in out.splitlines() if line.startswith("| MATRIX_LR=7 | quantized | 2 |")).split(" | ")
    assert float(line[4]) == pytest.approx(expected, abs=2e-5)
    assert float(line[5]) == pytest.approx(expected / 3, abs=2e-5)  # pairs of 2/3 and 4/3 of the mean


def test_an_artifact_from_elsewhere_is_scored_base_and_all(tmp_path: Path, tiny_data: Path, capsys, monkeypatch) -> None:
    (tmp_path / "own.artifact").write_text("weights")
    assert call(monkeypatch, tmp_path, tiny_data, "--artifact", str(tmp_path / "own.artifact"), "--try", "TTT_LORA_RANK=5") == 0
    calls = (tmp_path / "out" / "calls.txt").read_text().splitlines()
    assert len(calls) == 2 and all(words.endswith(" 1") for words in calls)  # EVAL_ONLY
    assert "| TTT_LORA_RANK=5 | quantized | 1 |" in capsys.readouterr().out
