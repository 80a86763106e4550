"""Prove what can be proved about a run, and say what cannot.

    python tools/verify.py RECORD_FOLDER [--data SHARDS]
    python tools/verify.py --artifact FILE [--log FILE] --data SHARDS [--code FOLDER]

One table comes out: rule by rule pass, FAIL or not checkable, with the reason. The exit status is 0 if nothing failed, 1
if something did (with --strict also if something could not be checked), 2 for a mistake on the command line.

Three kinds of checks, in this order:
    the folder   logs, code, artifacts and submission.json against each other, and against the rules' limits
    the data     which validation set it is, its bytes against its text, training documents that are validation documents
    the code     the train_gpt.py of the folder is imported and scores with the artifact: documents whose later tokens, or
                 whose neighbours, are replaced (the earlier scores must stay, to the last bit); documents that differ in
                 their last token alone, by all tokens (the probabilities must add up to 1); and, in a process that has
                 nothing but the counted code and the artifact, the whole validation set (the score must be the log's)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import logs
from logs import RunLog

CAP_BYTES = 16_000_000
BUDGET_SECONDS = 600
SEEDS_OF_A_RECORD = 3
RECORD_TRACK, OTHER_TRACK = "track_10min_16mb", "track_non_record_16mb"
PASS, FAIL, UNKNOWN = "pass", "FAIL", "not checkable"
CODE_FILE = "train_gpt.py"
MACHINE_WORDS = ("device", "ranks", "torch", "attention", "compile")


class Result(NamedTuple):
    """One row of the table."""

    status: str
    rule: str
    detail: str


def judged(rule: str, problems: Sequence[str], good: str) -> Result:
    """FAIL with the problems, or pass with `good`."""
    return Result(FAIL, rule, "; ".join(problems)) if problems else Result(PASS, rule, good)


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
    submission: dict[str, Any] | None = None

    @property
    def is_record(self) -> bool:
        return self.track == RECORD_TRACK


def open_folder(folder: Path) -> Record:
    """A record folder; ValueError if it holds no logs."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if not (paths := logs.logs_in(folder)):
        raise ValueError(f"{folder} holds no logs ({logs.RECORD_LOGS}): nothing is claimed there that could be verified")
    path = folder / "submission.json"
    submission = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    artifacts = {log: log.with_suffix(".artifact") for log in paths if log.with_suffix(".artifact").exists()}
    track = (submission or {}).get("track", folder.resolve().parent.name)
    return Record(folder, [logs.read_log(log) for log in paths], artifacts, track, submission)


def check_complete(record: Record) -> Result:
    problems = [f"{run.path.name}: {problem}" for run in record.runs for problem in run.problems
                if not problem.startswith("warning")]
    problems += [f"{run.path.name} is of a mere evaluation" for run in record.runs if run.settings.get("EVAL_ONLY") == "1"]
    seeds = [run.seed for run in record.runs]
    if len(set(seeds)) < len(seeds):
        problems.append(f"the same seed twice: {seeds}")
    problems += [f"{run.path.name} is of seed {run.seed}" for run in record.runs
                 if run.path.match(logs.RECORD_LOGS) and run.path.stem != f"train_seed{run.seed}"]
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


CODE_RULE = "the folder's code is the code that ran"


def check_code(record: Record) -> Result:
    rule, problems = CODE_RULE, []
    for run in record.runs:
        if not run.code:
            return Result(UNKNOWN, rule, f"{run.path.name} names no code")
        for file, row in run.code.items():
            path = record.folder / file
            have = sha256_of(path) if path.is_file() else "missing"
            if have != row["sha256"]:
                problems.append(f"{file} is {have[:12]} here and {row['sha256'][:12]} in {run.path.name}")
    files = ", ".join(f"{file} {row['sha256'][:12]}" for file, row in record.runs[0].code.items())
    return judged(rule, problems, files)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def check_size(record: Record) -> Result:
    """The code is counted as it lies in the folder, byte by byte, nothing minified."""
    problems, sizes = [], []
    for run in record.runs:
        name, log = run.path.name, run.artifact
        if not log:
            problems.append(f"{name} has no artifact line")
            continue
        code_bytes = sum((record.folder / file).stat().st_size for file in run.code if (record.folder / file).is_file())
        model_bytes = int(log["model_bytes"])
        if (path := record.artifacts.get(run.path)) is not None:
            if path.stat().st_size != model_bytes:
                problems.append(f"{path.name} has {path.stat().st_size} bytes, {name} says {model_bytes}")
            if "sha256" in log and sha256_of(path) != log["sha256"]:
                problems.append(f"{path.name} is not the file of which {name} gives the sha256")
            model_bytes = max(model_bytes, path.stat().st_size)
        total = model_bytes + code_bytes
        sizes.append(total)
        if total > CAP_BYTES:
            problems.append(f"{name}: {model_bytes:,} + {code_bytes:,} = {total:,} bytes, over the cap of {CAP_BYTES:,}")
        told = {int(log["total_bytes"]), run.final.total_bytes if run.final else None} - {None}
        if told != {total}:
            problems.append(f"{name} says {' and '.join(map(str, sorted(told)))} bytes in all, counted here: {total}")
    files = "with the artifacts here" if record.artifacts else "the artifacts are not here, their sizes are the logs'"
    return judged("artifact and code within the cap", problems, f"at most {max(sizes, default=0):,} of {CAP_BYTES:,} bytes; {files}")


