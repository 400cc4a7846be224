"""Pairs in a packed sequence: documents 2 i, chosen, and 2 i + 1, rejected, before the documents of padding."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ringflash.data.records import IGNORE

DIGEST = 16  # bytes


def predicted(labels: Tensor, documents: Sequence[int]) -> Tensor:
    """The predicted tokens of each document of a sequence's pairs, int64 [2 x pairs]; padding has none.

    labels: int64 [S]. documents: all lengths, with those of padding.
    """
    number = torch.arange(len(documents)).repeat_interleave(torch.tensor(documents))
    found = number[labels != IGNORE].bincount(minlength=len(documents))
    return found[: 2 * (int(found.nonzero().max()) // 2 + 1)] if found.any() else found[:0]


def digests(tokens: Tensor, labels: Tensor, documents: Sequence[int]) -> list[bytes]:
    """A digest of each pair of a sequence, which depends on the tokens and labels of its two documents alone.

    A pair therefore has the same digest in whichever sequence it is packed.
    """
    found, begin = [], 0
    for pair in range(len(predicted(labels, documents)) // 2):
        chosen, rejected = documents[2 * pair : 2 * pair + 2]
        here = slice(begin, begin + chosen + rejected)
        digest = hashlib.blake2b(f"{chosen}".encode(), digest_size=DIGEST)
        for part in (tokens, labels):
            digest.update(part[here].numpy().data)
        found.append(digest.digest())
        begin = here.stop
    return found
