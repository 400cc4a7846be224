"""Packing: sequence number `index` of an endless stream, as a pure function of (corpus, seed, index, length).

In every epoch the documents are put in an order drawn from (seed, epoch), laid end to end and cut every `length`
tokens. The pieces of a cut document are documents of their own. The last tokens of an epoch, fewer than `length`,
are left out. Three documents of 5, 4 and 6 tokens at length 4:

    epoch 0    a a a a a b b b b c c c c c c
    index      |0      |1      |2      |
    documents  (4)     (1, 3)  (1, 3)

Nothing is carried from one sequence to the next, so any rank can make any sequence at any time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ringflash.data.corpus import TokenCorpus
from ringflash.errors import ConfigError

IGNORE = -100  # the label of a token that predicts nothing; torch's cross entropy skips it


class Packed(NamedTuple):
    """One packed sequence: tokens and labels int64 [S] on the CPU, and its documents' token counts, which sum to S.

    A token's label is the next token of its document; the last of each document has the label IGNORE.
    """

    tokens: Tensor
    labels: Tensor
    documents: tuple[int, ...]


def sequences_per_epoch(corpus: TokenCorpus, length: int) -> int:
    """How many sequences of `length` tokens an epoch has. Raises ConfigError if there is not one."""
    if corpus.total < length:
        raise ConfigError(
            f"data.path={corpus.source} has {corpus.total} tokens for {corpus.split}, fewer than"
            f" data.sequence_length={length}; give more text, a shorter sequence or another data.held_out"
        )
    return corpus.total // length


def pack(corpus: TokenCorpus, seed: int, index: int, length: int) -> Packed:
    """The index-th sequence of `length` tokens, counted over all epochs. Raises ConfigError if an epoch has none."""
    epoch, number = divmod(index, sequences_per_epoch(corpus, length))
    order, ends = _epoch(corpus, seed, epoch)
    start, stop = number * length, (number + 1) * length
    first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
    pieces = []
    for i in range(first, last + 1):
        document = corpus.document(order[i])
        begin = ends[i] - len(document)
        pieces.append(document[max(start - begin, 0) : stop - begin])
    documents = tuple(len(piece) for piece in pieces)
    tokens = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
    labels = torch.cat([tokens[1:], tokens[:1]])
    labels[torch.tensor(documents).cumsum(0) - 1] = IGNORE
    return Packed(tokens, labels, documents)


@lru_cache(maxsize=4)  # the current epoch and the next, for training and for evaluation
def _epoch(corpus: TokenCorpus, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's order of documents, and where each ends in it: int64 [documents], twice."""
    # epoch + 1, because numpy draws the same from (seed, 0) as from seed, which draws the split
    order = np.random.default_rng((seed, epoch + 1)).permutation(len(corpus))
    return order, corpus.lengths[order].cumsum()
