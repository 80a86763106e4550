"""CaseOps tokenizers: what is true of a SentencePiece model, and exact token ids and byte charges, fast.

`Tokenizer` reads a model and proves from it what the rest relies on. `Encoder` asks SentencePiece for one text;
`FastEncoder` gives the same for many documents at once, several times as fast. prepare_caseops_data.py builds with
them.
"""
from __future__ import annotations

import hashlib
import os
import re
import struct
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

import lossless_caps

BOS = 1


# ----------------------------------------------------------------------------------------------------------- tokenizer
SPACE = "\u2581"  # how SentencePiece writes a space inside its pieces
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of pieces


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


class Tokenizer:
    """A SentencePiece model and the facts about it that exact accounting rests on.

    pieces     list of V bytes: what each id stands for in the CaseOps text (control pieces: nothing)
    charges    (V,) uint16: its bytes in the original text (operators 0; literal ones are seen to by the callers)
    lossless   decoding gives back every text: identity normalisation, no whitespace touched, bytes for what is unknown
    by_word    the ids of a text are the ids of its words, one after the other, where a word is cut before each space
               (see `FastEncoder` for which spaces); proven from the model, not assumed
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no tokenizer at {self.path}: give a SentencePiece .model file with --sp")
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.path} is not a SentencePiece model: {error}") from None
        fields = list(protobuf_fields(model))
        entries = [dict(protobuf_fields(value)) for number, value in fields if number == 1]
        trainer = dict(protobuf_fields(next((value for number, value in fields if number == 2), b"")))
        normalizer = dict(protobuf_fields(next((value for number, value in fields if number == 3), b"")))
        self.vocab_size = len(entries)
        self.kinds = [entry.get(3, NORMAL) for entry in entries]
        self.names = [entry[1].decode() for entry in entries]
        self.rules = study_rules(normalizer.get(2, b""))
        self._check_operators()
        self.pieces = [self._piece_bytes(index) for index in range(self.vocab_size)]
        self.charges = np.array([0 if name in lossless_caps.OPERATORS else len(piece)
                                 for name, piece in zip(self.names, self.pieces)], dtype=np.uint16)
        keeps_spaces = not normalizer.get(3, 1) and normalizer.get(5, 1)
        self.lossless = bool(not normalizer.get(2) and keeps_spaces and not normalizer.get(4, 1)
                             and self.kinds.count(BYTE) == 256)
        self.by_word = bool(keeps_spaces and trainer.get(3, 1) == 2 and not trainer.get(24, 0)
                            and self.kinds.count(BYTE) == 256 and UNUSED not in self.kinds
                            and not any(SPACE in name[1:] for name in self.names)
                            and not self.rules.reach_space)

    def _check_operators(self) -> None:
        """ValueError unless the ids fit a shard, BOS is 1 and the four operators are pieces of their own."""
        if self.vocab_size > 1 << 16:
            raise ValueError(f"{self.path} has {self.vocab_size} pieces; shards hold ids below 65,536")
        if self.processor.bos_id() != BOS:
            raise ValueError(f"{self.path} has BOS id {self.processor.bos_id()}; the shards need {BOS}")
        for operator in lossless_caps.OPERATORS:
            if operator not in self.names or self.kinds[self.names.index(operator)] != USER_DEFINED:
                raise ValueError(f"{self.path} lacks the CaseOps operator U+{ord(operator):04X} as a user-defined"
                                 " piece: use a CaseOps tokenizer (see tokenizers/README.md)")

    def _piece_bytes(self, index: int) -> bytes:
        kind, name = self.kinds[index], self.names[index]
        if kind == BYTE:
            return bytes([int(name[3:5], 16)])
        return b"" if kind in (CONTROL, UNKNOWN) else name.replace(SPACE, " ").encode()

    def decode(self, ids: Iterable[int]) -> str:
        """The original text behind token ids (BOS is nothing); ValueError for ids that no text has."""
        transformed = b"".join(map(self.pieces.__getitem__, ids))
        return lossless_caps.decode(transformed.decode())

    def lossless_charges(self, ids: np.ndarray) -> np.ndarray:
        """(T,) ids -> (T,) uint16 original bytes, for a lossless tokenizer: they depend on the ids alone."""
        charges = self.charges[ids]
        literal = -1  # where the last literal operator stands: it may be an ESC itself
        for at in np.flatnonzero(ids == self.names.index(lossless_caps.ESC)).tolist():
            if at != literal and at + 1 < len(ids):
                literal = at + 1
                charges[literal] = lossless_caps.OPERATOR_BYTES
        return charges


class RuleFacts(NamedTuple):
    """What matters about a normaliser's rules (source string -> replacement) for cutting a text into parts."""
    reach_space: bool   # some source holds a space
    inner_ascii: bool   # some source holds an ASCII character that is not its first
    breakers: set[int]  # code points at the ends of sources whose replacement is empty, or begins or ends with a space


