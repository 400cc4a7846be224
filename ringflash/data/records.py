"""Records to documents: what the records of a file mean.

    Texts       a field holds text                                              data.field=text
    TokenIds    a field holds token ids, and perhaps another their labels       data.field=input_ids
    Dialogues   messages, or a prompt and its completion: chat.py               data.chat=true
    Preferences a prompt with a chosen and a rejected answer: preferences.py    data.preferences=true

Each of them is a `Reading`. It splits a record into parts (only long texts have several), parses each part, with errors
that say where it is, and encodes the parsed parts in groups. One process splits; many processes parse and encode.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ringflash.data.formats import Fields, Record, RecordError
from ringflash.data.pieces import PIECE, Piece, UncutError, pieces
from ringflash.data.tokenizer import Encoder
from ringflash.errors import ConfigError

IGNORE = -100  # the label of a token that is not predicted; torch's cross entropy skips it
FIELD = "text"  # the field to read if data.field=null and the format has fields
EMPTY = "empty"  # the count of documents without text or tokens
SPELLED = "spelled: "  # begins the counts of texts that spell a special token
IDS = "input_ids"  # the field of token ids
READ_BY = {  # fields of other records, and the settings that read them
    "messages": "data=chat", "conversations": "data=chat data.field=conversations",
    "conversation": "data=chat data.field=conversation", "instruction": "data=chat", "completion": "data=chat",
    "chosen": "data=preferences", IDS: f"data.field={IDS}",
}  # fmt: skip
TOKENISED = (IDS, "labels", "attention_mask", "position_ids", "cu_seqlens")  # what tokenised records hold


class Document(NamedTuple):
    """The tokens of a document.

    tokens: integers [n]. labels: int32 [n], not shifted: the token to predict in each place, which is the token itself
    or IGNORE; None if all are predicted. begins: whether it is the first document of its record. ends: False if the
    next document continues it, as pieces of one text do.
    """

    tokens: np.ndarray
    labels: np.ndarray | None = None
    begins: bool = True
    ends: bool = True


class Reading(Protocol):
    """The meaning of a file's records. counts: what was counted while parsing, for remarks."""

    fields: Fields
    counts: Counter[str]

    def split(self, where: str, record: Record) -> Iterable[Any]:
        """The parts of a record. Raises RecordError, which begins with `where`."""

    def parse(self, where: str, part: Any) -> Sequence[Any]:
        """What a part holds; nothing, if it is empty. Raises RecordError, which begins with `where`."""

    def encode(self, parsed: Sequence[Any]) -> Iterable[Document]:
        """The documents of parsed parts, in order."""

    def remarks(self, counts: Counter[str]) -> list[str]:
        """Lines for the user about the counts."""
        empty = [f"{counts[EMPTY]:,} empty documents are left out"] if counts[EMPTY] else []
        return empty + spelled_out(counts)


def spelled_out(counts: Counter[str]) -> list[str]:
    """A line for the user about texts that spell special tokens, as those do that a chat template rendered before."""
    found = {name.removeprefix(SPELLED): count for name, count in counts.items() if name.startswith(SPELLED)}
    if not found:
        return []
    return [
        f"{sum(found.values()):,} texts spell special tokens, such as {max(found, key=lambda x: found[x])}, which are "
        f"read as text and not as the tokens: data=chat renders messages, and data.field={IDS} reads tokens"
    ]


class Texts(Reading):
    """A field holds the text of one document: a string, or its blocks. special: finds special tokens in a text."""

    def __init__(self, field: str, encoder: Encoder, special: re.Pattern[str]) -> None:
        self.field = field
        self.fields = Fields((field,), lambda available: missing(field, available))
        self.counts: Counter[str] = Counter()
        self._encoder, self._special = encoder, special

    def split(self, where: str, record: Record) -> Iterator[Piece]:
        """The pieces of the text."""
        text = record[self.field]
        if isinstance(text, str):
            text = clean(text, f"{where}: data.field={self.field}")
            blocks: Iterable[str] = (text[begin : begin + PIECE] for begin in range(0, len(text), PIECE))
        elif isinstance(text, Iterator):
            blocks = text
        else:
            held = "null" if text is None else type(text).__name__
            raise RecordError(f"{where}: data.field={self.field} holds {held}, not text")
        try:
            yield from pieces(blocks, self._encoder.ids)
        except UncutError as error:
            raise ConfigError(
                f"{where} holds a text of more than {PIECE:,} characters that data.tokenizer cannot take in pieces: "
                f"its tokens differ wherever it is cut; divide it into several documents"
            ) from error

    def parse(self, where: str, part: Piece) -> list[Piece]:
        """The piece; nothing, if the text is empty."""
        self.counts[EMPTY] += not part.text
        if part.first and (found := self._special.search(part.text)):
            self.counts[f"{SPELLED}{found[0]}"] += 1
        return [part] if part.text else []

    def encode(self, parsed: Sequence[Piece]) -> Iterator[Document]:
        """A document per piece."""
        for piece, tokens in zip(parsed, self._encoder(parsed), strict=True):
            yield Document(tokens, None, piece.first, piece.last)


