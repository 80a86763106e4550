"""Tokenizers: ours is what it claims to be; the fast encoder equals SentencePiece; every byte is charged."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import caseops_tokenizer
import data_tools
import prepare_caseops_data as prepare
from caseops_tokenizer import Encoded, Encoder, FastEncoder, PartTable, Tokenizer, read_spans
from lossless_caps import OPERATORS, V1, VERSIONS

# Words and what lies between them: plain, odd white space, what normalisation joins, removes or makes a space.
chunks = st.sampled_from([
    "the", "The", "NASA", "iPhone", "a", "def ", "print(", "class", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\x00", "\x01", "\x7f",
    "\x85", "\u00a0", "\u3000", "\u200b", "\u2028", "\ufeff", "\u2581", "\u0301", "\u0338", "=", "\u00e9", "\ufb01", "\u00bd", "\u00a8",
    "\u00af", "\u1680", "\u0149", "\u0660", "\ud55c", "\u11a8", "\U0001f600", "\u201cHello", "\u2019s", "1", "42", ".", "...",
    "--------------------", "internationalisation", "_", "<0x41>", "<s>", "\nThe", " Then", "\n ", *OPERATORS])
texts = st.lists(chunks | st.just(" ") | st.text(st.characters(codec="utf-8"), max_size=3), max_size=14).map("".join)


LINES = "lossless_caps_caseops_v2_lines"
every_version = pytest.mark.parametrize("version", VERSIONS)


def assert_equal(documents: list[str], with_charges: bool = True, fast: FastEncoder | None = None, version: str = V1.name) -> None:
    """The fast encoder gives what SentencePiece gives, and the charges are those of the pieces."""
    model, raw = data_tools.tokenizer("lossless", version), [text.encode() for text in documents]
    assert_same((fast or FastEncoder(model, with_charges)).encode(raw), Encoder(model, with_charges).encode(raw))


def assert_same(got: list[Encoded], expected: list[Encoded]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        np.testing.assert_array_equal(one.tokens, other.tokens, strict=True)
        np.testing.assert_array_equal(one.charges, other.charges, strict=True)
        assert one.fault == other.fault


@every_version
@settings(max_examples=120, deadline=None)
@given(documents=st.lists(texts, min_size=1, max_size=4), with_charges=st.booleans())
def test_fast_encoder_equals_sentencepiece_for_any_text(version: str, documents: list[str], with_charges: bool) -> None:
    assert_equal(documents, with_charges, version=version)


@every_version
def test_fast_encoder_equals_sentencepiece_on_documents(version: str) -> None:
    assert_equal(data_tools.texts(), version=version)


def test_fast_encoder_with_a_full_table_is_still_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caseops_tokenizer, "SLOTS", 128)
    fast = FastEncoder(data_tools.tokenizer("lossless"), True)
    for _ in range(2):
        assert_equal(data_tools.texts()[:60], fast=fast)
    assert fast.table.slot_spans.all()


LONG = [
    " ".join(data_tools.texts()[:9]),
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0" * 400,
    "\u00e9\u0301x" * 900,
    "ab" * 2000,
    "\u2581" * 99 + "A\u00c5" * 700,
]


@pytest.mark.parametrize("version", [V1.name, LINES])
@pytest.mark.parametrize("text", LONG, ids=["words", "no spaces", "accents", "letters", "odd"])
def test_a_long_document_in_slices_has_the_tokens_of_the_whole(text: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = data_tools.tokenizer("lossless", version)
    whole = Encoder(model, True).encode([text.encode(), b"", text.encode()])
    assert_equal([text], version=version)
    monkeypatch.setattr(caseops_tokenizer, "LONG_DOCUMENT", 600)
    monkeypatch.setattr(caseops_tokenizer, "LONGEST_AT_ONCE", 500)
    for encoder in (FastEncoder(model, True), Encoder(model, True)):
        assert_same(encoder.encode([text.encode(), b"", text.encode()]), whole)


@pytest.mark.parametrize("letters", ["the quick brown fox ", "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u304c"])
def test_memory_stays_flat_for_a_huge_document(letters: str) -> None:
    """What a document of 24 MB takes beside itself: less than twenty times its size would be 480 MB."""
    script = (
        "import resource, sys; from caseops_tokenizer import *\n"
        "text = (sys.argv[2] * 400_000).encode()[:24_000_000]; text = text[:len(text) - len(text) % 3]\n"
        "encoder = FastEncoder(Tokenizer(sys.argv[1]), True); peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "text = text.decode(errors='ignore').encode(); before = peak(); encoder.encode([text])\n"
        "print((peak() - before) * 1024 / len(text))"
    )
    command = [sys.executable, "-c", script, str(data_tools.tokenizer("lossless").path), letters]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(prepare.__file__).parent)
    assert float(done.stdout) < 20


def test_a_normalising_tokenizer_refuses_what_it_cannot_take_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caseops_tokenizer, "LONGEST_NORMALISED", 50)
    encoded = Encoder(data_tools.tokenizer("nfkc"), True).encode([b"ok", b"x" * 51, b"ok"])
    assert "has 51 bytes" in encoded[1].fault and len(encoded[1].tokens) == len(encoded[1].charges) == 0
    assert all(not one.fault and len(one.tokens) == len(one.charges) > 1 for one in encoded[::2])


def test_part_table_finds_what_it_keeps_while_it_grows() -> None:
    table = PartTable()
    generator = np.random.default_rng(0)
    keys = np.unique(generator.integers(0, 50, (200_000, 2), dtype=np.uint64) * np.uint64(1 << 57), axis=0)
    keys = np.concatenate([keys, generator.integers(0, 1 << 62, (60_000, 2), dtype=np.uint64)])
    counts = generator.integers(0, 4, len(keys))  # parts without ids are neighbours of equal offset
    values = [[index % 65521] * count for index, count in enumerate(counts.tolist())]
    for start in range(0, len(keys), 7000):
        part, own = keys[start : start + 7000], values[start : start + 7000]
        assert not table.find(part).any()
        may_stay = generator.random(len(part)) < 0.9
        spans, found = table.put(part, may_stay, own), table.find(part)
        assert (found[found > 0] == spans[found > 0]).all() and not found[~may_stay].any()
        for offset, count, value in zip(*read_spans(spans), own):
            assert table.ids[offset : offset + count].tolist() == value
    found = table.find(keys)
    assert (found > 0).mean() > 0.8
    for offset, count, value in zip(*read_spans(found[found > 0]), (values[index] for index in np.flatnonzero(found))):
        assert table.ids[offset : offset + count].tolist() == value


@every_version
@settings(max_examples=120, deadline=None)
@given(text=texts)
def test_lossless_tokenizer_gives_back_every_text_and_charges_every_byte(version: str, text: str) -> None:
    model = data_tools.tokenizer("lossless", version)
    ((tokens, charges, _),) = FastEncoder(model, True).encode([text.encode()])
    assert model.decode(tokens.tolist()) == text
    assert charges.sum() == len(text.encode())
    assert not charges[np.isin(tokens, [model.names.index(operator) for operator in OPERATORS])].any() or any(
        operator in text for operator in OPERATORS
    )


@every_version
@settings(max_examples=80, deadline=None)
@given(text=texts)
def test_normalising_tokenizer_charges_all_bytes_but_those_stripped_at_the_ends(version: str, text: str) -> None:
    """Between two characters that stay, every byte of the text is charged, whatever happened to it."""
    _, charges = Encoder(data_tools.tokenizer("nfkc", version), True).one(f"a{text}z")
    assert charges.sum() == len(text.encode()) + 2


# Text, charges of the visible characters in it: white space goes to what follows it, or at the ends to nobody.
CHARGED = [
    ("a  b", [1, 3]),
    ("a \n\t b", [1, 5]),
    ("  a", [1]),
    ("a  ", [1]),
    ("A", [1]),
    ("a \u3042", [1, 4]),
    (f"a{OPERATORS[0]}", [1, 3]),
    (f"a {OPERATORS[3]}A", [1, 4, 1]),
    ("a\u00a0\u3000 b", [1, 7]),
    ("a\x01-", [2, 1]),
]


@pytest.mark.parametrize("text,expected", CHARGED)
def test_surface_charges_of_known_cases(text: str, expected: list[int]) -> None:
    model = data_tools.tokenizer("nfkc")
    tokens, charges = Encoder(model, True).one(text)
    visible, waiting = [], 0
    for token, charge in zip(tokens.tolist(), charges.tolist()):
        waiting += charge
        ends_character = model.kinds[token] != caseops_tokenizer.BYTE or charge
        if ends_character and model.names[token] not in (caseops_tokenizer.SPACE, OPERATORS[3]) and waiting:
            visible.append(waiting)
            waiting = 0
    assert visible == expected


@lru_cache(maxsize=None)
def crossing_tokenizer(version: str = V1.name) -> Tokenizer:
    """One whose pieces cross spaces."""
    model, texts = io.BytesIO(), map(VERSIONS[version].encode, data_tools.texts()[:40])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, model_type="bpe", vocab_size=700, byte_fallback=True, split_by_whitespace=False,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, bos_id=1, eos_id=2,
        unk_id=3, user_defined_symbols=list(OPERATORS), max_sentence_length=1 << 20, minloglevel=2)
    path = data_tools.tokenizer("lossless").path.with_name("crossing.model")
    path.write_bytes(caseops_tokenizer.marked(model.getvalue(), version))
    return Tokenizer(path)


def test_a_tokenizer_that_does_not_work_by_word_goes_through_sentencepiece() -> None:
    """It is not cut at spaces."""
    crossing = crossing_tokenizer()
    assert not crossing.by_word and isinstance(prepare.make_encoder(crossing, True), Encoder)


OURS = [version for version, path in prepare.OUR_TOKENIZERS.items() if path.exists()]


@pytest.mark.parametrize("version", OURS)
def test_our_tokenizer_is_what_its_readme_says(version: str) -> None:
    ours = Tokenizer(prepare.OUR_TOKENIZERS[version])
    assert ours.transform is VERSIONS[version] and ours.lossless and ours.by_word and ours.vocab_size == 8192
    assert ours.names[:8] == ["<pad>", "<s>", "</s>", "<unk>", *OPERATORS]
    assert ours.kinds[:4] == [3, 3, 3, 2] and ours.kinds[4:8] == [caseops_tokenizer.USER_DEFINED] * 4
    assert ours.names[8:264] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert set(ours.kinds[264:]) == {caseops_tokenizer.NORMAL}
    assert not [name for name in ours.names[264:] if any(char.isdigit() for char in name) and len(name) > 1]
    assert "\n" in ours.names
    readme = (ours.path.parent / "README.md").read_text()
    vocabulary = ours.path.with_suffix(".vocab")
    assert ours.sha256 in readme and prepare.file_sha256(vocabulary) in readme
    assert [json.loads(line.split("\t")[0]) for line in vocabulary.read_text().splitlines()] == ours.names


@pytest.mark.parametrize("version", OURS)
def test_our_tokenizer_gives_back_documents(version: str) -> None:
    ours = Tokenizer(prepare.OUR_TOKENIZERS[version])
    encoder = FastEncoder(ours, True)
    for text in data_tools.texts()[:26]:
        ((tokens, charges, _),) = encoder.encode([text.encode()])
        assert ours.decode(tokens.tolist()) == text and charges.sum() == len(text.encode())
        sentencepiece_text = ours.processor.decode(tokens.tolist())  # its own decoder agrees
        assert ours.transform.decode(sentencepiece_text) == text


def test_the_first_version_is_not_marked_in_a_tokenizer_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    model = data_tools.tokenizer("lossless").path.read_bytes()
    assert caseops_tokenizer.marked(model, V1.name) == model
    for version in VERSIONS:
        (tmp_path / "marked.model").write_bytes(caseops_tokenizer.marked(model, version))
        assert Tokenizer(tmp_path / "marked.model").transform.name == version
    (tmp_path / "marked.model").write_bytes(caseops_tokenizer.marked(model, "caseops_v99"))
    with pytest.raises(ValueError, match="marked.model is for CaseOps caseops_v99; this program has lossless_caps_caseops_v1"):
        Tokenizer(tmp_path / "marked.model")


def test_a_word_has_the_same_piece_wherever_it_is() -> None:
    """What the second version is for: with the first the capital one has a piece without its space."""
    text, pieces = "the cat. The cat saw THE cat", {}
    for version in (V1.name, "lossless_caps_caseops_v2"):
        model = data_tools.tokenizer("lossless", version)
        pieces[version] = [model.names[token] for token in Encoder(model).one("x " + text)[0].tolist()]
    assert [found.count("\u2581the") for found in pieces.values()] == [1, 3]


@every_version
def test_spaces_inside_of_pieces_are_charged_too(version: str) -> None:
    """A tokenizer whose pieces cross spaces has given spaces within them."""
    crossing = crossing_tokenizer(version)
    encoder = Encoder(crossing, True)
    assert crossing.lossless and not crossing.by_word
    for text in [*data_tools.texts()[:40], "\nthe\n the", " The\nThe"]:
        ids, charges = encoder.one(text)
        assert crossing.decode(ids.tolist()) == text and charges.sum() == len(text.encode())


def test_training_is_deterministic(tmp_path: Path) -> None:
    docs = (str(data_tools.write_documents(tmp_path / "docs.jsonl", data_tools.texts()[:60])),)
    models = [
        prepare.train_tokenizer(prepare.TokenizerRequest(tmp_path / name, docs, 2, vocab_size=600)).read_bytes()
        for name in ("one", "two")
    ]
    assert models[0] == models[1]
    assert str(tmp_path).encode() not in models[0]


def test_tokenizer_training_leaves_validation_documents_out(tmp_path: Path) -> None:
    docs = (str(data_tools.write_documents(tmp_path / "docs.jsonl", ["secret", "first one", "second two"])),)
    request = prepare.TokenizerRequest(tmp_path / "t", docs, val_docs=1)
    assert "".join(prepare.training_sentences(request)) == "first onesecond two"
    assert (
        "".join(prepare.training_sentences(prepare.TokenizerRequest(tmp_path / "t", docs, 0, sample_bytes=3)))
        == "secret"
    )


def test_too_little_text_for_a_tokenizer_is_said(tmp_path: Path) -> None:
    docs = (str(data_tools.write_documents(tmp_path / "docs.jsonl", ["a b c"])),)
    with pytest.raises(ValueError, match="smaller --vocab-size"):
        prepare.train_tokenizer(prepare.TokenizerRequest(tmp_path / "t", docs, 0))


def test_unusable_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer at"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "noise.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "noise.model")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(data_tools.texts()[:20]),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        minloglevel=2,
        byte_fallback=True,
    )
    (tmp_path / "plain.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="lacks the CaseOps operator"):
        Tokenizer(tmp_path / "plain.model")


PUBLISHED, CASES = os.environ.get("CASEOPS_PUBLISHED_TOKENIZER"), os.environ.get("CASEOPS_CASES")


@pytest.mark.skipif(not (PUBLISHED and CASES), reason="CASEOPS_PUBLISHED_TOKENIZER and CASEOPS_CASES name no files")
def test_published_tokenizer_cases() -> None:
    encoder = Encoder(Tokenizer(PUBLISHED), True)
    for case in json.loads(Path(CASES).read_text()):
        ids, charges = encoder.one(case["text"])
        assert V1.encode(case["text"]) == case["transformed"]
        assert (ids.tolist(), charges.tolist()) == (case["ids"], case["original_bytes"]), case["text"]