def check_time(record: Record, what: str, name: str) -> Result:
    rule, limit_ms = f"{what} within {BUDGET_SECONDS} s", 1e3 * BUDGET_SECONDS
    times = [getattr(run.final, name) for run in record.runs if run.final]
    if not times or None in times:
        return Result(UNKNOWN, rule, "not every log says how long it took")
    longest = f"{max(times) / 1e3:.1f} s at most"
    problems = []
    if name == "train_ms":
        last = [(run, run.train[-1].elapsed_ms) for run in record.runs if run.train and run.train[-1].elapsed_ms and run.final]
        problems = [f"{run.path.name}: {run.final.train_ms / 1e3:.1f} s at the end, {last_ms / 1e3:.1f} s in the last training line"
                    for run, last_ms in last if run.final.train_ms < last_ms - 1]
    if max(times) > limit_ms and record.is_record:
        problems.append(longest)
    if not record.is_record:
        longest += ", above it, but this track has no limit" if max(times) > limit_ms else ""
    return judged(rule, problems, f"{longest}; measured by the run itself")


def check_targets(record: Record) -> Result:
    """By the logs: every evaluation counted all targets and all bytes."""
    rule, problems = "every target counted once (by the logs)", []
    for run in record.runs:
        if "val_tokens" not in run.data:
            return Result(UNKNOWN, rule, f"{run.path.name} does not say how long the validation set is")
        expected = (int(run.data["val_tokens"]) - 1, int(run.data["val_bytes"]))
        for name, score in run.evals.items():
            if (score.tokens, score.num_bytes) != expected:
                problems.append(f"{run.path.name}, {name}: {score.tokens} targets and {score.num_bytes} bytes of {expected}")
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
        last = run.evals.get("quantized_ttt") or run.evals.get("quantized")
        if run.final and (last is None or (last.val_loss, last.val_bpb) != (run.final.val_loss, run.final.val_bpb)):
            problems.append(f"{run.path.name}: its last line says {run.final.val_bpb}, its evaluation {last and last.val_bpb}")
    return judged("BPB = nats / ln 2 / bytes, and the final score is the last evaluation", problems, "recomputed from every log")


def check_claims(record: Record) -> Result:
    """submission.json says what the logs say."""
    rule, told, problems = "submission.json says what the logs say", record.submission, []
    if told is None:
        return Result(UNKNOWN, rule, "there is none")
    group = logs.Group("", record.runs)
    for name in ("val_loss", "val_bpb"):
        mean, std = logs.mean_and_std(group.values(name))
        for key, value in ((name, mean), (name + "_std", std)):
            claim = math.nan if told.get(key) is None else told[key]
            if not (math.isclose(claim, value, abs_tol=1e-7) or math.isnan(claim) and math.isnan(value)):
                problems.append(f"{key} is {told.get(key)}, by the logs {value:.8f}")
    track = record.folder.resolve().parent.name
    if track.startswith("track_") and track != told.get("track"):
        problems.append(f"it says track {told.get('track')} and lies in {track}")
    if sorted(told.get("seeds", [])) != sorted(run.seed for run in record.runs):
        problems.append(f"seeds {told.get('seeds')}, logs of {[run.seed for run in record.runs]}")
    for run in record.runs:
        row = told.get("seed_results", {}).get(str(run.seed), {})
        if run.final and (row.get("val_bpb"), row.get("artifact_bytes")) != (run.final.val_bpb, run.final.total_bytes):
            problems.append(f"seed {run.seed}: {row.get('val_bpb')} and {row.get('artifact_bytes')} bytes, by the log "
                            f"{run.final.val_bpb} and {run.final.total_bytes}")
    return judged(rule, problems, "means, deviations, seeds, sizes")


def check_folder(record: Record) -> list[Result]:
    """All checks that need nothing but the folder."""
    return [check_complete(record), check_one_configuration(record), check_code(record), check_size(record),
            check_time(record, "training", "train_ms"), check_time(record, "evaluation", "eval_ms"),
            check_targets(record), check_arithmetic(record), check_claims(record)]


# ======================================================================================================================
# The data
# ======================================================================================================================


@dataclass
class Subject:
    """The code of a record, loaded, with its settings and its data."""

    record: Record
    code: ModuleType
    cfg: Any  # its Config, with the data folder that is here
    val: Any  # its ValData
    shards: Path


