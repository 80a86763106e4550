"""Where one CaseOps version gains over another: the losses of the same documents, summed by word class and place of the word.

    python bench/caseops_why.py --docs DOCS.jsonl --a v1 DATA MODEL LOSSES.npz... --b v2 DATA MODEL LOSSES.npz... [--plot FILE.png]

DOCS are the validation documents, DATA a folder of shards made from them with MODEL, LOSSES what LOSSES_PATH wrote, one file a
seed (averaged). A token belongs to the word that it begins in, its space included; an operator to the word behind it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt as g  # noqa: E402
from caseops_tokenizer import Tokenizer  # noqa: E402

WORD = re.compile(r" ?[^\W\d_]+")
OTHER, END = ("no letters", ""), ("end of a document", "")
Class = tuple[str, str]  # case, place


class Side(NamedTuple):
    """One version: its name, and the mean bits of its runs by class."""

    name: str
    bits: Counter[Class]


def word_class(text: str, found: re.Match[str]) -> Class:
    """How a word is written, and what stands in front of it."""
    word, before = found[0].strip(), text[found.start() - 1: found.start()] or "\n"
    case = "lower" if word.islower() else "ALLCAPS" if word.isupper() and len(word) > 1 else "Title" if word.istitle() else "mIxed"
    spaced = found[0][0] == " "
    place = ("line start" if before == "\n" else "after . ! ?" if before in ".!?" and spaced else "after a quote or bracket"
             if before in "\"'([{“‘" else "inside")
    return case, place


def classes_of(text: str, known: dict[Class, int]) -> tuple[np.ndarray, Counter[Class]]:
    """The class of every byte of a text, as a number of `known`, which grows; words by class."""
    of_byte, words = np.full(len(text.encode()), known.setdefault(OTHER, len(known))), Counter()
    at_byte, at = 0, 0
    for found in WORD.finditer(text):
        at_byte += len(text[at: found.start()].encode())
        size = len(found[0].encode())
        kind = word_class(text, found)
        of_byte[at_byte: at_byte + size] = known.setdefault(kind, len(known))
        words[kind] += 1
        at_byte, at = at_byte + size, found.end()
    return of_byte, words


def bits_by_class(documents: list[str], name: str, data: str, model: str, files: list[str], stage: str) -> tuple[Side, Counter[Class]]:
    """Mean bits of the runs by class, and the words of each; ValueError if shards, tokenizer and documents do not fit."""
    tokenizer, known, words, bits = Tokenizer(Path(model)), {}, Counter(), Counter()
    tokens = np.concatenate(g.Dataset(Path(data)).read("val"))
    losses = np.mean([np.load(file)[stage] for file in files], axis=0, dtype=np.float64) / np.log(2)
    starts = np.flatnonzero(tokens == g.BOS_ID)
    if len(starts) != len(documents) or len(losses) != len(tokens) - 1:
        raise ValueError(f"{name}: {len(starts)} documents and {len(losses)} losses do not fit {len(documents)} texts "
                         f"and {len(tokens)} tokens")
    for text, begin, end in zip(documents, starts, np.append(starts[1:], len(tokens))):
        of_byte, found = classes_of(text, known)
        charges = tokenizer.lossless_charges(tokens[begin + 1: end]).astype(np.int64)
        if charges.sum() != len(of_byte):
            raise ValueError(f"{name}: a document has {len(of_byte)} bytes, its tokens stand for {charges.sum()}")
        kinds = of_byte[np.minimum(np.cumsum(charges) - charges, len(of_byte) - 1)]
        sums = np.bincount(kinds, losses[begin: end - 1], len(known))
        bits.update({kind: float(sums[number]) for kind, number in known.items()})
        bits[END] += float(losses[end - 1]) if end <= len(losses) else 0.0
        words.update(found)
    return Side(name, bits), words


def print_table(a: Side, b: Side, words: Counter[Class], total: int) -> list[tuple[Class, float]]:
    """A row a class, the largest part of the difference first; class and difference in bits per byte of all text."""
    rows = sorted(((kind, (b.bits[kind] - a.bits[kind]) / total) for kind in a.bits), key=lambda row: row[1])
    print(f"| words | place | of 1000 words | bits a word, {a.name} | {b.name} | difference, BPB |\n|---|---|---|---|---|---|")
    for kind, change in rows:
        count = words[kind]
        each = [f"{side.bits[kind] / count:.3f}" if count else "" for side in (a, b)]
        share = f"{1000 * count / words.total():.1f}" if count else ""
        print(f"| {kind[0]} | {kind[1]} | {share} | {each[0]} | {each[1]} | {change:+.5f} |")
    print(f"| all | | | | | {sum(change for _, change in rows):+.5f} |")
    return rows


def plot(rows: list[tuple[Class, float]], a: Side, b: Side, file: str) -> None:
    """A bar a class."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(rows) + 1.2), layout="constrained")
    changes = [1000 * change for _, change in rows]
    axes.barh([", ".join(filter(None, kind)) for kind, _ in rows], changes, color=["#2a7f62" if c < 0 else "#b5483a" for c in changes])
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(f"{b.name} less {a.name}, thousandths of a bit per byte of all text: {sum(changes):+.1f} in sum")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", required=True, help="JSON lines, the validation documents")
    for side in ("--a", "--b"):
        parser.add_argument(side, required=True, nargs="+", metavar="NAME DATA MODEL LOSSES", help="a version and its runs")
    parser.add_argument("--stage", default="quantized", help="which losses (default: quantized)")
    parser.add_argument("--plot", help="file of a picture")
    given = parser.parse_args()
    try:
        documents = [json.loads(line)["text"] for line in Path(given.docs).read_text(encoding="utf-8").splitlines()]
        (a, words), (b, _) = (bits_by_class(documents, *side[:3], side[3:], given.stage) for side in (given.a, given.b))
    except (ValueError, OSError, KeyError, TypeError) as error:
        sys.exit(f"error: {error}")
    rows = print_table(a, b, words, sum(len(text.encode()) for text in documents))
    if given.plot:
        plot(rows, a, b, given.plot)


if __name__ == "__main__":
    main()
