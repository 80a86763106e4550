"""Prove what can be proved about a run, and say what cannot.

    python tools/verify.py RECORD_FOLDER                           what the folder says, against itself and the rules
    python tools/verify.py RECORD_FOLDER --data SHARDS --run       and its code, its artifacts and its data
    python tools/verify.py --artifact FILE [--log FILE] --data SHARDS --run [--code FOLDER]

One table comes out: rule by rule pass, FAIL or not checkable, with the reason. The exit status is 0 if nothing failed, 1
if something did (with --strict also if something could not be checked), 2 for a mistake on the command line.

Without --run no code of the folder is run. With it, referee.py runs that code in a process of its own, and every verdict
is computed here from the losses it writes. What no tool can see is said in the last rows of every table.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import logs
import referee
from logs import RunLog
from referee import BOS, CODE_FILE, FAIL, PASS, UNKNOWN, Result, Suspect, ValSet, judged, read_shard, shard_paths

ROOT = Path(__file__).resolve().parent.parent
CAP_BYTES = 16_000_000
BUDGET_SECONDS = 600
SEEDS_OF_A_RECORD = 3
RECORD_TRACK, OTHER_TRACK = "track_10min_16mb", "track_non_record_16mb"
PUBLISHED_VAL = {"documents": 50_000, "tokens": 47_853_344, "bytes": 151_080_645}
MACHINE_WORDS = ("device", "ranks", "threads", "torch", "python", "attention", "compile")
MOST_CODE_BYTES = 1 << 22
SCORES_BESIDE_CUTS = 5  # two sets cut in each document, another order, and other company, which is twice as long


# ======================================================================================================================
# The folder
# ======================================================================================================================


@dataclass
class Record:
    """What is to be verified: code, logs, artifacts by log, and the claims made about them."""

    folder: Path  # holds the code
    runs: list[RunLog]
    artifacts: dict[Path, Path] = field(default_factory=dict)  # log -> artifact, where there is one
    track: str = OTHER_TRACK
    submission: Any = None
    unread: list[str] = field(default_factory=list)  # files that cannot be read, and why
    loose: bool = False  # an artifact and a log beside the repository: its code may be readable where it was counted packed

    @property
    def is_record(self) -> bool:
        return self.track.removeprefix("track_") == RECORD_TRACK.removeprefix("track_")

    def text_of(self, file: str) -> str | None:
        path = self.folder / file
        if not path.is_file():
            return None
        logs.check_file(path)
        return path.read_text(encoding="utf-8", errors="replace")


def open_folder(folder: Path) -> Record:
    """A record folder; ValueError if no log in it can be read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    runs, unread, submission = [], [], None
    for path in logs.logs_in(folder):
        try:
            runs.append(logs.read_log(path))
        except (ValueError, OSError) as error:
            unread.append(f"{path.name}: {error}")
    if not runs:
        raise ValueError(f"{folder} holds no log that can be read ({'; '.join(unread) or logs.RECORD_LOGS}): nothing to verify")
    if (path := folder / "submission.json").exists():
        try:
            logs.check_file(path)
            submission = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            submission = f"{path.name} cannot be read: {error}"
    artifacts = {run.path: path for run in runs if (path := run.path.with_suffix(".artifact")).is_file()}
    track = submission.get("track") if isinstance(submission, dict) else None
    lies_in = folder.resolve().parent.name
    # A folder that lies among the records is held to their limits, whatever it says.
    track = lies_in if lies_in.endswith(RECORD_TRACK) or not isinstance(track, str) else track
    return Record(folder, runs, artifacts, track, submission, unread)


def check_complete(record: Record) -> Result:
    problems = record.unread + [f"{run.path.name}: {problem}" for run in record.runs for problem in run.problems
                                if not problem.startswith("warning")]
    problems += [f"{run.path.name} is of a mere evaluation" for run in record.runs if run.settings.get("EVAL_ONLY") == "1"]
    seeds = [run.seed for run in record.runs]
    if len(set(seeds)) < len(seeds):
        problems.append(f"the same seed twice: {seeds}")
    problems += [f"{run.path.name} is of seed {run.seed}" for run in record.runs
                 if (match := re.fullmatch(r"train_seed(\d+)", run.path.stem)) and run.seed not in (None, int(match[1]))]
    if record.is_record and len(seeds) < SEEDS_OF_A_RECORD:
        problems.append(f"a record needs {SEEDS_OF_A_RECORD} seeds, here are {len(seeds)}")
    return judged("every seed's run is complete", problems, f"seeds {', '.join(map(str, seeds))}")


def check_one_configuration(record: Record) -> Result:
    differing = logs.differing_settings(record.runs, logs.VARYING | {"CHECKPOINT_EVERY"})
    problems = [f"{name} is {' / '.join(values)}" for name, values in differing.items()]
    problems += [f"{run.path.name} says no settings" for run in record.runs if not run.settings]
    problems += [f"{run.path.name}: seed {run.final.seed} at the end, SEED={run.settings['SEED']} at the start"
                 for run in record.runs if run.final and "SEED" in run.settings and str(run.final.seed) != run.settings["SEED"]]
    for word in MACHINE_WORDS:
        if len(found := {run.run.get(word, "?") for run in record.runs}) > 1:
            problems.append(f"{word} is {' / '.join(sorted(found))}")
    return judged("one configuration, one kind of machine", problems, f"{len(record.runs[0].settings)} settings are the same")


