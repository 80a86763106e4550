#!/usr/bin/env python3
"""How fast data is prepared, side by side with plain SentencePiece, and how much memory a build takes.

    python bench/prep.py FILE.jsonl [--sp MODEL ...] [--mb 40] [--build WORKERS ...] [--kill] [--full-table]

rate     one process, the same documents in turns: SentencePiece on text that is transformed already, against the
         encoder of a build on raw text (transform included), for train documents and with the sidecar; both see every
         word for the first time. Every document's tokens are compared.
caseops  the transform against a loop over characters, and its inverse.
build    the whole program on FILE: wall and CPU time, and the peak memory of the parent and of the largest worker.
full     an encoder fed with random words until most slots of its table are taken: about the most memory that a worker comes to.
kill     the program killed with SIGKILL in the middle and started again: the same hashes as without.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import caseops_tokenizer  # noqa: E402
import prepare_caseops_data as prepare  # noqa: E402
from lossless_caps import V1, VERSIONS  # noqa: E402
from test_lossless_caps import encode_by_characters  # noqa: E402

GROUP_BYTES = 1 << 20  # text encoded at once, as in a build


def groups(path: str, limit: int) -> Iterator[list[str]]:
    """Documents of the file, about `GROUP_BYTES` at a time, up to `limit` bytes of text."""
    group, size, total = [], 0, 0
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            group.append(json.loads(line)["text"])
            size += len(group[-1].encode())
            if size >= GROUP_BYTES:
                yield group
                total += size
                group, size = [], 0
                if total >= limit:
                    return
    if group:
        yield group


def timed(function: Callable[[], object], seconds: dict[str, list[float]], name: str) -> object:
    """Call it, and add (wall, CPU) seconds under `name`."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    spent = seconds.setdefault(name, [0.0, 0.0])
    spent[0] += time.perf_counter() - wall
    spent[1] += time.process_time() - cpu
    return result


def bench_rates(path: str, model: str, limit: int) -> None:
    """Plain and fast, in turns on the same groups of documents."""
    tokenizer = caseops_tokenizer.Tokenizer(model)
    for_train = prepare.make_encoder(tokenizer, with_charges=False)
    with_sidecar = prepare.make_encoder(tokenizer, with_charges=True)
    seconds: dict[str, list[float]] = {}
    total = documents = tokens = 0
    for texts in groups(path, limit):
        transformed = [tokenizer.transform.encode(text) for text in texts]
        raw = [text.encode() for text in texts]
        plain = timed(lambda: [tokenizer.processor.encode(text) for text in transformed], seconds, "plain")
        fast = timed(lambda: for_train.encode(raw), seconds, "train")
        charged = timed(lambda: with_sidecar.encode(raw), seconds, "sidecar")
        expected = np.concatenate([[caseops_tokenizer.BOS, *ids] for ids in plain])
        odd = tokenizer.lossless and any(caseops_tokenizer.SPACE in text for text in texts)  # SentencePiece loses those
        ids, again = (np.concatenate([document.tokens for document in encoded]) for encoded in (fast, charged))
        assert odd or np.array_equal(expected, ids), "tokens differ from SentencePiece"
        assert np.array_equal(ids, again)
        total, documents, tokens = total + sum(map(len, raw)), documents + len(raw), tokens + len(ids)
    print(f"rate tokenizer:{Path(model).name} documents:{documents} mb:{total / 1e6:.1f} tokens:{tokens}"
          f" encoder:{type(for_train).__name__}")
    for name, (wall, cpu) in seconds.items():
        print(f"rate {name} mb_s:{total / 1e6 / wall:.1f} cpu_mb_s:{total / 1e6 / cpu:.1f}"
              f" ratio:{seconds['plain'][0] / wall:.2f} cpu_ratio:{seconds['plain'][1] / cpu:.2f}")


def bench_transform(path: str, limit: int) -> None:
    """The transform, its inverse and the loop over characters on the same text."""
    seconds: dict[str, list[float]] = {}
    total = 0
    for texts in groups(path, min(limit, 8_000_000)):
        text = "\n".join(texts)
        for name, version in VERSIONS.items():
            written = timed(lambda: version.encode(text), seconds, f"{name} encode")
            assert timed(lambda: version.decode(written), seconds, f"{name} decode") == text
            assert timed(lambda: version.original_bytes(written), seconds, f"{name} bytes") == len(text.encode())
        assert timed(lambda: encode_by_characters(text), seconds, "characters") == V1.encode(text)
        total += len(text)
    for name, (wall, _) in seconds.items():
        print(f"caseops {name} mb_s:{total / 1e6 / wall:.1f} ratio:{seconds['characters'][0] / wall:.1f}")


