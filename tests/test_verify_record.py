"""tools/verify.py: an honest folder passes, and what its files, logs and data say wrong is found."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import brotli
import numpy as np
import pytest
import tiny
import tiny_record
from tiny_record import made, verify

import train_gpt as tg


def status_of(results: list[verify.Result], rule: str) -> str:
    """The status of the one row whose rule starts with `rule`."""
    found = [result for result in results if result.rule.startswith(rule)]
    assert len(found) == 1, [result.rule for result in results]
    return found[0].status


def folder_checks(folder: Path) -> list[verify.Result]:
    return verify.check_folder(verify.open_folder(folder))


def failed_rules(folder: Path) -> list[str]:
    return [result.rule for result in folder_checks(folder) if result.status == verify.FAIL]


def one_seed(folder: Path) -> Path:
    """A copy of the record with its first seed alone, which claims nothing."""
    copy = tiny_record.copy_of(made().record, folder)
    for path in (copy / "submission.json", *(copy / f"train_seed{seed}.log" for seed in tiny_record.SEEDS[1:])):
        path.unlink()
    return copy


def test_an_honest_record_of_train_gpt_fails_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = one_seed(tmp_path / "record")
    assert verify.main([str(folder), "--data", str(made().data), "--same-machine", "--run", "--cuts", "1", "--minutes", "60",
                        "--save"]) == 0
    table = capsys.readouterr().out
    assert " 0 fail" in table and (folder / "verify.txt").exists() and (folder / "verify.diff").exists()
    for rule in (
        "causal: evaluation",
        "causal: test-time training",
        "documents are scored apart",
        "the distribution adds up to 1: evaluation",
        "the distribution adds up to 1: test-time",
        "no validation document",
        "validation documents score no better than others: test-time",
        "the same score in another order and name: test-time",
        "the same score in other company: evaluation",
        "the artifact scores what the log says: seed 3",
    ):
        assert re.search(rf"^pass +{re.escape(rule)}", table, re.MULTILINE), rule
    assert table.count("(exactly)") == 2 and table.index("now running the code of") < table.index("the artifact scores")


def suspect_of(folder: Path) -> verify.Suspect:
    record = verify.open_folder(folder)
    return verify.suspect_of(record, record.runs[0], verify.parse_arguments([str(folder)]))


def test_train_gpt_that_sees_the_future_is_found(tmp_path: Path) -> None:
    """The real program through its own entry point, with text replaced in every document."""
    folder = one_seed(tmp_path / "record")
    shutil.copy(folder / "source" / "train_gpt.py", folder)
    tiny_record.rewrite(folder / "train_gpt.py", "is_causal=True", "is_causal=False")
    val, suspect = verify.ValSet.load(made().data), suspect_of(folder)
    change = verify.referee.cut_each(val, np.ones(len(val.starts), bool), np.random.default_rng(0))
    before, after = suspect.score(val)["quantized"], suspect.score(change.val)["quantized"]
    assert (before != after)[change.before].any()


def test_code_from_before_losses_path_is_scored_all_the_same(tmp_path: Path) -> None:
    folder = one_seed(tmp_path / "record")
    code = folder / "train_gpt.py"
    code.write_text(re.sub("losses_path", "nothing", (folder / "source" / "train_gpt.py").read_text(), flags=re.IGNORECASE))
    tiny_record.rewrite(folder / "train_seed3.log", "setting LOSSES_PATH value:\n", "")
    suspect, val = suspect_of(folder), verify.ValSet.load(made().data)
    assert suspect.older
    assert verify.referee.check_score(verify.open_folder(folder).runs[0], suspect.score(val), val, exact=True).status == verify.PASS


def test_the_records_of_this_repository_agree_with_their_logs() -> None:
    folders = [path.parent for path in (tiny.ROOT / "records").glob("track_*/*/submission.json")]
    assert folders
    for folder in folders:
        assert failed_rules(folder) == [], folder.name


def test_what_cannot_be_checked_is_said_and_strict_counts_it() -> None:
    assert verify.main([str(made().record), "--folder-only"]) == 0
    assert verify.main([str(made().record), "--folder-only", "--strict"]) == 1
    assert verify.main([str(made().record / "tokenizers")]) == 2


def test_an_artifact_without_a_log_is_scored() -> None:
    settings = [f"{name}={value}" for name, value in {**tiny_record.settings(), "SEED": "3"}.items()]
    artifact = made().record / "train_seed3.artifact"
    options = verify.parse_arguments(["--artifact", str(artifact), "--data", str(made().data), "--code", str(made().code), "--run",
                                      "--set", *settings])
    record = verify.open_record(options)
    results = verify.check_with_code(record, record.runs, verify.ValSet.load(made().data), made().data, options)
    score = verify.logs.read_log(made().record / "train_seed3.log").final.val_bpb
    assert f"quantized_ttt {score:.8f}" in next(result.detail for result in results if result.rule.startswith("the artifact scores"))
    assert verify.main(["--artifact", str(artifact.with_name("none"))]) == 2


# ---------------------------------------------------------------------------------------------------------- the folder


def spoil_code(folder: Path) -> None:
    (folder / "train_gpt.py").write_bytes((folder / "train_gpt.py").read_bytes() + b"\n# one more line\n")


def spoil_artifact(folder: Path) -> None:
    """The artifact of another seed."""
    (folder / "train_seed3.artifact").write_bytes((folder / "train_seed4.artifact").read_bytes())


def spoil_setting(folder: Path) -> None:
    tiny_record.rewrite(folder / "train_seed4.log", "TTT_LORA_LR value:0.02", "TTT_LORA_LR value:0.01")


def spoil_last_line(folder: Path) -> None:
    log = folder / "train_seed5.log"
    score = re.search(r"final seed:5 val_loss:\S+ val_bpb:(\S+)", log.read_text())[1]
    tiny_record.rewrite(log, f"val_bpb:{score} pre_ttt", f"val_bpb:{float(score) - 0.01:.8f} pre_ttt")


def spoil_claim(folder: Path) -> None:
    page = folder / "submission.json"
    page.write_text(re.sub(r'"val_bpb": [\d.]+', '"val_bpb": 1.0', page.read_text(), count=1))


def spoil_targets(folder: Path) -> None:
    log = folder / "train_seed3.log"
    log.write_text(re.sub(r"(eval name:quantized_ttt .* tokens:)(\d+)", lambda m: m[1] + str(int(m[2]) - 7), log.read_text()))


def spoil_end(folder: Path) -> None:
    log = folder / "train_seed3.log"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if not line.startswith("final ")))


def spoil_seed(folder: Path) -> None:
    """The log of one seed under the name of another."""
    (folder / "train_seed3.log").write_bytes((folder / "train_seed4.log").read_bytes())


def edit(name: str, pattern: str, new: str) -> Callable[[Path], None]:
    """A spoiler that replaces what `pattern` matches in a file; it must match."""
    def spoil(folder: Path) -> None:
        text, count = re.subn(pattern, new, (folder / name).read_text(), flags=re.MULTILINE)
        assert count, f"{name} has no {pattern}"
        (folder / name).write_text(text)
    return spoil


def better(name: str, stage: str, share: float) -> Callable[[Path], None]:
    """Loss and BPB of one stage of a log, and of its last line if that says them too, multiplied by `share`."""
    def spoil(folder: Path) -> None:
        log = folder / name
        loss, bpb = re.search(rf"eval name:{stage} val_loss:(\S+) val_bpb:(\S+)", log.read_text()).groups()
        for old in (f"val_loss:{loss} val_bpb:{bpb}",):
            tiny_record.rewrite(log, old, f"val_loss:{float(loss) * share:.8f} val_bpb:{float(bpb) * share:.8f}")
    return spoil


def spoil_packed(folder: Path) -> None:
    """A packed file that carries other code than what stands beside it to be read."""
    (folder / "train_gpt.py").write_bytes(tg.pack_code("print('something else')\n"))


def spoil_source(folder: Path) -> None:
    """One number of the code to be read."""
    tiny_record.rewrite(folder / "source" / "train_gpt.py", "RANS_BITS = 14", "RANS_BITS = 13")


def spoil_loader(folder: Path) -> None:
    """The source that is to be read, and behind it something else that runs."""
    code = folder / "train_gpt.py"
    code.write_bytes(code.read_bytes().replace(b'""".encode("latin-1"))', b'""".encode("latin-1") + print("more") or b"")'))


LOG = "train_seed3.log"
FOLDER_CASES: list[tuple[str, Callable[[Path], None], str]] = [
    ("other code", spoil_code, "the folder's code is the code that ran"),
    ("another seed's artifact", spoil_artifact, "artifact and code within the cap"),
    ("another setting in one seed", spoil_setting, "one configuration"),
    ("a better last line", spoil_last_line, "BPB = nats"),
    ("a better claim", spoil_claim, "submission.json"),
    ("fewer targets", spoil_targets, "every target counted once"),
    ("no end", spoil_end, "every seed's run is complete"),
    ("a log twice", spoil_seed, "every seed's run is complete"),
    ("packed code that is not the source", spoil_packed, "the code that runs can be read"),
    ("a source that is not the packed code", spoil_source, "the code that runs can be read"),
    ("packed code with more beside it", spoil_loader, "the code that runs can be read"),
    ("another source in one seed", edit(LOG, r"source_sha256:\w{9}", "source_sha256:123456789"), "the code that runs can be read"),
    ("another Python in one seed", edit(LOG, r"python:\S+", "python:3.12.1"), "one configuration"),
    ("other threads in one seed", edit(LOG, r"threads:\d+", "threads:97"), "one configuration"),
    ("quantized far better than averaged", better(LOG, "quantized", 0.6), "the figures of each log"),
    ("TTT far better than quantized", better(LOG, "quantized_ttt", 0.7), "the figures of each log"),
    ("validation far better than training", better(LOG, "ema", 0.5), "the figures of each log"),
    ("a pace that no batch has", edit(LOG, r"^(train step:5/.* tok_s:)\d+", r"\g<1>99999"), "the figures of each log"),
    ("a step in no time", edit(LOG, r"^(train step:5/.* elapsed_ms:)\d+", r"\g<1>71"), "the figures of each log"),
    ("time that runs back", edit(LOG, r"^(train step:6/.* elapsed_ms:)\d+", r"\g<1>1"), "the figures of each log"),
    ("a shorter training", edit(LOG, r"train_ms:\d+ eval", "train_ms:10 eval"), "training within"),
    ("a shorter evaluation", edit(LOG, r"eval_ms:\d+ total", "eval_ms:10 total"), "the figures of each log"),
    ("fewer steps at the end", edit(LOG, r"steps:8", "steps:4"), "the figures of each log"),
    ("another running score", edit(LOG, r"^(ttt docs:16/16 .*val_bpb:)\S+", r"\g<1>2.0"), "the figures of each log"),
    ("bytes that grow in one stage", edit(LOG, r"^(eval name:quantized val_loss:\S+ val_bpb:)\S+", r"\g<1>1.5"), "BPB = nats"),
    ("part of the documents", edit(LOG, r"VAL_DOC_FRACTION value:1", "VAL_DOC_FRACTION value:0.5"), "every target counted once"),
    ("a seed's result", edit("submission.json", r'("3": \{\s+"val_loss": )[\d.]+', r"\g<1>2.0"), "submission.json"),
    ("a seed that is not there", edit("submission.json", r'"seeds": \[\s+3', '"seeds": [\n    7'), "submission.json"),
    ("a smaller spread", edit("submission.json", r'("val_bpb_std": )[\d.]+', r"\g<1>0.0001"), "submission.json"),
    ("claims that are no table", edit("submission.json", r"\A[\s\S]*\Z", "[1, 2]"), "submission.json"),
    ("claims that cannot be read", edit("submission.json", r"\A[\s\S]*\Z", "{"), "submission.json"),
    ("a smaller artifact in the log", edit(LOG, r"model_bytes:\d+", "model_bytes:5"), "artifact and code within the cap"),
    ("a smaller sum at the end", edit(LOG, r"total_bytes:\d+$", "total_bytes:5"), "artifact and code within the cap"),
]


@pytest.mark.parametrize("name, spoil, rule", FOLDER_CASES, ids=[case[0] for case in FOLDER_CASES])
def test_a_spoilt_folder_is_found(name: str, spoil: Callable[[Path], None], rule: str, tmp_path: Path) -> None:
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    assert failed_rules(folder) == []
    spoil(folder)
    assert any(found.startswith(rule) for found in failed_rules(folder)), failed_rules(folder)


def test_a_packed_file_is_read_as_its_source(tmp_path: Path) -> None:
    source = '"""Words."""\ndef f(x: int) -> int:\n    return x  # caf\u00e9\n'
    packed = tg.pack_code(source)
    assert verify.packed_source(packed) == "def f(x):return x\n" and verify.packed_source(source.encode()) is None
    for cut in (packed.replace(b'decompress("""', b'decompress("""x'), packed.replace(b'""".encode', b'" """, """".encode'),
                tg.PACKED_HEAD + brotli.compress(bytes(1 << 23)).decode("latin-1").replace("\0", "\\0").encode("latin-1") + tg.PACKED_TAIL):
        with pytest.raises(ValueError, match="payload is"):
            verify.packed_source(cut)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "train_gpt.py").write_text(source, encoding="utf-8")
    (tmp_path / "train_gpt.py").write_bytes(packed)
    record = verify.Record(tmp_path, [])
    assert verify.check_packed(record).status == verify.PASS and verify.readable_code(record) == source
    (tmp_path / "source" / "train_gpt.py").write_text(source.replace("return x", "return -x"), encoding="utf-8")
    assert verify.check_packed(record).status == verify.FAIL and verify.readable_code(record) == verify.packed_source(packed)
    shutil.rmtree(tmp_path / "source")
    assert verify.check_packed(record).status == verify.UNKNOWN


@pytest.mark.parametrize("track", ["track_10min_16mb", "10min_16mb"])
def test_a_record_without_its_artifacts_proves_nothing(track: str, tmp_path: Path) -> None:
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    tiny_record.rewrite(folder / "submission.json", verify.OTHER_TRACK, track)
    assert status_of(folder_checks(folder), "artifact and code") == verify.PASS
    for path in folder.glob("*.artifact"):
        path.unlink()
    assert status_of(folder_checks(folder), "artifact and code") == verify.FAIL
    log = folder / "train_seed3.log"
    log.write_text(re.sub(r"train_ms:\d+ eval", "train_ms:650000 eval", log.read_text()))
    assert status_of(folder_checks(folder), "training within") == verify.FAIL


def test_a_public_folder_in_its_own_words_is_read(tmp_path: Path) -> None:
    """Results as a list, seeds as tables, figures at the digits given, paths that differ, a total without an artifact line."""
    folder = tmp_path / "track_non_record_16mb" / "public"
    folder.mkdir(parents=True)
    for seed, bpb in ((1, 1.08), (2, 1.082)):
        (folder / f"train_seed{seed}.log").write_text(
            f"Hyperparameters:\n  logfile: logs/{seed}.txt\n  model_path: {seed}.pt\n  seed: {seed}\n  ttt_enabled: False\n"
            f"1/9 train_loss: 2.5 train_time: 0.1m tok/s: 100\nstopping_early: wallclock_cap train_time: 588000ms step: 9/9\n"
            f"quantized val_loss:{bpb * 2.18833:.5f} val_bpb:{bpb:.5f} eval_time:100ms\nTotal submission size quantized: 15,900,000 bytes\n"
            "total_eval_wallclock:100.5s\n")
    page = {"val_bpb": 1.081, "track": "non_record_16mb", "seeds": [{"seed": 1}, {"seed": 2}],
            "seed_results": [{"seed": 1, "val_bpb": 1.08}, {"seed": 2, "val_bpb": 1.082, "artifact_bytes": 15900000}]}
    (folder / "submission.json").write_text(json.dumps(page))
    results = folder_checks(folder)
    assert [result for result in results if result.status == verify.FAIL] == []
    assert "15,900,000" in next(result.detail for result in results if result.rule.startswith("artifact and code"))
    for change, status in (({"seed_results": {"seed_1": 1.08, "2": 1.082}}, verify.PASS), ({"seed_results": {"1": 1.07}}, verify.FAIL),
                           ({"seeds": {"1": {}, "2": {"val_bpb": 1.082}}}, verify.PASS), ({"val_bpb": 1.071}, verify.FAIL)):
        (folder / "submission.json").write_text(json.dumps({**page, **change}))
        assert status_of(folder_checks(folder), "submission.json") == status


def test_no_damage_ends_in_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes changed, cut out and put in, files that are folders or empty: always a table or a sentence."""
    small = one_seed(tmp_path / "small")
    shutil.copy(made().record / "train_seed4.log", small)
    shutil.rmtree(small / "tokenizers")
    page = (made().record / "submission.json").read_bytes()
    rng, names = random.Random(0), ["train_seed3.log", "train_seed4.log", "submission.json", "train_gpt.py", "train_seed3.artifact"]
    for turn in range(100):
        folder = tiny_record.copy_of(small, tmp_path / str(turn))
        (folder / "submission.json").write_bytes(page)
        for name in rng.sample(names, 2):
            data = bytearray((folder / name).read_bytes())
            for _ in range(rng.choice([1, 30])):
                begin = rng.randrange(len(data) + 1)
                data[begin : begin + rng.choice([0, 1, 1000])] = rng.choice(
                    [b"", b"\xff\xfe", b"\n", b"-1e999", b"nan", b'"', b"[", b"{}", b":"]
                )
            (folder / name).write_bytes(rng.choice([bytes(data), bytes(data[: len(data) // 2]), b""]))
        if turn % 10 == 0:
            (folder / names[turn // 10 % 5]).unlink()
            (folder / names[turn // 10 % 5]).mkdir()
        assert verify.main([str(folder), *(["--data", str(made().data)] if turn % 5 == 0 else ["--folder-only"])]) in (0, 1, 2)
        shutil.rmtree(folder)
    assert "Traceback" not in capsys.readouterr().out


def test_a_table_that_cannot_be_written_is_no_traceback(tmp_path: Path) -> None:
    folder = one_seed(tmp_path / "record")
    (folder / "verify.txt").mkdir()
    program = [sys.executable, verify.__file__, str(folder), "--folder-only"]
    for sink, more, said in (("/dev/full", [], "cannot be written"), ("/dev/null", ["--save"], "cannot be written")):
        with open(sink, "w") as out:
            done = subprocess.run([*program, *more], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(f"{shlex.join(program)} | true", shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    (folder / "train_seed\udcff.log").write_text("x")  # a name that is no UTF-8
    for tool, more in ((verify, "--folder-only"), (verify.logs, "summary")):
        done = subprocess.run([sys.executable, tool.__file__, more, str(folder)], env={"PYTHONIOENCODING": "ascii"}, capture_output=True)
        assert done.returncode in (0, 1) and rb"train_seed\udcff.log" in done.stdout and done.stderr == b""


def test_the_diff_is_kept_beside_the_folder_or_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    folder = one_seed(tmp_path / "record")
    before = sorted(folder.iterdir())
    shutil.copy(folder / "source" / "train_gpt.py", folder)
    tiny_record.rewrite(folder / "train_gpt.py", "RANS_BITS = 14", "RANS_BITS = 13")
    monkeypatch.setattr(verify.tempfile, "tempdir", str(tmp_path))
    verify.main([str(folder), "--folder-only"])
    said = capsys.readouterr().out
    (diff,) = tmp_path.glob("verify_*.diff")
    assert f"read it: 2 lines differ from the repository's train_gpt.py, which are in {diff}" in said
    assert "+RANS_BITS = 13" in diff.read_text() and sorted(folder.iterdir()) == before
    (folder / "train_gpt.py").unlink()
    shutil.rmtree(folder / "source")
    verify.main([str(folder), "--folder-only"])
    assert "no train_gpt.py is here" in capsys.readouterr().out


def test_a_folder_that_lies_in_another_track_than_it_says_is_found(tmp_path: Path) -> None:
    folder = tiny_record.copy_of(made().record, tmp_path / verify.RECORD_TRACK / "record")
    assert status_of(folder_checks(folder), "submission.json") == verify.FAIL


def test_over_the_cap_is_found(tmp_path: Path) -> None:
    """An artifact of 16,000,000 bytes whose log counts right: with the code it is too much."""
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    log, artifact = folder / "train_seed3.log", folder / "train_seed3.artifact"
    small, code_bytes = artifact.stat().st_size, (folder / "train_gpt.py").stat().st_size
    old_hash = hashlib.sha256(artifact.read_bytes()).hexdigest()
    artifact.write_bytes(bytes(16_000_000))
    for old, new in ((f"model_bytes:{small}", "model_bytes:16000000"), (old_hash, hashlib.sha256(bytes(16_000_000)).hexdigest()),
                     (f"total_bytes:{small + code_bytes}", f"total_bytes:{16_000_000 + code_bytes}")):
        tiny_record.rewrite(log, old, new)
    detail = next(result.detail for result in folder_checks(folder) if result.rule.startswith("artifact and code"))
    assert "over the cap of 16,000,000" in detail


@pytest.mark.parametrize("what", ["train_ms", "eval_ms"])
def test_over_the_time_is_found_on_the_record_track_alone(what: str, tmp_path: Path) -> None:
    folder = tiny_record.copy_of(made().record, tmp_path / "record")
    log = folder / "train_seed3.log"
    log.write_text(re.sub(rf"^(final .* {what}:)\d+", r"\g<1>600001", log.read_text(), flags=re.MULTILINE))
    rule = "training within" if what == "train_ms" else "evaluation within"
    assert status_of(folder_checks(folder), rule) == verify.PASS
    tiny_record.rewrite(folder / "submission.json", verify.OTHER_TRACK, verify.RECORD_TRACK)
    assert status_of(folder_checks(folder), rule) == verify.FAIL


# ------------------------------------------------------------------------------------------------------------ the data


def record_and_val(data: Path) -> tuple[verify.Record, verify.ValSet, Path]:
    return verify.open_folder(made().record), verify.ValSet.load(data), data


def with_entries(data: Path, change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], folder: Path) -> Path:
    """A copy of the data whose two training shards are what `change` makes of them."""
    copy = tiny_record.copy_of(data, folder)
    paths = [copy / f"tiny_train_00000{i}.bin" for i in (0, 1)]
    for path, entries in zip(paths, change(*(np.frombuffer(path.read_bytes(), "<u2")[512:] for path in paths))):
        path.write_bytes(tiny.shard_bytes(entries))
    return copy


def disjoint(data: Path) -> verify.Result:
    return verify.check_disjoint(*record_and_val(data))


def test_a_validation_document_in_the_training_data_is_found(tmp_path: Path) -> None:
    """Even where the document runs across the border of two shards."""
    assert disjoint(made().data).status == verify.PASS
    stolen = tiny.documents(16, seed=2)[9]

    def insert(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        second = second[np.flatnonzero(second == 1)[0]:]
        return np.concatenate([first, stolen[:7]]), np.concatenate([stolen[7:], second])

    result = disjoint(with_entries(made().data, insert, tmp_path / "data"))
    assert result.status == verify.FAIL and " 1 equal " in result.detail


@pytest.mark.parametrize("change", ["one token", "the beginning cut off", "between two others"])
def test_a_validation_document_but_for_some_tokens_is_found(change: str, tmp_path: Path) -> None:
    stolen = max(tiny.documents(16, seed=2), key=len).copy()
    stolen[len(stolen) // 2] = 63 if stolen[len(stolen) // 2] != 63 else 62
    if change == "the beginning cut off":
        stolen = np.append(1, stolen[20:])
    if change == "between two others":
        stolen = np.concatenate([tiny.documents(1, seed=8)[0], stolen[1:], tiny.documents(1, seed=9)[0][1:]])
    data = with_entries(
        made().data, lambda first, second: (np.concatenate([stolen, first[: len(first) - len(stolen)]]), second), tmp_path / "data"
    )
    result = disjoint(data)
    assert result.status == verify.FAIL and "1 of these there in large part" in result.detail


def test_other_training_data_than_the_log_says_is_found_and_missing_data_is_not_checkable(tmp_path: Path) -> None:
    fewer = disjoint(with_entries(made().data, lambda first, second: (first[:-7], second), tmp_path / "fewer"))
    assert fewer.status == verify.FAIL and "the log trained on" in fewer.detail
    data = tiny_record.copy_of(made().data, tmp_path / "data")
    shutil.copy(data / "tiny_train_000001.bin", data / "tiny_train_000002.bin")
    assert disjoint(data).status == verify.FAIL
    for name in ("tiny_train_000002.bin", "tiny_train_000001.bin", "tiny_train_000000.bin"):
        (data / name).unlink()
        assert disjoint(data).status == (verify.PASS if name.endswith("2.bin") else verify.UNKNOWN)


def test_another_validation_set_than_the_log_says_is_found(tmp_path: Path) -> None:
    other = tiny.write_dataset(tmp_path / "data", train_docs=60, val_docs=15)
    assert verify.check_which_data(*record_and_val(other)).status == verify.FAIL
    record, val, data = record_and_val(made().data)
    assert verify.check_which_data(record, val, data).status == verify.PASS
    record.track = "10min_16mb"
    assert verify.check_which_data(record, val, data).status == verify.FAIL


@pytest.mark.parametrize("version", ["lossless_caps_caseops_v1", "lossless_caps_caseops_v2"])
def test_a_sidecar_that_charges_too_much_is_found(version: str, tmp_path: Path) -> None:
    """The 3 bytes of an operator are no bytes of the text; made with the real tokenizer."""
    import sentencepiece

    from caseops_tokenizer import Tokenizer
    from lossless_caps import VERSIONS, ByteCounter
    from prepare_caseops_data import OUR_TOKENIZERS

    model, transform = OUR_TOKENIZERS[version], VERSIONS[version]
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    text = "A Tale of TWO Cities,\n  by McDonald \u2013 na\u00efve \ue001 \ufb01ne"
    ids = np.array([1, *tokenizer.encode(transform.encode(text))], np.uint16)
    counter = ByteCounter(transform)
    pieces = Tokenizer(model).pieces
    counts = np.array([0, *(len(pieces[i]) for i in ids[1:])], np.uint16)
    decoded = b"".join(pieces[i] for i in ids[1:]).decode()
    operators = len(decoded.encode()) - counter.feed(decoded)
    record = verify.open_folder(made().record)
    record.runs[0].settings["CASEOPS_VERSION"] = version
    # The operators' bytes are taken from the first tokens that have enough; only the sum of a document is compared.
    honest = counts.copy()
    for i in np.flatnonzero(np.isin(ids, range(4, 8)))[: operators // 3]:
        honest[i] = 0
    documents = tmp_path / "docs.jsonl"
    documents.write_text('{"text": "another text"}\n')
    for charged, compared, status in ((honest, None, verify.PASS), (counts, None, verify.FAIL), (honest, documents, verify.FAIL)):
        assert verify.check_bytes(record, verify.ValSet(ids, charged), model, compared).status == status