CODE_RULES = ["the artifact scores what the log says", "causal", "the distribution adds up to 1",
              "validation documents score no better than others", "no validation document in the training data"]
CODE_RULE = "the folder's code is the code that ran"
BLIND_DECORATORS = {"property", "classmethod", "staticmethod", "lru_cache", "torch.no_grad"}  # they read no annotations


def check_code(record: Record) -> Result:
    problems = []
    for run in record.runs:
        if not run.code:
            return Result(UNKNOWN, CODE_RULE, f"{run.path.name} names no code")
        for file, row in run.code.items():
            path = record.folder / file
            have, told = sha256_of(path) if path.is_file() else "missing", {row["sha256"]}
            told |= {row.get("source_sha256")} if record.loose else set()
            if Path(file).name != file or have not in told:
                problems.append(f"{file} is {have[:12]} here and {row['sha256'][:12]} in {run.path.name}")
    files = ", ".join(f"{file} {row['sha256'][:12]}" for file, row in record.runs[0].code.items())
    return judged(CODE_RULE, problems, files)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=1)
def packed_frame() -> tuple[bytes, bytes]:
    """The readable lines around the payload of a packed file, as the repository's train_gpt.py has them."""
    tree = ast.parse((ROOT / CODE_FILE).read_text(encoding="utf-8"))
    named = {ast.unparse(node.targets[0]): node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)}
    return ast.literal_eval(named["PACKED_HEAD"]), ast.literal_eval(named["PACKED_TAIL"])


@lru_cache(maxsize=4)
def packed_source(code: bytes) -> str | None:
    """The source that a packed file runs, None if it is none; ValueError if there is more than a payload between its lines."""
    import brotli

    head, tail = packed_frame()
    if not (code.startswith(head) and code.endswith(tail)):
        return None
    try:
        payload = ast.literal_eval('"""' + code[len(head): len(code) - len(tail)].decode("latin-1") + '"""').encode("latin-1")
        decoder = brotli.Decompressor()
        source = decoder.process(payload, output_buffer_limit=MOST_CODE_BYTES).decode()
    except (SyntaxError, ValueError, AttributeError, brotli.error) as error:
        raise ValueError(f"{CODE_FILE} is packed, and its payload is not one piece of text: {error}") from None
    if not decoder.is_finished():
        raise ValueError(f"{CODE_FILE} is packed, and its payload is cut off or over {MOST_CODE_BYTES} bytes")
    return source


