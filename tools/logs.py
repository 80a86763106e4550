"""Read the logs of runs: their figures, a fair comparison, plots and a page to show.

    python tools/logs.py summary PATH...              mean, standard deviation and one row a seed
    python tools/logs.py compare BASE NEW             is NEW better than BASE, and by the bar of 0.005 nats?
    python tools/logs.py plot PATH... --out FILE.png  loss, score at each stage, running TTT score, step time
    python tools/logs.py report PATH... --out FILE.html   all of that on one self-contained page

A PATH is a log, a folder of logs (a record folder: its train_seed<N>.log), or several of these with commas between; each
PATH is one group of runs. A folder without logs but with published.json stands for figures that others published.

Two dialects are read: our own lines `phase key:value key:value`, and the many of public records, by a table of forms
(THEIRS) and one of stages (STAGES): a log that is not read right gets a row there. summary needs Python alone, compare needs
scipy, plot and report need matplotlib: `pip install -r requirements-tools.txt`.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import glob
import html
import io
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

BAR_NATS = 0.005  # what a new record must gain, nats a token
SIGNIFICANCE = 0.01  # largest p with which it must have gained it
MOST_SEEDS = 1000
MOST_BYTES = 1 << 28  # of a log
MOST_CHARACTERS = 1 << 12  # of a line that are looked at; more is source, or made to keep a reader busy
SAME_BYTES = 1e-4  # by which two counts of bytes a token may differ
INSTALL_HINT = "install what the tools need with: pip install -r requirements-tools.txt"
RECORD_LOGS = "train_seed*.log"
PUBLISHED_FILE = "published.json"

# Settings that differ between the seeds of one configuration, or only say where files are.
VARYING = {"SEED", "RUN_ID", "RESUME"}
TTT_SWITCH = r"(\w+_)?TTT(_\w+)?_ENABLED|((USE|EVAL|RUN|DO)_)?TTT"  # names of settings that switch test-time training on


def is_place(name: str) -> bool:
    """Whether a setting only says where something is."""
    return re.search(r"(^|_)(PATH|DIR|FILE|FILES|LOGFILE)$", name) is not None


# ======================================================================================================================
# What a log holds
# ======================================================================================================================


class Point(NamedTuple):
    """One training line. Times are milliseconds; `None` is what the log does not say."""

    step: int
    loss: float
    depth: int | None
    step_ms: float | None
    elapsed_ms: float | None
    tok_s: float | None = None


class Phase(NamedTuple):
    """From `step` on the loop runs at `depth`."""

    step: int
    frac: float
    depth: int


class Evaluation(NamedTuple):
    """A score: nats a token, bits a byte, how many targets and bytes (None: not said), milliseconds."""

    val_loss: float
    val_bpb: float
    tokens: int | None
    num_bytes: int | None
    time_ms: float | None


class TTTPoint(NamedTuple):
    """The running TTT score when the share `done` of the documents, and `scored` of the bytes (None: not said), is scored."""

    done: float
    val_bpb: float
    scored: float | None = None


@dataclass
class Final:
    """The end of a run. None: not said."""

    seed: int | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    pre_ttt_bpb: float | None = None
    steps: int | None = None
    train_ms: float | None = None
    eval_ms: float | None = None
    total_bytes: int | None = None


@dataclass
class RunLog:
    """Everything that the programs read from one log."""

    path: Path
    dialect: str = "ours"
    settings: dict[str, str] = field(default_factory=dict)
    starred: set[str] = field(default_factory=set)  # settings that are not at their default
    run: dict[str, str] = field(default_factory=dict)
    code: dict[str, dict[str, str]] = field(default_factory=dict)  # file -> bytes, sha256
    data: dict[str, str] = field(default_factory=dict)
    artifact: dict[str, str] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    train: list[Point] = field(default_factory=list)
    evals: dict[str, Evaluation] = field(default_factory=dict)  # by stage, in the order of the run
    ttt: list[TTTPoint] = field(default_factory=list)
    final: Final | None = None
    problems: list[str] = field(default_factory=list)  # warnings, errors, and lines that could not be read
    stage_words: dict[str, str] = field(default_factory=dict)  # stage -> what the log calls it, where that is not ours
    in_settings: bool = False  # while a list of settings is being read
    began_ttt: bool = False  # a line says that test-time training began
    unread_score: str = ""  # a score of a stage or form not known here that stands behind all others

    @property
    def seed(self) -> int | None:
        if self.final is not None and self.final.seed is not None:
            return self.final.seed
        return int(self.settings["SEED"]) if re.fullmatch("[0-9]{1,18}", self.settings.get("SEED", "")) else None

    @property
    def says_ttt(self) -> bool:
        """Whether test-time training was to follow, by its settings, its running score or the line with which it began."""
        switches = [name for name in self.settings if re.fullmatch(TTT_SWITCH, name)]
        switches = ["TTT_ENABLED"] if "TTT_ENABLED" in switches else switches
        asked = any(canonical(self.settings[name].capitalize()) == "1" for name in switches)
        return asked or bool(self.ttt) or self.began_ttt

    @property
    def name(self) -> str:
        return f"seed {self.seed}" if self.seed is not None else self.path.stem


@dataclass
class Group:
    """Runs that belong together, usually the seeds of one configuration."""

    name: str
    runs: list[RunLog]
    published: bool = False  # figures that others published; no logs of ours stand behind them
    notes: list[str] = field(default_factory=list)  # logs that were left out, and why

    @property
    def finished(self) -> list[RunLog]:
        return [run for run in self.runs if run.final is not None and run.final.val_bpb is not None]

    def values(self, name: str) -> list[float]:
        """The field `name` of Final, of every finished run that has it."""
        found = (getattr(run.final, name) for run in self.finished)
        return [value for value in found if value is not None]


# ======================================================================================================================
# Our dialect
# ======================================================================================================================

PAIR = re.compile(r'(\w+):("[^"]*"|\S*)')
Pairs = dict[str, str]


def pairs_of(line: str) -> Pairs:
    """The key:value words of a line; a value in quotes may hold spaces, and a path goes on to the end of the line."""
    head, mark, path = line.partition(" path:")
    values = {key: value.strip('"') for key, value in PAIR.findall(head)}
    return values | ({"path": path} if mark else {})


def whole(values: Pairs, key: str) -> int | None:
    return int(values[key]) if key in values else None


def number(values: Pairs, key: str) -> float | None:
    return float(values[key]) if key in values else None


def read_train(run: RunLog, values: Pairs) -> None:
    step = int(values["step"].split("/")[0])
    while run.train and run.train[-1].step >= step:  # a resumed run repeats the steps after its last checkpoint
        run.train.pop()
    run.train.append(Point(step, float(values["loss"]), whole(values, "depth"), number(values, "step_ms"),
                           number(values, "elapsed_ms"), number(values, "tok_s")))


def read_phase(run: RunLog, values: Pairs) -> None:
    step = int(values["step"])
    run.phases = [phase for phase in run.phases if phase.step < step]
    run.phases.append(Phase(step, float(values["frac"]), int(values["depth"])))


def read_eval(run: RunLog, values: Pairs) -> None:
    run.evals[values["name"]] = Evaluation(float(values["val_loss"]), float(values["val_bpb"]), whole(values, "tokens"),
                                           whole(values, "bytes"), number(values, "time_ms"))


def read_ttt(run: RunLog, values: Pairs) -> None:
    done, total = values["docs"].split("/")
    scored = int(values["bytes"]) / int(run.data["val_bytes"]) if "bytes" in values and "val_bytes" in run.data else None
    run.ttt.append(TTTPoint(int(done) / int(total), float(values["val_bpb"]), scored))


def read_code(run: RunLog, values: Pairs) -> None:
    run.code[values["file"]] = {key: values[key] for key in ("bytes", "sha256", *sorted(values.keys() & {"source_sha256"}))}


def read_final(run: RunLog, values: Pairs) -> None:
    run.final = Final(whole(values, "seed"), float(values["val_loss"]), float(values["val_bpb"]), number(values, "pre_ttt_bpb"),
                      whole(values, "steps"), number(values, "train_ms"), number(values, "eval_ms"), whole(values, "total_bytes"))


OURS: dict[str, Callable[[RunLog, Pairs], None]] = {
    "run": lambda run, values: run.run.update(values), "data": lambda run, values: run.data.update(values),
    "artifact": lambda run, values: run.artifact.update(values), "train": read_train, "phase": read_phase,
    "eval": read_eval, "ttt": read_ttt, "code": read_code, "final": read_final,
}
SETTING = re.compile(r"setting (\*?)(\w+) value:(.*?)(?: default:.*)?$")


def read_our_line(run: RunLog, line: str) -> None:
    """Take one line into `run`; ValueError or KeyError if it has the form of a record and not its content."""
    if match := SETTING.match(line):
        star, name, value = match.groups()
        run.settings[name] = value
        if star:
            run.starred.add(name)
        return
    if line.startswith("resumed from step"):
        run.problems.append(f"warning: {line}")
    word = line.split(" ", 1)[0].rstrip(":")
    if word in ("warning", "error"):
        run.problems.append(line)
    elif word in OURS and PAIR.match(line[len(word) + 1:]):
        OURS[word](run, pairs_of(line))


# ======================================================================================================================
# The dialects of public records
# ======================================================================================================================

FLOAT = r"([-+.\deE]+|nan|inf)"
# What a stage is, by the first pattern that its name has; a name that has none stands for itself and is no final score.
STAGES = [(r"pre.?ttt|before.?ttt", "quantized"), (r"ttt", "quantized_ttt"), (r"post.?ema|pre.?quant", "ema"),
          (r"quant|roundtrip|int\d|sliding", "quantized")]
RECORD_BATCH_TOKENS = 786432
LOOP_PASSES = 3  # of a loop that is switched on at once, if the log does not say


def their_settings(run: RunLog, text: str) -> None:
    run.settings |= {name.upper(): value for name, value in re.findall(r"(\w+):(\S+)", text)}


def their_start(run: RunLog) -> None:
    """A list of settings begins; behind a run that is there already, it is another run's, and the last one counts."""
    start_again(run, settings={})
    run.in_settings = True


