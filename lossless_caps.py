"""CaseOps: bijective transforms that write capital letters as operators, so that "The" and "the" share a token.

A word is a maximal run of ASCII letters. It becomes lowercase, and an operator says what was capital:

    hello    hello                     unchanged
    Hello    TITLE hello               first letter only (a single capital letter is TITLE + letter)
    HELLO    ALLCAPS hello             every letter, two or more
    McDonald TITLE mc CAPNEXT donald   any other mixture: TITLE for the first letter, CAPNEXT before each later capital

Everything that is not an ASCII letter stays as it is; a literal operator character in the text becomes ESC + itself.

A version is a row of `VERSIONS`. From the second on TITLE and ALLCAPS go before the space directly in front of their word, so
that the word is written as it is in the middle of a sentence, its space included: "see The" is "see", TITLE, " the". And where
`spaced_after` names characters, a word after one of them is given the space that it lacks, while CAPNEXT marks a real one:
with a newline, "\nthe" is "\n the" and "\n the" is "\n", CAPNEXT, " the". The start of the text is a line's start. Where
`titled_after` names characters, a word with its space behind one of them is taken to begin with a capital, and TITLE says that
it does not: "end. The cat" is "end. the cat", "Mr. and" is "mr.", TITLE, " and".

Of every version `decode(encode(text)) == text` for every string, and `decode` raises ValueError for every string that
`encode` cannot have produced. Operators, and spaces given to words, stand for no byte of the original text, so bits per byte
are charged with `original_bytes`, or with `ByteCounter` where the transformed text comes in pieces (tokens).
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESC
LONG_TEXT = 1 << 20  # characters that are transformed at once
OPERATOR_BYTES = 3  # every operator character is three bytes of UTF-8; it counts where it is literal text

# All patterns begin with one set of characters, which lets the regular expression engine skip the rest of the text.
# A run of letters from its first capital on; a literal operator, with the word that may follow it.
_CHANGED = re.compile(f"([A-Z{OPERATORS}][A-Za-z]*)")
_LITERAL = re.compile(f"([{OPERATORS}])")
_CAPITAL = re.compile("[A-Z]")
_WITHOUT_TEXT = re.compile(f"{ESC}[{OPERATORS}]|[{OPERATORS}]")

# The way back: what TITLE and ALLCAPS say of a word.
_TITLED = f"(?![a-z](?:{CAPNEXT}[a-z])++(?![a-z]))[a-z](?:{CAPNEXT}?[a-z])*+"
_CAPITALS = f"[a-z]{{2,}}+(?!{CAPNEXT})"


@lru_cache(maxsize=1 << 16)
def _write(found: str) -> str:
    """Transform one match of `_CHANGED` or `_LITERAL` that does not continue a word."""
    literal, word = (ESC + found[0], found[1:]) if found[0] in OPERATORS else ("", found)
    if len(word) > 1 and word.isupper():
        return literal + ALLCAPS + word.lower()
    if word[:1].isupper():
        return literal + TITLE + word[0].lower() + _write_inside(word[1:])
    return literal + _write_inside(word)


@lru_cache(maxsize=1 << 16)
def _write_inside(letters: str) -> str:
    """Transform the rest of a word: CAPNEXT before each capital."""
    return _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), letters)


@lru_cache(maxsize=1 << 16)
def _read(found: str) -> str:
    """Undo one match of a version's `_written`; "" marks a match of its last alternative, which is malformed."""
    first, rest = found[0], found[1:]
    if not rest:
        return ""
    if first == ESC:
        return rest
    if first == ALLCAPS:
        return rest.upper()
    if first not in OPERATORS:  # one of `spaced_after`: the space behind it is the text's only after CAPNEXT
        marked = rest[0] == CAPNEXT
        spaced = rest[marked:]
        return first + (spaced if spaced == " " else _read(spaced))[not marked:]
    letters = found.split(CAPNEXT)
    if first == TITLE:
        letters[0] = letters[0][1:].title()  # of one word, with or without a space before it
    return letters[0] + "".join(part[0].upper() + part[1:] for part in letters[1:])