def load_code(path: Path) -> ModuleType:
    """Import a train_gpt.py by its path, under a name of its own."""
    name = "verified_train_gpt_" + hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:12]
    if name in sys.modules:  # its operators are registered already
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def settings_for_here(run: RunLog, shards: Path | None, tokenizer: Path | None) -> dict[str, str]:
    """The settings of a log as an environment, with the places of this machine."""
    environ = {name: value for name, value in run.settings.items() if name not in logs.VARYING and value != ""}
    for name in ("SEED", "DATA_DIR", "DATA_PATH", "TOKENIZER_PATH"):
        if run.settings.get(name):
            environ[name] = run.settings[name]
    here = {"DATA_PATH": shards, "TOKENIZER_PATH": tokenizer}
    return environ | {name: str(path) for name, path in here.items() if path}


def open_subject(record: Record, shards: Path | None, tokenizer: Path | None) -> Subject:
    """Load code and validation data; ValueError says what is missing."""
    code = load_code(record.folder / CODE_FILE)
    cfg = code.Config.from_env(settings_for_here(record.runs[0], shards, tokenizer))
    if tokenizer is None and not cfg.tokenizer_file.exists() and (record.folder / cfg.tokenizer_path).is_file():
        cfg = replace(cfg, tokenizer_path=str(record.folder / cfg.tokenizer_path))
    if not cfg.shards_dir.is_dir():
        raise ValueError(f"the data is not here ({cfg.shards_dir}); name the folder of the shards with --data")
    return Subject(record, code, cfg, code.load_val(replace(cfg, val_doc_fraction=1.0)), cfg.shards_dir)


def check_which_data(subject: Subject) -> Result:
    """The published validation set by name and constants, or another one, named by its hash; and the one of the logs."""
    rule, code, val, problems = "which validation set", subject.code, subject.val, []
    found = {"documents": val.documents, "tokens": len(val.tokens), "bytes": val.num_bytes}
    published = found == code.PUBLISHED_VAL
    digest = hashlib.sha256(val.tokens.tobytes()).hexdigest()
    for run in (run for run in subject.record.runs if run.data):
        told = {key: run.data.get(name) for key, name in zip(found, ("val_docs", "val_tokens", "val_bytes"))}
        if told != {key: str(value) for key, value in found.items()}:
            problems.append(f"{run.path.name} scored {told}, here is {found}")
    if subject.record.is_record and not published:
        problems.append(f"a record scores the published validation set {code.PUBLISHED_VAL}, here is {found}")
    which = "the published one" if published else f"not the published one: {subject.shards.name}"
    size = f"{val.documents:,} documents, {val.num_bytes:,} bytes"
    return judged(rule, problems, f"{which}; {size}, sha256 of the tokens {digest[:16]}")


def split_documents(tokens: Any, bos: int = 1) -> Iterator[bytes]:
    """The documents of a stream of token ids, each as bytes without its BOS."""
    import numpy as np

    starts = np.flatnonzero(tokens == bos)
    for begin, end in zip(starts, np.append(starts[1:], len(tokens))):
        yield tokens[begin + 1: end].tobytes()


def check_disjoint(subject: Subject) -> Result:
    """No training document is a validation document: by their hashes, over all train shards, across shard borders."""
    import numpy as np

    rule, code, told = "no validation document in the training data", subject.code, subject.record.runs[0].data
    paths = code.shard_paths(subject.shards, "train")
    if not paths:
        return Result(UNKNOWN, rule, "no train shards here")
    forbidden = {hashlib.blake2b(text, digest_size=16).digest() for text in split_documents(subject.val.tokens)}
    lengths = {len(text) for text in split_documents(subject.val.tokens)}
    equal, documents, rest = 0, 0, None
    for path in [*paths, None]:  # what follows the last BOS of a shard goes on in the next; None is the end
        shard = np.empty(0, np.uint16) if path is None else np.asarray(code.read_shard(path))
        stream = shard if rest is None else np.concatenate([rest, shard])
        starts = np.flatnonzero(stream == 1)
        cut = len(stream) if path is None or not len(starts) else int(starts[-1])
        for text in split_documents(stream[:cut]):
            documents += 1
            equal += len(text) in lengths and hashlib.blake2b(text, digest_size=16).digest() in forbidden
        rest = stream[cut:]
    some = f"{equal} of {documents:,}" if equal else f"none of {documents:,}"
    note = f"{some} training documents in {len(paths)} shard(s) equal one of the {subject.val.documents:,} validation documents"
    if told.get("train_shards", str(len(paths))) != str(len(paths)):
        note = f"only {len(paths)} of the {told['train_shards']} train shards are here; {note}"
        return Result(FAIL if equal else UNKNOWN, rule, note)
    return judged(rule, [note] if equal else [], note)


