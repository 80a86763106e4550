"""CaseOps transforms: every version bijective on all of Unicode, strict on the way back, exact in bytes, fast."""
from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lossless_caps
from lossless_caps import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE, V1, VERSIONS, ByteCounter, Transform

V2, LINES, QUOTES, TITLES = (VERSIONS["lossless_caps_caseops_v2" + name] for name in ("", "_lines", "_quotes", "_titles"))
PLAIN = VERSIONS["plain"]
every_version = pytest.mark.parametrize("version", VERSIONS.values(), ids=lambda version: version.name)

ALIKE = {  # in all versions with operators, but for given spaces
    "": "",
    "-hello": "-hello",
    "-Hello": f"-{TITLE}hello",
    "-A": f"-{TITLE}a",
    "-HELLO": f"-{ALLCAPS}hello",
    "-OK": f"-{ALLCAPS}ok",
    "-McDonald": f"-{TITLE}mc{CAPNEXT}donald",
    "-iPhone": f"-i{CAPNEXT}phone",
    "-HELLOworld": f"-{TITLE}h{CAPNEXT}e{CAPNEXT}l{CAPNEXT}l{CAPNEXT}oworld",
    "-eBAY": f"-e{CAPNEXT}b{CAPNEXT}a{CAPNEXT}y",
    "-U.S.A.": f"-{TITLE}u.{TITLE}s.{TITLE}a.",
    "-DON'T": f"-{ALLCAPS}don'{TITLE}t",
    "ÜBER": f"Ü{ALLCAPS}ber",
    "4K_HDtv": f"4{TITLE}k_{TITLE}h{CAPNEXT}dtv",
    f"{TITLE}x{ESC}": f"{ESC}{TITLE}x{ESC}{ESC}",
    f"-a{ALLCAPS}Bc{CAPNEXT}DE": f"-a{ESC}{ALLCAPS}{TITLE}bc{ESC}{CAPNEXT}{ALLCAPS}de",
}
CASES = {
    V1: ALIKE | {
        "see The  NASA": f"see {TITLE}the  {ALLCAPS}nasa", "Hello": f"{TITLE}hello", " É\nNo": f" É\n{TITLE}no",
        f"{TITLE} The": f"{ESC}{TITLE} {TITLE}the",
    },
    V2: ALIKE | {
        "see The  NASA": f"see{TITLE} the {ALLCAPS} nasa", "Hello": f"{TITLE}hello", " É\nNo": f" É\n{TITLE}no", " A": f"{TITLE} a",
        f"{TITLE} The": f"{ESC}{TITLE}{TITLE} the", f" {TITLE}The": f" {ESC}{TITLE}{TITLE}the", "a McDonald": f"a{TITLE} mc{CAPNEXT}donald",
        "an iPhone": f"an i{CAPNEXT}phone", "\u00a0The": f"\u00a0{TITLE}the", "\tThe": f"\t{TITLE}the",
    },
    LINES: ALIKE | {
        "see The": f" see{TITLE} the", "The": f"{TITLE} the", "\nNASA\n\nx": f"\n{ALLCAPS} nasa\n\n x", " The": f"{CAPNEXT}{TITLE} the",
        "\n  The": f"\n{CAPNEXT} {TITLE} the", "\n the": f"\n{CAPNEXT} the", "\n 5\n5": f"\n{CAPNEXT} 5\n5", "\nÉa": "\nÉa",
        "\r\niPhone": f"\r\n i{CAPNEXT}phone", f"\n{TITLE} The": f"\n{ESC}{TITLE}{TITLE} the", " ": f"{CAPNEXT} ",
    },
    TITLES: ALIKE | {
        "The cat. The cat": " the cat. the cat", "a. b": f"{TITLE} a.{TITLE} b", "A? NASA!\nNo": f" a?{ALLCAPS} nasa!\n no",
        "\n the": f"\n{CAPNEXT} the", "\n The": f"\n{CAPNEXT}{TITLE} the", "1.  The": f"1. {TITLE} the",
        "1. iPhone": f"1.{TITLE} i{CAPNEXT}phone",
        "1. IPhone": f"1. i{CAPNEXT}phone", "1.The": f"1.{TITLE}the", f"1.{TITLE} The": f"1.{ESC}{TITLE}{TITLE} the",
        "1. McDonald": f"1. mc{CAPNEXT}donald",
    },
    QUOTES: ALIKE | {'said "The': f' said "{TITLE} the', '" the': f'"{CAPNEXT} the', '("[a': '("[ a'},
    PLAIN: {"see The NASA\n": "see The NASA\n", f"a{ESC}B{TITLE}": f"a{ESC}{ESC}B{ESC}{TITLE}"},
}
WITH_OPERATORS = [
    TITLE, ALLCAPS, CAPNEXT, ESC, f"-a{ESC}", f"{ESC}a", "A", "aB", f"{TITLE}A", f"{TITLE}é", f"{TITLE} é", f"{TITLE}  a",
    f"{ALLCAPS}a", f"{ALLCAPS}a b", f"{ALLCAPS} a", f"{CAPNEXT}a", f"- {CAPNEXT}a", f"-a{TITLE}b", f"-a{ALLCAPS}bc", f"-a{CAPNEXT}",
    f"-a{CAPNEXT}{CAPNEXT}b", f"{TITLE}a{CAPNEXT}b", f"{TITLE}a{CAPNEXT}b{CAPNEXT}c", f"{TITLE}{TITLE}a",
    f"{ALLCAPS}ab{CAPNEXT}c", f"{ALLCAPS}ab{TITLE}c", f"{ALLCAPS}ab{ALLCAPS}cd", f"{ALLCAPS}abC", f"{TITLE}ab{TITLE}c",
    f"{ESC}{CAPNEXT}{CAPNEXT}a", f"1{CAPNEXT}a", f"é{CAPNEXT}a",
]
MALFORMED = {
    V1: [*WITH_OPERATORS, f"{TITLE} a", f"-{ALLCAPS} ab"],
    V2: [*WITH_OPERATORS, f" {TITLE}a", f"- {ALLCAPS}ab", f"{TITLE} {TITLE}a", f"{TITLE} a{CAPNEXT}b", f"{CAPNEXT} a"],
    LINES: [*WITH_OPERATORS, "a", f"{TITLE}a", "\na", f"\n{ALLCAPS}ab", " ", "  a", f"\n{CAPNEXT}a", f"{CAPNEXT}", f"\n{CAPNEXT}{TITLE}a",
            f"\n{CAPNEXT}{TITLE}", f"-{CAPNEXT} a", f"\n{CAPNEXT}{CAPNEXT} a", f"\n{CAPNEXT} {TITLE}a", f" {TITLE}a"],
    TITLES: [f"1. {TITLE}a", f"1. i{CAPNEXT}p{CAPNEXT}h", f"1.{TITLE}{TITLE} a", f"{TITLE}a", "a", f"1.{ALLCAPS} a", f"1.{CAPNEXT} a"],
    QUOTES: ['("a', '"  a', f'"{TITLE}a', f'"{CAPNEXT}"'],
    PLAIN: [TITLE, f"a{CAPNEXT}b", ESC, f"{ESC}a"],
}