def bare(source: str) -> str:
    """A program in one way of writing, without comments, docstrings, annotations that no decorator reads, and what runs unpacked alone."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.If) or ast.unparse(node.test) != "not PACKED"]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None and len(node.body) > 1:
            del node.body[0]
        if isinstance(node, ast.FunctionDef) and {ast.unparse(d).partition("(")[0] for d in node.decorator_list} <= BLIND_DECORATORS:
            node.returns = None
            for arg in (found for found in ast.walk(node.args) if isinstance(found, ast.arg)):
                arg.annotation = None
    return ast.unparse(tree)


def readable_code(record: Record) -> str:
    """The source of the code that runs, in its readable form where it is the same program; empty if there is none."""
    path, source = record.folder / CODE_FILE, record.text_of(f"source/{CODE_FILE}")
    text = record.text_of(CODE_FILE) or ""
    packed = packed_source(path.read_bytes()) if text else None
    if packed is None:
        return text
    return source if source is not None and same_program(packed, source) else packed


@lru_cache(maxsize=4)
def same_program(packed: str, source: str) -> bool:
    return ast.unparse(ast.parse(packed)) == bare(source)


def check_packed(record: Record) -> Result:
    """What is counted and run is what can be read, and what the logs say was packed."""
    rule, source = "the code that runs can be read", record.text_of(f"source/{CODE_FILE}")
    if not (record.folder / CODE_FILE).is_file():
        return Result(UNKNOWN, rule, f"there is no {CODE_FILE} here")
    packed = packed_source((record.folder / CODE_FILE).read_bytes())
    if packed is None:
        problems = [f"source/{CODE_FILE} is here, and {CODE_FILE} is not packed as the repository packs"] if source is not None else []
        return judged(rule, problems, "it is not packed")
    if source is None:
        return Result(UNKNOWN, rule, f"{CODE_FILE} is packed, and source/{CODE_FILE} is not here to compare with")
    problems = [f"what {CODE_FILE} runs is not source/{CODE_FILE}"] if readable_code(record) != source else []
    here = {hashlib.sha256(text.encode()).hexdigest() for text in (source, packed)}
    problems += [f"{run.path.name} ran another source, {row['source_sha256'][:12]}" for run in record.runs
                 for file, row in run.code.items() if file == CODE_FILE and row.get("source_sha256") not in (None, *here)]
    return judged(rule, problems, f"it is packed, and runs source/{CODE_FILE} less comments, docstrings, annotations and what packs it")


def check_size(record: Record) -> Result:
    """The code is counted as it lies in the folder, byte by byte, nothing minified."""
    problems, sizes = [], []
    for run in record.runs:
        name, log, path = run.path.name, run.artifact, record.artifacts.get(run.path)
        total = run.final.total_bytes if run.final else None
        if path is None and record.is_record:
            problems.append(f"{name}: its artifact is not here, and without it a record proves nothing")
        if log:
            counted, wrong = counted_bytes(record, run, path)
            problems += [f"{name}: {words}" for words in wrong]
            if (told := {int(log["total_bytes"]), total} - {None}) != {counted}:
                problems.append(f"{name} says {' and '.join(map(str, sorted(told)))} bytes in all, counted here: {counted}")
            total = counted
        elif total is None:
            problems.append(f"{name} does not say how large its artifact is")
        if total is not None:
            sizes.append(total)
            problems += [f"{name}: {total:,} bytes, over the cap of {CAP_BYTES:,}"] if total > CAP_BYTES else []
    files = "with the artifacts here" if record.artifacts else "the artifacts are not here, their sizes are the logs'"
    return judged("artifact and code within the cap", problems, f"at most {max(sizes, default=0):,} of {CAP_BYTES:,} bytes; {files}")


def counted_bytes(record: Record, run: RunLog, artifact: Path | None) -> tuple[int, list[str]]:
    """Bytes of code and model, and where the artifact is not that of the log."""
    files = {file: record.folder / file for file in run.code if (record.folder / file).is_file()}
    code_bytes = sum(int(run.code[file]["bytes"]) if record.loose else path.stat().st_size for file, path in files.items())
    model_bytes, problems = int(run.artifact["model_bytes"]), []
    if artifact is not None:
        size = artifact.stat().st_size
        if size != model_bytes or sha256_of(artifact) != run.artifact.get("sha256", sha256_of(artifact)):
            problems.append(f"{artifact.name} ({size} bytes) is not the file of {model_bytes} bytes and the sha256 that the log gives")
        model_bytes = max(model_bytes, size)
    return model_bytes + code_bytes, problems


def check_time(record: Record, what: str, name: str) -> Result:
    rule, limit_ms, problems = f"{what} within {BUDGET_SECONDS} s", 1e3 * BUDGET_SECONDS, []
    times = [time for run in record.runs if run.final and (time := getattr(run.final, name)) is not None]
    longest = f"{max(times, default=0) / 1e3:.1f} s at most"
    if name == "train_ms":
        last = [(run, run.train[-1].elapsed_ms) for run in record.runs if run.final and run.final.train_ms and run.train]
        problems = [f"{run.path.name}: {run.final.train_ms / 1e3:.1f} s at the end, {last_ms / 1e3:.1f} s in the last training line"
                    for run, last_ms in last if last_ms and run.dialect == "ours" and run.final.train_ms < last_ms - 1]
    if max(times, default=0) > limit_ms and record.is_record:
        problems.append(longest)
    elif max(times, default=0) > limit_ms:
        longest += ", above it, but this track has no limit"
    if not problems and len(times) < len(record.runs):
        return Result(UNKNOWN, rule, "not every log says how long it took")
    return judged(rule, problems, f"{longest}; measured by the run itself")


def check_targets(record: Record) -> Result:
    """By the logs: every evaluation counted all targets and all bytes."""
    rule, problems = "every target counted once (by the logs)", []
    for run in record.runs:
        if "val_tokens" not in run.data:
            return Result(UNKNOWN, rule, f"{run.path.name} does not say how long the validation set is")
        expected = (int(run.data["val_tokens"]) - 1, int(run.data["val_bytes"]))
        problems += [f"{run.path.name}, {name}: {score.tokens} targets and {score.num_bytes} bytes of {expected}"
                     for name, score in run.evals.items() if (score.tokens, score.num_bytes) != expected]
        if float(run.settings.get("VAL_DOC_FRACTION", 1)) < 1:
            problems.append(f"{run.path.name}: VAL_DOC_FRACTION={run.settings['VAL_DOC_FRACTION']}, no full score")
    data = record.runs[0].data
    return judged(rule, problems, f"{data['val_tokens']} entries less the first, {data['val_bytes']} bytes")


def check_arithmetic(record: Record) -> Result:
    """The score of a log follows from its own figures, and the last evaluation is the one that counts."""
    problems = []
    for run in record.runs:
        for name, score in run.evals.items():
            if score.tokens and score.num_bytes:
                bpb = score.val_loss * score.tokens / math.log(2) / score.num_bytes
                if not math.isclose(bpb, score.val_bpb, abs_tol=2e-7):
                    problems.append(f"{run.path.name}, {name}: val_bpb {score.val_bpb}, by its val_loss {bpb:.8f}")
        sizes = {name: size for name, score in run.evals.items() if (size := logs.bytes_a_token(score.val_loss, score.val_bpb))}
        if sizes and max(sizes.values()) > min(sizes.values()) * (1 + 3e-4):
            problems.append(f"{run.path.name}: bytes a token differ from stage to stage: "
                            f"{', '.join(f'{name} {size:.5f}' for name, size in sizes.items())}")
        last = run.evals.get("quantized_ttt") or run.evals.get("quantized")
        end = run.final if run.dialect == "ours" else None
        if end and (last is None or (last.val_loss, last.val_bpb) != (end.val_loss, end.val_bpb)):
            problems.append(f"{run.path.name}: its last line says {run.final.val_bpb}, its evaluation {last and last.val_bpb}")
    return judged("BPB = nats / ln 2 / bytes, and the final score is the last evaluation", problems, "recomputed from every log")


# (stage, stage before it, least share of the earlier loss that the later one can be)
STAGE_LIMITS = [("quantized", "ema", 0.97), ("quantized_ttt", "quantized", 0.8), ("ema", "training", 0.8), ("final", "training", 0.8),
                ("quantized", "training", 0.8)]


def check_figures(record: Record) -> Result:
    """Stages, losses, steps, tokens and times of a log hang together."""
    problems = [f"{run.path.name}: {words}" for run in record.runs for words in (*stage_problems(run), *pace_problems(run))]
    return judged("the figures of each log hang together", problems, "stages, training loss, steps x tokens x time")


def stage_problems(run: RunLog) -> Iterator[str]:
    losses = {name: score.val_loss for name, score in run.evals.items()}
    if run.train:
        losses["training"] = min(point.loss for point in run.train[-5:])
    for stage, before, share in STAGE_LIMITS:
        if stage in losses and before in losses and losses[stage] < share * losses[before]:
            yield f"{stage} {losses[stage]} is too good after {before} {losses[before]}"
    final, last = run.final, run.evals.get("quantized_ttt")
    if run.dialect == "ours" and final and last:
        if run.ttt and abs(run.ttt[-1].val_bpb - last.val_bpb) > 2e-5 and run.ttt[-1].done == 1:
            yield f"the running score of test-time training ends at {run.ttt[-1].val_bpb}, its evaluation says {last.val_bpb}"
        if final.eval_ms is not None and last.time_ms and final.eval_ms < last.time_ms - 1:
            yield f"evaluation took {final.eval_ms:.0f} ms, its test-time training alone {last.time_ms:.0f}"


def pace_problems(run: RunLog) -> Iterator[str]:
    """Our logs say each step's time, the tokens a second and the time so far: three ways to say the same."""
    batch = float(run.settings.get("TRAIN_BATCH_TOKENS", 0))
    for point in run.train if run.dialect == "ours" else []:
        if point.step_ms and point.tok_s and abs(point.tok_s * point.step_ms / 1e3 - batch) > 0.02 * batch:
            yield f"step {point.step}: {point.step_ms} ms and {point.tok_s:.0f} tokens a second make no step of {batch:.0f} tokens"
    for before, point in zip(run.train, run.train[1:]):
        if None in (before.elapsed_ms, point.elapsed_ms, point.step_ms):
            continue
        took, steps = point.elapsed_ms - before.elapsed_ms, point.step - before.step
        if took < 0 or run.dialect == "ours" and abs(took - steps * point.step_ms) > 0.02 * took + 2 + steps:
            yield f"steps {before.step} to {point.step} took {took:.0f} ms, by the time of a step {steps * point.step_ms:.0f}"
    if run.final and run.final.steps is not None and run.train and run.final.steps < run.train[-1].step:
        yield f"{run.final.steps} steps at the end, step {run.train[-1].step} in a training line"