def check_bytes(subject: Subject, documents_file: Path | None) -> Result:
    """The sidecar charges the bytes of the original text, document by document.

    For a lossless tokenizer the text is what the shard decodes to. With the raw documents, it is also compared with them.
    """
    rule, code, val = "bytes equal to the text's bytes", subject.code, subject.val
    if {"documents": val.documents, "tokens": len(val.tokens), "bytes": val.num_bytes} == code.PUBLISHED_VAL:
        return Result(PASS, rule, f"the sidecar sums to the published {val.num_bytes:,} bytes")
    try:
        pieces, lossless = tokenizer_pieces(subject.cfg.tokenizer_file)
    except (ImportError, OSError, ValueError) as error:
        return Result(UNKNOWN, rule, f"no text without the tokenizer: {error}")
    if not (subject.cfg.caseops_enabled and lossless):
        return Result(UNKNOWN, rule, "the tokenizer is not lossless, the original text is not in the shard")
    problems: list[str] = []
    starts = [*val.document_starts().tolist(), len(val.tokens)]
    originals = raw_texts(documents_file) if documents_file else None
    for number, (begin, end) in enumerate(zip(starts, starts[1:])):
        charged = int(val.byte_counts[begin:end].sum())
        try:
            text = decode_caseops(b"".join(pieces[token] for token in val.tokens[begin + 1: end]), subject.record.folder)
        except ValueError as error:
            problems.append(f"document {number} does not decode: {error}")
            continue
        if len(text.encode()) != charged:
            problems.append(f"document {number} is charged {charged} bytes, its text has {len(text.encode())}")
        if originals is not None and next(originals, None) != text:
            problems.append(f"document {number} is not the text in {documents_file}")
    compared = f" and equal to {documents_file.name}" if documents_file else ""
    if len(problems) > 3:
        problems = [*problems[:3], f"and {len(problems) - 3} more"]
    return judged(rule, problems, f"{len(starts) - 1:,} documents decoded{compared}")


def tokenizer_pieces(path: Path) -> tuple[list[bytes], bool]:
    """What each token stands for in the CaseOps text, and whether the tokenizer loses nothing; ValueError without the file."""
    import sentencepiece

    if not path.is_file():
        raise ValueError(f"there is none at {path}; name it with --tokenizer")
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = []
    for i in range(model.vocab_size()):
        name = model.id_to_piece(i)
        control = model.is_control(i) or model.is_unknown(i)
        plain = bytes([int(name[3:5], 16)]) if model.is_byte(i) else name.replace("\u2581", " ").encode()
        pieces.append(b"" if control else plain)
    sample = "a  b\n\n c\u00a0\ufb01 \t"
    return pieces, b"".join(pieces[i] for i in model.encode(sample)).decode() == sample


def decode_caseops(transformed: bytes, folder: Path) -> str:
    """The original text, by the lossless_caps.py of the folder (or of this repository)."""
    global _caseops
    if _caseops is None:
        here = folder / "lossless_caps.py"
        _caseops = load_code(here if here.is_file() else Path(__file__).resolve().parent.parent / "lossless_caps.py")
    return _caseops.decode(transformed.decode("utf-8"))


_caseops: ModuleType | None = None


def raw_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)["text"]


def check_data(subject: Subject, documents_file: Path | None) -> Iterator[Result]:
    """All checks of the data."""
    yield check_which_data(subject)
    yield check_bytes(subject, documents_file)
    yield check_disjoint(subject)


# ======================================================================================================================
# The code: what depends on what
#
# The audit knows nothing of how the score is made. It hands the code small validation sets, made of documents of the
# real one, and looks at which of the losses change when tokens change.
# ======================================================================================================================

AUDIT_DOCUMENTS = 12
LONG_DOCUMENTS = 2
AUDIT_SIZES = {"eval_seq_len": 128, "ttt_chunk_size": 16, "ttt_eval_seq_len": 64}  # at most; less work, the same code paths
NORMALISED_TO = {"cpu": 1e-3, "cuda": 2e-2}  # of the sum of probabilities: float32 there, bfloat16 here


