"""Section 1: the record's settings, word for word, and what a wrong one is told."""

from __future__ import annotations

import re
from dataclasses import Field, fields
from pathlib import Path

import pytest

import train_gpt as tg

RECORDS = Path(tg.__file__).parent / "records"
PUBLISHED_COMMAND = (
    "DATA_DIR=./data CASEOPS_ENABLED=1 PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=2000 PHASED_TTT_NUM_PHASES=3 "
    "MLP_CLIP_SIGMAS=12.0 ATTN_CLIP_SIGMAS=13.0 EMBED_BITS=7 EMBED_CLIP_SIGMAS=15.0 MATRIX_LR=0.026 GPTQ_RESERVE_SECONDS=4 "
    "GPTQ_CALIBRATION_BATCHES=16 GATED_ATTN_ENABLED=1 GATED_ATTN_INIT_STD=0.005 GATED_ATTN_QUANT_GATE=1 "
    "TRAIN_LOOP_PHASE_DEPTHS=1,3,4 TRAIN_LOOP_PREWARM_DEPTHS=3,4 EVAL_LOOP_DEPTH=4"
)
PUBLISHED_DEFAULTS = (
    "ITERATIONS 20000, MAX_WALLCLOCK_SECONDS 600, WARMUP_STEPS 20, WARMDOWN_FRAC 0.75, MIN_LR 0, TRAIN_BATCH_TOKENS 786432, "
    "TRAIN_SEQ_LEN 2048, EVAL_SEQ_LEN 2048, VAL_BATCH_TOKENS 524288, VAL_LOSS_EVERY 4000, TRAIN_LOG_EVERY 500, VOCAB_SIZE 8192, "
    "NUM_LAYERS 11, MODEL_DIM 512, NUM_HEADS 8, NUM_KV_HEADS 4, MLP_MULT 4, XSA_LAST_N 11, ROPE_BASE 10000, ROPE_DIMS 16, "
    "QK_GAIN_INIT 5, LOGIT_SOFTCAP 30, LN_SCALE 1, SKIP_GATES_ENABLED 1, TIED_EMBED_INIT_STD 0.005, NUM_LOOPS 2, LOOP_START 3, "
    "LOOP_END 5, ENABLE_LOOPING_AT 0.35, PARALLEL_START_LAYER 8, PARALLEL_FINAL_LANE mean, TIED_EMBED_LR 0.03, SCALAR_LR 0.02, "
    "MUON_MOMENTUM 0.97, MUON_MOMENTUM_WARMUP_START 0.92, MUON_MOMENTUM_WARMUP_STEPS 1500, MUON_BACKEND_STEPS 5, "
    "MUON_ROW_NORMALIZE 1, MUON_WD 0.095, EMBED_WD 0.085, ADAM_WD 0.02, BETA1 0.9, BETA2 0.95, ADAM_EPS 1e-8, GRAD_CLIP_NORM 0.3, "
    "EMA_DECAY 0.9965, COMPRESSOR brotli, MATRIX_BITS 6, EMBED_BITS 7, MATRIX_CLIP_SIGMAS 12.85, MLP_CLIP_SIGMAS 12, "
    "ATTN_CLIP_SIGMAS 13, EMBED_CLIP_SIGMAS 15, TTT_ENABLED 1, TTT_LORA_RANK 96, TTT_LORA_LR 1e-4, TTT_CHUNK_SIZE 48, "
    "TTT_EVAL_SEQ_LEN 2048, TTT_BATCH_SIZE 64, TTT_GRAD_STEPS 1, TTT_WEIGHT_DECAY 0.5, TTT_BETA1 0, TTT_BETA2 0.999, "
    "TTT_K_LORA 1, TTT_O_LORA 1, TTT_MLP_LORA 1, VAL_DOC_FRACTION 1, GLOBAL_TTT_LR 1e-3, GLOBAL_TTT_MOMENTUM 0.9, "
    "GLOBAL_TTT_EPOCHS 1, GLOBAL_TTT_CHUNK_TOKENS 32768, GLOBAL_TTT_BATCH_SEQS 32, GLOBAL_TTT_GRAD_CLIP 1"
)


def test_no_variables_and_the_published_command_give_the_same_settings() -> None:
    command = dict(word.split("=", 1) for word in PUBLISHED_COMMAND.split())
    assert tg.Config.from_env(command) == tg.Config.from_env({}) == tg.Config()
    for name, value in command.items():
        assert tg.format_setting(getattr(tg.Config(), name.lower())) == value.removesuffix(".0")


def test_defaults_are_the_records() -> None:
    for words in PUBLISHED_DEFAULTS.split(", "):
        name, value = words.split()
        field = next(f for f in fields(tg.Config) if f.name == name.lower())
        assert tg.parse_setting(field, value) == field.default, name


