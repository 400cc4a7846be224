"""Pieces: a long text in parts that are tokenised apart, so that memory is bounded and every core takes part.

A text is cut where that changes no token near the cut. Around a cut c, with the ids of a text in brackets,

    [left right]  =  [left] + ([context right] without [context])        left: BESIDE characters before c, right: after
                                                                         context: CONTEXT characters before c

must hold. Then the piece before ends at c, and the piece behind is tokenised with its context, whose ids are dropped.
The context absorbs what a tokenizer puts before every text, such as SentencePiece's "▁".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

PIECE = 1 << 18  # characters; shorter texts are not cut
BESIDE, CONTEXT = 256, 16  # characters
TRIED = 256  # cuts of either kind that are tried: before white space, then anywhere

Ids = Callable[[list[str]], list[np.ndarray]]  # the ids of texts, with nothing added to them


class Piece(NamedTuple):
    """Part of a text, behind a context that has `skipped` ids. first, last: whether the text begins, ends with it."""

    text: str
    skipped: int = 0
    first: bool = True
    last: bool = True


class UncutError(Exception):
    """No cut was found."""


def pieces(blocks: Iterable[str], ids: Ids) -> Iterator[Piece]:
    """A text that comes in blocks, in pieces; an empty text is one piece. Raises UncutError."""
    text, context, skipped, first = "", "", 0, True
    for block in blocks:
        text += block
        while len(text) >= 2 * PIECE:
            cut, after = _cut(text, ids)
            yield Piece(context + text[:cut], skipped, first, last=False)
            context, skipped, first = text[cut - CONTEXT : cut], after, False
            text = text[cut:]
    yield Piece(context + text, skipped, first)


def _cut(text: str, ids: Ids) -> tuple[int, int]:
    """Where to cut at or before PIECE, and how many ids the context behind the cut has."""
    before_space = (PIECE // 2 + match.start() + 1 for match in re.finditer(r"\S\s", text[PIECE // 2 : PIECE]))
    tried = [*before_space][-TRIED:][::-1]
    for cut in itertools.chain(tried, range(PIECE, PIECE - TRIED, -1)):
        left, right, context = text[cut - BESIDE : cut], text[cut : cut + BESIDE], text[cut - CONTEXT : cut]
        both, before, behind, dropped = (
            found.tolist() for found in ids([left + right, left, context + right, context])
        )
        count = len(dropped)
        if behind[:count] == dropped and both == before + behind[count:]:
            return cut, count
    raise UncutError