def study_rules(rules: bytes) -> RuleFacts:
    """Walk through all sources in `rules`, SentencePiece's precompiled_charsmap.

    Its form: a size, a double-array trie of that size with the UTF-8 of the sources (a child by the byte b of a node
    stands at the node's base exclusive-or b, and the place for b = 0 holds where the replacement is), and the
    replacements, each closed by a 0 byte. Branches share their ends, so the walk is over paths, level by level.
    """
    if not rules:
        return RuleFacts(False, False, set())
    size = struct.unpack_from("<I", rules)[0]
    units = np.frombuffer(rules, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
    texts = np.frombuffer(rules, dtype=np.uint8, offset=4 + size)
    bases = np.arange(len(units)) ^ ((units >> 10) << ((units & (1 << 9)) >> 6))
    labels = units & 0x800000FF
    children = np.flatnonzero((labels >= 1) & (labels <= 255))
    children = children[np.argsort(children ^ labels[children], kind="stable")]
    their_bases = children ^ labels[children]
    closing = np.flatnonzero(texts == 0)
    levels: list[tuple[np.ndarray, np.ndarray]] = []  # (place of each path's end, number of its beginning one level up)
    nodes, breakers = np.zeros(1, dtype=np.int64), set()
    while len(nodes):
        first, last = (np.searchsorted(their_bases, bases[nodes], side=side) for side in ("left", "right"))
        counts = last - first
        parents = np.repeat(np.arange(len(nodes)), counts)
        nodes = children[np.arange(len(parents)) + np.repeat(first - np.cumsum(counts) + counts, counts)]
        levels.append((nodes, parents))
        whole = np.flatnonzero((units[nodes] >> 8) & 1)
        starts = units[bases[nodes[whole]]] & 0x7FFFFFFF
        ends = closing[np.searchsorted(closing, starts)]
        breaks = (ends == starts) | (texts[starts] == ord(" ")) | (texts[ends - 1] == ord(" "))
        for path in whole[breaks].tolist():
            source = bytearray()
            for level_nodes, level_parents in reversed(levels):
                source.append(labels[level_nodes[path]])
                path = level_parents[path]
            text = bytes(reversed(source)).decode()
            breakers |= {ord(text[0]), ord(text[-1])}
    reach_space = any(bool((labels[level] == ord(" ")).any()) for level, _ in levels)
    inner_ascii = any(bool((labels[level] < 128).any()) for level, _ in levels[1:])
    return RuleFacts(reach_space, inner_ascii, breakers)


# ------------------------------------------------------------------------------------------------- fast exact encoding
MARK = "_"  # stands for "another word" where a part is asked for in its context
DOCUMENT = 0xFF  # a byte that UTF-8 never has: separates documents in a block, and is encoded as BOS
KEY_BYTES = 15  # longer parts are too rare for the table
LARGEST_CHARGE = (1 << 16) - 1
TABLE_ENTRIES = 1 << 20  # what bounds the memory of an encoder: about 100 bytes each
COUNT_BITS = 32  # of a span of the table: how many ids a part has
SEPARATOR = "\ue005"  # stands between parts that go to SentencePiece in one text of at most
PARTS_AT_ONCE = 500
SPECIAL = [SPACE.encode(), b"\xee\x80", bytes([DOCUMENT])]  # the second: what operators begin with
LETTER, DIGIT, OTHER, WHITE, WIDE = range(5)  # kinds of bytes; WIDE is what is not ASCII, or not left as it is
DOCUMENT_CODE = -1  # what a `DOCUMENT` byte counts as among code points


class Encoder:
    """Token ids and byte charges of a text straight from SentencePiece: slow, and what the fast one must equal.

    Both methods return uint16 little-endian bytes, one entry a token, without BOS.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.processor = tokenizer.processor

    def ids(self, text: str) -> bytes:
        """The token ids of a text."""
        if self.tokenizer.lossless and SPACE in text:  # in a piece it would come back as a space: spell it in bytes
            spelled = [self.tokenizer.names.index(f"<0x{byte:02X}>") for byte in SPACE.encode()]
            return array("H", spelled).tobytes().join(map(self.ids, text.split(SPACE)))
        return array("H", self.processor.encode(lossless_caps.encode(text))).tobytes()

    def charges(self, text: str) -> bytes:
        """The original bytes behind each id: the surface of its piece, operators not counted."""
        if self.tokenizer.lossless:
            return self.tokenizer.lossless_charges(np.frombuffer(self.ids(text), dtype="<u2")).tobytes()
        transformed = lossless_caps.encode(text).encode()
        mapping = self.processor.encode(transformed, return_type="offset_mapping")
        counter = lossless_caps.ByteCounter()
        counts = [counter.feed(transformed[start:end].decode()) for start, end in mapping["offsets"]]
        if max(counts, default=0) > LARGEST_CHARGE:
            raise ValueError(f"a token stands for {max(counts)} bytes (a long run of white space?), the sidecar holds"
                             f" at most {LARGEST_CHARGE}")
        return array("H", counts).tobytes()


class FastEncoder:
    """The same for many documents at once, many times as fast, for tokenizers that work word by word.

    The UTF-8 of the documents, each after a `DOCUMENT` byte, is cut into parts: before white space, and within words
    between ASCII letters, digits and other ASCII characters. No piece of the model and no rule of its normaliser
    reaches over such a cut (`Tokenizer.by_word` and `_cut_table` prove it from the model), so the ids of a text are the
    ids of its parts, one after the other. A part carries the white space before it: " the" and "the" are two parts.
    Each distinct part goes to SentencePiece once; after that a hash table of whole parts, in numpy, has its ids.

    A tokenizer that normalises strips and collapses white space, of which Unicode has many kinds. There a run of ASCII
    white space begins a part only where both its neighbours are characters that normalisation makes neither white space
    nor nothing (`RuleFacts.breakers`); any other run stays inside a part, which SentencePiece then sees as a whole.
    """

    def __init__(self, tokenizer: Tokenizer, with_charges: bool) -> None:
        assert tokenizer.by_word
        self.tokenizer = tokenizer
        self.plain = Encoder(tokenizer)
        self.with_charges = with_charges
        self.table_has_charges = with_charges and not tokenizer.lossless  # a lossless tokenizer's follow from the ids
        self.mark_ids = len(tokenizer.processor.encode(MARK))
        self.white, self.fixed = (" ", "") if tokenizer.lossless else ascii_classes(tokenizer)
        self.fixed_part = re.compile(f"[{re.escape(self.white)}]*[{re.escape(self.fixed) or '0'}]+".encode()).fullmatch
        self.cuts = self._cut_table()
        self.breakers = np.array(sorted(tokenizer.rules.breakers | {DOCUMENT_CODE}), dtype=np.int64)
        self.table = PartTable()

    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """UTF-8 of documents -> (tokens, charges (n,) uint16, lengths (documents,) int64); BOS before each document.

        `charges` is empty if the encoder was made without.
        """
        mark = bytes([DOCUMENT])
        text = mark + mark.join(documents) + mark + bytes(16)
        starts = self._part_starts(text)
        offsets, counts = read_spans(self._part_spans(text, starts))
        ends = np.cumsum(counts)
        take = np.repeat(offsets - ends + counts, counts)
        take += np.arange(len(take))
        tokens = self.table.ids[take]
        charges = np.zeros(0, dtype=np.uint16)
        if self.table_has_charges:
            charges = self.table.charges[take]
        elif self.with_charges:
            charges = self.tokenizer.lossless_charges(tokens)
        first = np.searchsorted(starts, np.cumsum([0, *(len(document) + 1 for document in documents[:-1])]))
        lengths = np.diff(ends[first] - counts[first], append=ends[-1])
        self.table.forget_temporary()
        return tokens, charges, lengths

    def _cut_table(self) -> np.ndarray:
        """(65536,) int8 for each pair of bytes (the second one high): 1 cut between them, 0 do not; for tokenizers that
        normalise also 2, a run of white space begins with the second byte, and 3, it ended with the first."""
        kinds = np.full(256, WIDE)
        for byte in range(128):
            char = chr(byte)
            if self.tokenizer.lossless or char in self.fixed:
                kinds[byte] = LETTER if char.isalpha() else DIGIT if char.isdigit() else OTHER
        kinds[[ord(char) for char in self.white]] = WHITE
        before, after = kinds[None, :], kinds[:, None]
        table = np.zeros((256, 256), dtype=np.int8)
        if keeps_kinds_apart(self.tokenizer):
            table[(before <= OTHER) & (after <= OTHER) & ((before != after) | (after == DIGIT))] = 1
        table[:, DOCUMENT] = table[DOCUMENT, :] = 1
        if self.tokenizer.lossless:
            table[ord(" "), :] = 1
        else:
            table[(before != WHITE) & (after == WHITE)] = 2
            table[(before == WHITE) & (after != WHITE)] = 3
        return table.reshape(-1)

    def _part_starts(self, text: bytes) -> np.ndarray:
        """Where parts start, ascending; the last one is the place of the closing `DOCUMENT` byte."""
        pairs = np.ndarray((len(text) - 17,), dtype="<u2", buffer=text, strides=(1,))
        marks = self.cuts[pairs]
        if not self.tokenizer.lossless:
            raw = np.frombuffer(text, dtype=np.uint8)
            before, after = np.flatnonzero(marks == 2), np.flatnonzero(marks == 3) + 1  # the bytes around each run
            marks[before] = self._are_edges(raw, before) & self._are_edges(raw, after)
            marks[after - 1] = raw[after] == DOCUMENT
        return np.concatenate([[0], np.flatnonzero(marks == 1) + 1])

    def _are_edges(self, raw: np.ndarray, places: np.ndarray) -> np.ndarray:
        """For each place, that the character which has a byte there is no breaker."""
        codes = raw[places].astype(np.int64)
        wide = np.flatnonzero(codes >= 128)
        if len(wide):
            codes[wide] = code_points(raw, places[wide])
        return ~np.isin(codes, self.breakers)

    def _part_spans(self, text: bytes, starts: np.ndarray) -> np.ndarray:
        """The table's span for every part; parts that it lacks are put in."""
        lengths = np.diff(starts)
        places = starts[:-1]
        capped = np.minimum(lengths, KEY_BYTES + 1)
        keys = np.empty((len(places), 2), dtype=np.uint64)
        for half in range(2):
            words = np.ndarray((len(text) - 15,), dtype="<u8", buffer=text, offset=8 * half, strides=(1,))
            np.bitwise_and(words[places], KEY_MASKS[half][capped], out=keys[:, half])
        keys[:, 1] |= KEY_LENGTHS[capped]
        spans = self.table.find(keys)
        spans[lengths > KEY_BYTES] = -1
        missing = np.flatnonzero(spans < 0)
        if len(missing):
            spans[missing] = self._add(text, keys[missing], places[missing], lengths[missing])
        return spans

    def _add(self, text: bytes, keys: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Spans for parts that the table lacks: short ones stay in it, long ones only for this block."""
        parts = [text[place:place + length] for place, length in zip(places.tolist(), lengths.tolist())]
        where = {part: index for index, part in enumerate(parts)}
        spans: dict[bytes, int] = {}
        for stays in (True, False):
            group, ids, charges, counts = self._values([part for part in where if (len(part) <= KEY_BYTES) == stays])
            new = self.table.append(ids, charges, counts)
            spans.update(zip(group, new.tolist()))
            if stays:
                room = TABLE_ENTRIES - self.table.kept
                self.table.keep(keys[[where[part] for part in group[:room]]], new[:room])
        return np.array([spans[part] for part in parts])

    def _values(self, parts: list[bytes]) -> tuple[list[bytes], np.ndarray, np.ndarray, np.ndarray]:
        """(the parts in another order, flat ids and charges, number of ids by part), each part in its context."""
        simple, others = [], []
        for part in parts:
            (simple if self._is_simple(part) else others).append(part)
        ids, counts = self._simple_ids(simple)
        charges = self._simple_charges(simple, ids, counts) if self.table_has_charges else ids[:0]
        values = list(map(self._value, others))
        other_ids = np.frombuffer(b"".join(value[0] for value in values), dtype="<u2")
        other_charges = np.frombuffer(b"".join(value[1] for value in values), dtype="<u2")
        other_counts = np.array([len(value[0]) // 2 for value in values], dtype=np.int64)
        return (simple + others, np.concatenate([ids, other_ids]), np.concatenate([charges, other_charges]),
                np.concatenate([counts, other_counts]))

    def _is_simple(self, part: bytes) -> bool:
        """Can it go to SentencePiece with others, each after an operator? Not with one in it, nor with what `Encoder`
        or the normaliser must see alone."""
        if self.tokenizer.lossless:
            return part.isascii() or not any(special in part for special in SPECIAL)
        return len(part) <= LARGEST_CHARGE and self.fixed_part(part) is not None

    def _simple_ids(self, parts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """(flat ids, number by part) of simple parts: many in one text, each after an operator, which joins nothing."""
        separator = SEPARATOR.encode()
        found = [np.zeros(0, dtype=np.uint16)]
        for start in range(0, len(parts), PARTS_AT_ONCE):
            text = (separator + separator.join(parts[start:start + PARTS_AT_ONCE])).decode()
            transformed = lossless_caps.encode(text).replace(SEPARATOR, lossless_caps.ESC)
            found.append(self.tokenizer.processor.encode(transformed, return_type="numpy").astype(np.uint16))
        ids = np.concatenate(found)
        is_separator = ids == self.tokenizer.names.index(lossless_caps.ESC)
        counts = np.diff(np.flatnonzero(is_separator), append=len(ids)) - 1 if parts else np.zeros(0, dtype=np.int64)
        assert len(counts) == len(parts)
        return ids[~is_separator], counts

    def _simple_charges(self, parts: list[bytes], ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The bytes of the pieces; the first has one space, and stands for all the white space before the part."""
        charges = self.tokenizer.charges[ids]
        white = self.white.encode()
        collapsed = [max(0, len(part) - len(part.lstrip(white)) - 1) for part in parts]
        charges[np.cumsum(counts) - counts] += np.array(collapsed, dtype=np.uint16)
        return charges

    def _value(self, part: bytes) -> tuple[bytes, bytes]:
        """(ids, charges) of any part; charges are empty if not asked for."""
        begins_document = part[0] == DOCUMENT
        text = part[begins_document:].decode()
        after_word = not begins_document and text[0] in self.white
        asked, skip = (MARK + text, 2 * self.mark_ids) if after_word else (text, 0)
        ids = self.plain.ids(asked)[skip:]
        charges = self.plain.charges(asked)[skip:] if self.table_has_charges else b""
        if begins_document:
            ids, charges = BOS.to_bytes(2, "little") + ids, bytes(2) + charges if self.table_has_charges else b""
        return ids, charges


class PartTable:
    """A hash table from parts of up to `KEY_BYTES` bytes to their ids and charges, looked up in bulk.

    A key is 16 bytes: the part, zeros, and its length in the last byte, so that different parts have different keys and
    a match is exact. What the table has for a part is a span, one int64: where its ids begin in `ids`, and their number
    (`read_spans`). Spans with keys stay; ids without are temporary and are forgotten at the end of a block.
    """

    def __init__(self) -> None:
        self.kept = self.kept_ids = self.used_ids = 0
        self.keys, self.spans = np.zeros((1 << 14, 2), dtype=np.uint64), np.zeros(1 << 14, dtype=np.int64)
        self.ids, self.charges = np.zeros(1 << 16, dtype=np.uint16), np.zeros(1 << 16, dtype=np.uint16)
        self._make_slots(1 << 15)

    def _make_slots(self, count: int) -> None:
        """Empty slots: for each the key in it (free: zeros, which no key is) and the key's span (free: -1)."""
        self.slot_keys, self.slot_spans = np.zeros((count, 2), dtype=np.uint64), np.full(count, -1, dtype=np.int64)
        self.shift = np.uint64(64 - count.bit_length() + 1)

    def _home(self, keys: np.ndarray) -> np.ndarray:
        """The slot where the search for a key begins."""
        mixed = keys[:, 1] * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= keys[:, 0]
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed ^= mixed >> np.uint64(32)
        mixed *= np.uint64(0xD6E8FEB86659FD93)
        mixed >>= self.shift
        return mixed.view(np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(n, 2) keys -> (n,) spans, -1 where there is none."""
        slots = self._home(keys)
        astray = self._without(slots, keys)
        while len(astray):  # look in the next slot, unless a free one ends the search
            astray = astray[self.slot_spans[slots[astray]] >= 0]
            slots[astray] = (slots[astray] + 1) % len(self.slot_spans)
            astray = astray[self._without(slots[astray], keys[astray])]
        return self.slot_spans[slots]

    def _without(self, slots: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """The indices of the keys that are not in their slots."""
        halves_differ = self.slot_keys.take(slots, axis=0) != keys
        return np.flatnonzero(halves_differ.view(np.uint16))

    def append(self, ids: np.ndarray, charges: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """New spans, temporary until `keep`, from flat ids and charges (or none) and the number of ids of each."""
        first, self.used_ids = self.used_ids, self.used_ids + len(ids)
        self.ids, self.charges = _grown(self.ids, self.used_ids), _grown(self.charges, self.used_ids)
        self.ids[first:self.used_ids] = ids
        self.charges[first:first + len(charges)] = charges
        return (first + np.cumsum(counts) - counts) << COUNT_BITS | counts

    def keep(self, keys: np.ndarray, spans: np.ndarray) -> None:
        """Give the first temporary spans these (distinct, new) keys; they stay."""
        if not len(keys):
            return
        first, self.kept = self.kept, self.kept + len(keys)
        self.keys, self.spans = _grown(self.keys, self.kept), _grown(self.spans, self.kept)
        self.keys[first:self.kept], self.spans[first:self.kept] = keys, spans
        self.kept_ids = int(sum(read_spans(spans[-1])))
        if 2 * self.kept > len(self.slot_spans):
            self._make_slots(1 << (4 * self.kept).bit_length() - 1)
            first = 0
        self._put(self.keys[first:self.kept], self.spans[first:self.kept])

    def _put(self, keys: np.ndarray, spans: np.ndarray) -> None:
        """Find free slots for new keys; where several want the same one the first, often the most frequent, gets it."""
        slots = self._home(keys)
        todo = np.arange(len(keys))[::-1]  # of several rows assigned to one place numpy keeps the last
        while len(todo):
            to_free = todo[self.slot_spans[slots[todo]] < 0]
            self.slot_keys[slots[to_free]] = keys[to_free]
            lost = self._without(slots[todo], keys[todo])
            placed = np.delete(todo, lost)
            self.slot_spans[slots[placed]] = spans[placed]
            todo = todo[lost]
            slots[todo] = (slots[todo] + 1) % len(self.slot_spans)

    def forget_temporary(self) -> None:
        """Drop the ids without keys."""
        self.used_ids = self.kept_ids


def read_spans(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, counts) of spans of a `PartTable`."""
    return spans >> COUNT_BITS, spans & (1 << COUNT_BITS) - 1


def _grown(values: np.ndarray, size: int) -> np.ndarray:
    """The array itself, or a copy in one of at least `size` and half as much again."""
    if size <= len(values):
        return values
    larger = np.zeros((size + size // 2, *values.shape[1:]), dtype=values.dtype)
    larger[:len(values)] = values
    return larger


KEY_MASKS = np.array([[(1 << 8 * min(8, max(0, length - 8 * half))) - 1 for length in range(KEY_BYTES + 2)]
                      for half in range(2)], dtype=np.uint64)
KEY_LENGTHS = np.arange(KEY_BYTES + 2, dtype=np.uint64) << np.uint64(56)


def code_points(raw: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The code point of the UTF-8 character that has a byte at each place; `DOCUMENT_CODE` for a `DOCUMENT` byte."""
    first = places.copy()
    for _ in range(3):
        first -= (raw[first] & 0xC0) == 0x80
    lead = raw[first].astype(np.int64)
    size = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
    codes = lead & np.array([0, 0x7F, 0x1F, 0x0F, 0x07])[size]
    for step in range(1, 4):
        longer = size > step
        codes[longer] = codes[longer] << 6 | raw[first[longer] + step] & 0x3F
    return np.where(lead == DOCUMENT, DOCUMENT_CODE, codes)


def keeps_kinds_apart(tokenizer: Tokenizer) -> bool:
    """Is there no piece that joins an ASCII letter or digit to an ASCII character of another kind, or digits to digits,
    and no rule of the normaliser with more than one ASCII character in its source?"""
    joined = re.compile(r"[A-Za-z][\0-@\[-`{-\x7f]|[\0-@\[-`{-\x7f][A-Za-z]|[0-9][\0-\x7f]|[\0-\x7f][0-9]", re.DOTALL)
    names = [name.removeprefix(SPACE) for name, kind in zip(tokenizer.names, tokenizer.kinds)
             if kind in (NORMAL, USER_DEFINED)]
    return not tokenizer.rules.inner_ascii and not any(map(joined.search, names))


def ascii_classes(tokenizer: Tokenizer) -> tuple[str, str]:
    """(white, fixed): the ASCII characters that the normaliser makes a space, and those that it leaves as they are."""
    white, fixed = " ", ""
    for char in map(chr, range(1, 128)):
        normal = tokenizer.processor.normalize(MARK + lossless_caps.encode(char) + MARK)
        if char != " " and normal == MARK + SPACE + MARK:
            white += char
        elif normal == MARK + lossless_caps.encode(char) + MARK:
            fixed += char
    return white, fixed


def encode_plainly(encoder: Encoder, texts: list[str], with_charges: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `FastEncoder.encode` returns, by SentencePiece alone."""
    parts = [encoder.ids(text) for text in texts]
    bos, none = BOS.to_bytes(2, "little"), bytes(2)
    charges = none + none.join(map(encoder.charges, texts)) if with_charges else b""
    lengths = np.array([1 + len(part) // 2 for part in parts], dtype=np.int64)
    return np.frombuffer(bos + bos.join(parts), dtype="<u2"), np.frombuffer(charges, dtype="<u2"), lengths
