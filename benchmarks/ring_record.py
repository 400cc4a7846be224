"""A record of what ring_attention does on each rank: kernel launches, messages and waits, in order.

ring_attention itself runs, on a ring and a kernel that only note what is asked of them. So the order is that of its
code. Heads have size 1, so that a million tokens take megabytes; bytes are counted at the true size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ring_cases import RingCase, kernels_wrapped
from ringflash import AttentionPlan, Partial, ring_attention
from ringflash.kernels import Kernel, blocked
from ringflash.mask import Intervals
from ringflash.ring.transport import Allocate, Message, plain_buffers


@dataclass(frozen=True)
class Compute:
    """A kernel launch: the hop whose keys it reads, and its pairs, over all its query heads."""

    hop: int
    pairs: int


@dataclass(frozen=True)
class Exchange:
    """Messages posted together: bytes by destination and by source; kind "keys" or "gradients"."""

    outgoing: dict[int, int]
    incoming: dict[int, int]
    kind: str


@dataclass(frozen=True)
class Wait:
    """The exchange with this number in the pass must be complete."""

    exchange: int


Event = Compute | Exchange | Wait
Records = list[list[Event]]  # of all ranks, in one pass


class Recorder:
    """A ring with one rank of `size` that delivers nothing and notes what is asked; `width` scales bytes."""

    def __init__(self, size: int, rank: int, width: int) -> None:
        self.size = size
        self.local: tuple[int, ...] = (rank,)
        self.device = torch.device("cpu")
        self.events: list[Event] = []
        self._width = width
        self._exchanges = 0

    def receive_buffers(self, context: str) -> AbstractContextManager[Allocate]:
        """Memory of torch's allocator."""
        return plain_buffers(self.device)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], context: str) -> _Awaited:
        """Note the messages."""
        kind = "gradients" if any(m.tensor.dtype == torch.float32 for m in (*outgoing, *incoming)) else "keys"
        sent, received = Counter[int](), Counter[int]()
        for message in outgoing:
            sent[message.destination] += self._bytes(message)
        for message in incoming:
            received[message.source] += self._bytes(message)
        self.events.append(Exchange(sent, received, kind))
        self._exchanges += 1
        return _Awaited(self, self._exchanges - 1)

    def taken(self) -> list[Event]:
        """The events so far, which are then forgotten."""
        events, self.events, self._exchanges = self.events, [], 0
        return events

    def _bytes(self, message: Message) -> int:
        return message.tensor.numel() * message.tensor.element_size() * self._width


@dataclass(frozen=True)
class _Awaited:
    ring: Recorder
    number: int

    def wait(self) -> None:
        self.ring.events.append(Wait(self.number))


def record(case: RingCase) -> tuple[Records, Records]:
    """What each rank does in the forward, and in the backward."""
    passes = []
    for rank in range(case.ranks):
        ring = Recorder(case.ranks, rank, case.head_dim)
        plan = case.plan(ring)
        shape = (1, plan.layout.shard_length)
        q, k, v = (
            torch.zeros(*shape, heads, 1, dtype=torch.bfloat16, requires_grad=True)
            for heads in (case.heads, case.kv_heads, case.kv_heads)
        )
        recording = _writing_down(ring, plan)
        with kernels_wrapped(lambda _, recording=recording: recording):  # type: ignore[misc]
            out = ring_attention(q, k, v, plan, kernel="blocked")
        forward = ring.taken()
        torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
        passes.append((forward, ring.taken()))
    return [forward for forward, _ in passes], [backward for _, backward in passes]


def _writing_down(ring: Recorder, plan: AttentionPlan) -> Kernel:
    """A kernel that notes its launches in ring.events."""
    hop_of = {id(intervals): s for s, (hop,) in enumerate(plan.hops) for intervals in hop.intervals}

    def note(q: Tensor, intervals: Intervals) -> None:
        pairs = int((intervals.end - intervals.start).sum()) * (len(q) // len(intervals.start)) * q.shape[2]
        ring.events.append(Compute(hop_of[id(intervals)], pairs))

    def forward(q, k, v, intervals, *, carry, out, **options) -> Partial:
        note(q, intervals)
        state = Partial.identity(q) if carry is None else carry
        return state if out is None else Partial(out, state.lse)

    def backward(dout, q, k, v, lse, delta, intervals, **options) -> None:
        note(q, intervals)

    return Kernel(
        "recorder", forward, blocked.delta, blocked.center, backward, blocked.round_into, lambda q, k, softcap: None
    )  # fmt: skip
