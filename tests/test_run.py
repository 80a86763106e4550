"""Section 13: whole runs as their users start them: what must hold at the end, and what a wrong start is told."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
import tiny

import train_gpt as tg


def eval_only(data: Path, out: Path, artifact: Path, **changes: object) -> dict[str, str]:
    """EVAL_ONLY with no setting but where things are."""
    given = {"EVAL_ONLY", "ARTIFACT_PATH", "DATA_PATH", "ARTIFACT_DIR", "EVAL_BUDGET_SECONDS", *changes}
    env = tiny.environment(data, out, EVAL_ONLY=1, ARTIFACT_PATH=artifact, **changes)
    return {name: value for name, value in env.items() if name in given or name.lower() not in tg.SETTING_TYPES}


def scores(log: str) -> dict[str, dict[str, str]]:
    return {e["name"]: {k: v for k, v in e.items() if k != "time_ms"} for e in tiny.records(log, "eval")}


def test_loss_falls_quantization_costs_little_and_ttt_gains(one_rank) -> None:
    losses = [float(r["loss"]) for r in tiny.records(one_rank.log, "train")]
    assert losses[-1] < losses[0] - 1
    bpb = {name: float(e["val_bpb"]) for name, e in scores(one_rank.log).items()}
    assert abs(bpb["quantized"] - bpb["ema"]) < 0.05 and bpb["quantized_ttt"] < bpb["quantized"]
    with np.load(one_rank.out / "losses.npz") as losses:
        assert {name: float(nats.mean()) for name, nats in losses.items()} == {
            name: pytest.approx(float(e["val_loss"]), abs=1e-6) for name, e in scores(one_rank.log).items()}
    final = tiny.records(one_rank.log, "final")[0]
    assert float(final["val_bpb"]) == bpb["quantized_ttt"] and float(final["pre_ttt_bpb"]) == bpb["quantized"]


def test_artifact_in_a_fresh_process_without_training_data_scores_what_the_log_says(one_rank, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(one_rank.data, data, ignore=shutil.ignore_patterns("*_train_*"))
    shutil.copy(one_rank.out / "run.artifact", tmp_path / "elsewhere")
    done = tiny.run(eval_only(data, tmp_path / "out", tmp_path / "elsewhere"))
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = scores(done.stdout), scores(one_rank.log)
    assert found == {name: expected[name] for name in ("quantized", "quantized_ttt")}


SCORE_SETTINGS = {"SEED": 11, "EVAL_SEQ_LEN": 32, "TTT_LORA_RANK": 3, "TTT_LORA_LR": 0.01, "TTT_CHUNK_SIZE": 8, "TTT_WEIGHT_DECAY": 0.1,
                  "GLOBAL_TTT_LR": 0.01, "PHASED_TTT_NUM_PHASES": 2, "TTT_BETA2": 0.9}


def test_the_artifact_alone_carries_how_it_is_scored_and_the_environment_wins_only_there(tiny_data: Path, tmp_path: Path) -> None:
    env = forked.environment(tiny_data, tmp_path / "run", **SCORE_SETTINGS, TTT_ENABLED=1)
    said = [tmp_path / name for name in ("trained", "alone", "rank", "width")]
    assert forked.run(env, said=said[0]) == [0]
    alone = eval_only(tiny_data, tmp_path / "out", tmp_path / "run" / "run.artifact")
    for changes, path in zip(({}, {"TTT_LORA_RANK": "5"}, {"MODEL_DIM": "256"}), said[1:]):
        assert forked.run({**alone, **changes}, said=path) == [0]
    trained, by_itself, rank, width = (scores(path.read_text()) for path in said)
    expected = {name: trained[name] for name in ("quantized", "quantized_ttt")}
    assert by_itself == width == expected
    assert rank["quantized"] == expected["quantized"] and rank["quantized_ttt"] != expected["quantized_ttt"]
    differing = [[line for line in path.read_text().splitlines() if "differs from the artifact's" in line] for path in said]
    assert [len(lines) for lines in differing] == [0, 0, 1, 1]
    assert "TTT_LORA_RANK=5" in differing[2][0] and "MODEL_DIM=256" in differing[3][0]


def test_the_packed_file_makes_the_same_artifact(tiny_data: Path, tmp_path: Path) -> None:
    """And counts itself as the readable one counts it: all that differs is what is said of the source."""
    packed = tmp_path / "packed" / "train_gpt.py"
    packed.parent.mkdir()
    packed.write_bytes(tg.counted_code())
    files = []
    for name, script in (("readable", tiny.ROOT / "train_gpt.py"), ("packed", packed)):
        env = forked.environment(tiny_data, tmp_path / name, ITERATIONS=2)
        done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
        code, size = tiny.records(done.stdout, "code")[0], tiny.records(done.stdout, "artifact")[0]
        files.append(((tmp_path / name / "run.artifact").read_bytes(), scores(done.stdout), code["sha256"], size["total_bytes"]))
        source = tg.own_source() if name == "readable" else tg.shipped_source(tg.own_source())
        assert (code["source_bytes"], code["source_sha256"]) == (str(len(source.encode())), tg.hashlib.sha256(source.encode()).hexdigest())
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "piece", ['"""a""" """"b""" \'\' "" "c"', "f'{1 + 2 !r:>{9}} {{x}}' f\"y\"", "[1 if 2else 3, -  -5, not(6), 0x1f]"]
)
def test_packing_leaves_out_what_changes_nothing(piece: str) -> None:
    """Blanks, comments, docstrings, and the annotations that no decorator reads."""
    source = f'''"""Words."""  # words

@decorate(
    1)  # words
def first(a: int, *, b: "str" = {piece}, **c: T[1, 2]) -> None:
    """Words
    and words."""
    def second(x: int = 1, /, *y: int) -> dict[int,
                                               int]:
        z: int = {piece}; return z  # words

        "no docstring"


class Third:
    """Words."""
    field: int = (1,   2)
    def third(self: T) -> T: "words"
    @property
    def fourth(self: T) -> T: "words"
if not PACKED:
    def fifth(a: int) -> None:
        """Words."""
        return f"b{{a}}"

    sixth = fifth(1)
seventh = 8
'''
    expected = f'''
@decorate(1)
def first(a: int, *, b: "str" = {piece}, **c: T[1, 2]) -> None:
    def second(x = 1, /, *y):
        z: int = {piece}; return z
        "no docstring"
class Third:
    field: int = (1, 2)
    def third(self): "words"
    @property
    def fourth(self): "words"
seventh = 8
'''
    shipped = tg.shipped_source(source)
    assert ast.dump(ast.parse(shipped)) == ast.dump(ast.parse(expected)) and "#" not in shipped and "  field" not in shipped
    assert tg.shipped_source(shipped) == shipped


