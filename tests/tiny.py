"""A data set and settings small enough that a whole run takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MAGIC = 20240520
VOCAB = 64

SETTINGS = {
    "VOCAB_SIZE": VOCAB, "MODEL_DIM": 32, "NUM_HEADS": 4, "NUM_KV_HEADS": 2, "MLP_MULT": 2, "ROPE_DIMS": 4, "TRAIN_SEQ_LEN": 64,
    "EVAL_SEQ_LEN": 64, "TRAIN_BATCH_TOKENS": 1024, "MICRO_BATCH_TOKENS": 512, "VAL_BATCH_TOKENS": 4096, "ITERATIONS": 20,
    "MAX_WALLCLOCK_SECONDS": 0, "EVAL_BUDGET_SECONDS": 0, "WARMUP_STEPS": 1, "VAL_LOSS_EVERY": 0, "TRAIN_LOG_EVERY": 5,
    "MUON_MOMENTUM_WARMUP_STEPS": 10, "EMA_DECAY": 0.8, "GPTQ_CALIBRATION_BATCHES": 2, "TTT_LORA_RANK": 4, "TTT_LORA_LR": 0.005,
    "TTT_CHUNK_SIZE": 16, "TTT_EVAL_SEQ_LEN": 64, "TTT_BATCH_SIZE": 8, "PHASED_TTT_PREFIX_DOCS": 24, "GLOBAL_TTT_CHUNK_TOKENS": 256,
    "SEED": 7,
}


def shard_bytes(entries: np.ndarray) -> bytes:
    """A shard file as SPEC'd: 256 int32 of header, then uint16 entries."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, 1, len(entries)
    return header.tobytes() + np.asarray(entries, dtype="<u2").tobytes()


def documents(count: int, seed: int, shortest: int = 5, longest: int = 150, errors: float = 0.1) -> list[np.ndarray]:
    """Documents of a language that can be learnt: each walks through the alphabet with a stride of its own."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        length, stride, start = rng.integers(shortest, longest), rng.integers(1, 4), rng.integers(VOCAB)
        walk = (start + stride * np.arange(length)) % (VOCAB - 4) + 4
        noise = rng.random(length) < errors
        walk[noise] = rng.integers(4, VOCAB, noise.sum())
        result.append(np.append(1, walk))
    return result


def write_dataset(folder: Path, train_docs: int = 400, val_docs: int = 40, seed: int = 0, errors: float = 0.1) -> Path:
    """Two train shards (a document runs across them), one val shard, the sidecar: token t stands for t % 5 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    train = np.concatenate(documents(train_docs, seed=seed + 1, errors=errors))
    val = np.concatenate(documents(val_docs, seed=seed + 2, errors=errors))
    half = len(train) // 2
    (folder / "tiny_train_000000.bin").write_bytes(shard_bytes(train[:half]))
    (folder / "tiny_train_000001.bin").write_bytes(shard_bytes(train[half:]))
    (folder / "tiny_val_000000.bin").write_bytes(shard_bytes(val))
    (folder / "tiny_val_bytes_000000.bin").write_bytes(shard_bytes(np.where(val < 4, 0, val % 5)))
    return folder


def environment(data: Path, out: Path, **changes: object) -> dict[str, str]:
    """The environment of a tiny run: nothing of the caller's settings but what a program needs to start."""
    settings = {**SETTINGS, "DATA_PATH": data, "ARTIFACT_DIR": out, **changes}
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**keep, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in settings.items()}}


def run(env: dict[str, str], ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """train_gpt.py as its users start it."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run([*start, str(ROOT / "train_gpt.py")], env=env, capture_output=True, text=True, timeout=300)


def records(log: str, phase: str) -> list[dict[str, str]]:
    """The `phase key:value ...` lines of a log."""
    lines = [line.split() for line in log.splitlines() if line.startswith(phase + " ")]
    return [dict(word.split(":", 1) for word in words[1:] if ":" in word) for words in lines]