class Auditor:
    """Scores small validation sets with the code and the artifact of a record, one process, one device, eagerly."""

    def __init__(self, subject: Subject, artifact: Path, full_size: bool = False) -> None:
        import numpy as np

        self.subject, self.code = subject, subject.code
        stored, self.tensors = self.code.unpack_artifact(artifact.read_bytes())
        sizes = {} if full_size else {name: min(getattr(subject.cfg, name), most) for name, most in AUDIT_SIZES.items()}
        if sizes and (doubles := getattr(subject.cfg, "ttt_chunk_doubles_at", ())):  # early enough for small documents
            sizes["ttt_chunk_doubles_at"] = tuple(sizes["ttt_chunk_size"] << i + 1 for i in range(len(doubles)))
        self.cfg = replace(subject.cfg, **stored, **sizes, val_doc_fraction=1.0)
        device = self.code.torch.device("cuda" if self.code.torch.cuda.is_available() else "cpu")
        self.code.resolve_attention("auto", device)
        self.ranks = self.code.Ranks(device=device)
        self.rng = np.random.default_rng(0)

    @property
    def device(self) -> str:
        return self.ranks.device.type

    def losses(self, tokens: Any, ttt: bool, byte_counts: Any = None, **changes: Any) -> Any:
        """Score `tokens` (N,) and check that every target has its one loss; (N - 1,) float32.

        `ttt` scores with test-time training; `changes` are settings of this score.

        Raises:
            AuditError: a target without a score, or a sum that is not the sum of its parts.
        """
        import numpy as np

        code, cfg = self.code, replace(self.cfg, **changes)
        byte_counts = np.ones_like(tokens) if byte_counts is None else byte_counts
        val = code.ValData(tokens, byte_counts, int((tokens == code.BOS_ID).sum()))
        run = code.Run(cfg, self.ranks, code.Log(None, speaks=False))
        model = code.model_from_tensors(cfg, self.tensors, run)
        if ttt:
            score = code.score_with_ttt(run, model, val)[0]
        else:
            score = code.evaluate(run, model, val, "audit", cfg.eval_loop_depth)
        losses = np.asarray(score.losses)
        if losses.shape != (len(tokens) - 1,) or not np.isfinite(losses).all():
            raise AuditError(f"{int(np.isfinite(losses).sum())} of {len(tokens) - 1} targets have a score")
        total = losses.sum(dtype=np.float64)
        if score.tokens != len(losses) or not math.isclose(score.nats, total, rel_tol=1e-6):
            raise AuditError(f"the score adds up {score.nats:.6f} nats over {score.tokens} targets, the {len(losses)} targets "
                             f"have {total:.6f}")
        if score.num_bytes != int(byte_counts[1:].sum(dtype=np.int64)):
            raise AuditError(f"the score is divided by {score.num_bytes} bytes, the targets have {int(byte_counts[1:].sum())}")
        return losses

    def sample(self, count: int, longest: int) -> tuple[Any, Any]:
        """Tokens and byte counts of `count` documents of the validation set, cut to `longest` targets; two may be longer."""
        import numpy as np

        val = self.subject.val
        starts = val.document_starts()
        ends = np.append(starts[1:], len(val.tokens))
        chosen = np.sort(self.rng.choice(len(starts), size=min(count, len(starts)), replace=False))
        longer = np.argsort(starts[chosen] - ends[chosen])[:LONG_DOCUMENTS]
        most = np.full(len(chosen), longest + 1)
        most[longer] = 2 * longest
        places = np.concatenate([np.arange(starts[d], min(ends[d], starts[d] + most[i])) for i, d in enumerate(chosen)])
        return val.tokens[places].copy(), val.byte_counts[places].copy()

    def replaced(self, tokens: Any, where: Any) -> Any:
        """`tokens` with another one at each place of the mask `where`, but for BOS: documents keep their lengths."""
        import numpy as np

        low = self.code.BOS_ID + 1
        shift = self.rng.integers(1, self.cfg.vocab_size - low, len(tokens))
        other = low + (tokens.astype(np.int64) - low + shift) % (self.cfg.vocab_size - low)
        return np.where(where & (tokens != self.code.BOS_ID), other, tokens).astype(tokens.dtype)


class AuditError(Exception):
    """The code under audit broke a rule."""


class Layout:
    """Documents of a small validation set: (D,) first entries, number of targets, and places in the scoring order."""

    def __init__(self, tokens: Any, longest_first: bool, bos: int = 1) -> None:
        import numpy as np

        self.starts = np.flatnonzero(tokens == bos)
        self.lengths = np.diff(self.starts, append=len(tokens) - 1)  # the BOS that follows is a target too
        order = np.argsort(-self.lengths, kind="stable") if longest_first else np.arange(len(self.starts))
        self.rank = np.empty_like(order)
        self.rank[order] = np.arange(len(order))
        self.document = np.repeat(np.arange(len(self.starts)), np.diff(self.starts, append=len(tokens)))  # of each entry
        self.offset = np.arange(len(tokens)) - self.starts[self.document]

    def later(self, document: int, offset: int) -> Any:
        """Mask (N,) of the entries that come after place `offset` of `document`, in the order of the scoring."""
        same = (self.document == document) & (self.offset > offset)
        return same | (self.rank[self.document] > self.rank[document])

    def scored_by(self, document: int, offset: int) -> Any:
        """Mask (N - 1,) of the losses that may not know what comes after place `offset` of `document`."""
        targets_in_time = (self.document[:-1] == document) & (self.offset[:-1] < offset)
        return targets_in_time | (self.rank[self.document[:-1]] < self.rank[document])


def same_bits(a: Any, b: Any) -> Any:
    import numpy as np

    return a.view(np.uint32) == b.view(np.uint32)