def test_packing_puts_simple_statements_on_one_line() -> None:
    source = '''a = 1
b = 2  # words
def f(x):
    """Words."""
    y = x

    y += 1
    if y:
        for z in (1,
                  2):
            y = z; x = y
            y = x
    else:
        return 3
    return y
class C:
    """Words."""
    d: int = 1
    e: int = 2
try:
    import g
except E:
    while True:
        break
        with f(1): pass
finally:
    i = 3
'''
    shipped = tg.shipped_source(source)
    assert shipped == ("a=1;b=2\ndef f(x):\n y=x;y+=1\n if y:\n  for z in(1,2):y=z;x=y;y=x\n else:return 3\n return y\n"
                       "class C:d:int=1;e:int=2\ntry:import g\nexcept E:\n while True:\n  break\n  with f(1):pass\nfinally:i=3\n")
    assert tg.shipped_source(shipped) == shipped


def test_an_f_string_that_python_takes_apart_is_packed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on it is several tokens, whose blanks are text."""
    source = 'x = f"a  {b!r:>{c}} {{d}}"  # words\ny = f\'\'\'e  {f"g  {h}"}\n    i\'\'\'\n'
    expected, tokens = tg.shipped_source(source), tg.tokenize.generate_tokens

    def in_pieces(readline) -> Iterator[tg.tokenize.TokenInfo]:
        for token in tokens(readline):
            if not token.string.startswith("f"):
                yield token
                continue
            (row, column), (last, end) = token.start, token.end
            quotes = 3 if "'''" in token.string else 1
            marks = [*((row, column + n) for n in (0, 1 + quotes, 7, 9, 10, 11)), (last, end - quotes), (last, end)]
            for kind, start, stop in zip((900, 901, 900, 901, 902, 901, 902), marks, marks[1:]):
                start = (start[0], start[1] + (kind == 901 and start == marks[3]))  # a bracket that is doubled belongs to no token
                yield tg.tokenize.TokenInfo(kind, "?", start, stop, token.line)

    names = {900: "FSTRING_START", 901: "FSTRING_MIDDLE", 902: "FSTRING_END"}
    monkeypatch.setattr(tg.tokenize, "tok_name", {**tg.tokenize.tok_name, **names})
    monkeypatch.setattr(tg.tokenize, "generate_tokens", in_pieces)
    assert tg.shipped_source(source) == expected and "a  {b" in expected and "\n    i" in expected


def test_a_packed_file_holds_every_byte_of_its_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the compressor gives, quotes and line ends and zeros before digits, comes back; packed twice it is the same file."""
    for payload in (bytes(range(256)) * 2, b'"""', b'\0007\0a\\"\\\\', b"\r\n\n\r\r\n", b'a"', b'\0', b'\\'):
        monkeypatch.setattr(tg.brotli, "compress", lambda data, payload=payload, **kinds: payload)
        text = tg.pack_code("")
        (literal,) = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute) and node.attr == "encode"]
        assert literal.value.encode("latin-1") == payload
    monkeypatch.undo()
    assert tg.pack_code(tg.shipped_source(tg.own_source())) == tg.counted_code() and len(tg.counted_code()) < 45_000


