"""Every setting at the ends of what its rule allows, through a tiny run: a finite score or one line, never a traceback."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import Field
from pathlib import Path

import forked
import pytest
import tiny

import train_gpt as tg

FEW = {"TTT_ENABLED": 1, "ITERATIONS": 2, "CHECKPOINT_EVERY": "", "TTT_CHUNK_SIZE": 16, "PHASED_TTT_PREFIX_DOCS": 3,
       "PHASED_TTT_LEAVE_OUT": 0, "GLOBAL_TTT_CHUNK_TOKENS": 32, "PHASED_TTT_NUM_PHASES": 2, "VAL_BATCH_TOKENS": 1024}
ONE_LAYER = {"NUM_LAYERS": 1, "LOOP_START": 0, "LOOP_END": 0, "PARALLEL_START_LAYER": 1, "ITERATIONS": 1, "TTT_ENABLED": 0}
THIN = {"MODEL_DIM": 4, "GATE_WINDOW": 4, "NUM_HEADS": 1, "NUM_KV_HEADS": 1, "ROPE_DIMS": 0}
ONE_DOCUMENT = {"VAL_DOC_FRACTION": 0.01, "PHASED_TTT_PREFIX_DOCS": 0, "TTT_BATCH_SIZE": 1, "TTT_CHUNK_SIZE": 64}
TTT_OF_LITTLE = ONE_LAYER | THIN | ONE_DOCUMENT | {"TTT_ENABLED": 1}
RECORD_LOOPS = {"LOOP_START": 3, "LOOP_END": 5, "PARALLEL_START_LAYER": 8, "NUM_LAYERS": 11}
LONG = "x" * 1000
CAPPED = {"MAX_WALLCLOCK_SECONDS": 2, "GPTQ_RESERVE_SECONDS": 0}
# What a value needs beside it to be cheap, or to be allowed at all
ALONG: dict[tuple[str, object], dict[str, object]] = {
    ("ITERATIONS", 10**9): CAPPED, ("ITERATIONS", 20000): CAPPED, ("GPTQ_CALIBRATION_BATCHES", 10**6): {"MAX_WALLCLOCK_SECONDS": 100},
    ("TRAIN_BATCH_TOKENS", 2**26): {"MICRO_BATCH_TOKENS": 2**26},
    ("MICRO_BATCH_TOKENS", 1): {"TRAIN_BATCH_TOKENS": 16, "ITERATIONS": 1, "GPTQ_CALIBRATION_BATCHES": 1},
    ("NUM_LAYERS", 256): ONE_LAYER | THIN | {"MLP_MULT": 1, "TRAIN_BATCH_TOKENS": 16, "VAL_DOC_FRACTION": 0.01},
    ("NUM_LAYERS", 1): ONE_LAYER, ("NUM_LAYERS", 11): RECORD_LOOPS,
    ("LOOP_START", 3): RECORD_LOOPS, ("LOOP_END", 5): RECORD_LOOPS, ("LOOP_END", 0): {"LOOP_START": 0},
    ("PARALLEL_START_LAYER", 8): RECORD_LOOPS,
    ("MODEL_DIM", 2): THIN | {"GATE_WINDOW": 2},
    ("MODEL_DIM", 512): ONE_LAYER | {"MLP_MULT": 1, "TRAIN_BATCH_TOKENS": 32, "COMPRESSOR": "rans"},
    ("NUM_HEADS", 256): ONE_LAYER | {"MODEL_DIM": 256, "ROPE_DIMS": 0}, ("NUM_HEADS", 1): {"NUM_KV_HEADS": 1},
    ("NUM_HEADS", 8): {"ROPE_DIMS": 2},
    ("NUM_KV_HEADS", 256): ONE_LAYER | {"MODEL_DIM": 256, "NUM_HEADS": 256, "ROPE_DIMS": 0}, ("ROPE_DIMS", 16): {"MODEL_DIM": 64},
    ("GATE_WINDOW", 12): {"MLP_GATE_ENABLED": 1}, ("GATE_WINDOW", 1): {"MLP_GATE_ENABLED": 1},
    ("VOCAB_SIZE", 65536): ONE_LAYER | THIN | {"TRAIN_BATCH_TOKENS": 64}, ("VOCAB_SIZE", 8192): ONE_LAYER | THIN,
    ("NUM_LOOPS", 63): {"TRAIN_LOOP_PHASE_DEPTHS": "none", "TTT_ENABLED": 0, "ITERATIONS": 1},
    ("EVAL_LOOP_DEPTH", 64): {"TTT_ENABLED": 0, "ITERATIONS": 1}, ("TRAIN_LOOP_PHASE_DEPTHS", (64,)): {"TTT_ENABLED": 0, "ITERATIONS": 1},
    ("TTT_LORA_RANK", 4096): ONE_DOCUMENT, ("TTT_GRAD_STEPS", 100): TTT_OF_LITTLE, ("TTT_CHUNK_SIZE", 1): TTT_OF_LITTLE,
    ("TTT_CHUNK_SIZE", 2**16): TTT_OF_LITTLE | {"TTT_EVAL_SEQ_LEN": 2**16},
    ("TTT_CHUNK_SIZE", 48): {"TTT_EVAL_SEQ_LEN": 48}, ("TTT_CHUNK_DOUBLES_AT", (64,)): {"TTT_CONTEXT": "cache"},
    ("GLOBAL_TTT_EPOCHS", 1000): {
        "GLOBAL_TTT_CHUNK_TOKENS": 1000, "PHASED_TTT_PREFIX_DOCS": 1, "TTT_BATCH_SIZE": 1, "PHASED_TTT_NUM_PHASES": 1},
    ("EVAL_SEQ_LEN", 2048): {"VAL_BATCH_TOKENS": 16384}, ("EVAL_SEQ_LEN", 2**20): {"VAL_BATCH_TOKENS": 2**23},
    ("VAL_BATCH_TOKENS", 16): {"EVAL_SEQ_LEN": 2},
}
REFUSED = {  # what no machine, no artifact or no tiny run has room for: a line says so
    ("MODEL_DIM", 4096), ("ROPE_DIMS", 4096), ("GATE_WINDOW", 4096), ("TRAIN_BATCH_TOKENS", 2**26), ("GPTQ_CALIBRATION_BATCHES", 10**6),
    ("LOOP_START", 255), ("LOOP_END", 255), ("TTT_EVAL_SEQ_LEN", 2), ("PARALLEL_START_LAYER", 0), ("TTT_CHUNK_DOUBLES_AT", (1,)),
    ("VOCAB_SIZE", 8), ("CASEOPS_ENABLED", False), ("EVAL_ONLY", True), ("ATTN_BACKEND", "fa3"), ("ATTN_BACKEND", "fa4"),
    ("ATTN_BACKEND", "varlen"), ("DATA_PATH", ""),
    ("DATA_PATH", LONG), ("DATA_DIR", LONG), ("ARTIFACT_DIR", LONG), ("TOKENIZER_PATH", LONG), ("LOSSES_PATH", LONG),
}
BY_NAME = {"CASEOPS_VERSION", "TTT_SHORT_CHUNKS", "NGRAM_TILT_BETAS"}  # must fit the data, or have a form that their own tests try
SIGNALLED = {("WARMUP_STEPS", 10**6): 3}  # goes on for as long as one likes: ended at so many steps
ELSEWHERE = {("ARTIFACT_DIR", ""), ("TRAIN_BATCH_TOKENS", 786432), ("COMPILE", "1")}  # writes where it stands; minutes on a CPU


def extremes(f: Field) -> tuple[list[object], list[str]]:
    """The least, largest and default values of a setting, or all its values where they can be counted; and texts just outside."""
    kind, check = tg.SETTING_TYPES[f.name], f.metadata["check"]
    if kind is bool:
        return [False, True], ["2", "-1", "true"]
    if kind is str:
        words = ["", "x" * 100, LONG, "1", "1s", "9" * 9, "9" * 9 + "s"]
        if check.text.startswith("one of "):
            words = check.text.removeprefix("one of ").split(", ")
        words = ["", LONG] if check is tg.TEXT else words
        return [word for word in words if check.accepts(word)], ["a\nb", "x" * 1001, "\x1b[2J"]
    if kind not in (int, float):
        item = [v for v in (1, 64) if check.accepts((v,))]
        return [(), *((v,) for v in item)], ["0", ",".join(["1"] * 17), "1,,1", "1;2"]
    low, high = (kind(float(word.rstrip(","))) for word in check.text.split() if word[0].isdigit() or word[0] == "-")
    step = 1 if kind is int else 1e-9 + 1e-9 * abs(high)
    outside = [low - step if check.accepts(low) else low, high + step if check.accepts(high) else high]
    low = low if check.accepts(low) else math.nextafter(low, high)
    high = high if check.accepts(high) else math.nextafter(high, low)
    return [low, high, f.default], [repr(v) for v in outside]


def cases() -> Iterator[tuple[str, object]]:
    """(name, value) of every setting, but for values that all other runs have."""
    common = {**tiny.SETTINGS, **forked.SMALL, **FEW}
    for f in tg.fields(tg.Config):
        usual = common.get(f.name.upper(), tg.format_setting(f.default))
        for value in dict.fromkeys(extremes(f)[0]):
            if tg.format_setting(value) != str(usual) and (f.name.upper(), value) not in ELSEWHERE:
                yield f.name.upper(), value


@pytest.fixture(scope="module")
def few_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("few"), train_docs=20, val_docs=4)


def outcome(data: Path, out: Path, fault: forked.Fault | None = None, **changes: object) -> tuple[int, str]:
    """Exit status of a tiny run and what it said, which must be a finite score or an error in a line."""
    out.mkdir(parents=True, exist_ok=True)
    said = out / "said"
    status, = forked.run(forked.environment(data, out, **FEW | changes), fault=fault, said=said)
    text = said.read_text(errors="replace")
    expected = (0, 2, 3) if fault is None else (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in text and status in expected, (changes, status, text[-1500:])
    if fault is not None:
        return status, text
    finals = tiny.records(text, "final")
    assert len(finals) == (status != 2) and all(math.isfinite(float(f["val_bpb"])) for f in finals), (changes, text[-1500:])
    assert status == 0 or any(line.startswith("error: ") for line in text.splitlines()), changes
    return status, text


@pytest.mark.parametrize(("name", "value"), cases(), ids=str)
def test_a_setting_at_the_end_of_its_rule_gives_a_score_or_a_line(few_data: Path, tmp_path: Path, name: str, value: object) -> None:
    steps = SIGNALLED.get((name, value))
    fault = forked.at_call(tg.Trainer, "train_step", steps, lambda: os.kill(os.getpid(), signal.SIGTERM)) if steps else None
    status, text = outcome(few_data, tmp_path / "out", fault, **ALONG.get((name, value), {}) | {name: tg.format_setting(value)})
    assert (status == tg.EXIT_USER_ERROR) == ((name, value) in REFUSED or (name in BY_NAME and value != ())), text[-1000:]


def test_what_is_just_outside_a_rule_is_refused_before_anything_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tried = 0
    for f in tg.fields(tg.Config):
        for text in extremes(f)[1]:
            assert tg.main({"ARTIFACT_DIR": str(tmp_path / "out"), f.name.upper(): text}, []) == tg.EXIT_USER_ERROR, (f.name, text)
            said = capfd.readouterr().err
            assert said.startswith(f"error: {f.name.upper()}") and said.count("\n") == 1, (f.name, text, said)
            tried += 1
    assert tried > 250 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [
    {"PHASED_TTT_NUM_PHASES": 1000}, {"PHASED_TTT_PREFIX_DOCS": 0}, {"PHASED_TTT_PREFIX_DOCS": 2, "PHASED_TTT_NUM_PHASES": 3},
    {"GLOBAL_TTT_EPOCHS": 0}, {"TTT_CONTEXT": "cache"}, {"TTT_CONTEXT": "cache", "TTT_CHUNK_DOUBLES_AT": "32,64"},
    {"MLP_GATE_ENABLED": 1, "SMEAR_GATE_ENABLED": 1},
    {"TRAIN_BATCH_TOKENS": 16}, {"TRAIN_BATCH_TOKENS": 8}, {"QUANTIZER": "trellis", "COMPRESSOR": "rans"}, {"RUN_ID": "r" * 100},
], ids=str)
def test_settings_together_give_a_score_or_a_line(few_data: Path, tmp_path: Path, changes: dict) -> None:
    outcome(few_data, tmp_path / "out", **changes)


@pytest.mark.parametrize("changes", [
    {"TTT_LORA_LR": 10, "TTT_WEIGHT_DECAY": 1000}, {"GLOBAL_TTT_LR": 10, "GLOBAL_TTT_GRAD_CLIP": 0, "GLOBAL_TTT_EPOCHS": 50},
    {"MATRIX_LR": 10, "TIED_EMBED_LR": 10, "SCALAR_LR": 10, "GRAD_CLIP_NORM": 0, "ITERATIONS": 30},
], ids=str)
def test_huge_learning_rates_end_in_a_line_or_a_number(few_data: Path, tmp_path: Path, changes: dict) -> None:
    outcome(few_data, tmp_path / "out", **changes)


@pytest.mark.parametrize("documents", [1, 2])
def test_a_validation_set_of_one_or_two_documents_is_scored(tmp_path: Path, documents: int) -> None:
    data = tiny.write_dataset(tmp_path / "data", train_docs=20, val_docs=documents)
    assert outcome(data, tmp_path / "out", PHASED_TTT_PREFIX_DOCS=24, PHASED_TTT_NUM_PHASES=3)[0] == 0