@lru_cache
def _titled(after: str) -> re.Pattern[str]:
    return re.compile(f"([{re.escape(after)}])({TITLE}?)(?= [a-z])")


def swap_titles(form: str, after: str) -> str:
    """A form with TITLE implied behind the characters `after` out of one with every TITLE, or the other way round.

    It is its own inverse: putting TITLE in or taking it out makes no other such place and ends none.
    """
    return _titled(after).sub(lambda found: found[1] + ("" if found[2] else TITLE), form) if after else form


@dataclass(frozen=True)
class Transform:
    """One version of CaseOps, by what sets it apart from the others."""
    name: str
    capitals: bool = True      # False: they stay, and only literal operators are changed: plain text, for comparison
    before_space: bool = False
    spaced_after: str = ""     # ASCII characters, no letters or spaces; the first one is what the start of the text counts as
    titled_after: str = ""     # the same; needs before_space

    def encode(self, text: str) -> str:
        """Return the CaseOps form of `text`; any string is allowed."""
        start = self.spaced_after[:1] if text else ""
        written = start + self.words(text)
        if start:
            mark, give = self._given
            written = give.sub(r"\1 ", mark.sub(rf"\1{CAPNEXT}", written))
        return swap_titles(written, self.titled_after)[len(start):]

    def words(self, text: str) -> str:
        """`encode` without `spaced_after` and `titled_after`: then the form of a part of a text is the part of its form, cut
        anywhere but in words and after spaces."""
        if len(text) > LONG_TEXT:  # a list of all its words would take ten times its memory
            return "".join(self._words(part[0]) for part in re.finditer(rf"(?s).{{1,{LONG_TEXT}}}[^ ]*", text))
        return self._words(text)

    def _words(self, text: str) -> str:
        parts = (_CHANGED if self.capitals else _LITERAL).split(text)
        if len(parts) > 1:
            parts[1::2] = [_write_inside(found) if "a" <= before[-1:] <= "z" and found[0] not in OPERATORS
                           else _write(found) for before, found in zip(parts[::2], parts[1::2])]
        written = "".join(parts)
        if self.before_space:
            written = written.replace(" " + TITLE, TITLE + " ")
            if ALLCAPS in written:
                written = written.replace(" " + ALLCAPS, ALLCAPS + " ")
        return written

    def decode(self, transformed: str) -> str:
        """Return the text whose CaseOps form is `transformed`; ValueError with the position (every TITLE counted) if there is none."""
        start = self.spaced_after[:1] if transformed else ""
        transformed = swap_titles(start + transformed, self.titled_after)
        parts = self._written.split(transformed)
        read = list(map(_read, parts[1::2]))
        if "" in read:
            at = sum(map(len, parts[:2 * read.index("") + 1]))
            raise ValueError(f"not a CaseOps text ({self.name}): {transformed[at:at + 2]!r} at character {max(0, at - len(start))} is"
                             f" not where the encoder puts it (near {transformed[max(0, at - 20):at + 20]!r})")
        parts[1::2] = read
        return "".join(parts)[len(start):]

    def original_bytes(self, transformed: str) -> int:
        """UTF-8 bytes of the original text of a CaseOps text: operators count 0, escaped (literal) ones 3."""
        counter = ByteCounter(self)
        count = counter.feed(transformed)
        counter.close()
        return count

    @cached_property
    def _given(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Before what a mark goes, and a given space, in a text of `words`."""
        after, operator = f"[{re.escape(self.spaced_after)}]", f"[{TITLE}{ALLCAPS}]?"
        return re.compile(f"({after})(?={operator} )"), re.compile(f"({after}{operator})(?=[a-z])")

    @cached_property
    def _written(self) -> re.Pattern[str]:
        """An operator with all that belongs to it, or a character of `spaced_after` with an operator or space behind it.

        Where nothing can belong to it (the encoder never puts it there) or where a letter is a capital, the last alternative,
        which is empty, leaves a match of one character. "(?<![a-z].)" right after an operator means that the operator is not in
        the middle of a word; nor is it behind the space that it should be in front of.
        """
        if not self.capitals:
            return re.compile(f"([{OPERATORS}](?:(?<={ESC})[{OPERATORS}]|))")
        gap = "(?: |(?<![a-z ].))" if self.before_space else "(?<![a-z].)"
        first, spaced = f"[A-Z{OPERATORS}]", ""
        if self.spaced_after:
            after = f"[{re.escape(self.spaced_after)}]"
            first = f"(?:{first}|{after}(?=[a-z {TITLE}{ALLCAPS}{CAPNEXT}]))"
            spaced = f"|(?<={after})(?: (?=[a-z])|{CAPNEXT} |{CAPNEXT}?(?:{TITLE} {_TITLED}|{ALLCAPS} {_CAPITALS}))"
        return re.compile(f"({first}(?:(?<={ESC})[{OPERATORS}]|(?<={TITLE}){gap}{_TITLED}|(?<={ALLCAPS}){gap}{_CAPITALS}"
                          f"|(?<=[a-z]{CAPNEXT})[a-z]{spaced}|))", re.DOTALL)


VERSIONS = {version.name: version for version in (
    Transform("lossless_caps_caseops_v1"),
    Transform("lossless_caps_caseops_v2", before_space=True),
    Transform("lossless_caps_caseops_v2_lines", before_space=True, spaced_after="\n"),
    Transform("lossless_caps_caseops_v2_quotes", before_space=True, spaced_after='\n"(['),
    Transform("lossless_caps_caseops_v2_titles", before_space=True, spaced_after="\n", titled_after="\n.!?"),
    Transform("plain", capitals=False))}
V1 = VERSIONS["lossless_caps_caseops_v1"]  # the published data's


class ByteCounter:
    """Counts the original bytes behind a CaseOps text that comes in pieces cut anywhere.

    `feed(piece)` returns the bytes that this piece stands for. ESC itself counts 0 and the literal operator after it 3,
    also when the two come in different pieces, so the sum is the same for any cut. A lone surrogate has no UTF-8 form
    and raises UnicodeEncodeError (a ValueError).
    """

    def __init__(self, transform: Transform) -> None:
        self.escaped = False  # the last character seen was an ESC that waits for its operator
        after = transform.spaced_after
        self.given = re.compile(f"[{re.escape(after)}][{TITLE}{ALLCAPS}]? ") if after else None
        self.before = after[:1]  # the last two characters seen, where a space may be given after them

    def feed(self, piece: str) -> int:
        """Bytes of the original text that `piece` stands for; ValueError when ESC is not followed by an operator."""
        if not piece:
            return 0
        given = 0
        if self.given:
            seen = self.before + piece
            given = sum(found.end() > len(self.before) for found in self.given.finditer(seen))
            self.before = seen[-2:]
        return self._written_bytes(piece) - given

    def _written_bytes(self, piece: str) -> int:
        """The same, if all spaces are of the text."""
        if self.escaped:
            if piece[0] not in OPERATORS:
                raise ValueError(f"not a CaseOps text: ESC is followed by {piece[0]!r}, not by an operator")
            self.escaped = False
            return OPERATOR_BYTES + (self._written_bytes(piece[1:]) if piece[1:] else 0)
        if piece.isascii():
            return len(piece)
        count = len(piece.encode())
        for found in _WITHOUT_TEXT.findall(piece):
            count -= OPERATOR_BYTES
            self.escaped = found == ESC
        if self.escaped and piece[-1] != ESC:
            raise ValueError(f"not a CaseOps text: ESC is not followed by an operator in {piece[-40:]!r}")
        return count

    def close(self) -> None:
        """ValueError when the text ended between an ESC and its operator."""
        if self.escaped:
            raise ValueError("not a CaseOps text: it ends with an ESC that escapes nothing")
