"""Artifacts made to harm, with checksums that fit: each is refused in a moment, and never scored as a number that is none."""

from __future__ import annotations

import itertools
import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import brotli
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from artifact_tools import config, header_of, parts, random_tensors, sealed, with_header, with_settings, with_streams, with_tensors

import train_gpt as tg

WRONG = (None, True, False, "1", "", [], [1], [[1]], {}, 0, -1, 1, 2, 3, 2**31, 2**63, 10**30, -10**30, 0.5, 1e308, -1e308,
         float("nan"), float("inf"), [float("nan")], [2**40] * 3, [0], [1] * 100)


@pytest.fixture(scope="module")
def valid() -> dict[str, bytes]:
    found = {}
    for compressor, quantizer in (("brotli", "scalar"), ("rans", "scalar"), ("rans", "trellis")):
        cfg = config(COMPRESSOR=compressor, QUANTIZER=quantizer, NUM_LAYERS=9, MODEL_DIM=16, GATE_WINDOW=4)
        found[f"{compressor} {quantizer}"] = tg.pack_artifact(random_tensors(cfg), cfg)
    return found


def wrong_settings(data: bytes) -> Iterator[tuple[str, bytes]]:
    settings, generator = header_of(data)["settings"], random.Random(0)
    for name in settings:
        for value in WRONG:
            yield f"{name}={value}", with_settings(data, **{name: value})
    for _ in range(200):
        names = generator.sample(sorted(settings), 3)
        yield f"{names}", with_settings(data, **{name: generator.choice(WRONG) for name in names})


def wrong_headers(data: bytes) -> Iterator[tuple[str, bytes]]:
    header = header_of(data)
    texts = [b"", b"null", b"[]", b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"\xff\xfe", b" " * 1_000_000, b'"' * 999]
    texts += [json.dumps({**header, "compressor": value}).encode() for value in WRONG]
    texts += [json.dumps({**header, "settings": value}).encode() for value in WRONG]
    texts.append(json.dumps({**header, "more": 1}).encode())
    for name in header["settings"]:
        texts.append(json.dumps({**header, "settings": {k: v for k, v in header["settings"].items() if k != name}}).encode())
    for text in texts:
        yield f"header {text[:40]!r}", with_header(data, text)


def wrong_tensors(data: bytes) -> Iterator[tuple[str, bytes]]:
    names = [name for name in safetensors.torch.load(parts(data)[0]) if name != "settings"]
    for name in [*names[:12], *names[-4:]]:
        def put(tensors: dict, value: object, name: str = name) -> None:
            tensors[name] = value(tensors[name])
        yield f"no {name}", with_tensors(data, lambda tensors: tensors.pop(name))
        for value in (lambda t: t.double(), lambda t: t[..., :-1].contiguous(), lambda t: t.flatten()[None, None], lambda t: t[None],
                      lambda t: torch.zeros(0), lambda t: torch.full_like(t.float(), float("nan")).half(),
                      lambda t: torch.full_like(t.float(), -float("inf")).half(), lambda t: t.view(torch.uint8)):
            yield f"changed {name}", with_tensors(data, lambda tensors: put(tensors, value))
    yield "one more", with_tensors(data, lambda tensors: tensors.update(more=torch.zeros(1)))
    yield "no settings", with_tensors(data, lambda tensors: tensors.pop("settings"))


def wrong_bytes(data: bytes) -> Iterator[tuple[str, bytes]]:
    generator, (plain, coded) = random.Random(1), parts(data)
    end = 8 + int.from_bytes(plain[:8], "little")  # of the table of a safetensors file
    for case in range(150):
        mutant = bytearray(plain)
        at = generator.randrange(end) if case % 3 else generator.randrange(8)
        mutant[at: at + generator.choice((0, 1, 1, 4))] = generator.randbytes(generator.choice((1, 1, 2, 0)))
        yield f"plain {case}", sealed(bytes(mutant), coded)
    for cut in (0, 4, 8, 20, end, len(plain) - 1):
        yield f"plain cut at {cut}", sealed(plain[:cut], coded)
    yield "a bomb", sealed(bytes(tg.ARTIFACT_MAX_PLAIN_BYTES + 1), coded)
    yield "more behind", sealed(plain, coded + b"\0")


def wrong_streams(data: bytes) -> Iterator[tuple[str, bytes]]:
    generator, (plain, coded) = random.Random(2), parts(data)
    streams = tg.cut_streams(coded)
    for n in range(len(streams)):
        for change in (lambda s: s[:-1], lambda s: s + b"\0", lambda s: s[:-2], lambda s: s + b"\0\0", lambda s: b"", lambda s: s[::-1]):
            yield f"stream {n}", with_streams(data, lambda s: [*s[:n], change(s[n]), *s[n + 1:]])
        yield f"swapped {n}", with_streams(data, lambda s: [*s[:n], s[n - 1], *s[n + 1:]])
        yield f"without {n}", with_streams(data, lambda s: s[:n] + s[n + 1:])
    tables = brotli.decompress(streams[0])
    for case in range(60):
        mutant = bytearray(tables)
        for _ in range(generator.choice((1, 1, 3))):
            mutant[generator.randrange(12) if case % 2 else generator.randrange(len(mutant))] = generator.randrange(256)
        yield f"table {case}", with_streams(data, lambda s: [brotli.compress(bytes(mutant)), *s[1:]])
    for count in (0, 1, 2**31, 2**32 - 1):
        yield f"{count} streams", sealed(plain, count.to_bytes(4, "little") + coded[4:])


