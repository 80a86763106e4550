"""Is a setting worth it? Small models trained in pairs; the difference in bits per byte at each stage, with standard errors.

    python bench/lab.py bench/lab.env --try EMA_DECAY=0.97 --try "flat: TRAIN_LOOP_PHASE_DEPTHS=3 EVAL_LOOP_DEPTH=3" --seeds 3
        [--leave-out] [--artifact FILE] [--ttt-pairs N] [--jobs N] [--out runs/lab] [--rows bench/results/lab.jsonl] [--plot FILE.png]

BASE is a file of NAME=VALUE lines; settings in the environment go over it (mostly DATA_PATH and TOKENIZER_PATH). A --try is NAME=VALUE
words on top of it, perhaps with a label and a colon before them; several are tried each alone. `--try placebo` changes the draw of the
first weights, nothing else. Another data set is a setting like another: scores are compared in bits by document, so the texts of the
validation documents must be the same, the tokens need not. With --leave-out a row is the whole, BASE with every try, without one.

A pair of seed S has the same first weights (SEED=S) and the same training documents in the same order, which S draws. A try that
changes only how an artifact is scored is not trained: the base's artifact of each pair is scored again, or with --artifact that
file, base and all. On a CPU a run has one thread, and --jobs says how many go side by side; on GPUs each has one, by default all.

Stages: `ema` the averaged weights, `quantized` the artifact, `quantized_ttt` with test-time training (--ttt-pairs 1: of the first
pair alone). A finished run is one line of --rows, whole or not there; what has its line is not run again, and what was killed goes on
from its checkpoint in --out when the same command is given. A run that fails is reported, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import hashlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import train_gpt as g  # noqa: E402
from lab_table import STAGES, Row, compare, draw, table  # noqa: E402

PROGRAM = ROOT / "train_gpt.py"
KNOWN = {f.name.upper(): f for f in fields(g.Config)}
SCORING = {name for name, f in KNOWN.items() if f.metadata["score"]} - {"SEED", "CASEOPS_ENABLED"}
PLACES = {"DATA_DIR", "DATA_PATH", "TOKENIZER_PATH", "ARTIFACT_DIR", "ARTIFACT_PATH", "LOSSES_PATH", "RUN_ID", "CHECKPOINT_EVERY"}
Settings = dict[str, str]


@dataclass(frozen=True)
class Job:
    """One run. `of` names the artifact in --out that it scores; empty: it trains one."""

    settings: Settings
    pair: int  # the seed of the pair, which the order of the documents comes from
    of: str = ""

    @functools.cached_property
    def key(self) -> str:
        """What the run is, wherever it ran: every setting that is not default, the data, the pair, the artifact."""
        cfg = g.Config.from_env(self.settings)
        own = {name: g.format_setting(value) for name, f in KNOWN.items()
               if name not in PLACES and (value := getattr(cfg, f.name)) != f.default}
        parts = [own, data_digest(cfg.shards_dir), self.pair, self.of]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@functools.cache
def data_digest(folder: Path) -> str:
    """Names a data set by its first validation and training tokens."""
    heads = [g.read_shard(path)[:500_000].tobytes() for kind in ("val", "train") for path in g.Dataset(folder).paths[kind][:1]]
    return hashlib.sha256(b"".join(heads)).hexdigest()[:12]


def settings_of(words: list[str]) -> Settings:
    """Settings out of NAME=VALUE words; `placebo` is the seed of other first weights."""
    pairs = [word.partition("=") for word in words]
    if wrong := [word for word, (name, equals, _) in zip(words, pairs) if word != "placebo" and (name not in KNOWN or not equals)]:
        raise SystemExit(f"error: {wrong[0]} is no NAME=VALUE of a setting (python train_gpt.py --help lists them)")
    return {name if equals else "SEED": value if equals else name for name, equals, value in pairs}


def plan(base: Settings, texts: list[str], leave_out: bool, pairs: int, artifact: str = "", ttt_pairs: int = 10**9) -> tuple[list, dict]:
    """The jobs that are compared with, one a pair, and by label a list of those to compare; `artifact`: name of the one that all score."""
    own, jobs = {}, {}
    for text in texts:
        label, colon, words = text.partition(": ")
        own[label] = settings_of((words if colon else text).split())
    rows = {label: base | settings for label, settings in own.items()}
    if leave_out:
        rows = {f"without {out}": dict(ChainMap(*(own[label] for label in own if label != out), base)) for out in own}
        base = dict(ChainMap(*own.values(), base))

    def job(settings: Settings, pair: int, of: str) -> Job:
        seed = {"SEED": str(pair + 1_000_000 * (settings.get("SEED") == "placebo"))}
        return Job(settings | seed | ({"TTT_ENABLED": "0"} if pair > ttt_pairs else {}), pair, of)

    bases = [job(base, pair, artifact) for pair in range(1, 1 + pairs)]
    for label, settings in rows.items():
        changed = {name for name in base | settings if base.get(name) != settings.get(name)}
        if artifact and not changed <= SCORING:
            raise SystemExit(f"error: {label} changes the training, and --artifact is trained already")
        jobs[label] = [job(settings, b.pair, (artifact or b.key) if changed <= SCORING else "") for b in bases]
    return bases, jobs


def data_of_pair(folder: Path, pair: int, out: Path) -> Path:
    """A data set with the same validation files and the training documents in an order drawn from `pair`, in `out`.

    The order depends on the pair and the number of documents alone: other tokens of the same texts come in the same order.
    """
    result = out / "data" / f"{data_digest(folder)}-{pair}"
    if result.exists():
        return result
    tokens, shards = np.concatenate(g.Dataset(folder).read("train")), g.Dataset(folder).paths
    documents = np.split(tokens, np.flatnonzero(tokens == g.BOS_ID)[1:])
    header = np.zeros(g.SHARD_HEADER_INTS, dtype="<i4")
    header[:3] = g.SHARD_MAGIC, g.SHARD_VERSION, len(tokens)
    shuffled = [documents[i].tobytes() for i in np.random.default_rng(pair).permutation(len(documents))]
    part, train = result.with_name(f"{result.name}.{os.urandom(4).hex()}"), shards["train"][0].name
    part.mkdir(parents=True)
    (part / train).write_bytes(data := b"".join([header.tobytes(), *shuffled]))
    for path in shards["val"] + shards["val_bytes"]:
        (part / path.name).symlink_to(path.resolve())
    if (manifest := folder / g.MANIFEST).exists():  # it says of which CaseOps version the data is
        record = json.loads(manifest.read_text())
        record["splits"]["train"]["files"] = [{"file": train, "entries": len(tokens), "sha256": hashlib.sha256(data).hexdigest()}]
        (part / g.MANIFEST).write_text(json.dumps(record))
    with suppress(OSError):  # another run of the pair was first
        part.rename(result)
    return result


def environment(job: Job, out: Path) -> Settings:
    """The environment of train_gpt.py for a job, whose files in `out` begin with its key."""
    folder = g.Config.from_env(job.settings).shards_dir
    env = {name: value for name, value in os.environ.items() if name not in KNOWN} | job.settings
    env |= {"RUN_ID": job.key, "ARTIFACT_DIR": str(out), "LOSSES_PATH": str(out / f"{job.key}.npz"), "CHECKPOINT_EVERY": "60s"}
    if job.of:
        return env | {"EVAL_ONLY": "1", "ARTIFACT_PATH": str(out / f"{job.of}.artifact"), "DATA_PATH": str(folder)}
    return env | {"DATA_PATH": str(data_of_pair(folder, job.pair, out))}


def row_of(job: Job, out: Path) -> Row:
    """The row that a finished job leaves: what it was, and the bits and bytes of every document, the BOS behind it included."""
    val, losses = g.load_val(cfg := g.Config.from_env(job.settings)), np.load(out / f"{job.key}.npz")
    lines = [line.split() for line in (out / f"{job.key}.out").read_text().splitlines()]
    said = {line[0]: dict(word.split(":", 1) for word in line[1:] if ":" in word) for line in lines if line[:1] in (["code"], ["final"])}
    starts, final = val.document_starts(), said["final"]
    bits = {stage: np.add.reduceat(losses[stage].astype(np.float64), starts) / math.log(2) for stage in STAGES if stage in losses}
    row = {"key": job.key, "pair": job.pair, "of": job.of, "data": cfg.shards_dir.name, "code": said["code"]["sha256"][:12],
           "device": "cuda" if torch.cuda.is_available() else "cpu", "targets": len(val.tokens) - 1,
           "settings": {name: value for name, value in job.settings.items() if name not in PLACES}}
    row |= {name: int(final[name]) for name in ("steps", "train_ms", "eval_ms", "total_bytes") if name in final}
    return row | {"bpb": {stage: round(float(b.sum()) / val.num_bytes, 6) for stage, b in bits.items()},
                  "bytes": np.add.reduceat(val.byte_counts[1:].astype(int), starts).tolist(),
                  "bits": {stage: b.round(1).tolist() for stage, b in bits.items()}}


class Lab:
    """Runs jobs side by side, each on a GPU or a core of its own, and keeps their rows."""

    def __init__(self, out: Path, rows: Path, jobs: int) -> None:
        self.out, self.path, self.jobs = out.resolve(), rows, jobs
        self.out.mkdir(parents=True, exist_ok=True)
        self.processes, self.places, gpus = [], queue.SimpleQueue(), torch.cuda.device_count()
        for i in range(jobs):
            self.places.put({"CUDA_VISIBLE_DEVICES": str(i % gpus)} if gpus else {"OMP_NUM_THREADS": "1"})

    def rows(self) -> dict[str, Row]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {row["key"]: row for row in map(json.loads, lines)}

    def keep(self, row: Row) -> None:
        """Add a row to the file, which is replaced whole; another lab may be adding its own."""
        with Path(f"{self.path}.lock.tmp").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = self.rows() | {row["key"]: row}
            g.write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())

    def run(self, job: Job) -> Row:
        """Run a job to its end, from where it stopped if it did. RuntimeError with its last line if it fails."""
        said, losses = self.out / f"{job.key}.out", self.out / f"{job.key}.npz"
        if losses.exists() and "quantized" in np.load(losses):  # it ended after the lab that started it
            return row_of(job, self.out)
        env, place = environment(job, self.out), self.places.get()
        with said.open("a") as file:
            self.processes.append(process := subprocess.Popen([sys.executable, str(PROGRAM)], env=env | place, stdout=file, stderr=file))
        status = process.wait()
        self.places.put(place)
        if status:
            raise RuntimeError(f"exit status {status}: {(said.read_text().splitlines() or ['it said nothing'])[-1]} (all: {said})")
        return row_of(job, self.out)

    def run_all(self, jobs: list[Job]) -> int:
        """Run the jobs that have no row yet; how many failed."""
        kept, failed = self.rows(), 0
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self.run, job): job for job in {job.key: job for job in jobs if job.key not in kept}.values()}
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    error, job = future.exception(), futures[future]
                    words = f"run {done}/{len(futures)} key:{job.key} pair:{job.pair}"
                    if error is None:
                        self.keep(row := future.result())
                        words += "".join(f" {stage}:{bpb:.5f}" for stage, bpb in row["bpb"].items())
                    failed += error is not None
                    print(words if error is None else f"error: {words}: {error}", file=sys.stderr, flush=True)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                _ = [process.terminate() for process in self.processes]  # they write their checkpoints and end
                raise SystemExit("stopped; the same command goes on from here") from None
        return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="WORDS")
    parser.add_argument("--leave-out", action="store_true")
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ttt-pairs", type=int, default=10**9)
    parser.add_argument("--jobs", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--out", type=Path, default=Path("runs/lab"))
    parser.add_argument("--rows", type=Path, default=ROOT / "bench" / "results" / "lab.jsonl")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    words = [line for line in options.base.read_text().splitlines() if line.strip() and not line.startswith("#")]
    words += [f"{name}={value}" for name, value in os.environ.items() if name in KNOWN]
    lab, artifact, pairs = Lab(options.out, options.rows, options.jobs), "", options.seeds
    if options.artifact:
        artifact, pairs = hashlib.sha256(data := options.artifact.read_bytes()).hexdigest()[:12], 1
        g.write_atomically(lab.out / f"{artifact}.artifact", data)
    base, tries = plan(settings_of(words), options.tries, options.leave_out, pairs, artifact, options.ttt_pairs)
    every = [job for jobs in zip(base, *tries.values()) for job in jobs]  # the first pair of each try, the second ...
    failed = sum(lab.run_all([job for job in every if bool(job.of) == scores]) for scores in (False, True))
    print(table(found := compare(lab.rows(), {label: [(t.key, b.key) for t, b in zip(jobs, base)] for label, jobs in tries.items()})))
    if options.plot and found:
        draw(found, options.plot)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
