"""Compare settings of test-time training on one artifact: paired by document, with standard errors.

    python bench/ttt.py --artifact A --data FOLDER --out FOLDER --rows ROWS.txt [--first 0 --last 150]
        [--base NAME] [--jobs 1] [--positions]

Every line of ROWS is a name and settings (`cache16 TTT_CONTEXT=cache TTT_CHUNK_SIZE=16`); settings for all rows come from
the environment. A row is scored by train_gpt's own score_with_ttt; its losses, one a target, go to OUT/NAME.npz with the words
of the row, and a row that is there already is only read. It may be one of more documents: documents do not depend on each other,
and the first ones are compared (with global SGD, meta, n-grams, a warm A or short chunks they do: refused). `--jobs N` scores N rows at
once, in a process with one thread each. Words in small letters are experiments that are no settings of the program:

    sites=k,attn,mlp,head  adapters on these sites only
    meta=0.5               after each batch of documents the initial A and B move by this share to where the batch ended
    mix=ROW1,ROW2          no run: the mean of the probabilities that two rows gave to each target

and with TTT_CONTEXT=cache, on a CPU:

    refresh=1              the cache keeps a chunk's keys and values as the adapters make them after their update on this chunk
                           (one more forward of every chunk that is learnt from)
    loss_chunks=2          an update uses the mean loss of the chunk just scored and of the one before it, both with the adapters
                           of the moment (one more forward for every update but the first)
"""

from __future__ import annotations

import argparse
import io
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as g  # noqa: E402

SITES = "q|k|v|attn|mlp|head"
EXPERIMENTS = {  # what may stand behind the = of a word in small letters
    "sites": rf"({SITES})(,({SITES}))*", "meta": r"\d+(\.\d*)?|\.\d+", "mix": r".+", "refresh": r"[01]", "loss_chunks": r"[12]",
}
EDGES = (0, 16, 48, 96, 192, 384, 768, 1400)  # positions in a document that --positions tells apart
CACHED = {"refresh", "loss_chunks"}


@dataclass
class Row:
    """What one line of the table rests on."""

    name: str
    losses: np.ndarray  # (targets,) float32 nats, in data order
    cpu_seconds: float
    forwards_per_target: float


class ExperimentalAdapters(g.Adapters):
    """Adapters with the experiments of one row; `options` is set on the class before the row runs."""

    options: dict[str, str]

    def __init__(self, run: g.Run, documents: int) -> None:
        super().__init__(run, documents)
        self.used = 0  # documents that have had an adapter since the last reset
        if sites := self.options.get("sites"):
            for name in set(self.shapes) - set(sites.split(",")):
                for table in (self.shapes, self.initial):
                    del table[name]
                for table in (self.values, self.first, self.second, self.steps):
                    del table[f"a.{name}"], table[f"b.{name}"]
        self.initial_b = {name: torch.zeros_like(self.values[f"b.{name}"][:1]) for name in self.shapes}

    def live(self, documents: int) -> dict[str, Tensor]:
        self.used = max(self.used, documents)
        return super().live(documents)

    @torch.no_grad()
    def reset(self, warm: bool = False) -> None:
        share = float(self.options.get("meta", 0))
        if share and self.used:
            for kind, initial in (("a", self.initial), ("b", self.initial_b)):
                for name, value in initial.items():
                    value.lerp_(self.values[f"{kind}.{name}"][: self.used].mean(0, keepdim=True), share)
        super().reset(warm)
        for name, value in self.initial_b.items():
            self.values[f"b.{name}"].copy_(value.expand_as(self.values[f"b.{name}"]))
        self.used = 0