def case_of(word: str) -> tuple[str, str]:
    """(operator before the word, its letters and inner operators), from the definition."""
    if word.islower():
        return "", word
    if len(word) > 1 and word.isupper():
        return ALLCAPS, word.lower()
    first = TITLE if word[0].isupper() else ""
    return first, word[0].lower() + "".join(CAPNEXT + letter.lower() if letter.isupper() else letter for letter in word[1:])


def encode_by_characters(text: str, version: Transform = V1) -> str:
    """The transform as a loop over characters, written from the definition: the oracle, and the slow baseline."""
    out, at = [], 0
    while at < len(text):
        end = at
        while end < len(text) and ("a" <= text[end] <= "z" or "A" <= text[end] <= "Z"):
            end += 1
        word = text[at:end]
        begins = version.spaced_after and (at == 0 or text[at - 1] in version.spaced_after)
        if word:
            space = " " if begins else out.pop() if version.before_space and at and text[at - 1] == " " else ""
            operator, letters = case_of(word) if version.capitals else ("", word)
            before = (text[at - 1] if at else version.spaced_after[0]) if begins else text[at - 2] if space and at > 1 else ""
            if before and before in version.titled_after and (begins or before not in version.spaced_after) and operator != ALLCAPS:
                operator = "" if operator else TITLE
            out.append(operator + space + letters)
        else:
            out += [CAPNEXT] if begins and text[at] == " " else []
            out.append(ESC + text[at] if text[at] in OPERATORS else text[at])
            end = at + 1
        at = end
    return "".join(out)


# Short words, capitals, operators and neighbours that are letters elsewhere, mixed with anything (surrogates too).
letters = st.sampled_from("abXYZzA")
odd = st.sampled_from(OPERATORS + "  -'.1éÉ\u2581\u0301\x00\n\"(\U0001f600")
anything = st.characters(codec=None)
texts = st.text(letters | odd | anything, max_size=40)
parts = [*OPERATORS, ESC + TITLE, "a", "b", "cd", " ", "\n", "B", "é", TITLE + "x", TITLE + " x", ALLCAPS + " xy"]
streams = st.lists(st.sampled_from(parts) | anything, max_size=12).map("".join)


@pytest.mark.parametrize("version, text", [(version, text) for version, cases in CASES.items() for text in cases])
def test_known_cases(version: Transform, text: str) -> None:
    assert version.encode(text) == CASES[version][text]
    assert version.decode(CASES[version][text]) == text
    assert version.original_bytes(CASES[version][text]) == len(text.encode())