def start_again(run: RunLog, settings: dict[str, str]) -> None:
    """Forget a run that broke off in the same file."""
    if run.train or len(run.evals) > 1:
        run.problems.append(f"warning: an earlier run in this file, up to step {run.train[-1].step if run.train else 0}, is left out")
    fresh = RunLog(run.path, run.dialect, settings=settings, problems=run.problems)
    vars(run).update(vars(fresh))


def their_train(run: RunLog, step: str, loss: str, rest: str) -> None:
    """The time so far is said, or follows from tok/s, the mean since the start; that of a step from two lines."""
    if run.train and run.train[-1].step >= int(step):
        start_again(run, run.settings)
    pace, clock = re.search(rf"tok/s:\s*{FLOAT}", rest), re.search(rf"train_time:\s*{FLOAT}ms", rest)
    batch = int(run.settings.get("TRAIN_BATCH_TOKENS", RECORD_BATCH_TOKENS))
    elapsed_ms = float(clock[1]) if clock else 1e3 * int(step) * batch / float(pace[1]) if pace and float(pace[1]) else None
    before = run.train[-1] if run.train and run.train[-1].elapsed_ms is not None else Point(0, 0, None, None, 0.0)
    step_ms = None if elapsed_ms is None else (elapsed_ms - before.elapsed_ms) / max(int(step) - before.step, 1)
    depth = run.phases[-1].depth if run.phases else 1
    run.train.append(Point(int(step), float(loss), depth, step_ms, elapsed_ms))


def their_validation(run: RunLog, step: str, loss: str, bpb: str) -> None:
    name = f"step{step}" if int(step) else "initial"
    run.evals[name] = Evaluation(float(loss), float(bpb), None, None, None)


def their_stage(run: RunLog, words: str, loss: str, bpb: str, rest: str) -> None:
    """A score under its name; a second one of the same stage counts, and the first keeps its own name."""
    stage = next((stage for pattern, stage in STAGES if re.search(pattern, words, re.IGNORECASE)), words)
    run.unread_score = words if stage == words and stage not in dict(STAGES).values() else ""
    time = re.search(rf"eval_time:\s*{FLOAT}ms", rest)
    if stage in run.evals and abs(run.evals[stage].val_bpb - float(bpb)) > 1e-4:
        run.evals[run.stage_words[stage]] = run.evals[stage]
    run.stage_words[stage] = words
    run.evals[stage] = Evaluation(float(loss), float(bpb), None, None, float(time[1]) if time else None)


def their_phase(run: RunLog, step: str, frac: str, depth: str) -> None:
    run.phases.append(Phase(int(step), float(frac), int(depth)))


def their_loop(run: RunLog, step: str, frac: str, rest: str) -> None:
    """The loop is switched on: how often it passes is how often its layers are listed, or NUM_LOOPS + 1."""
    layers = re.findall(r"\d+", rest) if "[" in rest else []
    depth = max(map(layers.count, layers)) if layers else int(run.settings.get("NUM_LOOPS", LOOP_PASSES - 1)) + 1
    run.phases.append(Phase(int(step), float(frac), depth))


def their_ttt_start(run: RunLog) -> None:
    run.began_ttt = True


def their_unknown_score(run: RunLog, line: str) -> None:
    run.unread_score = line


def their_ttt(run: RunLog, rest: str) -> None:
    """Running score of a batch of documents of the lengths dl:SHORTEST-LONGEST; sums here, made shares when all are read."""
    if match := re.search(rf"\brb:{FLOAT}", rest):
        lengths = re.search(r"\bdl:(\d+)-(\d+)", rest)
        before = run.ttt[-1].scored if run.ttt else 0.0
        scored = None if before is None or not lengths else before + (int(lengths[1]) + int(lengths[2])) / 2
        run.ttt.append(TTTPoint(len(run.ttt) + 1.0, float(match[1]), scored))


def their_end(name: str, scale: float = 1, add: bool = False) -> Callable[[RunLog, str], None]:
    """A figure of the end of a run, in place of what was said before or on top of it."""
    def read(run: RunLog, text: str) -> None:
        run.final = run.final or Final()
        value = ((getattr(run.final, name) or 0.0) if add else 0.0) + scale * float(text.replace(",", ""))
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is no figure")
        setattr(run.final, name, value)
    return read


def their_stop(run: RunLog, train_ms: str, steps: str) -> None:
    run.final = replace(run.final or Final(), train_ms=float(train_ms), steps=int(steps))


