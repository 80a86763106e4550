"""CaseOps (`lossless_caps_caseops_v1`): a bijective transform that writes capital letters as operators.

A word is a maximal run of ASCII letters. It becomes lowercase, and an operator says what was capital:

    hello    hello                     unchanged
    Hello    TITLE hello               first letter only (a single capital letter is TITLE + letter)
    HELLO    ALLCAPS hello             every letter, two or more
    McDonald TITLE mc CAPNEXT donald   any other mixture: TITLE for the first letter, CAPNEXT before each later capital

Everything that is not an ASCII letter stays as it is; a literal operator character in the text becomes ESC + itself.
`decode(encode(text)) == text` for every string, and `decode` raises ValueError for every string that `encode` cannot
have produced. Operators stand for no byte of the original text, so bits per byte are charged with `original_bytes`, or
with `ByteCounter` where the transformed text comes in pieces (tokens).
"""
from __future__ import annotations

import re
from functools import lru_cache

TITLE, ALLCAPS, CAPNEXT, ESC = "\ue001", "\ue002", "\ue003", "\ue004"
OPERATORS = TITLE + ALLCAPS + CAPNEXT + ESC
VERSION = "lossless_caps_caseops_v1"
OPERATOR_BYTES = 3  # every operator character is three bytes of UTF-8; it counts where it is literal text

# Both patterns begin with one set of characters, which lets the regular expression engine skip the rest of the text.
# A run of letters from its first capital on; a literal operator, with the word that may follow it.
_CHANGED = re.compile(f"([A-Z{OPERATORS}][A-Za-z]*)")
_CAPITAL = re.compile("[A-Z]")

# The way back: an operator with all that belongs to it. Where nothing can belong to it (the encoder never puts one
# there) or where the letter is a capital, the last alternative, which is empty, leaves a match of one character.
# "(?<![a-z].)" right after an operator means that the operator is not in the middle of a word.
_MARK = f"[{TITLE}{ALLCAPS}{CAPNEXT}]"
_WRITTEN = re.compile(
    f"([A-Z{OPERATORS}](?:"
    f"(?<={ESC})[{OPERATORS}]"
    f"|(?<={TITLE})(?<![a-z].)(?![a-z](?:{CAPNEXT}[a-z])++(?![a-z]))[a-z](?:{CAPNEXT}?[a-z])*+(?!{_MARK})"
    f"|(?<={ALLCAPS})(?<![a-z].)[a-z]{{2,}}+(?!{_MARK})"
    f"|(?<=[a-z]{CAPNEXT})[a-z]"
    f"|))", re.DOTALL)
_WITHOUT_TEXT = re.compile(f"{ESC}[{OPERATORS}]|[{OPERATORS}]")


@lru_cache(maxsize=1 << 16)
def _write(found: str) -> str:
    """Transform one match of `_CHANGED` that does not continue a word."""
    if found[0] in OPERATORS:
        return ESC + found[0] + encode(found[1:])
    small = found.lower()
    if len(found) > 1 and found.isupper():
        return ALLCAPS + small
    return TITLE + small[0] + _write_inside(found[1:])


@lru_cache(maxsize=1 << 16)
def _write_inside(letters: str) -> str:
    """Transform the rest of a word: CAPNEXT before each capital."""
    return _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), letters)


def encode(text: str) -> str:
    """Return the CaseOps form of `text`; any string is allowed."""
    parts = _CHANGED.split(text)
    if len(parts) > 1:
        parts[1::2] = [_write_inside(found) if "a" <= before[-1:] <= "z" and found[0] not in OPERATORS
                       else _write(found) for before, found in zip(parts[::2], parts[1::2])]
    return "".join(parts)


@lru_cache(maxsize=1 << 16)
def _read(found: str) -> str:
    """Undo one match of `_WRITTEN`; "" marks a match of its last alternative, which is malformed."""
    operator, rest = found[0], found[1:]
    if not rest:
        return ""
    if operator == ESC:
        return rest
    if operator == ALLCAPS:
        return rest.upper()
    letters = found.split(CAPNEXT)
    if operator == TITLE:
        letters[0] = letters[0][1:].capitalize()
    return letters[0] + "".join(part[0].upper() + part[1:] for part in letters[1:])


def decode(transformed: str) -> str:
    """Return the text whose CaseOps form is `transformed`; ValueError with the position if there is none."""
    parts = _WRITTEN.split(transformed)
    if len(parts) == 1:
        return transformed
    read = list(map(_read, parts[1::2]))
    if "" in read:
        at = sum(map(len, parts[:2 * read.index("") + 1]))
        raise ValueError(f"not a CaseOps text: {transformed[at]!r} at character {at} is not where the encoder puts one"
                         f" (near {transformed[max(0, at - 20):at + 20]!r})")
    parts[1::2] = read
    return "".join(parts)


def original_bytes(transformed: str) -> int:
    """UTF-8 bytes of the original text of a CaseOps text: operators count 0, escaped (literal) ones 3."""
    counter = ByteCounter()
    count = counter.feed(transformed)
    counter.close()
    return count


class ByteCounter:
    """Counts the original bytes behind a CaseOps text that comes in pieces cut anywhere.

    `feed(piece)` returns the bytes that this piece stands for. ESC itself counts 0 and the literal operator after it 3,
    also when the two come in different pieces, so the sum is the same for any cut. A lone surrogate has no UTF-8 form
    and raises UnicodeEncodeError (a ValueError).
    """

    def __init__(self) -> None:
        self.escaped = False  # the last character seen was an ESC that waits for its operator

    def feed(self, piece: str) -> int:
        """Bytes of the original text that `piece` stands for; ValueError when ESC is not followed by an operator."""
        if not piece:
            return 0
        if self.escaped:
            if piece[0] not in OPERATORS:
                raise ValueError(f"not a CaseOps text: ESC is followed by {piece[0]!r}, not by an operator")
            self.escaped = False
            return OPERATOR_BYTES + self.feed(piece[1:])
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
