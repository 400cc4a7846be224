"""Split: the training or the held-out documents of a tokenised corpus, in memory-mapped tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Split:
    """Some of the documents in a flat array of tokens.

    Fields: tokens uint16 or uint32 [all tokens]; offsets int64 [all documents + 1]; selection int64 [documents], the
    numbers of this split's documents, ascending; vocabulary, the highest token id of the whole corpus + 1; digest, of
    all documents' tokens and labels; source and split, for messages; labels int32 [all tokens], the id to predict at
    each place or IGNORE, or None to predict every token; packing, a value of data.packing (see packing.py); middles,
    int64 [all documents]: with data.preferences, a document here is a pair of two, and the second begins there.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    selection: np.ndarray
    vocabulary: int
    digest: str = ""
    source: str = "memory"
    split: str = "training"
    labels: np.ndarray | None = None
    packing: str = "cut"
    middles: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.selection)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens in each document of the split, int64 [documents]."""
        return self.offsets[self.selection + 1] - self.offsets[self.selection]

    @cached_property
    def total(self) -> int:
        """Tokens in the split."""
        return int(self.lengths.sum())

    def document(self, i: int) -> np.ndarray:
        """The tokens of the split's i-th document, a view."""
        return self.tokens[self._place(i)]

    def targets(self, i: int) -> np.ndarray:
        """The tokens to predict at the places of the split's i-th document, not shifted, or IGNORE: a view."""
        return (self.tokens if self.labels is None else self.labels)[self._place(i)]

    def halves(self, i: int) -> tuple[slice, slice]:
        """Where the two documents of the split's i-th pair lie in it."""
        assert self.middles is not None
        middle = int(self.middles[self.selection[i]] - self.offsets[self.selection[i]])
        return slice(0, middle), slice(middle, None)

    @property
    def noun(self) -> str:
        """What the split consists of, for messages."""
        return "document" if self.middles is None else "pair"

    def _place(self, i: int) -> slice:
        number = self.selection[i]
        return slice(self.offsets[number], self.offsets[number + 1])