# Forms of lines, the first that matches is taken: what comes in a new log gets a row.
THEIRS: list[tuple[re.Pattern[str], Callable[..., None]]] = [(re.compile(pattern), reader) for pattern, reader in (
    (r"Hyperparameters:?\s*$", their_start),
    (r"((?:seed|train_batch_tokens|attention_mode|tie_embeddings):\S.*)", their_settings),
    (rf"(?:step:|\d+:)?(\d+)/\d+ train_loss:\s*{FLOAT}(.*)", their_train),
    (rf"(?:step:|\d+:)?(\d+)/\d+ val_loss:\s*{FLOAT} val_bpb:\s*{FLOAT}", their_validation),
    (rf"([A-Za-z][\w .+-]{{,99}}?):?\s{{1,9}}val_loss[:=]\s*{FLOAT},?\s+val_bpb[:=]\s*{FLOAT}(.*)", their_stage),
    (rf"layer_loop:phase step:(\d+) frac:{FLOAT} depth:(\d+)", their_phase),
    (rf"layer_loop:enabled step:(\d+) frac:{FLOAT}(.*)", their_loop),
    (r"ttp:(.*)", their_ttt),
    (rf"stopping_early: \S+ train_time:\s*{FLOAT}ms step:\s*(\d+)", their_stop),
    (r"(?:ttt\w*|ttpp): ?\w(?!.*(?:disabled|skipped))|beginning TTT", their_ttt_start),
    (rf"(?i).*\bcollected \d+ hessians in {FLOAT} ?s", their_end("train_ms", 1e3, add=True)),
    (r"(?i)total submission size\b.{,99}?([\d,]{4,20}) bytes", their_end("total_bytes")),
    (rf"(?i)total[_ ]eval[_ ]\w+:\s*{FLOAT} ?s", their_end("eval_ms", 1e3)),
    (r"(.*\b(?:val_)?bpb\b\W{0,3}\d\.\d{3,}.*|Traceback \(most recent call last\).*)", their_unknown_score),
)]
THEIR_SETTING = re.compile(r" {1,2}(\w+): ?(.*)$")


def read_their_line(run: RunLog, line: str) -> None:
    """Take one line into `run`; ValueError if a number cannot be read. Only a list of settings holds any, not source code."""
    if run.in_settings and (match := THEIR_SETTING.match(line)):
        run.settings[match[1].upper()] = match[2]
        return
    run.in_settings = False
    for pattern, reader in THEIRS:
        if match := pattern.match(line):
            reader(run, *match.groups())
            return


def finish_theirs(run: RunLog) -> None:
    """What our logs say in their last line is put together from the whole of theirs; no final score without the last stage."""
    total = run.ttt[-1].scored if run.ttt else None
    run.ttt = [TTTPoint(point.done / len(run.ttt), point.val_bpb, point.scored / total if total else None) for point in run.ttt]
    plain, adapted = run.evals.get("quantized"), run.evals.get("quantized_ttt")
    last = adapted or (None if run.says_ttt else plain)
    run.final = run.final or Final()
    if run.final.total_bytes is not None:
        run.final.total_bytes = int(run.final.total_bytes)
    run.final = replace(run.final, seed=run.seed, val_loss=last and last.val_loss, val_bpb=last and last.val_bpb,
                        pre_ttt_bpb=plain and plain.val_bpb)
    if last is not None and run.unread_score:
        run.problems.append(f"warning: this may not be the final score: behind it stands {run.unread_score[:80]!r}, of a stage or form "
                            "not known here (a row of STAGES or THEIRS would read it)")
    if last is None:
        unknown = [name for name in run.evals if not re.fullmatch(r"initial|ema|quantized|step\d+", name)]
        broken_off = run.says_ttt and plain is not None
        run.problems.append("test-time training was to follow, and no score of it is here: the run did not end" if broken_off else
                            "no final score in a form known here: the run did not end, or its dialect is another (stages: "
                            f"{', '.join(unknown) or 'none'}; a row of STAGES or THEIRS would read it)")


# ======================================================================================================================
# Files and folders
# ======================================================================================================================

RANK_PREFIX = re.compile(r"(?:\[(?:default)?(?P<a>\d+)\]: ?|\[rank(?P<b>\d+)\]: ?)?(?P<text>.*)")
OUR_START = re.compile(r"(run id:|code file:|setting \*?[A-Z])")


