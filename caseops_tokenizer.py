"""CaseOps tokenizers: what is true of a SentencePiece model, and exact token ids and byte charges.

`Tokenizer` reads a model and proves from it what the rest relies on. `Encoder` asks SentencePiece for every text;
`FastEncoder` gives the same several times as fast, for tokenizers that lose nothing and work word by word, as ours does.
prepare_caseops_data.py builds with them.
"""
from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

from lossless_caps import ALLCAPS, CAPNEXT, ESC, OPERATOR_BYTES, OPERATORS, TITLE, V1, VERSIONS, ByteCounter, swap_titles

BOS = 1


# ----------------------------------------------------------------------------------------------------------- tokenizer
SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces
TRANSFORM_FIELD = 200  # of a model file: the version of CaseOps, in the first field that SentencePiece leaves to others


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message; nested messages and strings stay bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, message[at:at + size]
        at += size


def marked(model: bytes, transform: str) -> bytes:
    """A model file that says for which version of CaseOps it is; without a mark it is for the first."""
    name = transform.encode()
    key = TRANSFORM_FIELD << 3 | 2
    return model if transform == V1.name else model + bytes([key & 127 | 128, key >> 7, len(name)]) + name


class Tokenizer:
    """A SentencePiece model and the facts about it that exact accounting rests on.

    transform  the version of CaseOps that its text is in (`lossless_caps.VERSIONS`)
    pieces     list of V bytes: what each id stands for in the CaseOps text (control pieces: nothing)
    charges    (V,) uint16: its bytes in the original text (operators 0; literal ones are seen to by the callers)
    lossless   decoding gives back every text: identity normalisation, no whitespace touched, bytes for what is unknown
    by_word    it is lossless, and the ids of a text are the ids of its words, one after the other, where a word is cut
               before each space; proven from the model, not assumed
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no tokenizer at {self.path}: name a SentencePiece .model file (--sp; of tools/verify.py --tokenizer)")
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            fields = list(protobuf_fields(model))
            entries = [dict(protobuf_fields(value)) for number, value in fields if number == 1]
            trainer, normalizer = (dict(protobuf_fields(b"".join(value for number, value in fields if number == wanted)))
                                   for wanted in (2, 3))  # parts of one message may be joined
            self.kinds = [entry.get(3, NORMAL) for entry in entries]
            self.names = [entry[1].decode() for entry in entries]
            version = dict(fields).get(TRANSFORM_FIELD, V1.name.encode()).decode()
        except (RuntimeError, OSError, LookupError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is not a SentencePiece model: {error}") from None
        if version not in VERSIONS:
            raise ValueError(f"{self.path} is for CaseOps {version}; this program has {', '.join(VERSIONS)}")
        self.transform = VERSIONS[version]
        self.vocab_size = len(entries)
        self._check_operators()
        self.pieces = [self._piece_bytes(index) for index in range(self.vocab_size)]
        charges = [0 if name in OPERATORS else len(piece) for name, piece in zip(self.names, self.pieces)]
        self.charges = np.array(charges, dtype=np.uint16)
        keeps_spaces = not normalizer.get(3, 1) and not normalizer.get(4, 1) and normalizer.get(5, 1)
        self.lossless = bool(not normalizer.get(2) and keeps_spaces and self.kinds.count(BYTE) == 256)
        self.by_word = bool(self.lossless and trainer.get(3, 1) == 2 and not trainer.get(24, 0)
                            and UNUSED not in self.kinds and not any(SPACE in name[1:] for name in self.names))

    def _check_operators(self) -> None:
        """ValueError unless the ids fit a shard, BOS is 1 and the four operators are pieces of their own."""
        if self.vocab_size > 1 << 16:
            raise ValueError(f"{self.path} has {self.vocab_size} pieces; shards hold ids below 65,536")
        if self.processor.bos_id() != BOS:
            raise ValueError(f"{self.path} has BOS id {self.processor.bos_id()}; the shards need {BOS}")
        for operator in OPERATORS:
            if operator not in self.names or self.kinds[self.names.index(operator)] != USER_DEFINED:
                raise ValueError(f"{self.path} lacks the CaseOps operator U+{ord(operator):04X} as a user-defined"
                                 " piece: use a CaseOps tokenizer (see tokenizers/README.md)")

    def _piece_bytes(self, index: int) -> bytes:
        kind, name = self.kinds[index], self.names[index]
        if kind == BYTE:
            return bytes([int(name[3:5], 16)])
        return b"" if kind in (CONTROL, UNKNOWN) else name.replace(SPACE, " ").encode()

    @cached_property
    def joined(self) -> set[str]:
        """The pairs of neighbouring characters inside pieces: no token reaches over any other pair (space is `SPACE`)."""
        return {name[at:at + 2] for name, kind in zip(self.names, self.kinds) if kind in (NORMAL, USER_DEFINED)
                for at in range(len(name) - 1)}

    def decode(self, ids: Iterable[int]) -> str:
        """The original text behind token ids (BOS is nothing); ValueError for ids that no text has."""
        transformed = b"".join(map(self.pieces.__getitem__, ids))
        return self.transform.decode(transformed.decode())

    def lossless_charges(self, ids: np.ndarray) -> np.ndarray:
        """(T,) ids from the start of a text -> (T,) uint16 original bytes, for a lossless tokenizer: they depend on the ids alone."""
        charges = self.charges[ids]
        literal = -1  # where the last literal operator stands: it may be an ESC itself
        for at in np.flatnonzero(ids == self.names.index(ESC)).tolist():
            if at != literal and at + 1 < len(ids):
                literal = at + 1
                charges[literal] = OPERATOR_BYTES
        if self.transform.spaced_after:
            begins, ends, is_case, inner = self._given_spaces
            after = np.append(True, ends[ids[:-1]])  # a space here is not the text's; nor behind TITLE or ALLCAPS here
            after[1:] |= is_case[ids[:-1]] & after[:-1]
            charges -= inner[ids] + (begins[ids] & after)
        return charges

    @cached_property
    def _given_spaces(self) -> tuple[np.ndarray, ...]:
        """By id: does it begin with a space, does it end with what a space is given after (BOS does), is it TITLE or ALLCAPS;
        (V,) uint16 given spaces inside it."""
        after = tuple(character.encode() for character in self.transform.spaced_after)
        begins = np.array([piece[:1] == b" " for piece in self.pieces])
        ends = np.array([piece.endswith(after) or index == BOS for index, piece in enumerate(self.pieces)])
        is_case = np.array([name in (TITLE, ALLCAPS) for name in self.names])
        inner = np.array([sum(piece.count(character + b" ") for character in after) for piece in self.pieces], dtype=np.uint16)
        return begins, ends, is_case, inner


# ------------------------------------------------------------------------------------------------------------ encoding
LONGEST_AT_ONCE = 1 << 16  # characters that SentencePiece is given at once (it takes about 45 bytes of memory for each)
LONGEST_NORMALISED = 1 << 23  # bytes of a document whose text must go to it whole
LARGEST_CHARGE = (1 << 16) - 1


class Encoded(NamedTuple):
    """A document as it goes into shards."""
    tokens: np.ndarray = np.zeros(0, dtype=np.uint16)   # (T,), BOS first; none if it cannot be encoded
    charges: np.ndarray = np.zeros(0, dtype=np.uint16)  # (T,) original bytes; none if they were not asked for
    fault: str = ""                                     # why it cannot be encoded


class Encoder:
    """Token ids and byte charges straight from SentencePiece: slow, and what the fast one must equal."""

    def __init__(self, tokenizer: Tokenizer, with_charges: bool = False) -> None:
        self.tokenizer, self.with_charges = tokenizer, with_charges
        self.processor = tokenizer.processor

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """The UTF-8 of documents, one by one."""
        return list(map(self._encoded, documents))

    def _encoded(self, document: bytes) -> Encoded:
        try:
            ids, charges = self.one(document.decode())
        except ValueError as error:
            return Encoded(fault=str(error))
        return Encoded(np.append(np.uint16(BOS), ids), np.append(np.uint16(0), charges) if self.with_charges else charges)

    def one(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, charges) of one text, (T,) uint16 each, without BOS; no charges unless they are asked for.

        Raises:
            ValueError: a tokenizer that normalises can be given texts that are too long, or too much white space.
        """
        if self.tokenizer.lossless:
            ids = self.lossless_ids(self.tokenizer.transform.encode(text))
            return ids, self.tokenizer.lossless_charges(ids) if self.with_charges else ids[:0]
        transformed = self.tokenizer.transform.encode(text).encode()
        if len(transformed) > LONGEST_NORMALISED:
            raise ValueError(f"has {len(transformed):,} bytes; a tokenizer that normalises must see a text whole, and takes"
                             f" {LONGEST_NORMALISED:,} at most")
        if not self.with_charges:
            return self.ids(transformed), np.zeros(0, dtype=np.uint16)
        mapping = self.processor.encode(transformed, return_type="offset_mapping")
        counter = ByteCounter(self.tokenizer.transform)
        counts = [counter.feed(transformed[start:end].decode()) for start, end in mapping["offsets"]]
        if max(counts, default=0) > LARGEST_CHARGE:
            raise ValueError(f"has a token that stands for {max(counts)} bytes (a long run of white space?), the sidecar"
                             f" holds at most {LARGEST_CHARGE}")
        return np.array(mapping["ids"], dtype=np.uint16), np.array(counts, dtype=np.uint16)

    def lossless_ids(self, transformed: str) -> np.ndarray:
        """The ids of a CaseOps text, which a lossless tokenizer may be given in parts."""
        spelled = [self.tokenizer.names.index(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        spelled, found = np.array(spelled, dtype=np.uint16), [np.zeros(0, dtype=np.uint16)]
        for number, part in enumerate(transformed.split(SPACE)):  # in a piece it would come back as a space: spell it in bytes
            found += [spelled] if number else []
            found += [self.ids(piece) for piece in self._pieces_of(part)]
        return np.concatenate(found)

    def ids(self, transformed: str | bytes) -> np.ndarray:
        """What SentencePiece gives for a CaseOps text, (T,) uint16."""
        return self.processor.encode(transformed, return_type="numpy").astype(np.uint16)

    def _pieces_of(self, transformed: str) -> Iterator[str]:
        """A long text cut where no token reaches over, into pieces of about `LONGEST_AT_ONCE` characters."""
        start = 0
        while len(transformed) - start > LONGEST_AT_ONCE:
            end = start + LONGEST_AT_ONCE
            while end < len(transformed) and transformed[end - 1:end + 1].replace(" ", SPACE) in self.tokenizer.joined:
                end += 1
            yield transformed[start:end]
            start = end
        yield transformed[start:]


# ------------------------------------------------------------------------------------------------- fast exact encoding
# Bytes that UTF-8 never has: before each document, encoded as BOS; before a space, encoded as CAPNEXT; before the space of a word
# that is taken to begin with a capital; in place of such a space if CaseOps gives it; between parts that are transformed together.
DOCUMENT, MARK, TITLED, TITLED_SPACE, BETWEEN = 0xFF, 0xFE, 0xFD, 0xFC, 0xFB
NEVER_TEXT = re.compile(f"[{chr(0xDC00 + TITLED)}-{chr(0xDC00 + DOCUMENT)}]")  # all but BETWEEN, as `surrogateescape` decodes them
LONG_DOCUMENT = 1 << 22  # bytes from which on a document goes to `Encoder`, which takes little memory for it
KEY_BYTES = 15  # longer parts are too rare for the table
SLOTS = 1 << 21  # of the table, what bounds the memory of an encoder: about 50 bytes each
COUNT_BITS = 32  # of a span of the table: how many ids a part has
ASCII_LETTERS = np.array([chr(byte).isalpha() and byte < 128 for byte in range(256)])
LETTER, DIGIT, OTHER, WIDE = range(4)  # kinds of bytes; WIDE is a space, and what is not ASCII
# By the length of a part, at most 16: the bytes of its key that are its own, and its length in the last one.
KEY_MASKS = (255 * np.tri(KEY_BYTES + 2, 16, -1, dtype=np.uint8)).view(np.uint64)
KEY_LENGTHS = np.arange(KEY_BYTES + 2, dtype=np.uint64) << np.uint64(56)


class FastEncoder:
    """The same for many documents at once, many times as fast, for tokenizers that work word by word.

    The UTF-8 of the documents, each after a `DOCUMENT` byte and with the spaces that CaseOps gives to words, is cut into
    parts: before spaces, and within words between ASCII letters, digits and other ASCII characters. No piece of the model
    reaches over such a cut (`Tokenizer.by_word` and `_cut_table` prove it from the model), so the ids of a text are the ids
    of its parts, one after the other. Each distinct part goes to SentencePiece once; after that a hash table of whole parts,
    in numpy, has its ids.
    """

    def __init__(self, tokenizer: Tokenizer, with_charges: bool) -> None:
        assert tokenizer.by_word
        self.tokenizer, self.with_charges = tokenizer, with_charges
        self.plain = Encoder(tokenizer, with_charges)
        self.cuts, self.between = self._cut_table(), self._between_table()
        self.table = PartTable()

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """The UTF-8 of documents, all together; there is none that it cannot encode."""
        found: list[Encoded] = []
        for long, group in itertools.groupby(documents, lambda document: len(document) >= LONG_DOCUMENT):
            found += (self.plain.encode if long else self._encode_together)(list(group))
        assert len(found) == len(documents)
        return found

    def _encode_together(self, documents: list[bytes]) -> list[Encoded]:
        tokens = self._tokens(documents)
        charges = self.tokenizer.lossless_charges(tokens) if self.with_charges else tokens[:0]
        starts = [*np.flatnonzero(tokens == BOS).tolist(), len(tokens)]
        return [Encoded(tokens[start:end], charges[start:end]) for start, end in itertools.pairwise(starts)]

    def _cut_table(self) -> np.ndarray:
        """(65536,) bool for each pair of bytes (the second one high): may it be cut?"""
        kinds = np.full(256, WIDE)
        for byte in set(range(128)) - {ord(" ")}:
            kinds[byte] = LETTER if chr(byte).isalpha() else DIGIT if chr(byte).isdigit() else OTHER
        before, after = kinds[None, :], kinds[:, None]
        table = np.zeros((256, 256), dtype=bool)
        if keeps_kinds_apart(self.tokenizer):
            table |= (before != WIDE) & (after != WIDE) & ((before != after) | (after == DIGIT))
        table[ord(" "), :] = True
        for byte in (DOCUMENT, MARK):
            table[:, byte] = table[byte, :] = True
        table[[TITLED, TITLED_SPACE], :] = True
        table[ord(" "), TITLED] = False
        return table.reshape(-1)

    def _between_table(self) -> np.ndarray:
        """(65536,) uint8 for each pair of bytes: what CaseOps puts between them (`TITLED` if a letter is next), 0: nothing."""
        transform, table = self.tokenizer.transform, np.zeros((256, 256), dtype=np.uint8)
        for byte in transform.titled_after.encode():
            table[ord(" "), byte] = TITLED
        for byte in transform.spaced_after.encode():
            table[ASCII_LETTERS, byte] = TITLED_SPACE if chr(byte) in transform.titled_after else ord(" ")
            table[ord(" "), byte] = MARK
        if transform.spaced_after:
            table[:, DOCUMENT] = table[:, ord(transform.spaced_after[0])]
        return table.reshape(-1)

    def _tokens(self, documents: list[bytes]) -> np.ndarray:
        """The ids of documents, (n,) uint16."""
        mark = bytes([DOCUMENT])
        text = b"".join(mark + document for document in documents) + mark
        if self.between.any():
            pairs = byte_pairs(text)
            at = np.flatnonzero(self.between[pairs])
            at = at[(self.between[pairs[at]] != TITLED) | ASCII_LETTERS[pairs[np.minimum(at + 1, len(pairs) - 1)] >> 8]]
            text = np.insert(np.frombuffer(text, dtype=np.uint8), at + 1, self.between[pairs[at]]).tobytes()
        starts = np.concatenate([[0], np.flatnonzero(self.cuts[byte_pairs(text)]) + 1])  # the last one: of the mark at the end
        offsets, counts = read_spans(self._part_spans(text + bytes(KEY_BYTES), starts))
        take = np.repeat(offsets - np.cumsum(counts) + counts, counts)
        take += np.arange(len(take))
        return self.table.ids[take]

    def _part_spans(self, text: bytes, starts: np.ndarray) -> np.ndarray:
        """The table's span for every part; parts that it lacks are put in."""
        places, lengths = starts[:-1], np.diff(starts)
        capped = np.minimum(lengths, KEY_BYTES + 1)
        windows = np.ndarray((len(text) - KEY_BYTES,), dtype="V16", buffer=text, strides=(1,))
        keys = windows[places].view(np.uint64).reshape(-1, 2)
        keys &= KEY_MASKS[capped]
        keys[:, 1] |= KEY_LENGTHS[capped]
        spans = self.table.find(keys)
        spans[lengths > KEY_BYTES] = 0
        missing = np.flatnonzero(spans == 0)
        if len(missing):
            spans[missing] = self._add(text, keys[missing], places[missing], lengths[missing])
        return spans

    def _add(self, text: bytes, keys: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Spans for parts that the table lacks, which are put in."""
        parts = [text[place:place + length] for place, length in zip(places.tolist(), lengths.tolist())]
        where = {part: index for index, part in enumerate(parts)}
        first = list(where.values())
        spans = self.table.put(keys[first], lengths[first] <= KEY_BYTES, self._values(list(where)))
        span_of = dict(zip(where, spans.tolist()))
        return np.array([span_of[part] for part in parts])

    def _values(self, parts: list[bytes]) -> list[list[int]]:
        """The ids of each part."""
        forms = self._forms(parts)
        values = self.tokenizer.processor.encode(forms, num_threads=1)
        for index, (part, form) in enumerate(zip(parts, forms)):
            if not form:
                values[index] = [BOS if part[0] == DOCUMENT else self.tokenizer.names.index(CAPNEXT)]
            elif SPACE in form:
                values[index] = self.plain.lossless_ids(form).tolist()
        return values

    def _forms(self, parts: list[bytes]) -> list[str]:
        """The CaseOps form of each part, made of all in one text; none of `DOCUMENT` and `MARK`."""
        text = bytes([BETWEEN]).join(parts).decode(errors="surrogateescape")  # what UTF-8 never has is a lone surrogate there
        titled, titled_space, between = (chr(0xDC00 + byte) for byte in (TITLED, TITLED_SPACE, BETWEEN))
        form = swap_titles(self.tokenizer.transform.words(text.replace(titled_space, titled + " ")), titled)
        return NEVER_TEXT.sub("", form).split(between)


class PartTable:
    """A hash table from parts of up to `KEY_BYTES` bytes to their ids, looked up in bulk. A slot keeps what first comes into it.

    A key is 16 bytes: the part, zeros, and its length in the last byte, so that different parts have different keys and
    a match is exact. What the table has for a part is a span, one int64, never 0: where its ids begin in `ids`, and their
    number (`read_spans`). Parts that find their slot taken, and long ones, have spans only until the next `put`: the frequent
    parts come early, when nearly all slots are free.
    """

    def __init__(self) -> None:
        self.slot_keys, self.slot_spans = np.zeros((SLOTS, 2), dtype=np.uint64), np.zeros(SLOTS, dtype=np.int64)
        self.kept_ids = 1  # so many of `ids` stay
        self.ids = np.zeros(1 << 16, dtype=np.uint16)

    def _home(self, keys: np.ndarray) -> np.ndarray:
        """The slot of each key."""
        mixed = keys[:, 1] * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= keys[:, 0]
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed >>= np.uint64(65 - SLOTS.bit_length())
        return mixed.view(np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(n, 2) keys -> (n,) spans, 0 where there is none."""
        slots = self._home(keys)
        halves_differ = self.slot_keys.take(slots, axis=0) != keys
        spans = self.slot_spans[slots]
        spans[np.flatnonzero(halves_differ.view(np.uint16))] = 0
        return spans

    def put(self, keys: np.ndarray, may_stay: np.ndarray, values: list[list[int]]) -> np.ndarray:
        """Spans for the ids of distinct new keys: of those that may stay (mask), the first in each free slot do."""
        slots, counts = self._home(keys), np.array(list(map(len, values)))
        stay = np.flatnonzero(may_stay & (self.slot_spans[slots] == 0))
        stay = stay[np.unique(slots[stay], return_index=True)[1]]
        order = np.concatenate([stay, np.delete(np.arange(len(keys)), stay)])
        ends = self.kept_ids + np.cumsum(counts[order])
        if ends[-1] > len(self.ids):
            self.ids = np.concatenate([self.ids, np.zeros(ends[-1], dtype=np.uint16)])
        in_order = itertools.chain.from_iterable(values[index] for index in order.tolist())
        self.ids[self.kept_ids:ends[-1]] = np.fromiter(in_order, dtype=np.uint16)
        spans = np.empty(len(keys), dtype=np.int64)
        spans[order] = (ends - counts[order]) << COUNT_BITS | counts[order]
        self.slot_keys[slots[stay]], self.slot_spans[slots[stay]] = keys[stay], spans[stay]
        self.kept_ids += int(counts[stay].sum())
        return spans


def read_spans(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, counts) of spans of a `PartTable`."""
    return spans >> COUNT_BITS, spans & (1 << COUNT_BITS) - 1


def byte_pairs(text: bytes) -> np.ndarray:
    """(n - 1,) uint16: every pair of neighbouring bytes, the second one high."""
    return np.ndarray((len(text) - 1,), dtype="<u2", buffer=text, strides=(1,))


def keeps_kinds_apart(tokenizer: Tokenizer) -> bool:
    """Is there no piece that joins an ASCII letter or digit to an ASCII character of another kind, or digits to digits?"""
    joined = re.compile(r"[A-Za-z][\0-@\[-`{-\x7f]|[\0-@\[-`{-\x7f][A-Za-z]|[0-9][\0-\x7f]|[\0-\x7f][0-9]", re.DOTALL)
    return not any(joined.fullmatch(pair) for pair in tokenizer.joined)
