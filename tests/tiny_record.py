"""Three seeds of a run of seconds, made once for all tests of the tools, and ways to spoil a copy of them."""

from __future__ import annotations

import atexit
import shutil
import sys
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import tiny

sys.path.insert(0, str(tiny.ROOT / "tools"))

import make_record  # noqa: E402
import verify  # noqa: E402

SEEDS = (3, 4, 5)
SETTINGS = {
    "NUM_LAYERS": 5, "LOOP_START": 1, "LOOP_END": 2, "PARALLEL_START_LAYER": 4, "XSA_LAST_N": 5, "TRAIN_LOOP_PHASE_DEPTHS": "1,2",
    "TRAIN_LOOP_PREWARM_DEPTHS": 2, "EVAL_LOOP_DEPTH": 2, "MODEL_DIM": 16, "NUM_HEADS": 2, "NUM_KV_HEADS": 1, "ITERATIONS": 8,
    "WARMUP_STEPS": 0, "TRAIN_BATCH_TOKENS": 512, "VAL_BATCH_TOKENS": 2048, "EVAL_SEQ_LEN": 32, "TTT_EVAL_SEQ_LEN": 32,
    "TTT_CHUNK_SIZE": 8, "TTT_LORA_LR": 0.02, "PHASED_TTT_PREFIX_DOCS": 12, "VAL_LOSS_EVERY": 4, "TRAIN_LOG_EVERY": 1,
    "GLOBAL_TTT_LR": 0.1, "NGRAM_TILT_ENABLED": 1, "NGRAM_TILT_ORDER": 4, "NGRAM_TILT_BETA": 0.2,
}


class Made(NamedTuple):
    """Where everything is: a copy of the code, the shards, logs and artifacts of the seeds, and their record folder."""

    code: Path
    data: Path
    runs: Path
    record: Path


def settings() -> dict[str, str]:
    """Environment of the configuration, without seed, names and places."""
    merged = {name: value for name, value in {**tiny.SETTINGS, **SETTINGS}.items() if name != "SEED"}
    return {name: str(value) for name, value in merged.items()}


def copy_code(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in make_record.CODE:
        shutil.copy2(tiny.ROOT / name, folder)
    (folder / "tokenizers").mkdir()
    (folder / "tokenizers" / "README.md").write_text("none is needed for this data\n")
    return folder


@lru_cache(maxsize=1)
def made() -> Made:
    """The runs of all seeds and their record folder on the other track, artifacts included."""
    root = Path(mkdtemp(prefix="tiny_record_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    code = copy_code(root / "code")
    data = tiny.write_dataset(code / "data" / "shards", train_docs=60, val_docs=16)
    import train_gpt as module
    runs = code / "runs"
    for seed in SEEDS:
        environ = {**settings(), "DATA_PATH": str(data), "ARTIFACT_DIR": str(runs), "SEED": str(seed), "RUN_ID": f"train_seed{seed}"}
        assert module.main(environ) == 0
    options = ["--slug", "Tiny", "--seeds", ",".join(map(str, SEEDS)), "--runs", str(runs), "--non-record", "--with-artifacts",
               "--code", str(code), "--records", str(root / "records")]
    assert make_record.main(options) == 0
    return Made(code, data, runs, next((root / "records" / verify.OTHER_TRACK).iterdir()))


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def rewrite(path: Path, old: str, new: str) -> None:
    """Replace text that must be there."""
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new))