def digits(*values: float) -> int:
    """Decimals with which figures are given, at most 7."""
    return min(7, max(len(repr(float(value)).partition(".")[2]) for value in values))


def agree(claim: Any, value: float, given: int = 7) -> bool:
    """A claim is a figure, at the digits that both sides give (3 at least)."""
    if claim is None or not isinstance(claim, int | float):
        return claim is None and math.isnan(value)
    return abs(claim - value) <= 0.5001 * 10.0 ** -max(3, min(digits(claim), given)) or math.isnan(claim) and math.isnan(value)


def by_seed(told: Any) -> dict[str, dict[str, Any]]:
    """seed_results as a table or as a list, with seeds as text; a mere figure is a BPB."""
    if isinstance(told, list):
        return {str(row.get("seed")): row for row in told if isinstance(row, dict)}
    rows = told.items() if isinstance(told, dict) else ()
    return {re.sub(r"^seed\W?_?", "", str(seed)): row if isinstance(row, dict) else {"val_bpb": row} for seed, row in rows}


def check_claims(record: Record) -> Result:
    """submission.json says what the logs say."""
    rule, told, problems = "submission.json says what the logs say", record.submission, []
    if told is None:
        return Result(UNKNOWN, rule, "there is none")
    if not isinstance(told, dict):
        return Result(FAIL, rule, told if isinstance(told, str) else f"it holds no table but {type(told).__name__}")
    group = logs.Group("", record.runs)
    for name in ("val_loss", "val_bpb"):
        values = group.values(name)
        for key, value in zip((name, name + "_std"), logs.mean_and_std(values)):
            if (key in told or key == "val_bpb") and not agree(told.get(key), value, digits(*values) if values and len(values) < 2 else 7):
                problems.append(f"{key} is {told.get(key)}, by the logs {value:.8f}")
    track = record.folder.resolve().parent.name
    if track.startswith("track_") and track.removeprefix("track_") != str(told.get("track", track)).removeprefix("track_"):
        problems.append(f"it says track {told.get('track')} and lies in {track}")
    seeds = told.get("seeds", [])
    names = [str(row.get("seed")) if isinstance(row, dict) else str(row) for row in seeds] if isinstance(seeds, list) else []
    rows = by_seed(told.get("seed_results", seeds))
    if (names or rows) and sorted(names or rows) != sorted(str(run.seed) for run in record.runs):
        problems.append(f"seeds {sorted(names or rows)}, logs of {[run.seed for run in record.runs]}")
    for run in record.runs:
        if run.final and (row := rows.get(str(run.seed))) is not None:
            for key, value in (("val_bpb", run.final.val_bpb), ("val_loss", run.final.val_loss), ("artifact_bytes", run.final.total_bytes)):
                if key in row and value is not None and not agree(row[key], value, digits(value)):
                    problems.append(f"seed {run.seed}: {key} is {row[key]}, by the log {value}")
    return judged(rule, problems, "means, deviations, seeds, sizes")


