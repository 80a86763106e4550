"""bench/caseops_why.py: every bit of the losses goes to one class, and words are told apart by case and place."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

sys.path.insert(0, str(tiny.ROOT / "bench"))

import caseops_why as why  # noqa: E402
from caseops_tokenizer import Encoder, Tokenizer  # noqa: E402

DOCUMENTS = ["The cat. The dog (Rex) saw NASA\nToday é ß. ok", "a b", "…"]


def test_words_are_told_apart_by_case_and_place() -> None:
    known: dict[why.Class, int] = {}
    of_byte, words = why.classes_of(DOCUMENTS[0], known)
    assert words == {("Title", "line start"): 2, ("lower", "inside"): 5, ("Title", "after . ! ?"): 1, ("Title", "after a quote or bracket"): 1,
                     ("ALLCAPS", "inside"): 1, ("lower", "after . ! ?"): 1}
    assert len(of_byte) == len(DOCUMENTS[0].encode()) and of_byte[8:12].tolist() == [known[("Title", "after . ! ?")]] * 4


@pytest.mark.parametrize("model", ["caseops_8192_lossless", "lossless_caps_caseops_v2_titles_8192"])
def test_the_bits_of_all_classes_are_the_bits_of_all_tokens(model: str, tmp_path: Path) -> None:
    path = tiny.ROOT / "tokenizers" / f"{model}.model"
    encoded = Encoder(Tokenizer(path)).encode([text.encode() for text in DOCUMENTS])
    tokens = np.concatenate([document.tokens for document in encoded])
    (tmp_path / "x_val_000000.bin").write_bytes(tiny.shard_bytes(tokens))
    losses = np.random.default_rng(0).random((2, len(tokens) - 1)).astype(np.float32)
    for number, run in enumerate(losses):
        np.savez(tmp_path / f"{number}.npz", quantized=run)
    files = [str(tmp_path / f"{number}.npz") for number in (0, 1)]
    side, words = why.bits_by_class(DOCUMENTS, "v", str(tmp_path), str(path), files, "quantized")
    assert sum(side.bits.values()) == pytest.approx(losses.mean(0, dtype=np.float64).sum() / np.log(2)) and words.total() == 13
    with pytest.raises(ValueError, match="do not fit"):
        why.bits_by_class(DOCUMENTS[:2], "v", str(tmp_path), str(path), files, "quantized")
