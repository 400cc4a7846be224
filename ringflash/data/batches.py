"""Batches: which sequences make a step, and their mask.

Row r of global step s is sequence s * batch_size + r of the stream that `pack` defines. Neither the number of ranks
nor the way they share the rows enters, so a run resumes at any degree of parallelism with the data it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ringflash.data.build import Made, T, in_order
from ringflash.data.corpus import Corpus
from ringflash.data.packing import Packed
from ringflash.mask import IntervalMask

PREFETCHED = 2  # batches made in advance


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed sequences: tokens and labels int64 [B, S] on the CPU, and each row's document lengths, which sum to S.

    numbers: those of the rows in the stream of sequences; empty if they are from no stream.
    """

    tokens: Tensor
    labels: Tensor
    documents: list[list[int]]
    numbers: Sequence[int] = ()

    @classmethod
    def of(cls, sequences: Sequence[Packed], numbers: Sequence[int] = ()) -> Batch:
        """The batch of these packed sequences."""
        return cls(
            tokens=torch.stack([sequence.tokens for sequence in sequences]),
            labels=torch.stack([sequence.labels for sequence in sequences]),
            documents=[list(sequence.documents) for sequence in sequences],
            numbers=numbers,
        )

    def mask(self) -> IntervalMask:
        """Causal attention inside each document, none across: [B, S] queries and keys."""
        return IntervalMask.causal(self.tokens.shape[1]) & IntervalMask.documents(self.documents)

    def split(self, rows: int) -> list[Batch]:
        """The batch in parts of `rows` rows, in order: the micro-batches of gradient accumulation."""
        parts = (slice(i, i + rows) for i in range(0, len(self.documents), rows))
        return [Batch(self.tokens[x], self.labels[x], self.documents[x], self.numbers[x]) for x in parts]


def batch(corpus: Corpus, *, seed: int, step: int, batch_size: int, length: int, rows: range | None = None) -> Batch:
    """Rows `rows` of global step `step`, of the step's `batch_size` rows; by default all of them.

    Raises ConfigError if the corpus has fewer tokens than `length`.
    """
    rows = range(batch_size) if rows is None else rows
    numbers = [step * batch_size + row for row in rows]
    return Batch.of([corpus.packed(seed, number, length) for number in numbers], numbers)


def stream(
    corpus: Corpus,
    *,
    seed: int,
    batch_size: int,
    length: int,
    rows: range | None = None,
    start_step: int = 0,
    prepare: Callable[[Batch], Any] = lambda batch: batch,
) -> Generator[Any]:
    """prepare(batch) of each step from `start_step` on, without end, prefetched by a thread."""

    def make(step: int) -> Any:
        return prepare(batch(corpus, seed=seed, step=step, batch_size=batch_size, length=length, rows=rows))

    return prefetch(make, count(start_step))


def prefetch(make: Callable[[T], Made], inputs: Iterable[T]) -> Generator[Made]:
    """make(x) of each input, in order. A thread makes the next PREFETCHED ones in advance.

    An error in the thread is raised here. Closing the iterator (or dropping it) ends the thread.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
    return in_order(worker, make, inputs, PREFETCHED)
