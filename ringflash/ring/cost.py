"""What a layout would cost: the predicted time of one attention layer, forward and backward, on a ring.

On hop s, rank r computes with the keys of rank (r - s) mod ranks while the keys of hop s + 1 and the gradients of
hop s - 1 travel, so a hop takes as long as the slowest of its ranks' computing and sending, and

    time = sum over hops of max(pairs of a rank x time a pair, bytes of a rank x time a byte)

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

from ringflash.dealing import by_hop
from ringflash.layout import Layout
from ringflash.mask import IntervalMask
from ringflash.ring.plan import routes

# Forward 4 operations a pair, head and dimension; backward 2.5 times that.
FLOPS_A_PAIR = 4 * 3.5
# A predicted gain below this is not worth another layout than zigzag.
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
    """The name and the layout with the least predicted time; zigzag where others gain next to nothing.

    Not striped: pairs and bytes do not tell that each of its hops touches every tile of queries, which costs a quarter
    of the speed with packed documents (benchmarks/ring.py).
    """
    candidates = {
        "zigzag": Layout.zigzag(mask.queries, ranks, parts),
        "contiguous": Layout.contiguous(mask.queries, ranks, parts),
        "balanced": Layout.balanced(mask, ranks, parts),
    }
    seconds = {name: predict(mask, layout, heads, machine) for name, layout in candidates.items()}
    name = min(seconds, key=seconds.__getitem__)
    if seconds[name] > seconds["zigzag"] * (1 - WORTH):
        name = "zigzag"
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
    told = ", ".join(f"{u} x {ranks // u}: {1e3 * t:.4g} ms" for u, t in seconds.items())
    return best, f"ulysses={best} x ring={ranks // best}, the least predicted time of a layer's attention ({told})"


def predict(mask: IntervalMask, layout: Layout, heads: Heads, machine: Machine) -> float:
    """Seconds of one layer's attention, forward and backward, without what a kernel launch costs."""
    ranks = layout.ranks
    computing = by_hop(layout.pairs(mask)).max(1).values.double()
    computing *= FLOPS_A_PAIR * heads.query * heads.dim / machine.flops
    sending = torch.zeros(ranks, dtype=torch.float64)  # the most any rank sends during a hop
    ways = routes((mask,), layout)
    for s in range(1, ranks):
        keys = max(way.keys[s].tokens for way in ways)
        gradients = max(way.gradients[s].tokens if s <= way.reach else 0 for way in ways)
        # Keys and values, 2 bytes, in both passes; their gradients, 4 bytes.
        sending[s - 1] += (2 * 2 * 2 * keys + 2 * 4 * gradients) * heads.key * heads.dim / machine.bytes_per_second
    return float(torch.maximum(computing, sending).sum())