def check_file(path: Path) -> None:
    """ValueError unless a file can be read to its end in a moment: a hostile folder may hold a device, or a text without one."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is no file of at most {MOST_BYTES} bytes")


def lines_of(path: Path) -> list[str]:
    """The lines of a log: UTF-8 or UTF-16, and of several ranks in one file those of the first."""
    check_file(path)
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    lines = [RANK_PREFIX.match(line) for line in data.decode(encoding, errors="replace").splitlines()]
    return [line["text"][:MOST_CHARACTERS] for line in lines if line and (line["a"] or line["b"] or "0") == "0"]


def read_log(path: Path) -> RunLog:
    """A log in any dialect; ValueError if it holds no line that one has."""
    lines = lines_of(path)
    ours = any(OUR_START.match(line) for line in lines)
    run = RunLog(path, dialect="ours" if ours else "published")
    for count, line in enumerate(lines, 1):
        try:
            (read_our_line if ours else read_their_line)(run, line)
        except (ValueError, KeyError, ArithmeticError) as error:
            run.problems.append(f"line {count} cannot be read ({error!r}): {line[:100]}")
    if not (run.settings or run.train or run.evals):
        raise ValueError(f"{path} is no log of a run: no line of it is in a form known here")
    if not ours:
        finish_theirs(run)
    elif run.final is None:
        run.problems.append("the run did not end: there is no final score in this log")
    if run.final is not None and run.final.val_bpb is not None and not math.isfinite(run.final.val_bpb):
        run.problems.append(f"its final score is {run.final.val_bpb}")
    return run


def read_published(folder: Path) -> Group:
    """The figures of published.json as runs that have an end and nothing else."""
    page = json.loads((folder / PUBLISHED_FILE).read_text(encoding="utf-8"))
    runs = []
    for row in page["seed_results"]:
        # Others print the loss in five decimals for all seeds together: the loss of a seed follows from its BPB.
        loss = row["val_bpb"] * page["val_loss"] / page["val_bpb"]
        final = Final(row["seed"], loss, row["val_bpb"], row["pre_ttt_bpb"], row["steps"], 1e3 * row["train_seconds"],
                      1e3 * row["eval_seconds"], row["artifact_bytes"])
        runs.append(RunLog(folder / PUBLISHED_FILE, "published figures", final=final))
    return Group(f"{folder.name} (published by others)", runs, published=True)


def logs_in(folder: Path) -> list[Path]:
    """The logs of a record folder, or else every log of a folder but those of mere evaluations; seeds in order."""
    found = every_log(folder)
    records = [path for path in found if path.match(RECORD_LOGS)]
    return sorted(records or found, key=lambda path: [(not part.isdigit(), int(part) if part.isdigit() else part)
                                                      for part in re.split(r"(\d+)", path.name)])


def every_log(folder: Path) -> list[Path]:
    texts = [path for path in folder.glob("*.txt") if path.match("train*") or is_log(path)]
    return [path for path in (*folder.glob("*.log"), *texts) if not re.search(r"\.eval\d+\.log$", path.name)]


def is_log(path: Path) -> bool:
    """Whether a text of any name has a final score."""
    try:
        return bool((final := read_log(path).final) and final.val_bpb)
    except (ValueError, OSError):
        return False


def with_later_score(run: RunLog) -> RunLog:
    """A run that was scored with test-time training by a later process (as run.sh does): that score joins the log.

    Only a log NAME.evalN.log of the same code and the same settings, but for EVAL_ONLY and TTT_ENABLED, is taken.
    """
    if run.final is None or "quantized_ttt" in run.evals:
        return run
    for path in sorted(run.path.parent.glob(f"{glob.escape(run.path.stem)}.eval*.log")):
        later = read_log(path)
        same = later.code == run.code and not differing_settings([run, later], VARYING | {"EVAL_ONLY", "TTT_ENABLED"})
        if same and later.final is not None and "quantized_ttt" in later.evals:
            run.evals["quantized_ttt"], run.ttt = later.evals["quantized_ttt"], later.ttt
            run.final = replace(run.final, val_loss=later.final.val_loss, val_bpb=later.final.val_bpb, eval_ms=later.final.eval_ms,
                                pre_ttt_bpb=later.final.pre_ttt_bpb)
            run.problems.append(f"warning: test-time training was run by a later process, {path.name}")
            break
    return run


def read_group(text: str) -> Group:
    """The runs that a PATH of the command line stands for; ValueError if there are none."""
    names = [text] if Path(text).exists() else text.split(",")
    runs: list[RunLog] = []
    notes: list[str] = []
    for path in map(Path, names):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        if path.is_dir() and not logs_in(path) and (path / PUBLISHED_FILE).exists():
            if len(names) > 1:
                raise ValueError(f"{path} holds published figures, no logs: it cannot be joined to others")
            return read_published(path)
        for log in logs_in(path) if path.is_dir() else [path]:
            try:
                runs.append(with_later_score(read_log(log)))
            except ValueError as error:
                notes.append(f"left out: {error}")
        if path.is_dir() and (others := sorted({*every_log(path), *path.glob("*/*.log")} - set(logs_in(path)))):
            notes.append(f"left out, beside the logs {RECORD_LOGS}: {', '.join(str(log.relative_to(path)) for log in others)}")
    if not runs:
        raise ValueError("; ".join([note.removeprefix("left out: ") for note in notes] or [f"{text}: no logs (*.log) there"]))
    first = Path(names[0])
    return Group(first.resolve().name if first.is_dir() else first.stem, without_doubles(runs, notes), notes=notes)


def without_doubles(runs: list[RunLog], notes: list[str]) -> list[RunLog]:
    """One run a seed, the first by name that has an end: a seed that was run again is no further seed."""
    kept: dict[Any, RunLog] = {}
    for run in sorted(runs, key=lambda run: run.final is None or run.final.val_bpb is None):
        same = kept.setdefault(run.path if run.seed is None else run.seed, run)
        if same is not run:
            notes.append(f"seed {run.seed} is here twice, counted once: {same.path.name}, not {run.path.name}")
    return [run for run in runs if run in kept.values()]


def differing_settings(runs: Iterable[RunLog], ignore: Iterable[str] = VARYING) -> dict[str, list[str]]:
    """Name -> the value of each run (of those that say their settings), for settings that are not the same in all.

    Over logs of two dialects, only names that all of them say are compared: the other side has settings of its own.
    """
    telling = [run for run in runs if run.settings]
    told = [run.settings for run in telling]
    names = {name for settings in told for name in settings}
    if len({run.dialect for run in telling}) > 1:
        names = set.intersection(*(set(settings) for settings in told))
    names = sorted(name for name in names if name not in set(ignore) and not is_place(name))
    table = {name: [settings.get(name, "(not said)") for settings in told] for name in names}
    return {name: values for name, values in table.items() if len(set(map(canonical, values))) > 1}


def canonical(value: str) -> str:
    """One spelling of a setting: 600 and 600.0, 1 and True, [1, 3, 4] and 1,3,4 are the same."""
    text = {"True": "1", "False": "0", "": "none"}.get(value, value)
    text = re.sub(r"[\[\]() ]", "", text)
    try:
        return ",".join(f"{float(part):g}" for part in text.split(","))
    except ValueError:
        return text


# ======================================================================================================================
# summary and compare
# ======================================================================================================================


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (nan for fewer than two values, and of what is not finite)."""
    if not values or not all(map(math.isfinite, values)):
        return math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


class Column(NamedTuple):
    title: str
    field: str
    scale: float
    form: str


COLUMNS = [Column("val_bpb", "val_bpb", 1, "{:.5f}"), Column("pre-TTT BPB", "pre_ttt_bpb", 1, "{:.5f}"),
           Column("val_loss", "val_loss", 1, "{:.5f}"), Column("steps", "steps", 1, "{:.0f}"),
           Column("bytes", "total_bytes", 1, "{:,.0f}"), Column("train s", "train_ms", 1e-3, "{:.1f}"),
           Column("eval s", "eval_ms", 1e-3, "{:.1f}")]


def show(value: float | None, column: Column) -> str:
    return "-" if value is None or math.isnan(value) else column.form.format(value * column.scale)


def seed_table(group: Group) -> list[list[str]]:
    """Header, one row a run, and rows of mean and std."""
    rows = [["run", *(column.title for column in COLUMNS)]]
    for run in group.runs:
        final = run.final or Final()
        rows.append([run.name, *(show(getattr(final, column.field), column) for column in COLUMNS)])
    if len(group.finished) > 1:
        stats = [mean_and_std(group.values(column.field)) for column in COLUMNS]
        for i, name in enumerate(("mean", "std")):
            rows.append([name, *(show(pair[i], column) for pair, column in zip(stats, COLUMNS))])
    return rows


def stage_names(runs: Iterable[RunLog]) -> list[str]:
    """The stages that were scored, in the order of a run."""
    last = ["final", "ema", "quantized", "quantized_ttt"]
    found = {name for run in runs for name in run.evals}
    steps = sorted((name for name in found if re.fullmatch(r"step\d+", name)), key=lambda name: int(name[4:]))
    other = sorted(found - set(last) - set(steps) - {"initial"})
    return [name for name in ["initial", *steps, *other, *last] if name in found]


def stage_table(runs: Sequence[RunLog]) -> list[list[str]]:
    """Header and one row a stage: its BPB in each run."""
    rows = [["stage", *(run.name for run in runs)]]
    for stage in stage_names(runs):
        rows.append([stage, *(f"{run.evals[stage].val_bpb:.5f}" if stage in run.evals else "-" for run in runs)])
    return rows


def as_text(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
                     for row in rows)


def headline(group: Group) -> str:
    """The one line that matters."""
    bpb, spread = mean_and_spread(group)
    if not group.finished:
        return f"{group.name}: no finished run"
    whose = ", figures published by others" if group.published else ""
    return f"{group.name.removesuffix(' (published by others)')}: val_bpb {bpb} ({spread}){whose}"


def mean_and_spread(group: Group) -> tuple[str, str]:
    """The mean BPB, empty if no run has an end, and what stands behind it."""
    mean, std = mean_and_std(group.values("val_bpb"))
    count = len(group.finished)
    return f"{mean:.5f}" if count else "", f"std {std:.5f}, {count} seeds" if count > 1 else "one run" if count else "no finished run"


