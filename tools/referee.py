"""What verify.py sees with its own eyes: shards, and the losses that the code of a record writes to a file.

Nothing of the record is imported here. Its code runs as scoring runs it, `EVAL_ONLY=1 python train_gpt.py`, in a process
and an empty folder of its own that hold the counted code, the artifact and one validation set; what it says is not read,
but the nats of every target, which it writes to LOSSES_PATH. Which validation sets it is given is drawn at random:
    the real one                    its losses, added and divided here, are the score of the log
    with a changed end              losses before the change stay, to the last bit
    one text with every last token  the probabilities add up to 1
    mixed with training documents   validation documents score no better than those, and as they do in the real set
    in another order and name       the same score
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import logs

PASS, FAIL, UNKNOWN = "pass", "FAIL", "not checkable"
CODE_FILE = "train_gpt.py"
MAGIC, VERSION, HEADER_BYTES, BOS = 20240520, 1, 1024, 1
NOISE_NATS = logs.BAR_NATS / 10  # a score may differ by so much from machine to machine; a record is ten times as much
SUM_NOISE = 1e-5  # of the probabilities of all tokens, from float32 losses
TTT_SHIFT = 0.03  # share by which test-time training may score a document otherwise in other company
SMALL_TOKENS = 4096  # a validation set that is always scored whole
PROBES = (4, 12)  # documents that are scored first, to learn what a score takes
MORE_CUTS = 5  # in each order, where documents see each other
FEW = 10  # documents or pairs of which nothing is concluded
MEMORY_Z = 4.0  # standard errors by which validation documents may score better than training documents


class Result(NamedTuple):
    """One row of the table."""

    status: str
    rule: str
    detail: str


def judged(rule: str, problems: Sequence[str], good: str) -> Result:
    """FAIL with the first problems, or pass with `good`."""
    more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
    return Result(FAIL, rule, "; ".join(problems[:4]) + more) if problems else Result(PASS, rule, good)


class Broken(Exception):
    """The code of the record did not do what every code must: end, and give each target one loss."""


class TooLong(Broken):
    """It did not end in its time, which may be the time's fault."""


# ======================================================================================================================
# Validation sets
# ======================================================================================================================


def read_shard(path: Path) -> np.ndarray:
    """(N,) uint16; ValueError says what is wrong with the file."""
    header = np.fromfile(path, "<i4", HEADER_BYTES // 4)
    if len(header) < HEADER_BYTES // 4 or (header[0], header[1]) != (MAGIC, VERSION):
        raise ValueError(f"{path} is no shard: its header is not that of one")
    if path.stat().st_size != HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(f"{path} is cut or damaged: its header promises {header[2]} entries")
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (int(header[2]),)) if header[2] else np.empty(0, np.uint16)


def shard_paths(folder: Path, split: str) -> list[Path]:
    """The shards of train, val or val_bytes; the sidecar is no shard of val."""
    return sorted(path for path in folder.glob("*.bin") if re.search(rf"_{split}_\d+\.bin$", path.name))


def write_shard(path: Path, entries: np.ndarray) -> None:
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = MAGIC, VERSION, len(entries)
    path.write_bytes(header.tobytes() + entries.astype("<u2").tobytes())


