"""What a layer allocates on one rank: two shards of keys and values, two of gradients, whatever the ring's size.

Every storage that is made during a forward and a backward is tracked until it is freed. The kernels allocate nothing
but a first hop's result, and the other ranks are absent: receive buffers keep the values that they have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ringflash import AttentionPlan, IntervalMask, Layout, kernels, ring_attention
from ringflash.ring import execution
from ringflash.ring.transport import plain_buffers
from tests.ring.cases import idle_kernel

SHARD, HEADS, DIM = 64, 4, 8
KEYS = 2 * SHARD * DIM * 2  # bytes of a shard of keys and values in 16 bits, for each KV head
GRADIENTS = 2 * SHARD * DIM * 4
QUERIES = SHARD * HEADS * DIM * 2
ROWS = SHARD * HEADS * 4  # of lse or delta


@dataclass
class Following(TorchDispatchMode):
    """The peak of allocated bytes, and the largest storage allocated since that figure was reset."""

    known: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict)
    most: int = 0
    largest_made: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
        for x in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in (given | self.known.keys()):
                storage = x.untyped_storage()
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.largest_made = max(self.largest_made, storage.nbytes())
        self.most = max(self.most, self.now())
        return out

    def now(self) -> int:
        return sum(size for ref, size in self.known.values() if not ref.expired())

    def measure(self, run):
        """run(), and the peak of bytes in addition to those before."""
        before, self.most = self.now(), 0
        result = run()
        return result, self.most - before


class Alone:
    """One rank of a ring whose other ranks send nothing."""

    def __init__(self, size: int, rank: int, following: Following) -> None:
        self.size, self.local, self.device, self.following = size, (rank,), torch.device("cpu"), following
        self.made_on_hops: dict[str, int] = {}
        self.context = "before"

    def receive_buffers(self, label):
        return plain_buffers(self.device)

    def exchange(self, outgoing, incoming, label):
        self.made_on_hops[self.context] = self.following.largest_made
        self.context, self.following.largest_made = str(label), 0
        return self

    def wait(self) -> None:
        pass


def passes(monkeypatch, mask, layout, rank, kv_heads=2, sink=None):
    """Bytes that the forward and the backward add at most, and the largest allocation on each hop."""
    monkeypatch.setattr(kernels, "select", lambda *args: idle_kernel())
    following = Following()
    ring = Alone(layout.ranks, rank, following)
    plan = AttentionPlan(mask, layout, ring)
    shapes = [(1, SHARD, heads, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    q, k, v = (torch.zeros(shape, dtype=torch.float16, requires_grad=True) for shape in shapes)
    ring_attention(
        q, k, v, plan, sink=sink
    ).sum().backward()  # the first layer of a step makes what its plan then keeps
    with following:
        out, forward_bytes = following.measure(lambda: ring_attention(q, k, v, plan, sink=sink))
        dout = torch.zeros_like(out)
        _, backward_bytes = following.measure(lambda: torch.autograd.grad(out, (q, k, v), dout))
    return forward_bytes, backward_bytes, ring.made_on_hops


MASKS = {
    "full": lambda n: (IntervalMask.full(n * SHARD), Layout.zigzag(n * SHARD, n)),
    "causal": lambda n: (IntervalMask.causal(n * SHARD), Layout.zigzag(n * SHARD, n)),
    "window": lambda n: (IntervalMask.window(n * SHARD, SHARD // 2), Layout.contiguous(n * SHARD, n)),
    "window of two shards": lambda n: (IntervalMask.window(n * SHARD, 2 * SHARD), Layout.contiguous(n * SHARD, n)),
    "causal, contiguous": lambda n: (IntervalMask.causal(n * SHARD), Layout.contiguous(n * SHARD, n)),
    "documents": lambda n: (packed(n), Layout.zigzag(n * SHARD, n)),
}


def packed(n):
    """Causal documents of a shard and a half, in the middle of the sequence one of three shards."""
    lengths = [SHARD * 3 // 2] * (n // 2)
    lengths[n // 4] = n * SHARD - sum(lengths[: n // 4]) - sum(lengths[n // 4 + 1 :])
    return IntervalMask.causal(n * SHARD) & IntervalMask.documents(lengths)


# Where a rank's own gradients return while it still has others' to pass on, they need a third place.
THIRD = {"window of two shards", "causal, contiguous", "documents"}


def in_forward(kv_heads):
    """And the running result in fp32, the result, lse."""
    return 2 * KEYS * kv_heads + 2 * QUERIES + QUERIES + ROWS


def in_backward(kv_heads):
    """And dq in fp32, the results dq, dk and dv, delta; what centers the keys, and lse of those."""
    centered = DIM * 2 * kv_heads + ROWS
    return (2 * KEYS + 2 * GRADIENTS) * kv_heads + 2 * QUERIES + QUERIES + KEYS * kv_heads + ROWS + centered


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("size", [3, 16])
@pytest.mark.parametrize("mask", MASKS)
def test_extra_memory_is_two_shards_of_keys_and_two_of_gradients_whatever_the_ring(monkeypatch, mask, size, kv_heads):
    ranks = sorted({0, 1, size // 2, size - 2, size - 1})
    found = [passes(monkeypatch, *MASKS[mask](size), rank, kv_heads)[:2] for rank in ranks]
    forward_bytes, backward_bytes = (max(most) for most in zip(*found, strict=True))
    # The second buffer of keys, which no rank needs on hop 2, and that of gradients of those that no other rank sees.
    unused = KEYS * kv_heads + (GRADIENTS // 4 if kv_heads == 1 else 0) if mask == "window" else 0
    third = GRADIENTS * kv_heads if mask in THIRD and size > 3 else 0
    assert forward_bytes == in_forward(kv_heads) - (KEYS * kv_heads if mask == "window" else 0)
    assert backward_bytes == in_backward(kv_heads) - unused + third


def test_a_ring_of_one_holds_no_gradients_in_fp32_but_dq(monkeypatch):
    _, most, _ = passes(monkeypatch, IntervalMask.causal(SHARD), Layout.contiguous(SHARD, 1), 0)
    assert most == in_backward(2) - 2 * 2 * (KEYS + GRADIENTS)


def test_a_sink_takes_a_few_numbers_per_row_and_the_residue(monkeypatch):
    most, *_ = passes(monkeypatch, *MASKS["causal"](8), 0, sink=torch.zeros(HEADS))
    assert most <= in_forward(2) + QUERIES + 3 * ROWS


@pytest.mark.parametrize("mask", [mask for mask in MASKS if "window" not in mask])  # windows have no hops between
def test_no_hop_allocates_anything(monkeypatch, mask):
    layout = MASKS[mask](8)
    for rank in range(8):
        *_, made = passes(monkeypatch, *layout, rank)
        between = re.compile(r"forward, hop [2-6]|backward, (gradients of )?hop [2-6]")  # the first and last ones do
        hops = {label: size for label, size in made.items() if between.search(label)}
        assert hops == dict.fromkeys(hops, 0)
        assert len(hops) == 4 * 5  # keys in both passes, gradients of two sections


def test_buffers_that_are_not_reused_are_found(monkeypatch):
    """A pass that received into fresh memory would not pass."""
    messages, kept = execution._messages, []

    def into_fresh_memory(workers, steps, ranks):
        for step, worker in zip(steps, workers, strict=True):
            for name in {x.target.buffer for x in step.receives}:
                kept.append(worker.memory[name])
                worker.memory[name] = [torch.empty_like(x) for x in worker.memory[name]]
        return messages(workers, steps, ranks)

    monkeypatch.setattr(execution, "_messages", into_fresh_memory)
    most, _, made = passes(monkeypatch, *MASKS["full"](8), 0)
    assert most > in_forward(2)
    assert made["attention, forward, hop 3"] > 0