def group_warnings(group: Group) -> list[str]:
    """What a reader of the mean must know."""
    differing = differing_settings(group.runs)
    found = group.notes + [f"{name} differs between the runs: {', '.join(values)}" for name, values in differing.items()]
    versions = {tuple(sorted((file, row["sha256"]) for file, row in run.code.items())) for run in group.runs if run.code}
    if len(versions) > 1:
        found.append(f"the runs were made by {len(versions)} different versions of the code")
    for run in group.runs:
        found += [f"{run.name}: {problem}" for problem in run.problems]
    return found


def summary(groups: list[Group]) -> str:
    """The text of `summary`."""
    parts = []
    for group in groups:
        lines = [headline(group), "", as_text(seed_table(group))]
        if stage_names(group.runs):
            lines += ["", as_text(stage_table(group.runs))]
        lines += ["", *(f"! {warning}" for warning in group_warnings(group))]
        parts.append("\n".join(lines).rstrip())
    return "\n\n\n".join(parts)


def welch(base: Sequence[float], new: Sequence[float], bar: float = 0.0) -> Any:
    """Welch's one-sided test that mean(base) - mean(new) > bar: statistic, df, pvalue. ValueError for fewer than two values a side."""
    if min(len(base), len(new)) < 2:
        raise ValueError(f"a test needs at least 2 finished runs a side (here {len(base)} and {len(new)})")
    return import_for_tools("scipy.stats").ttest_ind([value - bar for value in base], new, equal_var=False, alternative="greater")


def seeds_needed(base: Sequence[float], new: Sequence[float], bar: float, level: float = SIGNIFICANCE) -> int | None:
    """Seeds a side with which the same means and spreads would pass the test at `level`; None: no number up to MOST_SEEDS would."""
    test = partial(import_for_tools("scipy.stats").ttest_ind_from_stats, equal_var=False, alternative="greater")
    (base_mean, base_std), (new_mean, new_std) = mean_and_std(base), mean_and_std(new)
    return next((n for n in range(2, MOST_SEEDS + 1) if test(base_mean - bar, base_std, n, new_mean, new_std, n).pvalue < level), None)