@dataclass(frozen=True)
class ValSet:
    """Tokens (N,) and the bytes that each stands for. Target i is token i + 1 and belongs to the document of token i."""

    tokens: np.ndarray
    byte_counts: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> ValSet:
        """Of a folder of shards; ValueError if there is none, or no sidecar of its length."""
        parts = [[read_shard(path) for path in shard_paths(folder, split)] for split in ("val", "val_bytes")]
        if not all(parts):
            raise ValueError(f"{folder} holds no validation shards (*_val_000000.bin) with their bytes (*_val_bytes_000000.bin)")
        tokens, byte_counts = map(np.concatenate, parts)
        if len(tokens) != len(byte_counts) or len(tokens) < 2 or tokens[0] != BOS:
            raise ValueError(f"{folder}: {len(tokens)} validation tokens, {len(byte_counts)} byte counts, first token {tokens[:1]}")
        return cls(tokens, byte_counts)

    @classmethod
    def of(cls, documents: Sequence[tuple[np.ndarray, np.ndarray]]) -> ValSet:
        return cls(*(np.concatenate(part).astype(np.uint16) for part in zip(*documents)))

    @cached_property
    def starts(self) -> np.ndarray:
        return np.flatnonzero(self.tokens == BOS)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Targets of each document; the BOS that follows is one."""
        return np.diff(self.starts, append=len(self.tokens) - 1)

    @cached_property
    def document(self) -> np.ndarray:
        """The document of each entry."""
        return np.cumsum(self.tokens == BOS) - 1

    @cached_property
    def offset(self) -> np.ndarray:
        """The place of each entry in its document; BOS is 0."""
        return np.arange(len(self.tokens)) - self.starts[self.document]

    @property
    def num_bytes(self) -> int:
        return int(self.byte_counts.sum(dtype=np.int64))

    def piece(self, number: int, targets: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Document `number`, its first `targets` targets; the BOS that follows is not in it."""
        begin = self.starts[number]
        end = begin + int(self.lengths[number]) + (number == len(self.starts) - 1)
        end = min(end, begin + targets + 1) if targets is not None else end
        return self.tokens[begin:end], self.byte_counts[begin:end]

    def of_documents(self, numbers: np.ndarray) -> ValSet:
        return ValSet.of([self.piece(int(number)) for number in np.sort(numbers)])

    def write(self, folder: Path, name: str) -> None:
        write_shard(folder / f"{name}_val_000000.bin", self.tokens)
        write_shard(folder / f"{name}_val_bytes_000000.bin", self.byte_counts)


# ======================================================================================================================
# The suspect
# ======================================================================================================================

NEW_USER, NEW_NET, NEW_MOUNTS, NEW_IPC, NEW_PIDS = 0x10000000, 0x40000000, 0x00020000, 0x08000000, 0x20000000  # of sched.h
PRIVATE, BIND, RECURSIVE = 0x44000, 0x1000, 0x4000  # of mount.h
MOUNT_SETATTR, ALL_BELOW, READ_ONLY = 442, 0x8000, struct.pack("4Q", 1, 0, 0, 0)  # a system call and what it takes
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/proc", "/dev", "/sys")
# Code from before LOSSES_PATH: the losses are taken from what its two scores return.
OLDER = """\
import os, numpy, train_gpt as code
kept = {}
def keeping(function, name=None):
    def called(*values):
        result = function(*values)
        kept[name or values[3]] = (result if hasattr(result, "losses") else result[0]).losses
        return result
    return called
code.evaluate, code.score_with_ttt = keeping(code.evaluate), keeping(code.score_with_ttt, "quantized_ttt")
status = code.main()
numpy.savez(os.environ["LOSSES_PATH"], **kept)
raise SystemExit(status)
"""


def close_off(case: Path) -> None:
    """In the child: no network, and no files but the system's and Python's, to be read, and those of `case`.

    Nothing that it writes or starts is there for the next: it would tell one score from another. OSError where this is not allowed.
    """
    libc, root = ctypes.CDLL(None, use_errno=True), case / "root"
    failed = libc.unshare(NEW_USER | NEW_NET | NEW_MOUNTS | NEW_IPC | NEW_PIDS) or libc.mount(b"none", b"/", None, PRIVATE, None)
    for path in map(Path, (*SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, case)):
        inside = root / path.relative_to("/")
        if path.is_symlink():
            inside.symlink_to(os.readlink(path))
        elif path.is_dir():
            inside.mkdir(parents=True, exist_ok=True)
            failed = failed or libc.mount(os.fsencode(path), os.fsencode(inside), None, BIND | (0 if path == case else RECURSIVE), None)
            if path != case:
                failed = failed or libc.syscall(MOUNT_SETATTR, -1, os.fsencode(inside), ALL_BELOW, READ_ONLY, len(READ_ONLY))
    if (memory := root / "dev" / "shm").is_dir():
        (case / "shm").mkdir()
        failed = failed or libc.mount(os.fsencode(case / "shm"), os.fsencode(memory), None, BIND, None)
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.chroot(root)
    os.chdir(case)
    if first := os.fork():  # with the first process of the new space of processes all others there end
        os.closerange(3, 1 << 16)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) & 255)