FOLDER_CHECKS: list[tuple[str, Callable[[Record], Result]]] = [
    ("every seed's run is complete", check_complete), ("one configuration, one kind of machine", check_one_configuration),
    (CODE_RULE, check_code), ("the code that runs can be read", check_packed), ("artifact and code within the cap", check_size),
    ("training time", lambda record: check_time(record, "training", "train_ms")),
    ("evaluation time", lambda record: check_time(record, "evaluation", "eval_ms")),
    ("every target counted once (by the logs)", check_targets), ("BPB = nats / ln 2 / bytes", check_arithmetic),
    ("the figures of each log hang together", check_figures), ("submission.json says what the logs say", check_claims)]


def guarded(rule: str, check: Callable[[], Result | Iterable[Result]]) -> Iterator[Result]:
    """The rows of a check. A file so damaged that the check itself stumbles proves nothing: that is a FAIL, never a traceback."""
    try:
        found = check()
        yield from [found] if isinstance(found, Result) else found
    except Exception as error:  # noqa: BLE001  whatever a hostile file can provoke, a row says so
        yield Result(FAIL, rule, f"cannot be read: {type(error).__name__}: {str(error)[:200]}")


def check_folder(record: Record) -> list[Result]:
    """All checks that need nothing but the folder."""
    return [row for rule, check in FOLDER_CHECKS for row in guarded(rule, lambda check=check: check(record))]


# ======================================================================================================================
# The data
# ======================================================================================================================

WINDOW = 16  # tokens of a shingle
ALIKE = 0.5  # share of a validation document's shingles in one training document that makes them the same text
CHANCE_ALIKE = 1e-3  # share of validation documents that any large corpus holds nearly, whoever collected it
BLOCK_TOKENS = 1 << 23


def check_which_data(record: Record, val: ValSet, folder: Path) -> Result:
    """The published validation set by its constants, or another one, named by its hash; and the one of the logs."""
    rule, problems = "which validation set", []
    found = {"documents": len(val.starts), "tokens": len(val.tokens), "bytes": val.num_bytes}
    for run in (run for run in record.runs if run.data):
        told = {key: run.data.get(name) for key, name in zip(found, ("val_docs", "val_tokens", "val_bytes"))}
        if told != {key: str(value) for key, value in found.items()}:
            problems.append(f"{run.path.name} scored {told}, here is {found}")
    if record.is_record and found != PUBLISHED_VAL:
        problems.append(f"a record scores the published validation set {PUBLISHED_VAL}, here is {found}")
    which = "the published one" if found == PUBLISHED_VAL else f"not the published one: {folder.name}"
    digest = hashlib.sha256(val.tokens.tobytes()).hexdigest()[:16]
    return judged(rule, problems, f"{which}; {found['documents']:,} documents, {found['bytes']:,} bytes, sha256 of the tokens {digest}")


def training_blocks(folder: Path) -> Iterator[np.ndarray]:
    """The training tokens in blocks that end where a document ends; documents run across the borders of shards."""
    rest = np.empty(0, np.uint16)
    for path in shard_paths(folder, "train"):
        shard = read_shard(path)
        for begin in range(0, len(shard), BLOCK_TOKENS):
            stream = np.concatenate([rest, shard[begin: begin + BLOCK_TOKENS]])
            starts = np.flatnonzero(stream == BOS)
            cut = int(starts[-1]) if len(starts) else 0
            yield stream[:cut]
            rest = stream[cut:]
    yield rest


