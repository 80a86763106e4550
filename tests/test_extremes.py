"""Every setting at the ends of what its rule allows, through a tiny run: a finite score or one line, never a traceback."""

from __future__ import annotations

import math
from pathlib import Path

import forked
import pytest
import tiny

import train_gpt as tg

# What takes long, or more memory than a test may have, at its largest
EXPENSIVE = {"iterations", "warmup_steps", "train_batch_tokens", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult",
             "vocab_size", "num_loops", "ttt_lora_rank", "ttt_grad_steps", "global_ttt_epochs", "gptq_calibration_batches",
             "muon_backend_steps", "eval_loop_depth", "checkpoint_every", "rope_dims", "gate_window"}
FEW = {"TTT_ENABLED": 1, "ITERATIONS": 2, "CHECKPOINT_EVERY": "", "TTT_CHUNK_SIZE": 16, "PHASED_TTT_PREFIX_DOCS": 3,
       "PHASED_TTT_LEAVE_OUT": 0, "GLOBAL_TTT_CHUNK_TOKENS": 32, "PHASED_TTT_NUM_PHASES": 2, "VAL_BATCH_TOKENS": 1024}


def ends() -> list[tuple[str, str]]:
    """(name, value) of every number's least and largest value."""
    found = []
    for f in tg.fields(tg.Config):
        if tg.SETTING_TYPES[f.name] not in (int, float):
            continue
        bounds = [word.rstrip(",") for word in f.metadata["check"].text.split() if word[0].isdigit() or word[0] == "-"]
        kind = tg.SETTING_TYPES[f.name]
        low, high = (kind(float(b)) for b in bounds)
        low = low if f.metadata["check"].accepts(low) else math.nextafter(low, high)
        high = high if f.metadata["check"].accepts(high) else math.nextafter(high, low)
        found += [(f.name.upper(), repr(low))] + ([] if f.name in EXPENSIVE else [(f.name.upper(), repr(high))])
    return found


@pytest.fixture(scope="module")
def few_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("few"), train_docs=20, val_docs=4)


def outcome(data: Path, out: Path, **changes: object) -> tuple[int, str]:
    """Exit status of a tiny run and what it said, which must be a finite score or an error in a line."""
    out.mkdir(parents=True, exist_ok=True)
    said = out / "said"
    status, = forked.run(forked.environment(data, out, **{**FEW, **changes}), said=said)
    text = said.read_text(errors="replace")
    assert "Traceback" not in text and status in (0, 2, 3), (changes, status, text[-1500:])
    finals = tiny.records(text, "final")
    assert len(finals) == (status != 2) and all(math.isfinite(float(f["val_bpb"])) for f in finals), (changes, text[-1500:])
    assert status == 0 or any(line.startswith("error: ") for line in text.splitlines()), changes
    return status, text


@pytest.mark.parametrize(("name", "value"), ends(), ids=lambda v: str(v))
def test_a_setting_at_the_end_of_its_rule_gives_a_score_or_a_line(few_data: Path, tmp_path: Path, name: str, value: str) -> None:
    outcome(few_data, tmp_path / "out", **{name: value})


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