@pytest.mark.parametrize("path", sorted(RECORDS.rglob("*.env")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_environment_files_of_the_records_are_accepted(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    known = {f.name.upper() for f in fields(tg.Config)} | {"NCCL_NET"}  # NCCL's own
    assert len(settings) == len(lines) and settings.keys() <= known
    tg.Config.from_env(settings)


@pytest.mark.parametrize(("setting", "told"), [
    ("MATRIX_LR=fast", "a number"), ("MATRIX_LR=nan", "a number"), ("MATRIX_LR=inf", "a number"), ("NUM_LAYERS=2.5", "a whole number"),
    ("NUM_LAYERS=0", "from 1 to 256"), ("EMA_DECAY=1.5", "below 1"), ("COMPRESSOR=zip", "brotli"), ("TTT_ENABLED=yes", "0 or 1"),
    ("TRAIN_LOOP_PHASE_DEPTHS=1,x", "commas"), ("TRAIN_LOOP_PHASE_DEPTHS=0,1", "from 1 to 64"), ("RUN_ID=../x", "letters"),
])
def test_a_wrong_value_names_variable_value_and_what_is_allowed(setting: str, told: str) -> None:
    name, value = setting.split("=")
    with pytest.raises(ValueError) as raised:
        tg.Config.from_env({name: value})
    assert name in str(raised.value) and repr(value) in str(raised.value) and told in str(raised.value)


@pytest.mark.parametrize("settings", ["MODEL_DIM=100", "NUM_KV_HEADS=3", "ROPE_DIMS=66", "LOOP_START=6", "LOOP_END=8",
                                      "TRAIN_LOOP_PHASE_FRACTIONS=1,2", "GPTQ_RESERVE_SECONDS=600", "TRAIN_BATCH_TOKENS=1001",
                                      "VAL_BATCH_TOKENS=1024", "TTT_CHUNK_SIZE=4096"])
def test_settings_that_contradict_each_other_are_named_with_their_values(settings: str) -> None:
    with pytest.raises(ValueError, match=settings.split("=")[0]) as raised:
        tg.Config.from_env(dict([settings.split("=")]))
    assert "here: " in str(raised.value)


def test_misspelt_settings_are_named_with_the_one_meant() -> None:
    environ = {"TTT_LORA_RNK": "8", "MATRIX_LRR": "1", "PATH": "/bin", "HOME": "/", "MASTER_PORT": "1", "TTT_LORA_RANK": "8"}
    assert tg.misspelt_settings(environ) == [("MATRIX_LRR", "MATRIX_LR"), ("TTT_LORA_RNK", "TTT_LORA_RANK")]


def test_settings_print_as_they_are_written() -> None:
    for f in fields(tg.Config):
        assert tg.parse_setting(f, tg.format_setting(f.default)) == f.default, f.name


@pytest.mark.parametrize("text", ["1_0", "\u0661", "\uff11", "nan", "inf", "-inf", "1e", "0x10", "1,0", "1 0", "1\n0", "",
                                  "9" * 50, "1e400", "--1"])
def test_what_only_looks_like_a_number_is_refused(text: str) -> None:
    for f in fields(tg.Config):
        if tg.SETTING_TYPES[f.name] in (int, float):
            with pytest.raises(ValueError, match=f.name.upper()):
                tg.parse_setting(f, text)


def test_no_text_can_forge_a_line_of_the_log() -> None:
    for f in fields(tg.Config):
        if tg.SETTING_TYPES[f.name] is str:
            for text in ("a\nfinal seed:0", "a\rb", "a\u2028b", "a\x1b[2Jb", "x" * 1001):
                with pytest.raises(ValueError, match=f.name.upper()):
                    tg.parse_setting(f, text)


def ends_of(f: Field) -> list[tuple[object, bool]]:
    """Values of a number at and just outside the ends of its rule, read from the rule's words, and whether they are allowed."""
    kind, number = tg.SETTING_TYPES[f.name], r"(-?[0-9.]+(?:e[+-]?[0-9]+)?)"
    words = f.metadata["check"].text
    low, high = re.search(rf"(?:from|above) {number}(?: to below|, up to| to) {number}", words).groups()
    low, high = (kind(float(v)) for v in (low, high))
    if kind is int:
        return [(low, True), (low - 1, False), (low + 1, True), (high - 1, True)]
    return [
        (low, "above" not in words), (low - 1e-9 * max(1, abs(low)), False), (high, "below" not in words),
        (high * (1 + 1e-9) + 1e-9, False),
    ]


NUMBERS = [f for f in fields(tg.Config) if tg.SETTING_TYPES[f.name] in (int, float)]


@pytest.mark.parametrize("f", NUMBERS, ids=lambda f: f.name)
def test_every_number_is_allowed_to_its_ends_and_no_further(f: Field) -> None:
    for value, allowed in ends_of(f):
        if allowed:
            assert tg.parse_setting(f, repr(value)) == value
        else:
            with pytest.raises(ValueError, match=f.name.upper()):
                tg.parse_setting(f, repr(value))


def test_flags_and_words_take_their_values_and_no_others() -> None:
    for f in fields(tg.Config):
        if tg.SETTING_TYPES[f.name] is bool:
            assert [tg.parse_setting(f, text) for text in "01"] == [False, True]
            for text in ("2", "true", "", "-1"):
                with pytest.raises(ValueError):
                    tg.parse_setting(f, text)
        elif f.metadata["check"].text.startswith("one of "):
            for word in f.metadata["check"].text.removeprefix("one of ").split(", "):
                assert tg.parse_setting(f, word) == word
