"""The cost of a layout: the predicted time of one attention layer, forward and backward, on a ring.

The steps that the ranks would run (`ring.schedule`) are simulated (`ring.simulation`): a kernel takes its number of
pairs times the time per pair, and a message its bytes times the time per byte. Both follow from mask and layout.

Contiguous layouts send least and balance worst. Zigzag balances causal masks. Balanced layouts balance packed documents
and send more. Document-local layouts balance long documents and do not split short ones. Which of them is fastest
depends on documents, windows, heads and links.

    >>> machine = Machine(flops=500e12, bytes_per_second=400e9)
    >>> heads = Heads(query=32, key=8, dim=128, value_dim=128)
    >>> window = IntervalMask.window(131072, left=1023)
    >>> fastest([Layers(window, heads, 32)], ranks=8, machine=machine)[0]
    'contiguous'
    >>> fastest([Layers(IntervalMask.causal(131072), heads, 32)], ranks=8, machine=machine)[0]
    'zigzag'
    >>> packed = IntervalMask.causal(131072) & IntervalMask.documents([29696, *[10000] * 10, 1376])
    >>> fastest([Layers(packed, heads, 32)], ranks=8, machine=machine)[0]
    'balanced'
    >>> fastest([Layers(packed, heads, 32)], ranks=8, machine=Machine(flops=500e12, bytes_per_second=50e9))[0]
    'document_local'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ringflash.layout import Layout
from ringflash.load_balance import by_hop
from ringflash.mask import IntervalMask
from ringflash.ring.compiler import backward_steps, forward_steps, head_sections
from ringflash.ring.key_hops import KeyHops
from ringflash.ring.routes import routes
from ringflash.ring.simulation import Rates, simulate

# Operations per pair, query head, and dimension of keys and of values: 2 forward; backward 2.5 times that.
FLOPS_PER_PAIR = 2 * 3.5
# A finer layout must be predicted to save more than this fraction of the time.
WORTH = 0.02
# Longest short document, as a fraction of a rank's tokens, of the two document_local layouts that are tried.
LONGEST = (0.25, 1.0)
# Default gigabytes per second from a GPU to another GPU of its machine, and to another machine.
INTRA_NODE_GB, INTER_NODE_GB = 300.0, 40.0
# Dense bf16 tensor-core peak, FLOP/s, by a part of the device's name (vendor data sheets, no sparsity).
PEAKS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "GH200": 989e12,
    "B200": 2250e12, "B100": 1750e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
}  # fmt: skip
# Fraction of a GPU's peak that attention reaches, and FLOP/s if the peak is not known: orders of magnitude, which
# hardly affect the choice between layouts.
UTILISATION, UNKNOWN_FLOPS = 0.55, 5e10


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


@dataclass(frozen=True)
class Machine:
    """Attention speed of one rank in FLOP/s, and bytes per second from each rank to the next."""

    flops: float
    bytes_per_second: float

    @classmethod
    def of(cls, device: torch.device, gb_per_second: float) -> Machine:
        """The attention speed of `device`, and links of `gb_per_second`."""
        peak = peak_flops(device)
        return cls(UNKNOWN_FLOPS if peak is None else peak * UTILISATION, 1e9 * gb_per_second)


@dataclass(frozen=True)
class Heads:
    """Numbers of query and KV heads, the head size of queries and keys (dim), and that of values and results."""

    query: int
    key: int
    dim: int
    value_dim: int

    @property
    def products(self) -> int:
        """Multiply-adds per (query, key) pair, for q k^T and p v over all query heads."""
        return self.query * (self.dim + self.value_dim)

    @property
    def key_width(self) -> int:
        """Elements of one token's keys and values."""
        return self.key * (self.dim + self.value_dim)

    def share(self, ulysses: int) -> Heads:
        """The heads of one of `ulysses` ranks; if there are fewer KV heads than ranks, each goes to several ranks."""
        return replace(self, query=self.query // ulysses, key=max(1, self.key // ulysses))


class Layers(NamedTuple):
    """Layers of one kind: their mask, their heads, and how many there are."""

    mask: IntervalMask
    heads: Heads
    number: int


def fastest(layers: Sequence[Layers], ranks: int, machine: Machine, ulysses: int = 1) -> tuple[str, Layout, str]:
    """(name, layout, reason) of the coarsest layout within WORTH of the least predicted time.

    layers: a model's layers, kind by kind, which all share the layout.

    Striped layouts are not considered: each of their hops touches every query tile, which pairs and bytes do not show,
    but which costs a quarter of the speed with packed documents (benchmarks/ring.py).
    """
    # Balance the mask that has most of the work.
    mask = max(layers, key=lambda kind: kind.mask.area() * kind.heads.products * kind.number).mask
    contiguous = Layout.contiguous(mask.queries, ranks, ulysses)
    if ranks == 1:
        return "contiguous", contiguous, "contiguous: one rank holds all tokens"
    candidates = {
        "contiguous": contiguous,
        "zigzag": Layout.zigzag(mask.queries, ranks, ulysses),
        "balanced": Layout.balanced(mask, ranks, ulysses),
        **{f"document_local {longest:g}": Layout.document_local(mask, ranks, ulysses, longest) for longest in LONGEST},
    }
    seconds = {label: _all_layers(layers, layout, machine, ulysses) for label, layout in candidates.items()}
    best = next(label for label, took in seconds.items() if min(seconds.values()) >= took * (1 - WORTH))
    times = ", ".join(f"{label}: {1e3 * took:.4g} ms" for label, took in seconds.items())
    name = best.split()[0]
    why = f"{name}, the coarsest within {WORTH:.0%} of the least predicted time of all layers' attention ({times})"
    return name, candidates[best], why


def _all_layers(layers: Sequence[Layers], layout: Layout, machine: Machine, ulysses: int) -> float:
    return sum(count * predict(mask, layout, heads.share(ulysses), machine) for mask, heads, count in layers)


def best_ulysses(
    layers: Sequence[Layers], ranks: int, ranks_per_node: int, in_node: Machine, across: float
) -> tuple[int, str]:
    """(number of neighbouring ranks that should exchange heads, reason); the other ranks form the ring.

    layers: a model's layers, on a causal sequence. across: bytes per second between nodes. Ulysses stays within a node
    and never replicates KV heads. Nothing overlaps with its exchanges, while a ring's overlap with a hop's attention.
    """
    length = layers[0].mask.queries
    # q and dq, out and dout, k and v in 2 bytes, dk and dv in 4.
    of_token = sum(count * (2 * 2 * heads.products + (2 + 4) * heads.key_width) for _, heads, count in layers)
    seconds: dict[int, float] = {}
    for ulysses in range(1, ranks_per_node + 1):
        divides = all(heads.query % ulysses == heads.key % ulysses == 0 for _, heads, _ in layers)
        if ranks_per_node % ulysses or ranks % ulysses or not divides:
            continue
        link = in_node.bytes_per_second if ranks <= ranks_per_node else across
        layout = Layout.zigzag(length, ranks // ulysses, ulysses=ulysses)
        hops = _all_layers(layers, layout, Machine(in_node.flops, link), ulysses)
        moved = of_token * length / ranks * (1 - 1 / ulysses)  # a rank keeps 1 / ulysses of its own data
        seconds[ulysses] = hops + moved / in_node.bytes_per_second
    best = min(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{u} x {ranks // u}: {1e3 * t:.4g} ms" for u, t in seconds.items())
    return best, f"ulysses={best} x ring={ranks // best}, the least predicted time of all layers' attention ({times})"


def predict(mask: IntervalMask, layout: Layout, heads: Heads, machine: Machine) -> float:
    """Seconds of one layer's attention, forward and backward, without the cost of kernel launches."""
    ways, pairs = routes((mask,), layout), by_hop(layout.pairs(mask).numpy()).T.tolist()
    of_forward, of_backward = KeyHops.of_forward(layout, ways), KeyHops.of_backward(layout, ways)
    sections = head_sections(ways, layout.shard_length, 2)  # gradients travel in halves, of the heads or of the keys
    per_pair = FLOPS_PER_PAIR * heads.products / machine.flops / len(sections)
    of_keys = 2 * heads.key_width  # k and v, 2 bytes; dk and dv, 4 bytes
    of_gradients = 4 * heads.key_width / len(sections)

    def rates(share: float) -> Rates:
        return Rates(
            lambda step: step.pairs * per_pair * share,
            lambda buffer: of_gradients if buffer.startswith(("gradients", "returned")) else of_keys,
            machine.bytes_per_second,
        )

    ranks = range(layout.ranks)
    together = [[sum(of_rank[d] for d in some) for some in of_forward.distances] for of_rank in pairs]
    forward = simulate((forward_steps(rank, together[rank], of_forward, sections) for rank in ranks), rates(1 / 3.5))
    of_sections = [[pairs[rank]] * len(sections) for rank in ranks]
    backward = simulate(
        (backward_steps(rank, of_sections[rank], of_backward, sections) for rank in ranks), rates(2.5 / 3.5)
    )
    return forward.seconds + backward.seconds
