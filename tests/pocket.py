"""A language model of one page with the entry point of train_gpt.py, honest; the tests of the referee plant cheats in it.

Tables of token pairs: counted on the training data, kept in the artifact, scored; then scored again while each document
adds its own pairs (longest document first), and, once half of the documents are scored, all pairs scored so far.
"""

import hashlib
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

VOCAB, BOS = 64, 1


def read(folder, split):
    paths = sorted(path for path in Path(folder).glob(f"*_{split}_[0-9]*.bin"))
    return np.concatenate([np.frombuffer(path.read_bytes(), "<u2")[512:] for path in paths]).astype(int)


def load_val(folder):
    """Tokens and bytes."""
    return read(folder, "val"), read(folder, "val_bytes")


def pairs(tokens):
    counts = np.zeros((VOCAB, VOCAB))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    return counts


def train(folder):
    """The artifact: pairs of the training data, each with a little of nothing known."""
    counts = pairs(read(folder, "train")) + 0.5
    return (counts / counts.sum(1, keepdims=True)).astype(np.float32).tobytes()


def unpack(data):
    table = np.frombuffer(data, np.float32)[: VOCAB * VOCAB].reshape(VOCAB, VOCAB).astype(float)
    return table / table.sum(1, keepdims=True)


def plain(table, tokens):
    """Nats of every target."""
    return -np.log(table[tokens[:-1], tokens[1:]])


def documents(tokens):
    starts = np.flatnonzero(tokens == BOS)
    lengths = np.diff(starts, append=len(tokens) - 1)
    return [(starts[i], lengths[i]) for i in np.argsort(-lengths, kind="stable")]


def adapt(table, text):
    """Nats of a document's targets, each before its pair is counted."""
    seen, total, nats = np.zeros((VOCAB, VOCAB)), np.zeros(VOCAB), []
    for a, b in zip(text[:-1], text[1:]):
        weight = total[a] / (total[a] + 4)
        nats.append(-math.log((1 - weight) * table[a, b] + weight * seen[a, b] / max(total[a], 1)))
        seen[a, b] += 1
        total[a] += 1
    return nats


def score_first(table, tokens):
    """Nats of every target; the table learns once, from documents already scored."""
    losses, order = np.full(len(tokens) - 1, np.nan), documents(tokens)
    for number, (start, length) in enumerate(order):
        if number == min(6, len(order) // 2):
            known = sum(pairs(tokens[s: s + n]) for s, n in order[:number]) + 20 * table
            table = known / known.sum(1, keepdims=True)
        losses[start: start + length] = adapt(table, tokens[start: start + length + 1])
    return losses


def save(path, losses):
    with open(path, "wb") as file:
        np.savez(file, **{stage: nats.astype(np.float32) for stage, nats in losses.items()})


def report(log, losses, byte_counts):
    """Lines of every stage and of the end."""
    for stage, nats in losses.items():
        loss, size = float(nats.astype(np.float32).sum(dtype=np.float64)) / len(nats), int(byte_counts[1:].sum())
        log(
            f"eval name:{stage} val_loss:{loss:.8f} val_bpb:{loss * len(nats) / math.log(2) / size:.8f} tokens:{len(nats)} "
            f"bytes:{size} time_ms:5"
        )
    return loss, loss * len(nats) / math.log(2) / size


def main():
    env = os.environ
    only, folder = env.get("EVAL_ONLY") == "1", env["DATA_PATH"]
    out = Path(env["ARTIFACT_DIR"], env["RUN_ID"])
    lines = []
    tokens, byte_counts = load_val(folder)
    code = Path(__file__).read_bytes()
    lines.append(
        f'run id:{env["RUN_ID"]} seed:{env["SEED"]} ranks:1 device:"x86_64" torch:2.13.0+cpu python:3.11.7 threads:1 attention:sdpa '
        "compile:0 date:2026-01-01T00:00:00Z"
    )
    lines.append(f"code file:train_gpt.py bytes:{len(code)} sha256:{hashlib.sha256(code).hexdigest()}")
    settings = {
        "SEED": env["SEED"],
        "TRAIN_BATCH_TOKENS": 512,
        "VOCAB_SIZE": VOCAB,
        "TTT_ENABLED": 1,
        "TTT_CHUNK_SIZE": 8,
        "TTT_BATCH_SIZE": 8,
        "PHASED_TTT_PREFIX_DOCS": 6,
        "DATA_PATH": folder,
    }
    lines += [f"setting *{name} value:{value} default:" for name, value in settings.items()]
    shards = sorted(Path(folder).glob("*_train_*.bin"))
    lines.append(f"data train_shards:{len(shards)} train_tokens:{0 if only else len(read(folder, 'train'))} val_tokens:{len(tokens)} "
                 f"val_bytes:{byte_counts.sum()} val_docs:{(tokens == BOS).sum()} published:0")
    artifact = Path(env["ARTIFACT_PATH"]).read_bytes() if only else train(folder)
    table = unpack(artifact)
    losses = {"quantized": plain(table, tokens), "quantized_ttt": score_first(table, tokens)}
    if not only:
        text = plain(table, read(folder, "train"))
        lines += [
            f"train step:{step}/3 frac:{step / 3:.3f} depth:1 loss:{text[step * 200 - 200 : step * 200].mean() + 0.6 - 0.2 * step:.4f} "
            f"lr_scale:1.0 step_ms:20.0 tok_s:25600 elapsed_ms:{20 * step}"
            for step in (1, 2, 3)
        ]
        report(lines.append, {"ema": losses["quantized"]}, byte_counts)
        lines.append(
            f"artifact model_bytes:{len(artifact)} code_bytes:{len(code)} total_bytes:{len(artifact) + len(code)} cap_bytes:16000000 "
            f"sha256:{hashlib.sha256(artifact).hexdigest()}"
        )
        Path(f"{out}.artifact").write_bytes(artifact)
    loss, bpb = report(lines.append, losses, byte_counts)
    lines.append(f"ttt docs:1/1 val_bpb:{bpb:.5f}")
    lines.append(f"final seed:{env['SEED']} val_loss:{loss:.8f} val_bpb:{bpb:.8f} pre_ttt_bpb:{bpb:.8f} steps:3 train_ms:61 eval_ms:10 "
                 f"total_bytes:{len(artifact) + len(code)}")
    if env.get("LOSSES_PATH"):
        save(env["LOSSES_PATH"], losses)
    Path(f"{out}.log").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
