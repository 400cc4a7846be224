"""Load balance: assign chunks of a sequence to the ranks of a ring so that ranks wait as little as possible.

On hop s, rank r computes with the keys of rank (r - s) mod ranks. In the backward, gradients are forwarded from rank to
rank, so on every hop the ring waits for the rank with the most work. In the forward only keys travel; ranks may run
ahead, and the rank with the most work over all hops finishes last. The assignment therefore minimises, in (query, key)
pairs,

    sum over hops of max over ranks of pairs(rank, hop)  +  max over ranks of sum over hops of pairs(rank, hop)

On slow links, what is sent matters more: `assign_long` assigns only the chunks of long documents.

All counts are whole numbers in float64 and therefore exact. Every rank computes the assignment for itself, and all
ranks get the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of a table [exchanges, hops, ranks] that are tried at once; trying more costs more time than it saves.
_ENTRIES = 2**15


def assign(pairs: Tensor, ranks: int) -> Tensor:
    """The rank of each chunk, int64 [chunks]; every rank gets the same number of chunks.

    pairs: visible (query, key) pairs of each chunk's queries with each chunk's keys, [chunks, chunks]. Neighbouring
    chunks are assigned in rounds, one per rank, which spreads a document over all hops. Exchanges then improve on that.
    """
    work = pairs.double().sum(1)
    owner = _rounds(work, torch.zeros(ranks, dtype=work.dtype))
    return _exchanging(owner, pairs, ranks, torch.arange(len(work)))


def assign_long(pairs: Tensor, ranks: int, most: float) -> Tensor:
    """The rank of each chunk, int64 [chunks]; every rank gets the same number of chunks.

    Chunks that are in more than `most` pairs, as queries and as keys, are assigned in rounds, without those with the
    least work if they do not fill the last round. All other chunks stay in runs, as in a contiguous layout, so that a
    short document lies on one rank or two.
    """
    work = pairs.double().sum(1)
    far = work + pairs.double().sum(0) > most
    left_over = int(far.sum()) % ranks
    far[work.where(far, torch.inf).argsort(stable=True)[:left_over]] = False
    owner = torch.empty(len(work), dtype=torch.int64)
    owner[~far] = torch.arange(ranks).repeat_interleave(int((~far).sum()) // ranks)
    owner[far] = _rounds(work[far], torch.zeros(ranks, dtype=work.dtype).index_add_(0, owner[~far], work[~far]))
    return _exchanging(owner, pairs, ranks, far.nonzero().flatten())


def by_hop(pairs: Tensor) -> Tensor:
    """Pairs [ranks, ranks], of each rank with the keys of each rank, as [hops, ranks]."""
    rank = torch.arange(len(pairs))
    return pairs[rank, (rank - rank[:, None]) % len(pairs)]


def _time(table: Tensor) -> Tensor:
    """The objective that `assign` minimises, [...], of pairs [..., hops, ranks]."""
    return table.amax(-1).sum(-1) + table.sum(-2).amax(-1)


def _rounds(work: Tensor, load: Tensor) -> Tensor:
    """Owners [chunks]: in each round, heaviest first, the heaviest chunk goes to the rank with the least work so far.

    load: each rank's work [ranks] before that; it is updated in place.
    """
    rounds = work.view(-1, len(load))
    owner = torch.empty(rounds.shape, dtype=torch.int64)
    for r in rounds.sum(1).argsort(descending=True, stable=True).tolist():
        chunks, owners = rounds[r].argsort(descending=True, stable=True), load.argsort(stable=True)
        owner[r, chunks] = owners
        load[owners] += rounds[r, chunks]
    return owner.flatten()


def _exchanging(owner: Tensor, pairs: Tensor, ranks: int, some: Tensor) -> Tensor:
    """Owners [chunks] after exchanges that reduce the time, among the chunks whose ascending numbers are in `some`.

    Each of these in turn, heaviest first, is exchanged for the chunk that helps most, out of those near it in the
    sequence and those of similar work.
    """
    pairs = pairs.double()
    heaviest = some[pairs.sum(1)[some].argsort(descending=True, stable=True)]
    owned = torch.nn.functional.one_hot(owner, ranks).double()  # [chunks, ranks]
    both = torch.stack([pairs, pairs.T])
    shared = both @ owned  # of each chunk's queries, and keys, with the keys, and queries, of each rank
    table = by_hop(owned.T @ shared[0])
    least = _time(table)
    places = torch.searchsorted(some, heaviest).tolist()
    for rank_of_work, (chunk, place) in enumerate(zip(heaviest.tolist(), places, strict=True)):
        others = torch.cat([_near(place, some, ranks), _near(rank_of_work, heaviest, ranks)])
        after = _exchanged(table, owned, pairs, shared, chunk, others)
        times = _time(after)
        best = int(times.argmin())
        if times[best] < least:
            table, least, other = after[best], times[best], int(others[best])
            shared += (both[:, :, chunk] - both[:, :, other])[..., None] * (owned[other] - owned[chunk])
            owned[[chunk, other]] = owned[[other, chunk]]
    return owned.argmax(1)


def _near(place: int, chunks: Tensor, ranks: int) -> Tensor:
    """The `ranks` chunks around a place in their order [chunks]; fewer if there are many ranks."""
    width = min(len(chunks), ranks, max(2, _ENTRIES // ranks**2 // 2))
    start = max(0, min(len(chunks) - width, place - width // 2))
    return chunks[start : start + width]


def _exchanged(table: Tensor, owned: Tensor, pairs: Tensor, shared: Tensor, chunk: int, others: Tensor) -> Tensor:
    """The table [hops, ranks] after `chunk` and each of others [n] have exchanged owners: [n, hops, ranks].

    With e the difference of two chunks' one-hot vectors and d that of their owners', owned becomes owned + e d', and
    owned' pairs owned gains d (e' pairs owned) + (owned' pairs e + d (e' pairs e)) d'.
    """
    d = owned[others] - owned[chunk]
    as_queries, as_keys = shared[:, [chunk]] - shared[:, others]
    inside = pairs[chunk, chunk] - pairs[chunk, others] - pairs[others, chunk] + pairs.diagonal()[others]
    as_keys = as_keys + inside[:, None] * d
    gained = d[:, None] * _turned(as_queries)
    return gained.addcmul_(as_keys[:, None], _turned(d)).add_(table)


def _turned(x: Tensor) -> Tensor:
    """For each hop and rank, the entry of x [n, ranks] of the rank whose keys it then has: [n, hops, ranks]."""
    ranks = x.shape[1]
    # Window w of x twice over begins with x[w]; hop s turns x by s places the other way.
    return torch.cat([x, x], 1).unfold(1, ranks, 1)[:, 1:].flip(1)