class ExperimentalScorer(g.TTTScorer):
    """Cached TTT with `refresh` and `loss_chunks`; counts what they forward besides the program's own steps."""

    options: dict[str, str]
    before: g.Chunk | None = None  # the chunk before

    def score(self, documents: g.Documents, members: range, warm: bool = False) -> list[np.ndarray]:
        self.before = None
        return super().score(documents, members, warm)

    def forward(self, batch: g.Batch, leaves: dict[str, Tensor], seen: int) -> tuple[Tensor, list]:
        """Losses, and keys and values, of the chunk that begins at the cache's `begin`."""
        return self.losses_of(batch, leaves, None, None, seen)

    def losses_before(self, leaves: dict[str, Tensor], live: int, seen: int) -> Tensor:
        """Losses of the chunk before, which sees what it saw when it was scored, with the adapters of now.

        `begin` moves back over it, so its own places in the ring are out of sight. This comes before the current chunk is stored,
        which takes the places of the oldest positions that the one before it has seen.
        """
        assert self.before is not None
        batch, size = self.before.batch, self.before.batch.max_seqlen
        batch = g.Batch(*(t[: live * size] for t in batch[:3]), batch.cu_seqlens[: live + 1], batch.positions[: live * size], size)
        self.cache.begin -= size
        losses, _ = self.forward(batch, leaves, seen)
        self.cache.begin += size
        self.forwarded += len(losses)
        return losses

    def loss(self, losses: Tensor, chunk: g.Chunk, leaves: dict[str, Tensor], live: int, seen: int) -> Tensor:
        """What an update lowers: the mean loss of a document's chunk, or of its two chunks; none in a document's last chunk."""
        if self.before is None:
            return (losses * chunk.weights).sum()
        both = [part.unflatten(0, (live, -1)) for part in (self.losses_before(leaves, live, seen), losses)]
        goes_on = chunk.weights.unflatten(0, (live, -1)).sum(1)  # 1 or 0
        return (torch.cat(both, 1).mean(1) * goes_on).sum()

    def _losses_and_learn(self, chunk: g.Chunk, live: int, seen: int, trains: bool) -> Tensor:
        leaves = self.adapters.live(live)
        with torch.set_grad_enabled(trains):
            losses, made = self.forward(chunk.batch, leaves, seen)
            scored = losses.detach().clone()
            for again in range(self.run.cfg.ttt_grad_steps if trains else 0):
                if again:
                    losses, _ = self.forward(chunk.batch, leaves, seen)
                self.adapters.learn(self.loss(losses, chunk, leaves, live, seen), leaves)
        if self.options.get("refresh") == "1" and trains:
            with torch.no_grad():
                _, made = self.forward(chunk.batch, leaves, seen)
            self.forwarded += len(chunk.batch.tokens)
        if self.options.get("loss_chunks") == "2":
            self.before = chunk
        self.cache.store(made)
        return scored


@contextmanager
def experiments(options: dict[str, str]) -> Iterator[None]:
    """train_gpt with classes that know the experiments `options`; those that no experiment needs stay its own."""
    classes: dict[str, type] = {"Adapters": ExperimentalAdapters} if options.keys() & {"sites", "meta"} else {}
    classes |= {"TTTScorer": ExperimentalScorer} if options.keys() & CACHED else {}
    own = {name: getattr(g, name) for name in classes}
    for name, experimental in classes.items():
        experimental.options = options
        setattr(g, name, experimental)
    try:
        yield
    finally:
        for name, cls in own.items():
            setattr(g, name, cls)


def part_of(val: g.ValData, first: int, last: int) -> g.ValData:
    """Documents first..last-1 of a validation set, in data order."""
    starts = np.append(val.document_starts(), len(val.tokens))
    begin, end = int(starts[first]), int(starts[min(last, val.documents)])
    return g.ValData(val.tokens[begin:end], val.byte_counts[begin:end], min(last, val.documents) - first)