def documents_of(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The documents of a stream, each with its BOS."""
    starts = np.flatnonzero(tokens == BOS)
    for begin, end in zip(starts, np.append(starts[1:], len(tokens))):
        yield tokens[begin:end]


def window_hashes(tokens: np.ndarray, every: int) -> tuple[np.ndarray, np.ndarray]:
    """(document, hash) of the windows of WINDOW tokens that lie in one document, or one in `every` of them by their hash."""
    count = max(0, len(tokens) - WINDOW + 1)
    hashes, document = np.zeros(count, np.uint64), np.cumsum(tokens == BOS)
    for i in range(WINDOW):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[i: i + count] + np.uint64(1)
    hashes ^= hashes >> np.uint64(29)
    keep = (document[:count] == document[WINDOW - 1:]) & (tokens[:count] != BOS) & (hashes % np.uint64(every) == 0)
    return document[:count][keep] - 1, hashes[keep]


def check_disjoint(record: Record, val: ValSet, folder: Path) -> Result:
    """No training document is a validation document, or one but for some tokens."""
    rule, told, paths = "no validation document in the training data", record.runs[0].data, shard_paths(folder, "train")
    if not paths:
        return Result(UNKNOWN, rule, "no train shards here")
    forbidden = {hashlib.blake2b(text.tobytes(), digest_size=16).digest() for text in documents_of(val.tokens)}
    lengths, every = {len(text) for text in documents_of(val.tokens)}, 1 if len(val.tokens) < 4e6 else 16
    owner, windows = window_hashes(val.tokens, every)
    windows, first = np.unique(windows, return_index=True)
    owner, alike, equal, documents, tokens = owner[first], set(), 0, 0, 0
    enough = np.maximum(ALIKE * np.bincount(owner, minlength=len(val.starts)), 2 * WINDOW // every)
    for block in training_blocks(folder):
        tokens += len(block)
        for text in documents_of(block):
            documents += 1
            equal += len(text) in lengths and hashlib.blake2b(text.tobytes(), digest_size=16).digest() in forbidden
        holder, found = window_hashes(block, every)
        at = np.minimum(np.searchsorted(windows, found), max(len(windows) - 1, 0))
        same = windows[at] == found if len(windows) else np.zeros(len(found), bool)
        shared = np.unique(np.stack([holder[same], at[same]]), axis=1)
        pairs, counts = np.unique(shared[0] * len(val.starts) + owner[shared[1]], return_counts=True)
        alike |= set((pairs % len(val.starts))[counts >= enough[pairs % len(val.starts)]].tolist())
    note = (f"{documents:,} training documents in {len(paths)} shard(s): {equal or 'none'} equal to one of the {len(val.starts):,} "
            f"validation documents, {len(alike) or 'none'} of these there in large part")
    problems = [note] if equal or len(alike) > CHANCE_ALIKE * len(val.starts) else []
    shards, said = int(told.get("train_shards", len(paths))), int(told.get("train_tokens", tokens))
    if len(paths) > shards or len(paths) == shards and said != tokens:
        problems.append(f"the log trained on {said:,} tokens in {shards} shard(s), here are {tokens:,} in {len(paths)}")
    if not problems and len(paths) < shards:
        return Result(UNKNOWN, rule, f"only {len(paths)} of the {shards} train shards are here; {note}")
    return judged(rule, problems, note)


def check_bytes(record: Record, val: ValSet, tokenizer: Path | None, documents_file: Path | None) -> Result:
    """The sidecar charges the bytes of the original text, document by document.

    For a lossless tokenizer the text is what the shard decodes to. With the raw documents, it is also compared with them.
    """
    rule, problems = "bytes equal to the text's bytes", []
    if {"documents": len(val.starts), "tokens": len(val.tokens), "bytes": val.num_bytes} == PUBLISHED_VAL:
        return Result(PASS, rule, f"the sidecar sums to the published {val.num_bytes:,} bytes")
    sys.path.append(str(ROOT))  # the transform of this repository, not the folder's
    from lossless_caps import V1, VERSIONS

    try:
        from caseops_tokenizer import Tokenizer  # here, because it needs SentencePiece

        model = Tokenizer(tokenizer or record.folder / record.runs[0].settings.get("TOKENIZER_PATH", ""))
    except (ImportError, OSError, ValueError) as error:
        return Result(UNKNOWN, rule, f"no text without the tokenizer: {error}")
    if not model.lossless:
        return Result(UNKNOWN, rule, "the tokenizer is not lossless, the original text is not in the shard")
    version = record.runs[0].settings.get("CASEOPS_VERSION", V1.name)  # older logs lack it
    if version not in VERSIONS:
        return Result(UNKNOWN, rule, f"CASEOPS_VERSION={version} is not one that lossless_caps.py here has: {', '.join(VERSIONS)}")
    decode = VERSIONS[version].decode
    originals = raw_texts(documents_file) if documents_file else None
    for number, begin in enumerate(val.starts):
        end = val.starts[number + 1] if number + 1 < len(val.starts) else len(val.tokens)
        charged = int(val.byte_counts[begin:end].sum())
        try:
            text = decode(b"".join(model.pieces[token] for token in val.tokens[begin + 1: end]).decode("utf-8"))
        except (ValueError, IndexError) as error:
            problems.append(f"document {number} does not decode: {error}")
            continue
        if len(text.encode()) != charged:
            problems.append(f"document {number} is charged {charged} bytes, its text has {len(text.encode())}")
        if originals is not None and next(originals, None) != text:
            problems.append(f"document {number} is not the text in {documents_file}")
    compared = f" and equal to {documents_file.name}" if documents_file else ""
    return judged(rule, problems, f"{len(val.starts):,} documents decoded{compared}")


def raw_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)["text"]


# ======================================================================================================================
# All of it
# ======================================================================================================================


def shards_of(record: Record, options: argparse.Namespace) -> Path:
    """The folder of the shards; ValueError if it is not here."""
    told = record.runs[0].settings.get("DATA_PATH")
    folder = options.data or Path(told or "no data named")
    if not folder.is_dir():
        raise ValueError(f"the data is not here ({folder}); name the folder of the shards with --data")
    return folder


def check_with_data(record: Record, options: argparse.Namespace) -> Iterator[Result]:
    """The checks that need data, and those that need artifact and code too."""
    try:
        shards = shards_of(record, options)
        val = ValSet.load(shards)
    except (ValueError, OSError) as error:
        yield Result(UNKNOWN, "data, bytes, causality, normalisation, the score again", str(error))
        return
    yield from guarded("which validation set", lambda: check_which_data(record, val, shards))
    yield from guarded("bytes equal to the text's bytes", lambda: check_bytes(record, val, options.tokenizer, options.docs))
    yield from guarded("no validation document in the training data", lambda: check_disjoint(record, val, shards))
    runs = [run for run in record.runs if run.path in record.artifacts]
    if not options.run or not runs:
        reason = "no artifact here; name one with --artifact" if options.run else "left out: --run runs the code of this folder"
        yield Result(UNKNOWN, "causality, normalisation, memory, the score again", reason)
        return
    yield from guarded("what the code does", lambda: check_with_code(record, runs, val, shards, options))


def check_with_code(record: Record, runs: list[RunLog], val: ValSet, shards: Path, options: argparse.Namespace) -> Iterator[Result]:
    """Score each artifact with the real set, then examine one, drawn at random."""
    draw = options.draw if options.draw is not None else int(np.random.SeedSequence().entropy % 10**9)
    rng = np.random.default_rng(draw)
    print(f"now running the code of {record.folder}, in a process and a folder of its own; drawn with --draw {draw}", flush=True)
    closed = referee.can_close_off()
    yield Result(PASS if closed else UNKNOWN, "the code runs with no network and no files but its own",
                 "in namespaces of its own" if closed else "this system does not let a process give them up")
    suspects = [suspect_of(record, run, options) for run in runs]
    examined, scores = int(rng.integers(len(runs))), len(runs) + 2 * options.cuts + SCORES_BESIDE_CUTS
    part, whole_seconds, losses = val, 0.0, None
    for number in np.roll(np.arange(len(runs)), -examined):
        run, suspect = runs[number], suspects[number]
        try:
            if number == examined:
                part, whole_seconds = suspect.that_fits(val, scores, rng)
            found = suspect.score(part)
            losses = found if number == examined else losses
            yield referee.check_score(run, found, val, options.same_machine) if part is val else referee.check_part(run, found, part, val)
        except referee.Broken as error:
            older = "this code is older than LOSSES_PATH; " if suspect.older else ""
            status = UNKNOWN if suspect.older or isinstance(error, referee.TooLong) else FAIL
            yield Result(status, f"the artifact scores what the log says: {run.name}", f"{older}{error}")
    if part is not val:
        yield Result(UNKNOWN, "all documents", f"{len(part.starts)} of {len(val.starts)} were drawn at random for the rows above and "
                     f"below, as --minutes {options.minutes:g} allows; all of them take about {whole_seconds / 60:.0f} minutes")
    if losses is not None:
        train = (lambda: (text for block in training_blocks(shards) for text in documents_of(block))) \
            if shard_paths(shards, "train") else None
        yield from referee.Examination(suspects[examined], part, losses, rng).rows(train, options.cuts)


def suspect_of(record: Record, run: RunLog, options: argparse.Namespace) -> Suspect:
    settings = {name: value for name, value in run.settings.items() if value != "" and not logs.is_place(name) and name not in logs.VARYING}
    settings |= {"SEED": run.settings["SEED"]} if "SEED" in run.settings else {}
    code = [record.folder / file for file in run.code or [CODE_FILE]]
    return Suspect(code, record.artifacts[run.path], settings, run.run.get("threads", "1"), 60 * options.minutes,
                   older="LOSSES_PATH" not in readable_code(record).upper())


def standing_rows(record: Record, save: bool) -> Iterator[Result]:
    """What no tool can see. The diff is kept in the folder if anything is to be, else among the temporary files."""
    ours, theirs = ((ROOT / CODE_FILE).read_text(encoding="utf-8") if (ROOT / CODE_FILE).is_file() else ""), readable_code(record)
    diff = list(difflib.unified_diff(ours.splitlines(), theirs.splitlines(), f"repository/{CODE_FILE}", f"record/{CODE_FILE}", lineterm=""))
    lines, data = sum(line[0] in "+-" for line in diff[2:]), ("\n".join(diff) + "\n").encode(errors="replace")
    path = record.folder / "verify.diff" if save else Path(tempfile.gettempdir(), f"verify_{hashlib.sha256(data).hexdigest()[:12]}.diff")
    if save or lines:
        logs.write_atomically(path, data)
    words = f"{lines} lines differ from the repository's {CODE_FILE}" + (f", which are in {path}" if lines else "")
    yield Result(UNKNOWN, "code that behaves differently when it is watched", f"read it: {words}" if theirs else f"no {CODE_FILE} is here")
    yield Result(UNKNOWN, "training took place as logged, on that hardware", "only by running it again")


def verify(record: Record, options: argparse.Namespace) -> Iterator[Result]:
    """Every check that the options ask for, each when it is done."""
    has_log = record.runs[0].final is not None or options.log is not None or options.folder is not None
    results = check_folder(record) if has_log else [check_loose_size(record)]
    yield from results
    if options.folder_only:
        yield Result(UNKNOWN, "data, bytes, causality, normalisation, the score again", "left out by --folder-only")
    elif any(result.rule == CODE_RULE and result.status == FAIL for result in results):
        yield Result(UNKNOWN, "what the code does", "it is not the code that ran")
    else:
        yield from guarded("the data", lambda: check_with_data(record, options))
    yield from guarded("code that behaves differently when it is watched", lambda: standing_rows(record, options.save))


def as_row(result: Result) -> str:
    return f"{result.status:<13}  {result.rule:<69}  {' '.join(result.detail.split())}"


def count_words(results: Sequence[Result]) -> str:
    counts = {status: sum(result.status == status for result in results) for status in (PASS, FAIL, UNKNOWN)}
    return f"{counts[PASS]} pass, {counts[FAIL]} fail, {counts[UNKNOWN]} not checkable"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="RECORD_FOLDER")
    parser.add_argument("--artifact", type=Path, help="an artifact outside a record folder")
    parser.add_argument("--log", type=Path, help="the log of the run that made it (without: settings from --set)")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of an artifact that has no log")
    parser.add_argument("--code", type=Path, default=ROOT, help="folder of its train_gpt.py")
    parser.add_argument("--data", type=Path, help="folder of the shards (default: where the log says, if it is here)")
    parser.add_argument("--run", action="store_true", help="run the code of the folder: a stranger's, in a process of its own")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the folder's)")
    parser.add_argument("--docs", type=Path, help="raw validation documents (JSON lines), to compare the decoded shard with")
    parser.add_argument("--cuts", type=int, default=2, help="places at which causality is tried, in each of two orders (default 2)")
    parser.add_argument("--draw", type=int, help="repeat what an earlier call drew at random")
    parser.add_argument("--minutes", type=float, default=2, help="for running the code (default 2): what does not fit is drawn at random "
                        "or left out, and said")
    parser.add_argument("--same-machine", action="store_true", help="the score again must be the log's to the last digit")
    parser.add_argument("--folder-only", action="store_true", help="only what needs no data")
    parser.add_argument("--strict", action="store_true", help="what is not checkable counts as failed")
    parser.add_argument("--save", action="store_true", help="keep the table as verify.txt and the diff to the repository's code as "
                        "verify.diff in the folder (without: the diff among the temporary files)")
    options = parser.parse_args(arguments)
    if (options.folder is None) == (options.artifact is None) or (options.log is not None and options.artifact is None):
        parser.error("give either a RECORD_FOLDER, or --artifact (and --log, if there is one)")
    return options


def open_record(options: argparse.Namespace) -> Record:
    """What the command line names; ValueError if it is not there."""
    if options.folder is not None:
        return open_folder(options.folder)
    for path in (options.artifact, options.log):
        if path is not None and not path.is_file():
            raise ValueError(f"no file {path}")
    settings = dict(text.partition("=")[::2] for text in options.set)
    run = logs.read_log(options.log) if options.log is not None else RunLog(options.artifact, settings=settings)
    return Record(options.code, [run], {run.path: options.artifact}, loose=True)


def check_loose_size(record: Record) -> Result:
    """The size of an artifact that has no log, with the code beside which it was put."""
    total = sum(path.stat().st_size for path in [*record.artifacts.values(), record.folder / CODE_FILE])
    problems = [f"{total:,} bytes, over the cap of {CAP_BYTES:,}"] if total > CAP_BYTES else []
    return judged("artifact and code within the cap", problems, f"{total:,} of {CAP_BYTES:,} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 nothing failed, 1 something did, 2 a mistake of the user."""
    logs.print_anything()
    options = parse_arguments(arguments)
    try:
        record = open_record(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = []
    try:
        for result in verify(record, options):
            print(as_row(result), flush=True)
            results.append(result)
        print("\n" + count_words(results), flush=True)
        if options.save:
            table = "\n".join([*map(as_row, results), "", count_words(results), ""])
            logs.write_atomically(record.folder / "verify.txt", table.encode(errors="replace"))
    except OSError as error:  # a full disk, a folder that may not be written to, a reader who has seen enough
        if not isinstance(error, BrokenPipeError):
            print(f"error: the table cannot be written: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    bad = {FAIL, UNKNOWN} if options.strict else {FAIL}
    return int(any(result.status in bad for result in results))


if __name__ == "__main__":
    sys.exit(main())
