"""CaseOps transform: bijective on all of Unicode, strict on the way back, exact in bytes, fast."""
from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lossless_caps as caps
from lossless_caps import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE

CASES = {
    "": "",
    "hello": "hello",
    "Hello": f"{TITLE}hello",
    "A": f"{TITLE}a",
    "HELLO": f"{ALLCAPS}hello",
    "OK": f"{ALLCAPS}ok",
    "McDonald": f"{TITLE}mc{CAPNEXT}donald",
    "iPhone": f"i{CAPNEXT}phone",
    "HELLOworld": f"{TITLE}h{CAPNEXT}e{CAPNEXT}l{CAPNEXT}l{CAPNEXT}oworld",
    "eBAY": f"e{CAPNEXT}b{CAPNEXT}a{CAPNEXT}y",
    "U.S.A.": f"{TITLE}u.{TITLE}s.{TITLE}a.",
    "don't DON'T": f"don't {ALLCAPS}don'{TITLE}t",
    "ÜBER Éclair": f"Ü{ALLCAPS}ber Éclair",
    "4K_HDtv": f"4{TITLE}k_{TITLE}h{CAPNEXT}dtv",
    f"{TITLE}x{ESC}": f"{ESC}{TITLE}x{ESC}{ESC}",
    f"a{ALLCAPS}Bc{CAPNEXT}DE": f"a{ESC}{ALLCAPS}{TITLE}bc{ESC}{CAPNEXT}{ALLCAPS}de",
}
MALFORMED = [
    TITLE, ALLCAPS, CAPNEXT, ESC, f"a{ESC}", f"{ESC}a", "A", "aB", f"{TITLE}A", f"{TITLE} a", f"{TITLE}é",
    f"{ALLCAPS}a", f"{ALLCAPS}a b", f"{CAPNEXT}a", f" {CAPNEXT}a", f"a{TITLE}b", f"a{ALLCAPS}bc", f"a{CAPNEXT}",
    f"a{CAPNEXT}{CAPNEXT}b", f"{TITLE}a{CAPNEXT}b", f"{TITLE}a{CAPNEXT}b{CAPNEXT}c", f"{TITLE}{TITLE}a",
    f"{ALLCAPS}ab{CAPNEXT}c", f"{ALLCAPS}ab{TITLE}c", f"{ALLCAPS}ab{ALLCAPS}cd", f"{ALLCAPS}abC", f"{TITLE}ab{TITLE}c",
    f"{ESC}{CAPNEXT}{CAPNEXT}a", f"1{CAPNEXT}a", f"é{CAPNEXT}a",
]


def encode_by_characters(text: str) -> str:
    """The transform as a loop over characters, written from the definition: the oracle, and the slow baseline."""
    out, at = [], 0
    while at < len(text):
        end = at
        while end < len(text) and ("a" <= text[end] <= "z" or "A" <= text[end] <= "Z"):
            end += 1
        word = text[at:end]
        if not word:
            out.append(ESC + text[at] if text[at] in OPERATORS else text[at])
            end = at + 1
        elif word.islower():
            out.append(word)
        elif len(word) > 1 and word.isupper():
            out.append(ALLCAPS + word.lower())
        else:
            for index, letter in enumerate(word):
                if letter.isupper():
                    out.append(CAPNEXT if index else TITLE)
                out.append(letter.lower())
        at = end
    return "".join(out)


# Short words, capitals, operators and neighbours that are letters elsewhere, mixed with anything (surrogates too).
letters = st.sampled_from("abXYZzA")
odd = st.sampled_from(OPERATORS + " -'1éÉ\u2581\x00\n\U0001f600")
anything = st.characters(codec=None)
texts = st.text(letters | odd | anything, max_size=40)
streams = st.lists(st.sampled_from([*OPERATORS, ESC + TITLE, "a", "b", "cd", " ", "B", "é", TITLE + "x"])
                   | anything, max_size=12).map("".join)


@pytest.mark.parametrize("text", CASES)
def test_known_cases(text: str) -> None:
    assert caps.encode(text) == CASES[text]
    assert caps.decode(CASES[text]) == text
    assert caps.original_bytes(CASES[text]) == len(text.encode())


@pytest.mark.parametrize("stream", MALFORMED)
def test_decoder_rejects_and_says_where(stream: str) -> None:
    with pytest.raises(ValueError, match="not a CaseOps text.* at character"):
        caps.decode(stream)


def test_error_names_the_position() -> None:
    with pytest.raises(ValueError, match="at character 7 "):
        caps.decode(f"ok {TITLE}ok {CAPNEXT}x")


@settings(max_examples=1500, deadline=None)
@given(texts)
def test_any_text_comes_back_and_equals_the_definition(text: str) -> None:
    transformed = caps.encode(text)
    assert transformed == encode_by_characters(text)
    assert caps.decode(transformed) == text


@settings(max_examples=1500, deadline=None)
@given(streams)
def test_decoder_accepts_only_what_the_encoder_produces(stream: str) -> None:
    try:
        text = caps.decode(stream)
    except ValueError:
        return
    assert caps.encode(text) == stream


def test_every_short_string_over_the_critical_alphabet() -> None:
    """A transformed text is never shorter than its text, so these texts produce all valid streams of that length."""
    strings = ["".join(characters) for length in range(6)
               for characters in itertools.product("aA " + OPERATORS, repeat=length)]
    produced = {caps.encode(text): text for text in strings}
    assert len(produced) == len(strings)
    for stream in strings:
        if stream in produced:
            assert caps.decode(stream) == produced[stream]
        else:
            with pytest.raises(ValueError):
                caps.decode(stream)


@settings(max_examples=800, deadline=None)
@given(st.text(letters | odd | st.characters(codec="utf-8"), max_size=30), st.lists(st.integers(0, 80), max_size=12))
def test_byte_counter_agrees_for_any_cut(text: str, cuts: list[int]) -> None:
    transformed = caps.encode(text)
    at = [0, *sorted(min(cut, len(transformed)) for cut in cuts), len(transformed)]
    counter = caps.ByteCounter()
    counts = [counter.feed(transformed[start:end]) for start, end in zip(at, at[1:])]
    counter.close()
    assert sum(counts) == caps.original_bytes(transformed) == len(text.encode())
    assert all(count >= 0 for count in counts)


def test_byte_counter_charges_a_literal_operator_to_the_operator() -> None:
    counter = caps.ByteCounter()
    assert [counter.feed(piece) for piece in (ESC, TITLE, ESC + ESC, TITLE, "ab", "é")] == [0, 3, 3, 0, 2, 2]


@pytest.mark.parametrize("pieces", [[ESC], [ESC, "a"], [f"x{ESC}y"], [f"{ESC}{ESC}{ESC}"]])
def test_byte_counter_rejects_an_escape_of_nothing(pieces: list[str]) -> None:
    counter = caps.ByteCounter()
    with pytest.raises(ValueError, match="not a CaseOps text"):
        for piece in pieces:
            counter.feed(piece)
        counter.close()


def test_a_lone_surrogate_transforms_but_has_no_bytes() -> None:
    assert caps.decode(caps.encode("A\ud800b")) == "A\ud800b"
    with pytest.raises(ValueError):
        caps.original_bytes("\ud800")


def test_at_least_five_times_the_character_loop() -> None:
    words = "It was NASA and McDonald's who sent the iPhone, a small thing, to Mars in 1998 - or so they say.\n"
    text = words * 3000

    def rate(function: Callable[[str], str]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            function(text)
            best = min(best, time.perf_counter() - start)
        return len(text) / best
    assert rate(caps.encode) > 5 * rate(encode_by_characters)