def parse(words: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Settings and experiments of a row; an error for a word that is neither."""
    settings, options, known = {}, {}, {f.name.upper() for f in fields(g.Config)}
    for word in words:
        key, equals, value = word.partition("=")
        if key in settings or key in options:
            raise SystemExit(f"{key} is there twice")
        if equals and key in known:
            settings[key] = value
        elif equals and key in EXPERIMENTS:
            if not re.fullmatch(EXPERIMENTS[key], value):
                raise SystemExit(f"{word}: {value!r} is no value of {key} (see --help)")
            options[key] = value
        elif key.isupper():
            raise SystemExit(f"{word}: no setting of train_gpt.py, as NAME=VALUE, is called so")
        else:
            raise SystemExit(f"{word}: no such experiment; there are " + ", ".join(f"{name}=" for name in EXPERIMENTS))
    if "mix" in options and len(words) > 1:
        raise SystemExit("mix= stands alone: nothing is run")
    return settings, options


def config_of(words: list[str], data: str) -> g.Config:
    """The settings of a row, from the environment and its words; an error where its experiments do not go with them."""
    settings, options = parse(words)
    try:
        cfg = g.Config.from_env({**os.environ, "DATA_PATH": data, **settings})
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if used := sorted(options.keys() & CACHED):
        if cfg.ttt_context != "cache":
            raise SystemExit(f"{used[0]}= needs TTT_CONTEXT=cache")
        if cfg.ngram_tilt_enabled:
            raise SystemExit(f"{used[0]}= is without NGRAM_TILT_ENABLED")
        if options.get("loss_chunks") == "2" and cfg.ttt_chunk_doubles_at:
            raise SystemExit("loss_chunks=2 is for chunks of one size, without TTT_CHUNK_DOUBLES_AT")
    return cfg


def check_rows(lines: list[list[str]], base: str, data: str) -> None:
    """An error that names the row for anything that cannot be run as it is written."""
    seen: set[str] = set()
    for name, *words in lines:
        try:
            if name in seen:
                raise SystemExit("there are two rows of this name")
            _, options = parse(words)
            if missing := [part for part in options.get("mix", "").split(",") if part and part not in seen]:
                raise SystemExit(f"mix= of {missing[0]}, which is no row above it")
            config_of(words, data)
        except SystemExit as error:
            raise SystemExit(f"row {name}: {error}") from None
        seen.add(name)
    if base not in seen:
        raise SystemExit(f"--base {base}: no such row")
    if any(name == base and word.startswith("mix=") for name, *words in lines for word in words):
        raise SystemExit(f"--base {base}: a row with mix= cannot be the base")


def run_row(words: list[str], artifact: bytes, data: str, span: tuple[int, int]) -> tuple[np.ndarray, float, float]:
    """Score one row; losses, CPU seconds, forwards a target."""
    _, options = parse(words)
    stored, tensors = g.unpack_artifact(artifact)
    of_artifact = [f.name for f in fields(g.Config) if f.metadata["model"]] + ["eval_loop_depth"]
    cfg = replace(config_of(words, data), **{name: getattr(stored, name) for name in of_artifact})
    run = g.Run(cfg, g.Ranks(), g.Log(None, enabled=False))
    if options.keys() & CACHED and run.device.type != "cpu":
        raise SystemExit("refresh and loss_chunks run on a CPU only")
    work: dict[str, str] = {}
    run.log.record = lambda word, /, **values: work.update(values) if word == "ttt_work" else None
    model = g.model_from_tensors(run, tensors)
    val = part_of(g.load_val(cfg), *span)
    began = time.process_time()
    with experiments(options):
        score = g.score_with_ttt(run, model, val)
    return score.losses, time.process_time() - began, float(work["forwards_per_target"])


def score_to_file(path: Path, words: list[str], artifact: Path, data: str, span: tuple[int, int]) -> None:
    """Score one row into its file."""
    losses, seconds, forwards = run_row(words, artifact.read_bytes(), data, span)
    buffer = io.BytesIO()
    np.savez(buffer, losses=losses, seconds=seconds, forwards=forwards, targets=len(losses), words=np.array(words, dtype=str))
    g.write_atomically(path, buffer.getvalue())


def start_worker() -> None:
    """One thread for the rows; and the process ends with the one that started it, however that ends."""
    torch.set_num_threads(1)

    def leave() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def score_at_once(jobs: int, tasks: dict[str, tuple]) -> None:
    """Score rows by name, each with the arguments of score_to_file, in so many processes; all end before a failure is told."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        futures = {name: pool.submit(score_to_file, *task) for name, task in tasks.items()}
    for name, future in futures.items():
        if error := future.exception():
            raise RuntimeError(f"row {name} failed") from error


def read_row(path: Path, name: str, words: list[str], targets: int, alone: bool) -> Row:
    """A saved row, cut to the targets asked for; `alone`: its documents do not depend on each other."""
    saved = np.load(path)
    there = saved["words"].tolist() if "words" in saved else ["(not", "known)"]
    if sorted(there) != sorted(words):
        raise SystemExit(f"row {name}: {path} was scored with other words: {' '.join(there)}; now: {' '.join(words)}: "
                         f"use another name or --out")
    count = int(saved["targets"])
    if count < targets:
        raise SystemExit(f"row {name}: {path} holds {count} targets, {targets} are asked for: use another --out")
    if count > targets and not alone:
        raise SystemExit(f"row {name}: {path} holds {count} targets, {targets} are asked for, and with global SGD, meta=, n-grams, a warm "
                         f"A or chunks by a batch's longest they depend on documents further on: use another --out")
    return Row(name, saved["losses"][:targets], float(saved["seconds"]), float(saved["forwards"]))


def combine(words: list[str], rows: dict[str, Row]) -> np.ndarray | None:
    """The losses of a row that is made from others, None if it is not such a row."""
    _, options = parse(words)
    if "mix" not in options:
        return None
    parts = [rows[name].losses.astype(np.float64) for name in options["mix"].split(",")]
    return -np.log(np.mean([np.exp(-part) for part in parts], axis=0))


def paired(losses: np.ndarray, base: np.ndarray, starts: np.ndarray) -> tuple[float, float]:
    """Difference in nats a token and its standard error, from the differences by document."""
    differences = np.add.reduceat((losses - base).astype(np.float64), starts)
    tokens = np.diff(np.append(starts, len(losses)))
    mean = differences.sum() / tokens.sum()
    count = len(tokens)
    return mean, math.sqrt(((differences - mean * tokens) ** 2).sum() * count / max(count - 1, 1)) / tokens.sum()


def table_line(row: Row, base: Row, starts: np.ndarray, num_bytes: int) -> str:
    nats = row.losses.sum(dtype=np.float64)
    mean, error = paired(row.losses, base.losses, starts)
    return (f"| {row.name} | {nats / len(row.losses):.4f} | {nats / math.log(2) / num_bytes:.4f} | {mean:+.4f} | {error:.4f} | "
            f"{row.forwards_per_target:.2f} | {row.cpu_seconds:.0f} |")


def by_position(losses: np.ndarray, base: np.ndarray, starts: np.ndarray) -> list[float]:
    """Mean difference in nats a token over the targets between two `EDGES`, counted from the start of a document."""
    place = np.arange(len(losses)) - np.repeat(starts, np.diff(np.append(starts, len(losses))))
    parts = [(losses - base)[(place >= first) & (place < end)] for first, end in zip(EDGES, [*EDGES[1:], math.inf])]
    return [float(part.mean()) if len(part) else math.nan for part in parts]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("artifact", "data", "out", "rows"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--first", type=int, default=0, help="first document, in data order")
    parser.add_argument("--last", type=int, default=10**9, help="document behind the last one")
    parser.add_argument("--base", help="row that the others are compared with, printed first (default: the first; no mix=)")
    parser.add_argument("--positions", action="store_true", help="a second table: the difference by position in a document")
    parser.add_argument("--jobs", type=int, default=1, help="rows scored at once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data, span = str(options.data), (options.first, options.last)
    lines = [line.split() for line in options.rows.read_text().splitlines() if line.strip() and not line.startswith("#")]
    if not lines:
        raise SystemExit(f"{options.rows} has no rows")
    base_name = options.base or lines[0][0]
    check_rows(lines, base_name, data)
    lines.sort(key=lambda line: line[0] != base_name)  # the others are compared with it
    val = part_of(g.load_val(g.Config.from_env({**os.environ, "DATA_PATH": data})), *span)
    starts, targets = val.document_starts(), len(val.tokens) - 1

    options.out.mkdir(parents=True, exist_ok=True)
    paths = {name: options.out / f"{name}.npz" for name, *words in lines if "mix" not in parse(words)[1]}
    words_of = {name: words for name, *words in lines}

    def read(name: str) -> Row:
        words = words_of[name]
        cfg = config_of(words, data)
        together = cfg.phased_ttt_enabled or cfg.ttt_warm_start_a or cfg.ttt_short_chunks or cfg.ngram_tilt_enabled
        return read_row(paths[name], name, words, targets, not together and not float(parse(words)[1].get("meta", 0)))

    rows = {name: read(name) for name, path in paths.items() if path.exists()}
    tasks = {name: (path, words_of[name], options.artifact, data, span) for name, path in paths.items() if name not in rows}
    if options.jobs > 1 and tasks:
        score_at_once(min(options.jobs, len(tasks)), tasks)

    print(f"{val.documents} documents, {targets} targets, {val.num_bytes} bytes", flush=True)
    print("| row | nats/token | bpb | difference | its s.e. | forwards a token | CPU s |\n|---|---|---|---|---|---|---|", flush=True)
    for name, *words in lines:
        losses = combine(words, rows)
        if losses is not None:
            rows[name] = Row(name, losses, math.nan, math.nan)
        elif name not in rows:
            if not paths[name].exists():
                score_to_file(*tasks[name])
            rows[name] = read(name)
        print(table_line(rows[name], rows[base_name], starts, val.num_bytes), flush=True)
    if options.positions:
        print("\n| row, from position | " + " | ".join(map(str, EDGES)) + " |\n" + "|---" * (len(EDGES) + 1) + "|")
        for row in rows.values():
            parts = by_position(row.losses, rows[base_name].losses, starts)
            print(f"| {row.name} | " + " | ".join(f"{part:+.3f}" for part in parts) + " |")


if __name__ == "__main__":
    main()