def asking_much(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A small file of a model that is not in it."""
    for changes in ({"num_layers": 256, "model_dim": 4096, "num_heads": 256}, {"vocab_size": 65536, "model_dim": 2048},
                    {"mlp_mult": 64, "num_layers": 200}, {"num_loops": 63, "eval_loop_depth": 64, "loop_start": 0, "loop_end": 7}):
        yield f"{changes}", with_settings(data, **changes)


def outcome(data: bytes) -> str:
    """'refused' or 'read', in under a second and within bounds of memory."""
    began = time.process_time()
    try:
        cfg, _ = tg.unpack_artifact(data)
        assert all(tg.is_allowed(f, getattr(cfg, f.name)) for f in tg.STORED_SETTINGS)
        found = "read"
    except tg.ArtifactError:
        found = "refused"
    assert time.process_time() - began < 1
    return found


@pytest.mark.parametrize("kind", ["brotli scalar", "rans scalar", "rans trellis"])
@pytest.mark.parametrize("make", [wrong_settings, wrong_headers, wrong_tensors, wrong_bytes, wrong_streams, asking_much])
def test_every_hostile_file_is_refused_or_read_in_a_moment(valid: dict[str, bytes], kind: str, make) -> None:
    if kind == "brotli scalar" and make is wrong_streams:
        pytest.skip("it has no streams")
    results = {}
    every = 8 if make is wrong_settings and kind != "brotli scalar" else 1  # settings are looked at before any stream is
    for name, data in itertools.islice(make(valid[kind]), 0, None, every):
        results.setdefault(outcome(data), []).append(name)
    if make is not wrong_settings:
        least = {asking_much: 0.9, wrong_streams: 0.4}.get(make, 0.5)  # most changed tables are tables too
        assert len(results["refused"]) > least * sum(map(len, results.values()))
    if make in (wrong_headers, wrong_tensors, asking_much):
        harmless = [name for name in results.get("read", []) if not name.startswith(("header", "{'num_loops'"))]
        assert not harmless


def test_a_bomb_takes_no_more_memory_than_its_limit(valid: dict[str, bytes]) -> None:
    bomb = sealed(bytes(tg.ARTIFACT_MAX_PLAIN_BYTES + 1))
    assert len(bomb) < 60_000
    tracemalloc.start()
    outcome_of = outcome(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert outcome_of == "refused" and peak < 2 * tg.ARTIFACT_MAX_PLAIN_BYTES


def scored(data: bytes, folder: Path, shards: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and output of EVAL_ONLY."""
    (folder / "x.artifact").write_bytes(data)
    env = {"EVAL_ONLY": "1", "ARTIFACT_PATH": str(folder / "x.artifact"), "DATA_PATH": str(shards), "ARTIFACT_DIR": str(folder),
           "RUN_ID": "x", "EVAL_BUDGET_SECONDS": "0"}
    status = tg.main(env, [])
    out, err = capfd.readouterr()
    return status, out + err


def test_evaluation_alone_refuses_hostile_files_in_a_line_and_scores_only_numbers(valid: dict[str, bytes], tmp_path: Path, capfd) -> None:
    shards = tiny.write_dataset(tmp_path / "data", train_docs=5, val_docs=2)
    generator, statuses = random.Random(3), []
    for kind, data in valid.items():
        huge = with_tensors(data, lambda t: [v.fill_(65504.0) for v in t.values() if v.dtype == torch.float16])
        cases = [("huge", huge), ("learning", with_settings(data, ttt_lora_lr=10.0, ttt_weight_decay=1000.0)), ("valid", data),
                 ("global", with_settings(data, global_ttt_lr=10.0, global_ttt_grad_clip=0.0, global_ttt_chunk_tokens=64))]
        for make in (wrong_settings, wrong_tensors, wrong_bytes):
            made = list(make(data))
            generator.shuffle(made)
            cases += itertools.islice((case for case in made if outcome(case[1]) == "refused"), 5)
        for name, case in cases:
            status, said = scored(case, tmp_path, shards, capfd)
            statuses.append(status)
            assert status in (0, 2) and "Traceback" not in said, (kind, name, said[-1000:])
            final = tiny.records(said, "final")
            assert (status == 0) == bool(final) and all(np.isfinite(float(f["val_bpb"])) for f in final), (kind, name)
            assert status == 0 or sum(line.startswith("error: ") for line in said.splitlines()) == 1, (kind, name, said[-1000:])
    assert statuses.count(2) >= 45 and statuses.count(0) >= 3
