"""Load balance: assign chunks of a sequence to the ranks of a ring so that ranks wait as little as possible.

On hop s, rank r computes with the keys of rank (r - s) mod ranks. The rank with the most work over all hops finishes
last. In the backward, gradients are also forwarded from rank to rank, so a rank may wait on a hop for the one before
it. The assignment therefore minimises

    5 x max over ranks of sum over hops of work(rank, hop)  +  sum over hops of max over ranks of work(rank, hop)

A rank's work on a hop is its visible (query, key) pairs and its visits. The forward visits a tile of 128 queries if any
of them sees a key of the hop, and the backward visits a tile of 128 keys if any query of the rank sees one of them. A
visit loads and stores what belongs to the tile, which takes about as long as 128 x 128 pairs:

    chunks of keys       0 1 2 3 4 5 6 7
    are held by rank     0 1 0 2 0 3 1 2
    a query tile sees      1 2 3 4          visits rank 1 for 1, rank 2 for 3, and rank 0 for 2 and 4, half for each

Divided like this among the chunks of a rank, visits count by pairs of chunks, as visible pairs do. Exchanges of chunks
change the division, so there are several passes of exchanges.

On slow links, what is sent matters more: `assign_long` assigns only the chunks of long documents.

All counts are whole numbers in float64 and therefore exact. Every rank computes the assignment for itself, and all
ranks get the same one. The tables are small, and numpy takes a third of torch's time for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# The most passes of exchanges. With more, nothing measurable is gained.
_PASSES = 3
# Weight of the whole work beside that on each hop. Ranks that wait on one hop often catch up on another: in simulations
# of packed rings, 5 finishes earlier than 1, 3 or 8.
_WHOLE = 5
# Entries of a table [exchanges, ranks, ranks] that are tried at once; trying more costs more time than it saves.
_ENTRIES = 2**14

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Visits(NamedTuple):
    """Tiles of one side, queries or keys, sorted by their chunk. Tiles of a chunk that see the same are one entry.

    chunk: that of the tiles. first, end: they see chunks first..end - 1 of the other side. price: in pairs, of one
    visit to all of them. int64 [n] each.
    """

    chunk: Ints
    first: Ints
    end: Ints
    price: Ints


def assign(pairs: Floats, visits: Sequence[Visits], ranks: int, most: float) -> Ints:
    """The rank of each chunk, int64 [chunks]; every rank gets the same number of chunks.

    pairs: visible (query, key) pairs of each chunk's queries with each chunk's keys, [chunks, chunks]. visits: those of
    query tiles and those of key tiles.

    Neighbouring chunks that are in more than `most` pairs are first assigned in rounds, one per rank, which spreads a
    long document over all hops. Chunks of short documents are assigned in runs, which visit few ranks. Exchanges then
    improve on that.
    """
    owner, _ = _started(pairs, ranks, most)
    return _improved(owner, pairs, visits, ranks, np.arange(len(pairs)))


def assign_long(pairs: Floats, visits: Sequence[Visits], ranks: int, most: float) -> Ints:
    """The same, except that chunks of short documents stay in runs, so that such a document lies on one rank or two."""
    owner, far = _started(pairs, ranks, most)
    return _improved(owner, pairs, visits, ranks, far.nonzero()[0])


def by_hop(work: NDArray) -> NDArray:
    """Work [ranks, ranks], of each rank with the keys of each rank, as [hops, ranks]."""
    rank = np.arange(len(work))
    return work[rank, (rank - rank[:, None]) % len(rank)]


def duration(work: NDArray) -> float:
    """What `assign` minimises, of work [ranks, ranks]."""
    return float(_duration(work.sum(1), by_hop(work)))


def _duration(whole: NDArray, table: NDArray) -> NDArray:
    """The same, [...], of the work [ranks, ...] over all hops and that on each hop [hops, ranks, ...]."""
    return _WHOLE * whole.max(0) + table.max(1).sum(0)


def _started(pairs: Floats, ranks: int, most: float) -> tuple[Ints, NDArray[np.bool_]]:
    """First owners [chunks], and which chunks are in rounds: those in more than `most` pairs, as queries and as keys.

    If these do not fill the last round, the ones with the least work are left out.
    """
    work = pairs.sum(1)
    far = work + pairs.sum(0) > most
    left_over = int(far.sum()) % ranks
    far[np.where(far, work, np.inf).argsort(kind="stable")[:left_over]] = False
    owner = np.empty(len(work), np.int64)
    owner[~far] = np.arange(ranks).repeat((~far).sum() // ranks)
    load = np.zeros(ranks)
    np.add.at(load, owner[~far], work[~far])
    owner[far] = _rounds(work[far], load)
    return owner, far


def _rounds(work: Floats, load: Floats) -> Ints:
    """Owners [chunks]: in each round, heaviest first, the heaviest chunk goes to the rank with the least work so far.

    load: each rank's work [ranks] before that; it is updated in place.
    """
    rounds = work.reshape(-1, len(load))
    owner = np.empty(rounds.shape, np.int64)
    for r in (-rounds.sum(1)).argsort(kind="stable"):
        chunks, owners = (-rounds[r]).argsort(kind="stable"), load.argsort(kind="stable")
        owner[r, chunks] = owners
        load[owners] += rounds[r, chunks]
    return owner.ravel()


def _improved(owner: Ints, pairs: Floats, visits: Sequence[Visits], ranks: int, some: Ints) -> Ints:
    """Owners [chunks] after passes of exchanges among the chunks `some`, up to the first pass that gains nothing."""

    def divided(owned: Floats) -> Floats:
        queries, keys = (_divided(side, owned) for side in visits)
        return pairs + queries + keys.T

    owned = np.eye(ranks)[owner]
    work = divided(owned)
    least = duration(owned.T @ work @ owned)
    for _ in range(_PASSES):
        after = _exchanging(owned, work, some)
        work = divided(after)
        if (took := duration(after.T @ work @ after)) >= least:
            break
        owned, least = after, took
    return owned.argmax(1)


def _divided(visits: Visits, owned: Floats) -> Floats:
    """The price of all visits, each divided among the chunks that it is to: [chunks, chunks]."""
    chunk, first, end, price = visits
    chunks = np.arange(len(owned))
    below = np.pad(owned.cumsum(0), ((1, 0), (0, 0)))
    share = price[:, None] // np.maximum(below[end] - below[first], 1)
    of_tiles = (share @ owned.T) * ((first[:, None] <= chunks) & (chunks < end[:, None]))
    divided = np.zeros((len(owned), len(owned)))
    present, begins = np.unique(chunk, return_index=True)
    if len(present):
        divided[present] = np.add.reduceat(of_tiles, begins, axis=0)
    return divided


def _exchanging(owned: Floats, work: Floats, some: Ints) -> Floats:
    """One-hot owners [chunks, ranks] after exchanges that reduce the duration, among the chunks `some`, ascending.

    Each of these in turn, heaviest first, is exchanged for the chunk that helps most, out of those near it in the
    sequence and those of similar work.
    """
    owned, ranks = owned.copy(), owned.shape[1]
    heaviest = some[(-work.sum(1)[some]).argsort(kind="stable")]
    as_queries, as_keys = work @ owned, work.T @ owned  # of each chunk, with each rank
    table = by_hop(owned.T @ as_queries)
    whole = table.sum(0)
    least = _duration(whole, table)
    for order, (chunk, place) in enumerate(zip(heaviest, np.searchsorted(some, heaviest), strict=True)):
        others = np.concatenate([_near(place, some, ranks), _near(order, heaviest, ranks)])
        wholes, tables = _exchanged(whole, table, owned, work, as_queries, as_keys, chunk, others)
        took = _duration(wholes, tables)
        best = took.argmin()
        if took[best] < least:
            whole, table, least, other = wholes[:, best], tables[..., best], took[best], others[best]
            change = owned[other] - owned[chunk]
            as_queries += np.outer(work[:, chunk] - work[:, other], change)
            as_keys += np.outer(work[chunk] - work[other], change)
            owned[[chunk, other]] = owned[[other, chunk]]
    return owned


def _near(place: int, chunks: Ints, ranks: int) -> Ints:
    """The `ranks` chunks around a place in their order [chunks]; fewer if there are many ranks."""
    width = min(len(chunks), ranks, max(2, _ENTRIES // ranks**2 // 2))
    start = max(0, min(len(chunks) - width, place - width // 2))
    return chunks[start : start + width]


def _exchanged(
    whole: Floats, table: Floats, owned: Floats, work: Floats, as_queries: Floats, as_keys: Floats,
    chunk: int, others: Ints,
) -> tuple[Floats, Floats]:  # fmt: skip
    """Work over all hops [ranks, n] and on each [hops, ranks, n] after `chunk` has changed owners with each of others.

    With e the difference of two chunks' one-hot vectors and d that of their owners', owned becomes owned + e d', and
    owned' work owned gains d (e' work owned) + (owned' work e + d (e' work e)) d'.
    """
    d = (owned[others] - owned[chunk]).T
    queries, keys = (x[chunk, :, None] - x[others].T for x in (as_queries, as_keys))
    keys += d * (work[chunk, chunk] - work[chunk, others] - work[others, chunk] + work[others, others])
    tables = d * _turned(queries)
    tables += keys * _turned(d)
    tables += table[..., None]
    return whole[:, None] + d * queries.sum(0), tables


def _turned(x: Floats) -> Floats:
    """For each hop and rank, the entry of x [ranks, n] of the rank whose keys it then has: [hops, ranks, n], a view."""
    ranks = len(x)
    # Window w of x twice over begins with x[w]; hop s turns x by s places the other way.
    windows = np.lib.stride_tricks.sliding_window_view(np.concatenate([x, x]), ranks, axis=0)
    return windows[ranks:0:-1].swapaxes(1, 2)