@pytest.mark.parametrize("version, stream", [(version, stream) for version, cases in MALFORMED.items() for stream in cases])
def test_decoder_rejects_and_says_where(version: Transform, stream: str) -> None:
    with pytest.raises(ValueError, match=rf"not a CaseOps text \({version.name}\).* at character"):
        version.decode(stream)


@pytest.mark.parametrize("stream, at", [(f"-ok {TITLE}ok {CAPNEXT}x", {V1: 8, V2: 4}), (f"\n ok{TITLE} ok\nx", {V1: 4, LINES: 8})])
def test_error_names_the_position(stream: str, at: dict[Transform, int]) -> None:
    for version, place in at.items():
        with pytest.raises(ValueError, match=f"at character {place} "):
            version.decode(stream)


@every_version
@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_any_text_comes_back_and_equals_the_definition(version: Transform, text: str) -> None:
    transformed = version.encode(text)
    assert transformed == encode_by_characters(text, version)
    assert version.decode(transformed) == text


@every_version
@settings(max_examples=300, deadline=None)
@given(stream=streams)
def test_decoder_accepts_only_what_the_encoder_produces(version: Transform, stream: str) -> None:
    try:
        text = version.decode(stream)
    except ValueError:
        return
    assert version.encode(text) == stream


@every_version
def test_every_short_string_over_the_critical_alphabet(version: Transform) -> None:
    """A transformed text is never shorter than its text, so these texts produce all valid streams of that length."""
    alphabet = "aA " + OPERATORS + version.spaced_after[-1:]
    strings = ["".join(characters) for length in range(6) for characters in itertools.product(alphabet, repeat=length)]
    produced = {version.encode(text): text for text in strings}
    assert len(produced) == len(strings)
    for stream in strings:
        if stream in produced:
            assert version.decode(stream) == produced[stream]
        else:
            with pytest.raises(ValueError):
                version.decode(stream)


@every_version
@settings(max_examples=200, deadline=None)
@given(text=st.text(letters | odd | st.characters(codec="utf-8"), max_size=30), cuts=st.lists(st.integers(0, 80), max_size=12))
def test_byte_counter_agrees_for_any_cut(version: Transform, text: str, cuts: list[int]) -> None:
    transformed = version.encode(text)
    at = [0, *sorted(min(cut, len(transformed)) for cut in cuts), len(transformed)]
    counter = ByteCounter(version)
    counts = [counter.feed(transformed[start:end]) for start, end in zip(at, at[1:])]
    counter.close()
    assert sum(counts) == version.original_bytes(transformed) == len(text.encode())
    assert all(count >= 0 for count in counts)


def test_byte_counter_charges_a_literal_operator_to_the_operator() -> None:
    counter = ByteCounter(V1)
    assert [counter.feed(piece) for piece in (ESC, TITLE, ESC + ESC, TITLE, "ab", "é")] == [0, 3, 3, 0, 2, 2]


def test_byte_counter_charges_a_given_space_to_nobody() -> None:
    counter = ByteCounter(LINES)
    pieces = (TITLE, " the", "\n", " a", "\n", CAPNEXT, " a", " b\n", CAPNEXT + ALLCAPS, " cd", "\n" + TITLE, " ", "e")
    assert [counter.feed(piece) for piece in pieces] == [0, 3, 1, 1, 1, 0, 2, 3, 0, 3, 1, 0, 1]


@pytest.mark.parametrize("pieces", [[ESC], [ESC, "a"], [f"x{ESC}y"], [f"{ESC}{ESC}{ESC}"]])
@every_version
def test_byte_counter_rejects_an_escape_of_nothing(version: Transform, pieces: list[str]) -> None:
    counter = ByteCounter(version)
    with pytest.raises(ValueError, match="not a CaseOps text"):
        for piece in pieces:
            counter.feed(piece)
        counter.close()


@every_version
def test_a_lone_surrogate_transforms_but_has_no_bytes(version: Transform) -> None:
    assert version.decode(version.encode("A\ud800b")) == "A\ud800b"
    with pytest.raises(ValueError):
        version.original_bytes("-\ud800")


@every_version
def test_at_least_five_times_the_character_loop(version: Transform) -> None:
    words = "It was NASA and McDonald's who sent the iPhone, a small thing, to Mars in 1998 - or so they say.\n"
    text = words * 1000

    def rate(function: Callable[[str], str]) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            function(text)
            best = min(best, time.perf_counter() - start)
        return len(text) / best
    assert rate(version.encode) > 5 * rate(lambda text: encode_by_characters(text, version))


@every_version
@settings(max_examples=200, deadline=None)
@given(text=texts, size=st.integers(1, 9))
def test_a_long_text_is_transformed_in_parts_as_it_is_at_once(version: Transform, text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        whole = version.encode(text)
        patch.setattr(lossless_caps, "LONG_TEXT", size)
        assert version.encode(text) == whole