def import_for_tools(name: str) -> Any:
    """A library that only the tools need; ValueError says how to install it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"this needs {name.split('.')[0]} ({error}); {INSTALL_HINT}") from None


def bytes_a_token(loss: float | None, bpb: float | None) -> float | None:
    """What a score was divided by: it tells validation sets and ways to count bytes apart."""
    return loss / (math.log(2) * bpb) if loss and bpb and math.isfinite(loss / bpb) else None


def bytes_of(runs: Iterable[RunLog]) -> float:
    """Mean bytes a token of the final scores; nan if no run says."""
    found = [bytes_a_token(run.final.val_loss, run.final.val_bpb) for run in runs if run.final]
    return statistics.fmean([size for size in found if size] or [math.nan])


def same_bytes(first: Iterable[RunLog], second: Iterable[RunLog]) -> bool:
    sizes = bytes_of(first), bytes_of(second)
    return not abs(sizes[0] - sizes[1]) > SAME_BYTES * max(sizes)


def check_denominators(base: Group, new: Group) -> None:
    """ValueError if the scores of two groups are bits of different bytes: then neither is the better one."""
    if not same_bytes(base.runs, new.runs):
        raise ValueError(f"{base.name} counts {bytes_of(base.runs):.5f} bytes a token, {new.name} {bytes_of(new.runs):.5f} (loss / (ln 2 x "
                         "BPB)): they scored different text or count its bytes differently, so their BPB do not compare")


def comparable(base: Group, new: Group) -> list[str]:
    """Reasons why the scores of two groups do not mean the same."""
    def targets(group: Group) -> set[tuple[int | None, int | None]]:
        ends = [list(run.evals.values())[-1] for run in group.runs if run.evals]
        return {(end.tokens, end.num_bytes) for end in ends if end.tokens is not None}

    found = []
    if targets(base) and targets(new) and targets(base) != targets(new):
        found.append(f"they score different validation sets (targets, bytes): {sorted(targets(base))} and "
                     f"{sorted(targets(new))}; nats a token and BPB are not comparable")
    elif not (targets(base) and targets(new)):
        found.append("one side does not say which validation set it scored: see for yourself that it is the same")
    return found


def compare(base: Group, new: Group) -> str:
    """The text of `compare`: NEW against BASE, lower is better, in nats a token and in BPB."""
    check_denominators(base, new)
    lines = [headline(base), headline(new), ""]
    for field_name, unit, bars in (("val_loss", "nats a token", (0.0, BAR_NATS)), ("val_bpb", "bits a byte", (0.0,))):
        old_values, new_values = base.values(field_name), new.values(field_name)
        if not (old_values and new_values):
            raise ValueError(f"{(new if old_values else base).name}: no finished run, nothing to compare")
        (old_mean, old_std), (new_mean, new_std) = mean_and_std(old_values), mean_and_std(new_values)
        sides = (f"{mean:.5f} ({f'std {std:.5f}, ' if len(values) > 1 else ''}n {len(values)})" for mean, std, values in
                 ((old_mean, old_std, old_values), (new_mean, new_std, new_values)))
        lines.append(f"{field_name}: {' -> '.join(sides)}: gain {old_mean - new_mean:+.5f} {unit}")
        lines += [compare_with_bar(old_values, new_values, bar) for bar in bars]
    differing = differing_settings([base.runs[0], new.runs[0]])
    if differing:
        lines += ["", "settings that differ (first run of each):"]
        lines += [f"  {name}: {values[0]} -> {values[1]}" for name, values in differing.items()]
    warnings = [*comparable(base, new), *group_warnings(base), *group_warnings(new)]
    return "\n".join([*lines, *([""] if warnings else []), *(f"! {warning}" for warning in warnings)])


def compare_with_bar(old: Sequence[float], new: Sequence[float], bar: float) -> str:
    """One line: does NEW beat BASE by more than `bar`, and how many seeds would show it."""
    what = f"better by more than {bar:g} nats" if bar else "better at all"
    try:
        test = welch(old, new, bar)
    except ValueError as error:
        return f"  {what}: no test, {error}"
    verdict = "yes" if test.pvalue < SIGNIFICANCE else "not shown"
    line = f"  {what}: {verdict} (one-sided Welch t = {test.statistic:.2f}, {test.df:.1f} degrees of freedom, p = {test.pvalue:.2g})"
    needed = seeds_needed(old, new, bar)
    if needed is None:
        above = statistics.fmean(old) - statistics.fmean(new) > bar
        return f"{line}; {'more than' if above else 'the gain is not above the bar: not even'} {MOST_SEEDS} seeds a side would show it"
    return f"{line}; with these means and spreads, {needed} seeds a side show it at p < {SIGNIFICANCE:g}"


# ======================================================================================================================
# Plots
# ======================================================================================================================

COLORS = ["#0b5fa5", "#d1495b", "#2e8b57", "#8d5a97", "#c77700", "#00798c", "#6b705c", "#3d405b"]
SHADES = ["#eef3f8", "#dbe7f2", "#c5d8ea", "#b0c9e1"]
WARMUP_STEPS = 5  # the first of a depth are slower: they are drawn apart
GRID = 200  # places at which seeds are averaged


class Curve(NamedTuple):
    """A configuration with the name and the colour that it has in every plot, and its runs, one a seed."""

    name: str
    color: str
    runs: list[RunLog]

    @property
    def label(self) -> str:
        return f"{self.name} ({len(self.runs)} seeds)" if len(self.runs) > 1 else self.name


def curves_of(groups: list[Group]) -> list[Curve]:
    """One curve a group, named by what its name has and others have not; runs that did not end are drawn where no others are."""
    words = [re.split(r"[_,\s]+", re.sub(r"^\d{4}-\d\d-\d\d_", "", group.name)) for group in groups]
    common = set.intersection(*map(set, words)) if len(groups) > 1 else set()
    labels = ["_".join(word for word in own if word not in common) or "_".join(own) for own in words]
    labels = [short(label) + (f" #{i + 1}" if labels.count(label) > 1 else "") for i, label in enumerate(labels)]
    return [Curve(label, COLORS[i % len(COLORS)], group.finished or group.runs) for i, (label, group) in enumerate(zip(labels, groups))]


def are_pair(curves: list[Curve]) -> bool:
    """Whether there are two configurations whose scores compare: then their difference is shown."""
    return len(curves) == 2 and same_bytes(curves[0].runs, curves[1].runs)


def less(curves: list[Curve]) -> str:
    """What a difference of two configurations is, in words that fit into a title."""
    return f"{short(curves[1].name, 12)} less {short(curves[0].name, 12)}"


def short(name: str, most: int = 32) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


Places = Callable[[RunLog, Point], float | None]


def by_step(run: RunLog, point: Point) -> float:
    return point.step


def by_minutes(run: RunLog, point: Point) -> float | None:
    return None if point.elapsed_ms is None else point.elapsed_ms / 6e4


def mean_line(lines: list[tuple[list[float], list[float]]]) -> tuple[list[float], list[float]]:
    """The mean of several lines, over the stretch that all of them have."""
    numpy = import_for_tools("numpy")
    grid = numpy.linspace(max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines), GRID)
    return grid.tolist(), numpy.mean([numpy.interp(grid, xs, ys) for xs, ys in lines], axis=0).tolist()


def draw_lines(axes: Any, curve: Curve, lines: list[tuple[list[float], list[float]]]) -> None:
    """A thin line a seed, and a thick one for their mean."""
    lines = [line for line in lines if line[0]]
    for xs, ys in lines if len(lines) > 1 else []:
        axes.plot(xs, ys, lw=0.7, alpha=0.45, color=curve.color)
    if lines:
        axes.plot(*(mean_line(lines) if len(lines) > 1 else lines[0]), lw=2, color=curve.color, label=curve.label)


def draw_loss(axes: Any, curves: list[Curve], place: Places = by_step) -> None:
    """Training loss, and as rings the validation losses; the beginning, which would flatten the rest, is cut off."""
    shade_phases(axes, curves, place)
    seen: list[float] = []
    for curve in curves:
        lines = []
        for run in curve.runs:
            points = [(x, p) for p in run.train if (x := place(run, p)) is not None]
            lines.append(([x for x, _ in points], [p.loss for _, p in points]))
            seen += [p.loss for _, p in points if p.step > 0.12 * points[-1][1].step]
            rings = [(x, run.evals[f"step{p.step}"].val_loss) for x, p in points if f"step{p.step}" in run.evals]
            axes.plot(*zip(*rings) if rings else ((), ()), "o", mfc="white", ms=5, color=curve.color, ls="")
        draw_lines(axes, curve, lines)
    axes.set_title("Loss by step" if place is by_step else "Loss by training time", pad=16)
    axes.set_xlabel("step" if place is by_step else "minutes")
    axes.set_ylabel("nats a token (rings: validation)")
    if seen:
        room = 0.05 * (max(seen) - min(seen)) + 0.01
        axes.set_ylim(min(seen) - room, max(seen) + room)


def shade_phases(axes: Any, curves: list[Curve], place: Places) -> None:
    """Bands for the depth phases of the first run that has any; dotted lines where another configuration changes depth."""
    runs = [(curve.color, run) for curve in curves for run in curve.runs[:1] if run.phases and run.train]
    width = max((place(run, run.train[-1]) or 0.0 for _, run in runs), default=0.0)
    for nth, (color, run) in enumerate(runs):
        phases = run.phases if run.phases[0].step == 0 else [Phase(0, 0.0, 1), *run.phases]
        ends = [next((x for p in run.train if p.step >= phase.step and (x := place(run, p)) is not None), None) for phase in phases]
        ends = [0 if phases[0].step == 0 else ends[0], *ends[1:], place(run, run.train[-1])]
        for i, (phase, begin, end) in enumerate(zip(phases, ends, ends[1:])):
            if begin is None or end is None:
                continue
            if nth == 0:
                axes.axvspan(begin, end, color=SHADES[min(i, len(SHADES) - 1)], lw=0, zorder=0)
                words = f"depth {phase.depth}" if end - begin > 0.11 * width else ""
                axes.annotate(words, ((begin + end) / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, 2), textcoords="offset points",
                              ha="center", fontsize="x-small", color="#456")
            elif i:
                axes.axvline(begin, color=color, lw=0.8, ls=":", zorder=0)


STAGE_TITLES = {"last": "last step", "ema": "averaged", "quantized": "quantized", "quantized_ttt": "+ TTT"}


def stage_score(run: RunLog, stage: str) -> float | None:
    """BPB of a run at a stage of STAGE_TITLES; the last step is that of the weights that were not averaged."""
    steps = [name for name in stage_names([run]) if name == "final" or name.startswith("step")]
    found = run.evals.get((steps or [""])[-1] if stage == "last" else stage)
    return found and found.val_bpb


def stage_values(runs: Sequence[RunLog], stage: str) -> list[float]:
    return [score for run in runs if (score := stage_score(run, stage)) is not None]


def difference(first: Sequence[float], second: Sequence[float]) -> str:
    """The mean of the second less that of the first, and its standard error where both have several values."""
    if not (first and second):
        return "-"
    (a, a_std), (b, b_std) = mean_and_std(first), mean_and_std(second)
    error = math.sqrt(a_std ** 2 / len(first) + b_std ** 2 / len(second))
    return f"{b - a:+.5f}" + ("" if math.isnan(error) else f" ± {error:.5f}")


def stage_comparison(curves: list[Curve]) -> list[list[str]]:
    """Header and a row a stage: the mean of each configuration, and of two the difference."""
    last = ["difference"] if are_pair(curves) else ["std"] if len(curves) == 1 and len(curves[0].runs) > 1 else []
    rows = [["BPB", *(short(curve.name, 18) for curve in curves), *last]]
    for stage, title in STAGE_TITLES.items():
        values = [stage_values(curve.runs, stage) for curve in curves]
        if any(values):
            means = [f"{statistics.fmean(found):.5f}" if found else "-" for found in values]
            spread = difference(*values) if len(curves) > 1 else f"{mean_and_std(values[0])[1]:.5f}"
            rows.append([title, *means, *([spread] if last else [])])
    return rows


def draw_stages(axes: Any, curves: list[Curve]) -> None:
    """BPB at each stage; under its name the difference of two configurations."""
    stages = [stage for stage in STAGE_TITLES if any(stage_values(curve.runs, stage) for curve in curves)]
    for curve in curves:
        for run in curve.runs if len(curve.runs) > 1 else []:
            found = [(i, score) for i, stage in enumerate(stages) if (score := stage_score(run, stage)) is not None]
            axes.plot(*zip(*found) if found else ((), ()), lw=0.7, alpha=0.45, color=curve.color)
        means = [(i, statistics.fmean(values)) for i, stage in enumerate(stages) if (values := stage_values(curve.runs, stage))]
        axes.plot(*zip(*means) if means else ((), ()), "o-", ms=5, lw=2, color=curve.color, label=curve.label)
    texts = [STAGE_TITLES[stage] for stage in stages]
    if are_pair(curves):
        texts = [f"{text}\n" + difference(*(stage_values(curve.runs, stage) for curve in curves)).replace(" ±", "\n±")
                 for text, stage in zip(texts, stages)]
    axes.set_xticks(range(len(stages)), texts, fontsize="small")
    axes.margins(x=0.1)
    axes.set_title(f"Stages, {less(curves)}" if are_pair(curves) else "Score at each stage")
    axes.set_ylabel("bits a byte")


def ttt_line(run: RunLog) -> tuple[list[float], list[float]]:
    return [100 * (p.done if p.scored is None else p.scored) for p in run.ttt], [p.val_bpb for p in run.ttt]


def draw_ttt(axes: Any, curves: list[Curve]) -> None:
    """The running score; of two configurations their difference at the same documents, which shows who is ahead, and when."""
    with_ttt = [curve for curve in curves if any(len(run.ttt) > 1 for run in curve.runs)]
    by_bytes = all(point.scored is not None for curve in with_ttt for run in curve.runs for point in run.ttt)
    lines = [[ttt_line(run) for run in curve.runs if len(run.ttt) > 1] for curve in with_ttt]
    axes.set_xlabel(f"{'bytes' if by_bytes else 'documents'} scored, %, longest documents first")
    if are_pair(with_ttt):
        numpy = import_for_tools("numpy")
        (xs, first), (others, second) = map(mean_line, lines)
        xs = [x for x in xs if others[0] <= x <= others[-1]]
        gap = numpy.interp(xs, others, second) - numpy.interp(xs, mean_line(lines[0])[0], first)
        axes.plot(xs, gap, lw=2, color=with_ttt[1].color, label="_difference")
        axes.axhline(0, color=with_ttt[0].color, lw=1.2)
        axes.set_title(f"Running TTT: {less(with_ttt)}")
        axes.set_ylabel("bits a byte (below 0: better)")
        return
    for curve, own in zip(with_ttt, lines):
        draw_lines(axes, curve, own)
    axes.set_title("Running score of test-time training")
    axes.set_ylabel("bits a byte so far")


def draw_stage_table(axes: Any, curves: list[Curve]) -> None:
    """The stages as a small table."""
    rows = stage_comparison(curves)
    axes.set_axis_off()
    if len(rows) > 1:
        rows[0] = ["BPB", *(short(cell, 44 // len(rows[0])) for cell in rows[0][1:])]
        widths = [0.2, *([0.26] * len(curves)), *([0.34] * (len(rows[0]) - 1 - len(curves)))]
        table = axes.table(rows, loc="center", edges="horizontal", cellLoc="right", colWidths=[width / sum(widths) for width in widths])
        table.auto_set_font_size(False)
        table.set_fontsize(9)
        table.scale(1, 1.6)
        for (row, column), cell in table.get_celld().items():
            cell.set_edgecolor("#d5dae0")
            if row == 0 and 0 < column <= len(curves):
                cell.get_text().set(color=curves[column - 1].color, weight="bold")


def step_times(run: RunLog) -> dict[int, tuple[list[float], list[float]]]:
    """Depth -> times of its steps, and apart those of its first ones."""
    found: dict[int, tuple[list[float], list[float]]] = {}
    begin = 0
    for before, point in zip([None, *run.train], run.train):
        begin = point.step if before is not None and point.depth != before.depth else begin
        if point.step_ms is not None and point.depth is not None:
            warm = point.step <= WARMUP_STEPS or point.step == begin or point.step - begin < WARMUP_STEPS
            found.setdefault(point.depth, ([], []))[warm].append(point.step_ms)
    return found


def draw_step_time(axes: Any, curves: list[Curve]) -> None:
    """Medians by depth, a dot a seed; crosses are steps right after the start and after a change of depth."""
    depths = sorted({depth for curve in curves for run in curve.runs for depth in step_times(run)})
    for nth, curve in enumerate(curves):
        shift = 0.5 * (nth + 0.5) / len(curves) - 0.25
        for place, depth in enumerate(depths):
            times = [step_times(run).get(depth, ([], [])) for run in curve.runs]
            first, middles = [ms for _, own in times for ms in own], [statistics.median(steps) for steps, _ in times if steps]
            axes.plot([place + shift + 0.05] * len(first), first, "x", ms=3, alpha=0.4, color=curve.color)
            axes.plot([place + shift] * len(middles), middles, "o", ms=5, color=curve.color)
            if middles:
                axes.annotate(f"{statistics.fmean(middles):.0f}", (place + shift, statistics.fmean(middles)), xytext=(-6, 0), ha="right",
                              va="center", textcoords="offset points", fontsize="x-small", color=curve.color)
    axes.set_xticks(range(len(depths)), [f"depth {depth}" for depth in depths])
    axes.set_xlim(-0.6, max(len(depths), 1) - 0.4)
    axes.set_title("Step time: medians (crosses: warm-up steps)")
    axes.set_ylabel("ms")
    if depths:
        axes.set_ylim(bottom=0)


PLOTS: dict[str, Callable[[Any, list[Curve]], None]] = {
    "loss": draw_loss, "loss_by_time": partial(draw_loss, place=by_minutes), "ttt": draw_ttt, "table": draw_stage_table,
    "stages": draw_stages, "step_time": draw_step_time}


def style(axes: Any) -> None:
    """The same plain frame for every plot, and a note where there is nothing to draw."""
    if not axes.axison:
        return
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#00000014", lw=0.6)
    axes.set_axisbelow(True)
    if not any(len(line.get_xdata()) for line in axes.get_lines()):
        axes.set(xticks=[], yticks=[], xlabel="", ylabel="")
        axes.text(0.5, 0.5, "not in these logs", transform=axes.transAxes, ha="center", color="#678")


def legend(figure: Any, curves: list[Curve]) -> None:
    """The configurations, above the plots and never over them."""
    lines = import_for_tools("matplotlib.lines")
    handles = [lines.Line2D([], [], color=curve.color, lw=2, label=curve.label) for curve in curves]
    columns = 1 if max(len(curve.label) for curve in curves) > 22 else 2
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


def pyplot() -> Any:
    """matplotlib.pyplot without a screen; ValueError says how to install it."""
    import_for_tools("matplotlib").use("Agg")
    module = import_for_tools("matplotlib.pyplot")
    module.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "svg.hashsalt": "logs",
                            "axes.titlelocation": "left", "figure.constrained_layout.use": True})
    return module


def picture(names: Sequence[str], curves: list[Curve], rows: int, inches: tuple[float, float], **form: Any) -> bytes:
    """Plots in so many rows on one picture, in the form that matplotlib's savefig is told."""
    plt = pyplot()
    figure, grid = plt.subplots(rows, len(names) // rows, figsize=inches, dpi=110, squeeze=False)
    for axes, name in zip(grid.flat, names):
        PLOTS[name](axes, curves)
        style(axes)
    if len(names) > 1 or len(curves) > 1:
        legend(figure, curves)
    buffer = io.BytesIO()
    figure.savefig(buffer, **form)
    plt.close(figure)
    return buffer.getvalue()


def plot(groups: list[Group], path: Path) -> None:
    """All plots on one picture."""
    write_atomically(path, picture(list(PLOTS), curves_of(groups), 3, (11.5, 10.5), format=path.suffix.lstrip(".") or "png"))


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the file and rename, so that nobody meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_bytes(data)
    beside.replace(path)


# ======================================================================================================================
# The page
# ======================================================================================================================

PAGE_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.45 system-ui, sans-serif; color: #1c2733; background: #f6f7f9 }
body { margin: 0 auto; padding: 14px; max-width: 1080px }
h1 { font-size: 1.3rem; margin: .3rem 0; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem }
.big { font-size: 2.3rem; font-weight: 700; margin: .2rem 0 0 }
.note { color: #566472; margin: 0 0 .3rem; overflow-wrap: anywhere }
.card { background: #fff; border: 1px solid #e1e5ea; border-radius: 8px; padding: 12px; margin: 12px 0 }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid #e8ebef; white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff }
tr.stat td { font-weight: 600 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 12px }
.plots img { width: 100%; display: block } .plots .card { margin: 0; padding: 6px }
ul { padding-left: 1.2rem; margin: .4rem 0 } li { overflow-wrap: anywhere }
pre { font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 }
details summary { cursor: pointer; padding: 6px 0 }
@media (max-width: 600px) { h1 { font-size: 1.1rem } table { font-size: .76rem } th, td { padding: 4px 5px } }
"""
PLOT_WORDS = {"loss": "training loss by step with the depth phases", "loss_by_time": "training loss by time",
              "stages": "bits a byte after each stage", "ttt": "running score of test-time training",
              "step_time": "milliseconds of a step at each depth"}  # the table is one of the page's own


def as_html(rows: list[list[str]]) -> str:
    """A table that scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr{' class=stat' if row[0] in ('mean', 'std') else ''}>"
                   + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def group_section(group: Group) -> str:
    """Headline, seeds, stages, where it ran and what to know."""
    bpb, spread = mean_and_spread(group)
    parts = [f"<h1>{html.escape(group.name)}</h1>", f'<p class="big">{bpb}</p>' if bpb else "",
             f'<p class="note">bits per byte ({spread})</p>', f'<p class="note">{html.escape(where_it_ran(group))}</p>',
             as_html(seed_table(group))]
    if stage_names(group.runs):
        parts += ["<h2>Bits a byte at each stage</h2>", as_html(stage_table(group.runs))]
    if warnings := group_warnings(group):
        parts += ["<h2>To know</h2><ul>", *(f"<li>{html.escape(text)}</li>" for text in warnings), "</ul>"]
    return f'<section class="card">{"".join(parts)}</section>'


def where_it_ran(group: Group) -> str:
    """Machine, versions, data, code, as far as the logs say."""
    run = next((run for run in group.runs if run.run), None)
    if run is None:
        return "figures published by others; no log" if group.published else "the log does not say where it ran"
    data = run.data
    words = [f"{run.run.get('ranks', '?')} rank(s) on {run.run.get('device', '?')}", f"torch {run.run.get('torch', '?')}",
             run.run.get("date", "")[:10]]
    if data:
        which = "the published validation set" if data.get("published") == "1" else "a validation set of our own"
        words.append(f"{which}: {int(data['val_docs']):,} documents, {int(data['val_bytes']):,} bytes")
    words += [f"{file} {row['sha256'][:12]}" for file, row in run.code.items()]
    return " · ".join(filter(None, words))


def settings_section(groups: list[Group]) -> str:
    """Settings that are not the same in all runs, then all that are not at their default."""
    runs = [run for group in groups for run in group.runs if run.settings]
    if not runs:
        return ""
    names = [f"{curve.name}, {run.name}" if len(groups) > 1 else run.name
             for curve in curves_of(groups) for run in curve.runs if run.settings]
    differing = differing_settings(runs, ignore=("RUN_ID",))
    parts = ["<h2>Settings that differ</h2>"]
    parts.append(as_html([["setting", *names], *([name, *values] for name, values in differing.items())])
                 if differing else '<p class="note">none: all runs have the same settings</p>')
    starred = sorted({name for run in runs for name in run.starred})
    if starred:
        rows = [["setting", "value (first run)"], *([name, runs[0].settings.get(name, "-")] for name in starred)]
        parts.append(f"<details><summary>{len(starred)} settings that are not the record's</summary>{as_html(rows)}</details>")
    return f'<section class="card">{"".join(parts)}</section>'


def report(groups: list[Group], path: Path) -> None:
    """Write the page: everything is in the one file, nothing is fetched."""
    curves, comparison = curves_of(groups), ""
    plots = []
    for name, words in PLOT_WORDS.items():
        image = base64.b64encode(picture([name], curves, 1, (4.7, 3.5), format="svg", metadata={"Date": None})).decode()
        plots.append(f'<div class="card"><img alt="{words}" src="data:image/svg+xml;base64,{image}"></div>')
    plots.append(f'<div class="card"><h2>Stages</h2>{as_html(stage_comparison(curves))}</div>')
    if len(groups) == 2 and all(group.finished for group in groups):
        try:
            text = f"<pre>{html.escape(compare(*groups))}</pre>"
        except ValueError as error:
            text = f"<p>{html.escape(str(error))}</p>"
        comparison = f'<section class="card"><h2>Comparison</h2>{text}</section>'
    title = html.escape(" and ".join(group.name for group in groups))
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{title}</title><style>{PAGE_STYLE}</style></head><body>'
            f'{"".join(map(group_section, groups))}<div class="plots">{"".join(plots)}</div>{comparison}'
            f'{settings_section(groups)}</body></html>\n')
    write_atomically(path, page.encode("utf-8", "backslashreplace"))


# ======================================================================================================================
# Command line
# ======================================================================================================================


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("summary", help="mean, std and a row a seed").add_argument("paths", nargs="+", metavar="PATH")
    versus = commands.add_parser("compare", help="is NEW better than BASE?")
    versus.add_argument("base", metavar="BASE")
    versus.add_argument("new", metavar="NEW")
    for name, default, words in (("plot", "plot.png", "one picture"), ("report", "report.html", "one self-contained page")):
        command = commands.add_parser(name, help=words)
        command.add_argument("paths", nargs="+", metavar="PATH")
        command.add_argument("--out", type=Path, default=Path(default), help=f"file to write (default {default})")
    return parser.parse_args(arguments)


def print_anything() -> None:
    """What a console cannot print, of a file's name say, is escaped: it must not end a program."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 for something the user can mend."""
    print_anything()
    options = parse_arguments(arguments)
    try:
        if options.command == "compare":
            print(compare(read_group(options.base), read_group(options.new)), flush=True)
            return 0
        groups = [read_group(path) for path in options.paths]
        if options.command == "summary":
            print(summary(groups), flush=True)
        else:
            {"plot": plot, "report": report}[options.command](groups, options.out)
            print(f"wrote {options.out}")
    except BrokenPipeError:  # the reader has seen enough; what is still unwritten goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # noqa: BLE001  whatever a damaged log can provoke is no traceback
        print(f"error: these logs cannot be read: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
