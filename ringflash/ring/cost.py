"""What a layout would cost: the predicted time of one attention layer, forward and backward, on a ring.

On hop s, rank r computes with the keys of rank (r - s) mod ranks; the forward begins with its own, hop 0, and the
backward ends with them. Keys for a hop set off when both ranks have those of the hop before and are done with the one
before that, whose buffer they fill; a rank never waits for all others:

    ready(r, s)   = max(done(r, s - 2), arrived(r, s - 1))
    arrived(r, s) = max(ready(r, s), ready(r - 1, s)) + bytes to r for hop s x time a byte
    done(r, s)    = max(done(r, s - 1), arrived(r, s)) + pairs(r, s) x time a pair + HOP
                    done(r, s - 1) where it sees none of the keys
    time          = max(done(r, last), arrived(r, last)) over all ranks, of the forward and of the backward

Both follow from mask and layout alone. Contiguous runs send least and balance worst, zigzag balances a causal mask,
balanced layouts balance documents and send more: which is fastest depends on documents, windows, heads and links.

    >>> machine = Machine(flops=500e12, bytes_per_second=400e9)
    >>> heads = Heads(query=32, key=8, dim=128)
    >>> window = IntervalMask.window(131072, left=1023)
    >>> fastest(window, ranks=8, heads=heads, machine=machine)[0]
    'contiguous'
    >>> fastest(IntervalMask.causal(131072), ranks=8, heads=heads, machine=machine)[0]
    'zigzag'
    >>> documents = IntervalMask.documents([70000, 1000, 20000, 40072])
    >>> fastest(IntervalMask.causal(131072) & documents, ranks=8, heads=heads, machine=machine)[0]
    'balanced'
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.ring.plan import routes

# Operations a pair, head and dimension, forward and backward.
FORWARD, BACKWARD = 4, 10
# Seconds that a hop other than 0 takes besides its pairs, in either pass: launches, partly filled tiles, the running
# result read and written once more.
HOP = 25e-6
# A predicted gain below this is not worth a layout of shorter runs.
WORTH = 0.02


@dataclass(frozen=True)
class Machine:
    """Attention speed of one rank in FLOP/s, and bytes a second from each rank to the next."""

    flops: float
    bytes_per_second: float


@dataclass(frozen=True)
class Heads:
    """Query and KV heads of one rank, and their size."""

    query: int
    key: int
    dim: int


def fastest(mask: IntervalMask, ranks: int, heads: Heads, machine: Machine, parts: int = 1) -> tuple[str, Layout]:
    """The layout with the least predicted time, and its name; of contiguous, zigzag and balanced the first near it."""
    candidates = {
        "contiguous": Layout.contiguous(mask.queries, ranks, parts),
        "zigzag": Layout.zigzag(mask.queries, ranks, parts),
        "balanced": Layout.balanced(mask, ranks, parts),
    }
    seconds = {name: predict(mask, layout, heads, machine) for name, layout in candidates.items()}
    least = min(seconds.values())
    name = next(name for name in candidates if seconds[name] * (1 - WORTH) <= least)
    return name, candidates[name]


def best_ulysses(
    length: int, ranks: int, ranks_per_node: int, heads: Heads, in_node: Machine, across: float
) -> tuple[int, str]:
    """How many neighbouring ranks should exchange heads, the rest forming the ring, and why, in a sentence.

    length: of a causal sequence; across: bytes a second between nodes. Ulysses stays inside a node and never
    replicates KV heads; its exchanges hide behind nothing, a ring's hide behind the attention of a hop.
    """
    seconds: dict[int, float] = {}
    for ulysses in range(1, ranks_per_node + 1):
        if ranks_per_node % ulysses or ranks % ulysses or heads.query % ulysses or heads.key % ulysses:
            continue
        ring = ranks // ulysses
        link = in_node.bytes_per_second if ranks <= ranks_per_node else across
        share = Heads(heads.query // ulysses, heads.key // ulysses, heads.dim)
        layout = Layout.zigzag(length, ring, parts=ulysses)
        hops = predict(IntervalMask.causal(length), layout, share, Machine(in_node.flops, link))
        # A rank keeps 1 / ulysses of what it has: q, out, dout, dq and k, v in 2 bytes, dk and dv in 4.
        moved = (4 * 2 * heads.query + 2 * (2 + 4) * heads.key) * heads.dim * length / ranks * (1 - 1 / ulysses)
        seconds[ulysses] = hops + moved / in_node.bytes_per_second
    best = min(seconds, key=seconds.__getitem__)
    told = ", ".join(f"{u} x {ranks // u}: {1e3 * t:.2f} ms" for u, t in seconds.items())
    return best, f"ulysses={best} x ring={ranks // best}, the least predicted time of a layer's attention ({told})"


def predict(mask: IntervalMask, layout: Layout, heads: Heads, machine: Machine) -> float:
    """Seconds of one layer's attention, forward and backward."""
    ranks = layout.ranks
    hop = (torch.arange(ranks)[:, None] - torch.arange(ranks)) % ranks  # of rank and source
    seen = torch.zeros(ranks, ranks, dtype=torch.int64).scatter_(1, hop, layout.pairs(mask))  # by rank and hop
    ways = routes((mask,), layout)
    keys, gradients = torch.zeros(2, ranks, ranks, dtype=torch.float64)  # tokens that come to a rank for a hop
    for rank in range(ranks):
        for s in range(1, ranks):
            way = ways[(rank - s) % ranks]
            keys[rank, s] = way.keys[s].tokens
            gradients[rank, s] = way.gradients[s].tokens if s <= way.reach else 0
    a_pair, a_token = heads.query * heads.dim / machine.flops, heads.key * heads.dim / machine.bytes_per_second
    # Keys and values take 2 bytes a number, their gradients 4.
    forward = _pass(seen * FORWARD * a_pair, seen, 4 * keys * a_token, own_keys_first=True)
    backward = _pass(seen * BACKWARD * a_pair, seen, (4 * keys + 8 * gradients) * a_token, own_keys_first=False)
    return forward + backward


def _pass(computing: Tensor, seen: Tensor, sending: Tensor, own_keys_first: bool) -> float:
    """Seconds of one pass; all by rank and hop: seconds of computing, pairs seen, seconds of receiving."""
    ranks = len(seen)
    before = arrived = torch.zeros(ranks, dtype=torch.float64)  # before: done(s - 2), at the head of the loop
    done = computing[:, 0] if own_keys_first else before
    for s in range(1, ranks):
        ready = torch.maximum(before, arrived)
        arrived = torch.maximum(ready, ready.roll(1)) + sending[:, s]
        before = done
        done = torch.where(seen[:, s] > 0, torch.maximum(done, arrived) + computing[:, s] + HOP, done)
    if not own_keys_first:
        done = done + computing[:, 0]
    return float(torch.maximum(done, arrived).max())