MEASURED = """
import os, resource, sys, time
sys.path.insert(0, sys.argv[1])
import prepare_caseops_data as prepare
if __name__ == "__main__":
    start = time.perf_counter()
    code = prepare.main(sys.argv[2:])
    own, child = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = os.times()
    print(f"seconds:{time.perf_counter() - start:.1f} parent_cpu_s:{cpu.user + cpu.system:.1f}"
          f" workers_cpu_s:{cpu.children_user + cpu.children_system:.1f} parent_peak_mb:{own:.0f}"
          f" worker_peak_mb:{child:.0f}")
"""


def build_command(script: Path, options: argparse.Namespace, model: str, workers: int, out: str) -> list[str]:
    """The program in a process of its own, with its peak memory in the last line of its output."""
    script.write_text(MEASURED)
    return [sys.executable, str(script), str(ROOT), "--docs", options.file, "--out", out, "--sp", model, "--val-docs",
            str(options.val_docs), "--workers", str(workers), "--shard-entries", str(options.shard_entries)]


def hashes(folder: str) -> str:
    """One short hash for all shards of a data set."""
    manifest = json.loads((Path(folder) / "manifest.json").read_bytes())
    files = [(entry["file"], entry["sha256"]) for split in manifest["splits"].values() for entry in split["files"]]
    return f"shards:{len(files)} sha256_of_all:{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"


def bench_build(options: argparse.Namespace, model: str, workers: int) -> None:
    """One uninterrupted build."""
    with tempfile.TemporaryDirectory() as folder:
        command = build_command(Path(folder) / "build.py", options, model, workers, f"{folder}/set")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        words = done.stdout.splitlines()[-1]
        manifest = json.loads((Path(folder) / "set/manifest.json").read_bytes())
        text = sum(split["bytes"] for split in manifest["splits"].values())
        seconds = float(words.split()[0].removeprefix("seconds:"))
        print(f"build workers:{workers} mb:{text / 1e6:.1f} mb_s:{text / 1e6 / seconds:.1f} {words}"
              f" {hashes(f'{folder}/set')} load:{os.getloadavg()[0]:.1f}", flush=True)


def bench_kill(options: argparse.Namespace, model: str, workers: int) -> None:
    """SIGKILL as soon as two train shards are there, then the same command again."""
    with tempfile.TemporaryDirectory() as folder:
        command = build_command(Path(folder) / "build.py", options, model, workers, f"{folder}/set")
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not (Path(folder) / "set/fineweb_train_000001.bin").exists() and process.poll() is None:
                time.sleep(0.1)
            time.sleep(1)
            process.kill()
        left = sorted(path.name for path in Path(folder, "set").iterdir())
        done = subprocess.run(command, capture_output=True, text=True)
        resumed = [line for line in done.stderr.splitlines() if line.startswith("build resume")]
        print(f"kill left:{','.join(left)}\nkill {resumed[0] if resumed else 'not resumed'} {hashes(f'{folder}/set')}",
              flush=True)


def bench_full_table(model: str) -> None:
    """Peak memory of this process after random words have taken most slots of the table of parts."""
    encoder = caseops_tokenizer.FastEncoder(caseops_tokenizer.Tokenizer(model), with_charges=True)
    generator = np.random.default_rng(0)
    while np.count_nonzero(encoder.table.slot_spans) < 0.6 * caseops_tokenizer.SLOTS:
        letters = generator.integers(ord("a"), ord("z") + 1, (100_000, 9), dtype=np.uint8)
        letters[:, 0] = ord(" ")
        encoder.encode([letters.tobytes()])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"full parts:{np.count_nonzero(encoder.table.slot_spans)} peak_mb:{peak:.0f}")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--sp", nargs="+", default=[str(prepare.OUR_TOKENIZERS[V1.name])], help="models, one after the other")
    parser.add_argument("--mb", type=float, default=40, help="text for the rates")
    parser.add_argument("--build", type=int, nargs="*", default=[], metavar="WORKERS")
    parser.add_argument("--kill", action="store_true", help="kill a build of two workers and resume it")
    parser.add_argument("--full-table", action="store_true")
    parser.add_argument("--val-docs", type=int, default=500)
    parser.add_argument("--shard-entries", type=int, default=prepare.SHARD_ENTRIES)
    options = parser.parse_args()
    print(f"machine cores:{len(os.sched_getaffinity(0))} load:{os.getloadavg()[0]:.1f} python:{sys.version.split()[0]}"
          f" sentencepiece:{caseops_tokenizer.sentencepiece.__version__} numpy:{np.__version__}", flush=True)
    if options.mb:
        bench_transform(options.file, int(options.mb * 1e6))
    for model in options.sp:
        if options.full_table:
            bench_full_table(model)
        if options.mb:
            bench_rates(options.file, model, int(options.mb * 1e6))
        for workers in options.build:
            bench_build(options, model, workers)
        if options.kill:
            bench_kill(options, model, 2)
    print(f"machine load:{os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