class TokenIds(Reading):
    """The field input_ids holds token ids; nothing is added to them.

    size: that of the tokenizer. Ids and labels beyond it are refused, and so is padding. A document begins where
    position_ids restart from 0, or at cu_seqlens.
    """

    fields = Fields(TOKENISED, lambda available: missing(IDS, available))

    def __init__(self, size: int) -> None:
        self.size = size
        self.counts: Counter[str] = Counter()

    def split(self, where: str, record: Record) -> list[Record]:
        """The record."""
        return [record]

    def parse(self, where: str, record: Record) -> list[Document]:
        """The documents of a record."""
        ids = self._ids(where, IDS, record.get(IDS), least=0)
        if not all(record.get("attention_mask") or []):
            raise RecordError(f"{where} has an attention_mask that hides tokens: remove the padding from its {IDS}")
        labels = None
        if record.get("labels") not in (None, record.get(IDS)):
            labels = self._ids(where, "labels", record["labels"], least=IGNORE)
            if len(labels) != len(ids):
                raise RecordError(f"{where}: labels holds {len(labels)} labels, for {len(ids)} {IDS}")
        self.counts[EMPTY] += not len(ids)
        starts = _starts(where, record, len(ids))
        ends = [*starts[1:], len(ids)]
        return [
            Document(ids[begin:end], None if labels is None else labels[begin:end].astype(np.int32))
            for begin, end in zip(starts, ends, strict=True)
            if end > begin
        ]

    def encode(self, parsed: Sequence[Document]) -> Sequence[Document]:
        """The documents, as they are."""
        return parsed

    def _ids(self, where: str, name: str, value: Any, least: int) -> np.ndarray:
        """Ids or labels as int64. Labels may be IGNORE."""
        ids = _integers(where, name, value, "token ids")
        wrong = ids[((ids < 0) & (ids != least)) | (ids >= self.size)]
        if len(wrong):
            raise RecordError(f"{where}: {_named(name)} holds {wrong[0]}, and data.tokenizer has {self.size} tokens")
        return ids


def _starts(where: str, record: Record, count: int) -> list[int]:
    """Where the documents of a record of token ids begin."""
    positions, boundaries = record.get("position_ids"), record.get("cu_seqlens")
    found = []
    if positions is not None:
        places = _integers(where, "position_ids", positions, "positions")
        starts = np.flatnonzero(places == 0)
        expected = np.arange(count)
        if len(places) == count and count and len(starts) and starts[0] == 0:
            expected = expected - np.repeat(starts, np.diff([*starts, count]))
        if not np.array_equal(places, expected):
            raise RecordError(f"{where}: position_ids must count each document's tokens from 0, {count} in all")
        found.append(starts.tolist())
    if boundaries is not None:
        ends = _integers(where, "cu_seqlens", boundaries, "boundaries")
        if not len(ends) or ends[0] != 0 or ends[-1] != count or (np.diff(ends) < 0).any():
            raise RecordError(f"{where}: cu_seqlens must rise from 0 to the {count} {IDS}, got {boundaries!r:.60}")
        found.append(sorted({*ends[:-1].tolist()}))
    if len(found) == 2 and found[0] != found[1]:
        raise RecordError(f"{where}: position_ids and cu_seqlens divide its {IDS} differently")
    return found[0] if found else [0]


def _integers(where: str, name: str, value: Any, what: str) -> np.ndarray:
    if not (isinstance(value, list) and all(type(x) is int and abs(x) < 2**63 for x in value)):
        raise RecordError(f"{where}: {_named(name)} holds {value!r:.60}, not a list of {what}")
    return np.asarray(value, np.int64)


def _named(name: str) -> str:
    return f"data.field={IDS}" if name == IDS else name


def missing(field: str, available: Sequence[str]) -> str | None:
    """None, or why a record with these fields cannot be used: it lacks data.field."""
    if field in available:
        return None
    hint = next((f"; {setting} reads {name}" for name, setting in READ_BY.items() if name in available), "")
    return f"has no field data.field={field}; it has {', '.join(available) or 'none':.300}{hint}"


def clean(text: str, where: str) -> str:
    """A text that tokenizers take: half a surrogate pair, which JSON can escape, becomes "?". Raises for a NUL."""
    if "\0" in text:
        raise RecordError(f"{where} holds a NUL at character {text.index(chr(0))}; remove it")
    return text.encode("utf-8", "replace").decode()