def test_two_ranks_score_the_same_artifact_the_same(one_rank, tmp_path: Path) -> None:
    env = tiny.environment(one_rank.data, tmp_path, EVAL_ONLY=1, ARTIFACT_PATH=one_rank.out / "run.artifact",
                           LOSSES_PATH=tmp_path / "losses.npz")
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
    code, source, logged = tg.counted_code(), (tiny.ROOT / "train_gpt.py").read_bytes(), tiny.records(one_rank.log, "code")[0]
    for prefix, data in (("", code), ("source_", source)):
        assert int(logged[f"{prefix}bytes"]) == len(data) and logged[f"{prefix}sha256"] == tg.hashlib.sha256(data).hexdigest()
    artifact = tiny.records(one_rank.log, "artifact")[0]
    assert int(artifact["model_bytes"]) == (one_rank.out / "run.artifact").stat().st_size
    assert int(artifact["total_bytes"]) == int(artifact["model_bytes"]) + len(code)
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
    said = told(tiny.environment(tiny_data, tmp_path, TRAIN_BATCH_TOKENS=16), ranks=3)
    assert "3 ranks do not divide TRAIN_BATCH_TOKENS=16" in said


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


def test_a_folder_that_cannot_be_written_is_told_at_once(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = tiny.run(tiny.environment(tiny_data, tmp_path / "file" / "out"))
    assert done.returncode == tg.EXIT_USER_ERROR and "set ARTIFACT_DIR" in done.stderr


@pytest.mark.parametrize("place", ["", "file/losses.npz", "/proc/losses.npz"])
def test_losses_that_cannot_be_written_are_told_before_training(place: str, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    env, said = forked.environment(tiny_data, tmp_path / "out", LOSSES_PATH=tmp_path / place), tmp_path / "said"
    assert forked.run(env, said=said) == [tg.EXIT_USER_ERROR]
    assert "LOSSES_PATH" in said.read_text() and "train step" not in said.read_text()


def test_every_long_phase_says_where_it_stands(tiny_data: Path, tmp_path: Path) -> None:
    def always() -> None:
        tg.PROGRESS_MS = 0

    said = tmp_path / "said"
    env = forked.environment(tiny_data, tmp_path / "out", GPTQ_CALIBRATION_BATCHES=2, VAL_BATCH_TOKENS=1024, TTT_ENABLED=1)
    assert forked.run(env, fault=always, said=said) == [0]
    phases = {record["phase"] for record in tiny.records(said.read_text(), "progress")}
    assert phases >= {"hessians", "pack", "eval_ema", "eval_quantized"} and tiny.records(said.read_text(), "ttt")


def test_help_ends_with_its_reader() -> None:
    done = subprocess.run(f"{sys.executable} {tiny.ROOT / 'train_gpt.py'} --help | true", shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_disk_with_no_room_for_the_artifact_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(tg.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert tg.main({"ARTIFACT_DIR": str(tmp_path / "out")}, []) == tg.EXIT_USER_ERROR
    assert "only 1 MB free" in capsys.readouterr().err and not list((tmp_path / "out").glob("*.artifact"))


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


def tg_import(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "import train_gpt"], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tiny.ROOT), "PYTHONDONTWRITEBYTECODE": "1"})


def test_two_copies_in_one_process_do_not_share_operators(tmp_path: Path) -> None:
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("another_train_gpt", shutil.copy(tiny.ROOT / "train_gpt.py", tmp_path))
    other = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = other
    try:
        spec.loader.exec_module(other)
        assert other.cross_entropy_op._qualname.startswith("another_train_gpt::") and tg.cross_entropy_op._qualname.startswith(
            "train_gpt::"
        )
        logits, targets = torch.zeros(3, 8), torch.zeros(3, dtype=torch.long)
        assert torch.equal(other.softcapped_cross_entropy(logits, targets, 30.0), tg.softcapped_cross_entropy(logits, targets, 30.0))
    finally:
        del sys.modules[spec.name]