@lru_cache
def can_close_off() -> bool:
    try:
        with tempfile.TemporaryDirectory() as case:
            return not subprocess.run(
                [sys.executable, "-c", ""], preexec_fn=partial(close_off, Path(case).resolve()), check=False
            ).returncode
    except (subprocess.SubprocessError, OSError):
        return False


@dataclass
class Suspect:
    """Code and artifact of one run, and how they are to be scored."""

    code: list[Path]
    artifact: Path
    settings: dict[str, str]  # without those that say where things are
    threads: str
    limit_seconds: float
    older: bool = False  # its code knows no LOSSES_PATH
    took: list[tuple[int, float]] = field(default_factory=list)  # (tokens, seconds) of each score

    def setting(self, name: str, default: int) -> int:
        return int(float(self.settings.get(name, default)))

    @property
    def stages(self) -> list[str]:
        return ["quantized", "quantized_ttt"] if self.setting("TTT_ENABLED", 1) else ["quantized"]

    def score(self, val: ValSet, name: str = "fineweb") -> dict[str, np.ndarray]:
        """The nats of every target, by stage; Broken with the reason if they are not there."""
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="run_") as place:
            case = Path(place).resolve()
            for part in ("home", "data", "out"):
                (case / part).mkdir()
            for path in self.code:
                shutil.copyfile(path, case / path.name)
            shutil.copyfile(self.artifact, case / "model.artifact")
            val.write(case / "data", name)
            if self.older:
                (case / "score.py").write_text(OLDER)
            self.run(case)
            losses = {stage: self.read(case / "losses.npz", stage, len(val.tokens) - 1) for stage in self.stages}
        self.took.append((len(val.tokens), time.monotonic() - began))
        return losses

    def seconds_of(self, tokens: int) -> float:
        """What a score of so many tokens takes, by the smallest and the largest so far."""
        (few, least), (many, most) = min(self.took), max(self.took)
        rate = max(most - least, 0.0) / (many - few) if many > few else most / many
        return least + rate * (tokens - few)

    def that_fits(self, val: ValSet, scores: int, rng: np.random.Generator) -> tuple[ValSet, float]:
        """The set, or documents drawn from it at random, of which `scores` scores take no longer than the limit; seconds for all of it."""
        order = rng.permutation(len(val.starts))
        for count in PROBES if len(val.tokens) > SMALL_TOKENS else ():
            self.score(val.of_documents(order[:count]))
        if not self.took or scores * (whole := self.seconds_of(len(val.tokens))) <= self.limit_seconds:
            return val, 0.0
        sizes = np.cumsum(val.lengths[order])
        count = sum(scores * self.seconds_of(int(size)) <= self.limit_seconds for size in sizes)
        return val.of_documents(order[: max(count, PROBES[0])]), scores * whole

    def run(self, case: Path) -> None:
        """Run the code in the folder `case`; whatever it started is ended with it."""
        keep = ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
        environ = {name: os.environ[name] for name in keep if name in os.environ} | self.settings
        environ |= {"EVAL_ONLY": "1", "ARTIFACT_PATH": "model.artifact", "DATA_PATH": "data", "LOSSES_PATH": "losses.npz",
                    "ARTIFACT_DIR": "out", "RUN_ID": "score", "HOME": str(case / "home"), "TMPDIR": str(case / "home"),
                    "OMP_NUM_THREADS": self.threads}
        with (case / "said").open("wb") as said:
            child = subprocess.Popen([sys.executable, "-s", "score.py" if self.older else CODE_FILE], cwd=case, env=environ, stdout=said,
                                     stderr=said, stdin=subprocess.DEVNULL, start_new_session=True,
                                     preexec_fn=partial(close_off, case) if can_close_off() else None)
            try:
                status: int | None = child.wait(self.limit_seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()
        if status is None:
            raise TooLong(f"it did not end in {self.limit_seconds:.0f} s (--minutes allows more)")
        if status not in (0, 3):  # 3: over a time budget, which is of no account here
            words = (case / "said").read_text(errors="replace").strip().splitlines()[-1:]
            raise Broken(f"it ended with exit status {status}: {' '.join(words)[-200:]}")

    def read(self, path: Path, stage: str, targets: int) -> np.ndarray:
        """The array of a stage; Broken unless every target has one loss."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size > 4 * 8 * targets + 10**6:
            raise Broken("it wrote no losses to LOSSES_PATH")
        try:
            with zipfile.ZipFile(path) as packed:
                if any(member.file_size > 8 * targets + 10**4 for member in packed.infolist()):
                    raise Broken("its losses are more than one a target")
            with np.load(path, allow_pickle=False) as stored:
                losses = np.asarray(stored[stage])
        except (OSError, ValueError, KeyError, EOFError, MemoryError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
            raise Broken(f"its losses of {stage} cannot be read: {error}") from None
        if losses.shape != (targets,) or losses.dtype != np.float32:
            raise Broken(f"{stage}: its losses are {losses.dtype} {losses.shape} for {targets} targets")
        if not np.isfinite(losses).all() or losses.min() < -1e-5:
            raise Broken(f"{stage}: {int((~np.isfinite(losses)).sum())} targets have no loss, the least loss is {np.nanmin(losses):g}")
        return losses


STAGE_WORDS = {"quantized": "evaluation", "quantized_ttt": "test-time training"}


def check_score(run: logs.RunLog, losses: dict[str, np.ndarray], val: ValSet, exact: bool) -> Result:
    """The sum of the losses, divided here, is the score of the log; `exact`: to the digits that the log prints."""
    rule, problems, said = f"the artifact scores what the log says: {run.name}", [], []
    for stage, nats in losses.items():
        mean = float(nats.sum(dtype=np.float64)) / len(nats)
        bpb = mean * len(nats) / math.log(2) / int(val.byte_counts[1:].sum(dtype=np.int64))
        said.append(f"{stage} {bpb:.8f}")
        if (told := run.evals.get(stage)) is None:
            if run.evals:
                problems.append(f"{stage} is {bpb:.8f} here, and has no score in the log")
            continue
        apart = abs(told.val_loss - mean), abs(told.val_bpb - bpb)
        if apart[0] > (1e-7 if exact else NOISE_NATS) or apart[1] > (1e-7 if exact else NOISE_NATS):
            problems.append(f"{stage} is {bpb:.8f} BPB and {mean:.8f} nats here, {told.val_bpb} and {told.val_loss} in the log")
        said[-1] += f" ({apart[1]:.1g} from the log)" if apart[1] > 1e-8 else " (exactly)"
    if "quantized_ttt" in run.evals and "quantized_ttt" not in losses:
        problems.append("the log has a score of test-time training, which its settings switch off")
    if not (problems or run.evals):
        return Result(UNKNOWN, rule, f"there is no log; it scores {', '.join(said)}")
    return judged(rule, problems, ", ".join(said))


def check_part(run: logs.RunLog, losses: dict[str, np.ndarray], part: ValSet, val: ValSet) -> Result:
    """Documents drawn at random score, within five standard errors, what the log says of all. That proves no digit of it."""
    rule, problems, said = f"the artifact scores what the log says: {run.name}", [], []
    for stage, nats in losses.items():
        if (told := run.evals.get(stage)) is not None:
            shift = float(nats.mean(dtype=np.float64)) - told.val_loss
            apart = np.bincount(part.document[:-1], nats - told.val_loss - shift, len(part.starts))
            error = math.sqrt(float((apart ** 2).sum())) / len(nats)
            said.append(f"{stage} {told.val_loss:.4f} in the log, here {shift:+.4f} with a standard error of {error:.4f}")
            if len(part.starts) >= FEW and abs(shift) > 5 * error + (TTT_SHIFT * told.val_loss if stage == "quantized_ttt" else NOISE_NATS):
                problems.append(said[-1])
    words = f"{len(part.starts)} of {len(val.starts)} documents, nats a token: {'; '.join(said)}"
    return Result(FAIL, rule, words) if problems else Result(UNKNOWN, rule, words)


# ======================================================================================================================
# What depends on what
# ======================================================================================================================


class Change:
    """A set with the tokens at `where` (N,) replaced by those at `source` (N,); BOS stays, and with it every length.

    In the evaluation nothing before the first replaced entry may change. Test-time training goes from the longest
    document to the shortest; documents of one length have no order among them.
    """

    def __init__(self, val: ValSet, where: np.ndarray, source: np.ndarray) -> None:
        self.real, self.source, self.where = val, source, where & (val.tokens != BOS)
        place = np.where(self.where, source, np.arange(len(val.tokens)))
        self.val = ValSet(val.tokens[place], val.byte_counts[place])
        self.touched = np.unique(val.document[self.where])
        first = np.full(len(val.starts), len(val.tokens))
        np.minimum.at(first, val.document[self.where], np.flatnonzero(self.where))
        self.before = np.arange(1, len(val.tokens)) < first[val.document[:-1]]  # targets in front of all that is replaced in their document

    def stays(self, stage: str, apart: bool) -> np.ndarray:
        """(N - 1,): the targets whose losses must be the real ones; `apart`: documents are known not to see each other."""
        if stage == "quantized":
            return self.before if apart else np.arange(1, len(self.where)) < np.flatnonzero(self.where)[0]
        document, lengths = self.real.document[:-1], self.real.lengths
        first = self.touched[lengths[self.touched] == lengths[self.touched].max()]
        return (lengths[document] > lengths[first[0]]) | (self.before & (document == first[0]) if len(first) == 1 else False)

    def suspicious(self, changed: np.ndarray) -> list[int]:
        """Documents whose losses in front of what was replaced changed, though those of shorter ones, scored later, did not."""
        document, lengths = self.real.document[:-1], self.real.lengths
        moved = np.intersect1d(self.touched, document[changed & self.before])
        still = np.setdiff1d(document[self.before], document[changed & self.before])
        return [int(one) for one in moved[np.argsort(-lengths[moved])] if len(still) and lengths[one] > lengths[still].min()]

    def only(self, document: int) -> Change:
        return Change(self.real, self.where & (self.real.document == document), self.source)


def cuts(val: ValSet, count: int, rng: np.random.Generator) -> Iterator[Change]:
    """`count` places in the order of the data and `count` in that of test-time training, everything behind replaced."""
    order = np.argsort(-val.lengths, kind="stable")
    for share in (np.arange(count) + rng.random(count)) / count:
        yield Change(val, np.arange(len(val.tokens)) >= 2 + int(share * (len(val.tokens) - 4)), other_text(val, rng))
        document = order[min(int(share * len(order)), len(order) - 1)]
        inside = int(rng.integers(1, max(2, val.lengths[document] - 1)))
        later = (val.lengths < val.lengths[document])[val.document] | ((val.document == document) & (val.offset > inside))
        if (later & (val.tokens != BOS)).any():
            yield Change(val, later, other_text(val, rng))


def other_text(val: ValSet, rng: np.random.Generator) -> np.ndarray:
    """(N,): places of other text of the same set."""
    text, other = np.flatnonzero(val.tokens != BOS), np.arange(len(val.tokens))
    other[text] = np.roll(text, int(rng.integers(1, len(text))))
    return other


def cut_each(val: ValSet, documents: np.ndarray, rng: np.random.Generator) -> Change:
    """Each of the documents (mask) goes on otherwise behind a place of its own: half of them with other text, half repeating themselves.

    So a choice that is made by a whole document's score is made otherwise in many.
    """
    inside = rng.integers(1, np.maximum(2, val.lengths))[val.document]
    again = val.starts[val.document] + 1 + (val.offset - 1) % inside
    source = np.where((rng.random(len(val.starts)) < 0.5)[val.document], again, other_text(val, rng))
    return Change(val, (val.offset > inside) & documents[val.document], source)


def same_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.view(np.uint32) == b.view(np.uint32)


class Examination:
    """All that one suspect is asked, beside the score of its log."""

    def __init__(self, suspect: Suspect, val: ValSet, real: dict[str, np.ndarray], rng: np.random.Generator) -> None:
        self.suspect, self.val, self.real, self.rng = suspect, val, real, rng
        self.vocab = suspect.setting("VOCAB_SIZE", 8192)
        # Documents, longest first, behind which no phase of test-time training begins.
        self.lead = suspect.setting("PHASED_TTT_PREFIX_DOCS", 2000) + 2 * suspect.setting("TTT_BATCH_SIZE", 64)
        self.apart = True  # whether its documents are scored apart, as far as was seen
        if int(val.tokens.max()) >= self.vocab:
            raise ValueError(f"the validation set has token {val.tokens.max()}, and VOCAB_SIZE is {self.vocab}")

    def rows(self, train: Callable[[], Iterator[np.ndarray]] | None, count: int) -> Iterator[Result]:
        """Every check; `train` gives the training documents, `count` is the number of cuts in each order."""
        for name, check in (("causal", partial(self.causal, count)), ("the distribution adds up to 1", self.normalised),
                            ("the same score in another order and name", self.reordered),
                            ("validation documents score no better than others", partial(self.memorised, train))):
            try:
                yield from check()
            except Broken as error:
                yield Result(FAIL, name, f"another validation set than the real one was not scored: {error}")

    def changes(self, count: int) -> Iterator[tuple[Change, dict[str, np.ndarray]]]:
        """Changed sets and their losses; where some documents alone look as if they saw their own end, each of two by itself."""
        ranks = np.argsort(np.argsort(-self.val.lengths, kind="stable"))
        for change in cuts(self.val, count, self.rng):
            yield change, self.suspect.score(change.val)
        if not self.apart:  # then only what lies before a place in the order of the data must stay
            yield from ((change, self.suspect.score(change.val)) for change in cuts(self.val, MORE_CUTS, self.rng))
        for which in (ranks >= 0, ranks >= (self.lead if self.lead < len(ranks) else 0)):
            change = cut_each(self.val, which, self.rng)
            if not self.apart or not change.where.any():
                return
            after = self.suspect.score(change.val)
            yield change, after
            last = self.suspect.stages[-1]
            for document in change.suspicious(~same_bits(self.real[last], after[last]))[:2]:
                alone = change.only(document)
                yield alone, self.suspect.score(alone.val)

    def causal(self, count: int) -> Iterator[Result]:
        """Everything behind a place replaced: what was scored before it stays, to the last bit."""
        stages = self.suspect.stages
        problems: dict[str, list[str]] = {stage: [] for stage in stages}
        kept, moved, worst, number = dict.fromkeys(stages, 0), dict.fromkeys(stages, 0), dict.fromkeys(stages, 0.0), 0
        for number, (change, after) in enumerate(self.changes(count), 1):
            untouched = ~np.isin(self.val.document[:-1], change.touched)
            self.apart &= not (~same_bits(self.real["quantized"], after["quantized"]) & untouched).any()
            for stage in stages:
                changed, stays = ~same_bits(self.real[stage], after[stage]), change.stays(stage, self.apart)
                kept[stage] += int(stays.sum())
                moved[stage] += int(changed[~stays].sum())
                if len(wrong := np.flatnonzero(changed & stays)):
                    apart = np.abs(self.real[stage][wrong].astype(np.float64) - after[stage][wrong])
                    worst[stage] = max(worst[stage], float(apart.max()))
                    problems[stage].append(f"set {number}: {len(wrong)} of {int(stays.sum())} earlier losses changed, "
                                           f"by {apart.max():.2g} at most")
            if any(problems.values()):
                break
        again = self.suspect.score(self.val) if any(problems.values()) else self.real
        for stage in stages:
            rule, noise = f"causal: {STAGE_WORDS[stage]}", float(np.abs(again[stage].astype(np.float64) - self.real[stage]).max())
            if not moved[stage]:
                problems[stage].append("no loss changed when the text did: the scores are not computed from it")
            if problems[stage] and noise and worst[stage] <= 10 * noise:
                yield Result(UNKNOWN, rule, f"scores of one text differ by {noise:.2g} on this device; try a CPU ({problems[stage][0]})")
            else:
                yield judged(rule, problems[stage], f"{number} changed sets: {kept[stage]:,} earlier losses bit-identical")
        yield Result(PASS if self.apart else UNKNOWN, "documents are scored apart", "in the evaluation, bit-identical" if self.apart else
                     "a document's losses depend on others; this is allowed, but scores in other sets say less")

    def normalised(self) -> Iterator[Result]:
        """One text with every token behind it, a document each: their probabilities add up to 1."""
        chunk = self.suspect.setting("TTT_CHUNK_SIZE", 48)
        prefix = self.rng.permutation(self.val.tokens[self.val.tokens != BOS])[: chunk + 3]
        one = np.array([BOS, *np.resize(prefix, chunk + 3)])
        longest = np.argsort(-self.val.lengths)[: max(1, int((self.val.lengths > len(one) + 1).sum()))]
        ends = [np.append(one, token) for token in range(self.vocab) if token != BOS] + [one, one[:2]]  # one, then the BOS that follows
        ends = [np.append(one, self.vocab - 1), np.append(one, self.vocab - 2), *ends]  # what two continue in two ways gives no n-gram hint
        documents = [self.val.piece(number) for number in np.resize(longest, self.lead)]  # the phases end before the texts begin
        documents += [(text, (text != BOS) & (text > 7)) for text in ends]
        begin = self.lead + 2
        made = ValSet.of(documents)
        if (estimate := self.suspect.seconds_of(len(made.tokens))) > 0.5 * self.suspect.limit_seconds:
            yield Result(UNKNOWN, "the distribution adds up to 1", f"left out: about {estimate / 60:.0f} minutes; --minutes makes room")
            return
        losses = self.suspect.score(made)
        places = made.starts[begin: begin + self.vocab] + len(one) - 1
        on_gpu = Path("/dev/nvidia0").exists()
        again = self.suspect.score(ValSet.of(documents[:begin] + documents[begin:-2][::-1] + documents[-2:])) if on_gpu else losses
        for stage in self.suspect.stages:
            total, other = (float(np.exp(-found[stage][places].astype(np.float64)).sum()) for found in (losses, again))
            allowed = max(SUM_NOISE, 3 * abs(total - other))
            rule, good = f"the distribution adds up to 1: {STAGE_WORDS[stage]}", f"{self.vocab} tokens after one text: {total:.7f}"
            others = not self.apart or stage != "quantized" and self.suspect.setting("TTT_WARM_START_A", 0)
            if allowed > NOISE_NATS or others:
                yield Result(UNKNOWN, rule, f"{total:.6f}, which {'other documents' if others else 'noise on this device'} may change")
            else:
                yield judged(rule, [f"they add up to {total:.7f}"] if abs(total - 1) > allowed else [], good)

    def compare_documents(self, rule: str, found: dict[str, np.ndarray], made: ValSet, pairs: Sequence[tuple[int, int]],
                          slack: dict[str, float]) -> Iterator[Result]:
        """Documents (number in `made`, number in the real set) score in `made` as they do in the real set.

        `slack`: the nats a token by which a stage may differ in the mean, beside four standard errors.
        """
        for stage in self.suspect.stages:
            sums, counts = [], []
            for here, there in pairs:
                count = int(min(made.lengths[here], self.val.lengths[there])) - 1  # without the BOS that follows
                begin, real = made.starts[here], self.val.starts[there]
                a, b = found[stage][begin: begin + count], self.real[stage][real: real + count]
                sums.append(float((a.astype(np.float64) - b).sum()))
                counts.append(count)
            shift = sum(sums) / max(sum(counts), 1)
            error = float(np.std(np.array(sums) - shift * np.array(counts))) * math.sqrt(len(sums)) / max(sum(counts), 1)
            words = f"{len(pairs)} documents: {shift:+.6f} nats a token"
            wrong = abs(shift) > slack[stage] + (4 * error if stage != "quantized" else 0)
            if wrong and stage == "quantized" and not self.apart:
                yield Result(UNKNOWN, f"{rule}: {STAGE_WORDS[stage]}", f"{words}; documents are not scored apart")
            else:
                yield judged(f"{rule}: {STAGE_WORDS[stage]}", [words + ", so the code knows which set it scores"] if wrong else [], words)

    def reordered(self) -> Iterator[Result]:
        order = self.rng.permutation(len(self.val.starts))
        made = ValSet.of([self.val.piece(number) for number in order])
        slack = dict.fromkeys(self.suspect.stages, NOISE_NATS)
        yield from self.compare_documents("the same score in another order and name", self.suspect.score(made, "text"), made,
                                          list(enumerate(order)), slack)

    def memorised(self, train: Callable[[], Iterator[np.ndarray]] | None, most: int = 1000) -> Iterator[Result]:
        """Validation and training documents of the same lengths, shuffled: those of the validation set are not easier."""
        rule = "validation documents score no better than others"
        if train is None or not (pool := sample_documents(train, 20 * most, self.rng)):
            yield Result(UNKNOWN, rule, "no training documents here to compare with; --data names a folder that has train shards too")
            return
        chosen = self.rng.permutation(len(self.val.starts))[:most]
        pool.sort(key=len)
        lengths, pairs = [len(text) for text in pool], []
        for number in chosen:
            text = pool[min(int(np.searchsorted(lengths, self.val.lengths[number] + 1)), len(pool) - 1)]
            pairs.append((number, text, min(len(text) - 1, int(self.val.lengths[number]) - 1)))
        pairs = [pair for pair in pairs if pair[2] >= 4]
        documents = [piece for number, text, count in pairs
                     for piece in (self.val.piece(number, count), (text[: count + 1], (text[: count + 1] > 7)))]
        order = self.rng.permutation(len(documents))
        made = ValSet.of([documents[i] for i in order])
        place = np.argsort(order)
        found = self.suspect.score(made)
        for stage in self.suspect.stages:
            means = [[float(found[stage][made.starts[i]: made.starts[i] + count].mean()) for i in place[2 * k: 2 * k + 2]]
                     for k, (_, _, count) in enumerate(pairs)]
            gaps = np.array([other - own for own, other in means])
            z = float(gaps.mean() / max(gaps.std(ddof=1) / math.sqrt(len(gaps)), 1e-9)) if len(gaps) > 1 else 0.0
            words = f"{len(gaps)} pairs of one length: {gaps.mean():+.4f} nats a token, z = {z:.1f}"
            if len(gaps) < FEW:
                yield Result(UNKNOWN, f"{rule}: {STAGE_WORDS[stage]}", f"too few: {words}")
                continue
            yield judged(f"{rule}: {STAGE_WORDS[stage]}", [words] if z > MEMORY_Z else [], words)
        slack = {"quantized": NOISE_NATS, "quantized_ttt": TTT_SHIFT * float(self.real[self.suspect.stages[-1]].mean())}
        yield from self.compare_documents("the same score in other company", found, made,
                                          [(int(place[2 * k]), pair[0]) for k, pair in enumerate(pairs)], slack)


def sample_documents(train: Callable[[], Iterator[np.ndarray]], most: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Up to `most` training documents, drawn from all: each of n seen so far stays with the chance most / n."""
    kept: list[np.ndarray] = []
    for seen, text in enumerate(train()):
        if len(kept) < most:
            kept.append(text)
        elif (at := int(rng.integers(seen + 1))) < most:
            kept[at] = text
    return kept
