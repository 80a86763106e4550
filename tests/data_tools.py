"""Documents and small tokenizers for the tests of the data path: no network, nothing but Python's own help texts."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydoc_data.topics import topics

import prepare_caseops_data as prepare
from lossless_caps import OPERATORS, V1


@lru_cache(maxsize=1)
def texts() -> list[str]:
    """About 200 documents of English with code, capitals, indentation and newlines, and some oddities."""
    plain = [topics[name][:6000] for name in sorted(topics)]
    odd = [
        "",
        " ",
        "A",
        "  leading and trailing  ",
        "caf\u00e9 na\u00efve \u201cquoted\u201d \u2014 dash",
        "\u2581 is U+2581, \u2581twice",
        "nul\x00 and tab\t.",
        f"literal {OPERATORS} operators",
        "1234567890 12,345.67",
        "\u65e5\u672c\u8a9e Tokyo \u6771\u4eac",
        "no-space" * 40,
        "line\r\nline\n\n\n  indented",
        "ﬁ ½ Å Å ＦＵＬＬ",
    ]
    return [text for pair in zip(plain, odd * (len(plain) // len(odd) + 1)) for text in pair]


def write_documents(path: Path, documents: list[str]) -> Path:
    """A JSONL file of documents; lone surrogates are written as escapes."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@lru_cache(maxsize=None)
def tokenizer(kind: str, version: str = V1.name) -> prepare.Tokenizer:
    """A tokenizer of 1000 pieces: "lossless", or "nfkc", which normalises as the published one does."""
    folder = Path(tempfile.mkdtemp(prefix="caseops-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    docs = write_documents(folder / "docs.jsonl", texts())
    request = prepare.TokenizerRequest(
        folder / kind, (str(docs),), val_docs=0, vocab_size=1000, lossless=kind == "lossless", transform=version
    )
    return prepare.Tokenizer(prepare.train_tokenizer(request))


def shard(path: Path) -> np.ndarray:
    """The entries of a shard, read without the program: header checked against the definition."""
    data = path.read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    assert header[:2].tolist() == [20240520, 1] and not header[3:].any()
    assert len(data) == 1024 + 2 * header[2]
    return np.frombuffer(data[1024:], dtype="<u2")


def damage(path: Path, entry: int, value: int) -> None:
    """Overwrite one entry of a shard."""
    data = bytearray(path.read_bytes())
    data[1024 + 2 * entry : 1026 + 2 * entry] = value.to_bytes(2, "little")
    path.write_bytes(data)


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 1
    path.write_bytes(data)