def audit_settings(auditor: Auditor, tokens: Any) -> dict[str, Any]:
    """Settings of a small test-time training in which every phase has documents and steps."""
    cfg, documents = auditor.cfg, int((tokens == auditor.code.BOS_ID).sum())
    prefix = documents * 3 // 4 if cfg.phased_ttt_prefix_docs else 0
    phases = min(cfg.phased_ttt_num_phases, max(prefix, 1))
    smallest = len(tokens) // max(1, documents) * max(1, prefix // phases)
    return {"ttt_batch_size": min(cfg.ttt_batch_size, 4), "phased_ttt_prefix_docs": prefix, "phased_ttt_num_phases": phases,
            "global_ttt_chunk_tokens": max(2, min(cfg.global_ttt_chunk_tokens, smallest // 3))}


def check_causal(auditor: Auditor, ttt: bool, cuts: int) -> Result:
    """Replace everything after a place, documents scored later included: no earlier loss may change by one bit."""
    import numpy as np

    rule = f"causal: {'test-time training, phases included' if ttt else 'evaluation'}"
    cfg = auditor.cfg
    # Two documents are twice as long as the others: longer than what a chunk or a segment sees.
    longest = max(2 * cfg.ttt_chunk_size, cfg.ttt_eval_seq_len // 2) + 5 if ttt else cfg.eval_seq_len // 2 + 5
    tokens, byte_counts = auditor.sample(AUDIT_DOCUMENTS, longest)
    layout, changes = Layout(tokens, longest_first=ttt), audit_settings(auditor, tokens) if ttt else {}
    before = auditor.losses(tokens, ttt, byte_counts, **changes)
    if not same_bits(before, auditor.losses(tokens, ttt, byte_counts, **changes)).all():
        return Result(UNKNOWN, rule, f"two scores of the same text differ on this device ({auditor.device}); run this on a CPU")
    problems, kept, moved = [], 0, 0
    ranks = np.linspace(0, len(layout.starts) - 1, cuts).round().astype(int)
    for rank in ranks:
        document = int(np.flatnonzero(layout.rank == rank)[0])
        offset = int(auditor.rng.integers(1, max(2, layout.lengths[document] - 1)))
        later = layout.later(document, offset)
        other = auditor.replaced(tokens, later)
        after = auditor.losses(other, ttt, np.where(later, byte_counts[::-1], byte_counts), **changes)
        early = layout.scored_by(document, offset)
        wrong = early & ~same_bits(before, after)
        kept += int(early.sum())
        moved += int((before[~early] != after[~early]).sum()) if (other != tokens).any() else 1
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            first = f"entry {layout.offset[at] + 1} of document {layout.rank[layout.document[at]] + 1}"
            problems.append(f"{int(wrong.sum())} earlier losses know what comes after entry {offset} of document {rank + 1} in "
                            f"scoring order, first that of {first}")
    if not moved:
        problems.append("no loss changed at all: the scores are not computed from these tokens")
    sizes = f"segments of {cfg.eval_seq_len}"
    if ttt:
        sizes = f"chunks of {cfg.ttt_chunk_size}, windows of {cfg.ttt_eval_seq_len}"
        if changes["phased_ttt_prefix_docs"] and cfg.phased_ttt_enabled:
            sizes += f", {changes['phased_ttt_num_phases']} phases"
    where = f"{len(ranks)} cuts in {len(layout.starts)} documents, {sizes}"
    return judged(rule, problems, f"{where}: {kept:,} earlier losses bit-identical")


def check_isolated(auditor: Auditor, ttt: bool) -> Result:
    """Replace all documents but one: its losses stay. In test-time training, without the phases, which may learn from others."""
    import numpy as np

    rule = f"documents do not see each other: {'test-time training within a phase' if ttt else 'evaluation'}"
    tokens, byte_counts = auditor.sample(AUDIT_DOCUMENTS, 3 * auditor.cfg.ttt_chunk_size + 1)
    changes = audit_settings(auditor, tokens) | {"phased_ttt_enabled": False} if ttt else {}
    layout = Layout(tokens, longest_first=ttt)
    before = auditor.losses(tokens, ttt, byte_counts, **changes)
    problems = []
    for document in {0, len(layout.starts) // 2, len(layout.starts) - 1}:
        others = layout.document != document
        other_counts = np.where(others, byte_counts[::-1], byte_counts)
        after = auditor.losses(auditor.replaced(tokens, others), ttt, other_counts, **changes)
        wrong = (layout.document[:-1] == document) & ~same_bits(before, after)
        if wrong.any():
            problems.append(f"{int(wrong.sum())} losses of document {document + 1} depend on other documents")
    return judged(rule, problems, f"3 of {len(layout.starts)} documents, with all others replaced: bit-identical")


def check_normalised(auditor: Auditor, ttt: bool, limit_seconds: float) -> Result:
    """The probabilities of all tokens at one place add up to 1: as many documents as tokens, different in the last token."""
    import numpy as np

    rule = f"the distribution adds up to 1: {'test-time training' if ttt else 'evaluation'}"
    cfg, bos = auditor.cfg, auditor.code.BOS_ID
    chunk = min(cfg.ttt_chunk_size, 8)
    batch = max(cfg.ttt_batch_size, 64)
    changes = {"ttt_chunk_size": chunk, "ttt_batch_size": batch, "phased_ttt_enabled": False} if ttt else {}
    text = auditor.sample(AUDIT_DOCUMENTS, cfg.eval_seq_len)[0]
    prefix = np.resize(text[text != bos], chunk + 3)
    documents = [np.array([bos, *prefix, token]) for token in range(cfg.vocab_size) if token != bos]
    few = np.concatenate([*documents[:batch], [bos, prefix[0]]]).astype(text.dtype)
    began = time.perf_counter()
    auditor.losses(few, ttt, **changes)
    estimate = (time.perf_counter() - began) * len(documents) / len(documents[:batch])
    if estimate > limit_seconds:
        return Result(UNKNOWN, rule, f"scoring {cfg.vocab_size} documents would take about {estimate / 60:.0f} minutes here; allow "
                      "it with --minutes")
    # BOS itself is the target behind a document that ends there, so one document is the bare prefix.
    tokens = np.concatenate([*documents, [bos, *prefix], [bos, prefix[0]]]).astype(text.dtype)
    losses = auditor.losses(tokens, ttt, **changes)
    layout = Layout(tokens, longest_first=False)
    last = layout.starts[: cfg.vocab_size] + len(prefix)
    total = float(np.exp(-losses[last].astype(np.float64)).sum())
    problems = [] if abs(total - 1) <= NORMALISED_TO[auditor.device] else [f"they add up to {total:.6f}"]
    return judged(rule, problems, f"{cfg.vocab_size} tokens after one text: {total:.7f}")


def audit(subject: Subject, artifact: Path, options: argparse.Namespace) -> Iterator[Result]:
    """Every check of what depends on what; a check that the code fails by an exception of the audit is a FAIL."""
    auditor = Auditor(subject, artifact, options.full_size)
    checks: list[tuple[str, Callable[[bool], Result]]] = [
        ("causal", lambda ttt: check_causal(auditor, ttt, options.cuts)), ("isolated", lambda ttt: check_isolated(auditor, ttt)),
        ("normalised", lambda ttt: check_normalised(auditor, ttt, 60 * options.minutes))]
    complaints = []
    for name, check in checks:
        for ttt in (False, True) if auditor.cfg.ttt_enabled else (False,):
            where = "test-time training" if ttt else "evaluation"
            try:
                yield check(ttt)
            except AuditError as error:
                complaints.append(f"{where}: {error}")
                yield Result(UNKNOWN, f"{name}: {where}", "the losses are not complete, see below")
    yield judged("every target has exactly one loss, and the score is their sum", list(dict.fromkeys(complaints)),
                 "in every score of this audit")


# ======================================================================================================================
# The code: the score again
# ======================================================================================================================

RESCORE_TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}  # BPB, on another machine: float32 in another order, or bfloat16


def check_rescored(subject: Subject, run: RunLog, artifact: Path, exact: bool) -> Result:
    """The counted code and the artifact, alone in an empty folder, give the score of the log."""
    rule = f"the artifact scores what the log says: {run.name}"
    with tempfile.TemporaryDirectory() as name:
        alone = Path(name)
        for file in run.code or {CODE_FILE: {}}:
            shutil.copy2(subject.record.folder / file, alone)
        shutil.copy2(artifact, alone / "model.artifact")
        again, problem = rescore(run, subject, alone)
    if again is None or again.final is None:
        return Result(FAIL, rule, f"the evaluation did not end: {problem}")
    if not run.evals:
        scored = ", ".join(f"{stage} {score.val_bpb:.8f}" for stage, score in again.evals.items())
        return Result(UNKNOWN, rule, f"there is no log; it scores {scored}")
    differences = {stage: abs(again.evals[stage].val_bpb - run.evals[stage].val_bpb)
                   for stage in ("quantized", "quantized_ttt") if stage in run.evals and stage in again.evals}
    if set(run.evals) & {"quantized", "quantized_ttt"} != set(differences):
        return Result(FAIL, rule, f"scored {sorted(again.evals)}, the log {sorted(run.evals)}")
    cpu = all("+cpu" in r.run.get("torch", "") or "NVIDIA" not in r.run.get("device", "") for r in (run, again))
    tolerance = 0.0 if exact else RESCORE_TOLERANCE["cpu" if cpu else "cuda"]
    said = ", ".join(f"{stage} {again.evals[stage].val_bpb:.8f}" for stage in differences)
    if max(differences.values()) == 0:
        return Result(PASS, rule, f"{said}: exactly")
    apart = f"{said}: {max(differences.values()):.2g} BPB from the log"
    if max(differences.values()) > tolerance:
        return Result(FAIL, rule, f"{apart}, allowed are {tolerance:g}")
    return Result(PASS, rule, f"{apart}; {tolerance:g} are allowed for another machine")


def rescore(run: RunLog, subject: Subject, alone: Path) -> tuple[RunLog | None, str]:
    """EVAL_ONLY in the folder `alone`: its log, or None and the last words of the program."""
    environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
               if name in os.environ}
    environ |= settings_for_here(run, subject.shards.resolve(), None)
    if subject.cfg.tokenizer_file.exists():
        environ["TOKENIZER_PATH"] = str(subject.cfg.tokenizer_file.resolve())
    else:
        environ.pop("TOKENIZER_PATH", None)
    environ |= {"EVAL_ONLY": "1", "ARTIFACT_PATH": str(alone / "model.artifact"), "ARTIFACT_DIR": str(alone / "out"),
                "RUN_ID": "again", "OMP_NUM_THREADS": run.run.get("threads", "1")}
    environ.pop("DATA_DIR", None)
    done = subprocess.run([sys.executable, CODE_FILE], cwd=alone, env=environ, capture_output=True, text=True, check=False)
    words = (done.stdout + done.stderr).strip().splitlines()[-1:]
    found = sorted((alone / "out").glob("again*.log"))
    return (logs.read_log(found[0]) if found else None), " ".join(words) or f"exit status {done.returncode}"


# ======================================================================================================================
# All of it
# ======================================================================================================================


def check_with_code(record: Record, options: argparse.Namespace) -> Iterator[Result]:
    """The checks that need data, and those that need an artifact too."""
    try:
        subject = open_subject(record, options.data, options.tokenizer)
    except (ValueError, OSError, ImportError) as error:
        yield Result(UNKNOWN, "data, bytes, causality, normalisation, the score again", str(error))
        return
    yield from check_data(subject, options.docs)
    runs = [run for run in record.runs if run.path in record.artifacts]
    if not runs:
        yield Result(UNKNOWN, "causality, normalisation, the score again", "no artifact here; name one with --artifact")
        return
    try:
        yield from audit(subject, record.artifacts[runs[0].path], options)
    except (AttributeError, ValueError, TypeError) as error:
        yield Result(UNKNOWN, "causality and normalisation", f"this code cannot be audited: {type(error).__name__}: {error}")
    if options.no_rescore:
        yield Result(UNKNOWN, "the artifact scores what the log says", "left out by --no-rescore")
        return
    for run in runs:
        yield check_rescored(subject, run, record.artifacts[run.path], options.same_machine)


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
        yield from check_with_code(record, options)
    yield Result(UNKNOWN, "training took place as logged, on that hardware", "only by running it again")


def as_row(result: Result) -> str:
    return f"{result.status:<13}  {result.rule:<69}  {result.detail}"


def count_words(results: Sequence[Result]) -> str:
    counts = {status: sum(result.status == status for result in results) for status in (PASS, FAIL, UNKNOWN)}
    return f"{counts[PASS]} pass, {counts[FAIL]} fail, {counts[UNKNOWN]} not checkable"


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, metavar="RECORD_FOLDER")
    parser.add_argument("--artifact", type=Path, help="an artifact outside a record folder")
    parser.add_argument("--log", type=Path, help="the log of the run that made it (without: settings from the environment)")
    parser.add_argument("--code", type=Path, default=Path(__file__).resolve().parent.parent, help="folder of its train_gpt.py")
    parser.add_argument("--data", type=Path, help="folder of the shards (default: where the log says, if it is here)")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model (default: the folder's)")
    parser.add_argument("--docs", type=Path, help="raw validation documents (JSON lines), to compare the decoded shard with")
    parser.add_argument("--cuts", type=int, default=4, help="places at which causality is tried, in each of the two scores")
    parser.add_argument("--full-size", action="store_true", help="audit with the chunks and windows of the log, not smaller ones")
    parser.add_argument("--minutes", type=float, default=5, help="most that one test of normalisation may take")
    parser.add_argument("--same-machine", action="store_true", help="the score again must be the log's to the last digit")
    parser.add_argument("--no-rescore", action="store_true", help="leave out scoring the whole validation set again")
    parser.add_argument("--folder-only", action="store_true", help="only what needs neither data nor torch")
    parser.add_argument("--strict", action="store_true", help="what is not checkable counts as failed")
    parser.add_argument("--save", action="store_true", help="keep the table as verify.txt in the folder")
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
    run = logs.read_log(options.log) if options.log is not None else settings_without_log(options.artifact, options.code)
    return Record(options.code, [run], {run.path: options.artifact})


def settings_without_log(artifact: Path, folder: Path) -> RunLog:
    """A run that says nothing but its settings: the model's from the artifact, all others from the environment."""
    code = load_code(folder / CODE_FILE)
    stored, _ = code.unpack_artifact(artifact.read_bytes())
    known = {f.name.upper() for f in code.fields(code.Config)}
    values = {name: value for name, value in os.environ.items() if name in known}
    return RunLog(artifact, settings=values | {name.upper(): code.format_setting(value) for name, value in stored.items()})


def check_loose_size(record: Record) -> Result:
    """The size of an artifact that has no log, with the code beside which it was put."""
    total = sum(path.stat().st_size for path in [*record.artifacts.values(), record.folder / CODE_FILE])
    problems = [f"{total:,} bytes, over the cap of {CAP_BYTES:,}"] if total > CAP_BYTES else []
    return judged("artifact and code within the cap", problems, f"{total:,} of {CAP_BYTES:,} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 nothing failed, 1 something did, 2 a mistake of the user."""
    options = parse_arguments(arguments)
    try:
        record = open_record(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results = []
    for result in verify(record, options):
        print(as_row(result), flush=True)
        results.append(result)
    print("\n" + count_words(results))
    if options.save:
        table = "\n".join([*map(as_row, results), "", count_words(results), ""])
        logs.write_atomically(record.folder / "verify.txt", table.encode())
    bad = {FAIL, UNKNOWN} if options.strict else {FAIL}
    return int(any(result.status in bad for result in results))


if __name__ == "__main__":
    sys.exit(main())
