"""Every access by one stream is ordered after the accesses of other streams that it depends on.

The streams are fake: stream 0, stream 1, a communicator and other GPUs, each with a vector clock. Every access to every
element of every tensor of a layer's forward and backward is checked against the clocks: a race is an access whose
predecessor on another stream is not ordered before it, however the GPU may time them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, Partial, kernels, ring_attention
from ringflash.kernels import Kernel, blocked
from ringflash.ring import execution
from ringflash.ring.message import Message
from ringflash.ring.transport import plain_buffers
from ringflash.ring.watchdog import Label
from tests.ring.cases import idle_kernel

STREAM_0, STREAM_1, COMMUNICATOR, OTHERS = range(4)
VIEWS = ("alias", "as_strided", "chunk", "detach", "empty", "expand", "permute", "reshape", "select", "slice", "split",
         "transpose", "unbind", "unsqueeze", "view")  # fmt: skip


@functools.cache
def places(count: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> np.ndarray:
    """Which of a storage's elements a view holds."""
    return torch.arange(count).as_strided(shape, stride, offset).flatten().numpy()


class Clocks:
    """What each stream has waited for, and which stream last accessed each element."""

    def __init__(self) -> None:
        self.known = np.eye(4, dtype=np.int64)
        self.now = STREAM_0
        self.touched: dict[int, tuple[torch.UntypedStorage, np.ndarray, np.ndarray]] = {}
        self.made: dict[int, int] = {}  # by storage, the stream that touched it first, and gets its memory back
        self.races: list[str] = []

    def tick(self, stream: int) -> None:
        self.known[stream, stream] += 1

    def wait(self, stream: int, moment: np.ndarray) -> None:
        """From now on, the stream comes after that moment of others."""
        self.known[stream] = np.maximum(self.known[stream], moment)

    def access(self, x: torch.Tensor, writes: bool, what: str, stream: int | None = None) -> None:
        """Note an access, and whether one that it must come after is not known to the stream."""
        stream = self.now if stream is None else stream
        storage = x.untyped_storage()
        count = storage.nbytes() // x.element_size()
        if storage._cdata not in self.touched:  # kept alive, so that its address is not given to another
            self.touched[storage._cdata] = (storage, np.zeros((4, count), int), np.zeros((4, count), int))
            self.made[storage._cdata] = stream
        _, reads, written = self.touched[storage._cdata]
        at = places(count, tuple(x.shape), x.stride(), x.storage_offset())
        before = np.maximum(reads[:, at], written[:, at]) if writes else written[:, at]
        if (before > self.known[stream][:, None]).any():
            self.races.append(f"{what} {'writes' if writes else 'reads'} on stream {stream} too early")
        (written if writes else reads)[stream, at] = self.known[stream, stream]

    def let_go(self) -> None:
        """Stream 1 may reuse its memory: note what stream 0 did there that stream 1 does not know to be over."""
        for key, (_, reads, written) in self.touched.items():
            last = max(reads[STREAM_0].max(initial=0), written[STREAM_0].max(initial=0))
            if self.made[key] == STREAM_1 and last > self.known[STREAM_1, STREAM_0]:
                self.races.append("memory of stream 1 is given out while stream 0 uses it")

    # -- what stands for torch's operators, the kernels, the streams and the communicator

    def operator(self, function, arguments: dict[str, object], out: object) -> None:
        """An operator of torch, by its schema."""
        self.tick(self.now)
        changes = False
        for argument in function._schema.arguments:
            given = arguments.get(argument.name)
            for x in given if isinstance(given, (list, tuple)) else [given]:
                if isinstance(x, torch.Tensor):
                    writes = argument.alias_info is not None and argument.alias_info.is_write
                    changes |= writes
                    self.access(x, writes, function._schema.name)
        if not changes:
            for x in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.access(x, True, function._schema.name)

    def kernel(self) -> Kernel:
        """A kernel that touches what a real one does."""

        def forward(q, k, v, intervals, *, carry, out, **options) -> Partial:
            with _disable_current_modes():
                self.tick(self.now)
                state = Partial.identity(q) if carry is None else carry
                if out is not None:
                    self.access(out.zero_(), True, "forward kernel")
                for x in (q, k, v) if carry is None else (q, k, v, carry.out, carry.lse):
                    self.access(x, False, "forward kernel")
                for x in (state.out, state.lse):
                    self.access(x, True, "forward kernel")
            return state

        def backward(dout, q, k, v, lse, delta, intervals, *, dq, dk, dv, center, **options) -> None:
            with _disable_current_modes():
                self.tick(self.now)
                for x in (dout, q, k, v, lse, delta, dq, dk, dv, *([] if center is None else [center])):
                    self.access(x, False, "backward kernel")
                for x in (dq, dk, dv):
                    self.access(x, True, "backward kernel")

        def delta(out, dout) -> torch.Tensor:
            return (out * dout).sum(-1).transpose(1, 2).float().contiguous()

        return idle_kernel(forward=forward, delta=delta, center=blocked.center, backward=backward)

    def streams(self, count: int, device: torch.device) -> FakeStreams:
        return FakeStreams(self, count)


class Watching(TorchDispatchMode):
    def __init__(self, clocks: Clocks) -> None:
        super().__init__()
        self.clocks = clocks

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::").strip("_")
        if name not in VIEWS and not name.startswith("empty"):
            names = [argument.name for argument in function._schema.arguments]
            with _disable_current_modes():
                self.clocks.operator(function, dict(zip(names, args, strict=False)) | (kwargs or {}), out)
        return out


class FakeStreams:
    """Streams, as edges between clocks."""

    def __init__(self, clocks: Clocks, count: int) -> None:
        self.clocks = clocks

    def switch(self, stream: int) -> None:
        self.clocks.now = stream

    def fork(self) -> None:
        self.clocks.wait(STREAM_1, self.clocks.known[STREAM_0])
        self.clocks.tick(STREAM_0)

    def join(self) -> None:
        self.clocks.wait(STREAM_0, self.clocks.known[STREAM_1])
        self.clocks.tick(STREAM_1)

    def __enter__(self) -> FakeStreams:
        return self

    def __exit__(self, *error: object) -> None:
        self.clocks.now = STREAM_0


class Waited:
    """A transfer that is done at a moment."""

    def __init__(self, clocks: Clocks, moment: np.ndarray) -> None:
        self.clocks, self.moment = clocks, moment

    def wait(self) -> None:
        self.clocks.wait(self.clocks.now, self.moment)


class FakeLoopback(Loopback):
    """A Loopback whose copies are waited for as on a GPU."""

    def __init__(self, clocks: Clocks, size: int, rank: int) -> None:
        super().__init__(size)
        self.clocks = clocks

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Waited:
        super().exchange(outgoing, incoming, label)
        moment = self.clocks.known[self.clocks.now].copy()
        self.clocks.tick(self.clocks.now)
        return Waited(self.clocks, moment)


class FakeNccl:
    """One rank of a ring on NCCL: the communicator waits for what the current stream has queued."""

    streams = (COMMUNICATOR,)  # of an exchange; the last one receives

    def __init__(self, clocks: Clocks, size: int, rank: int) -> None:
        self.clocks, self.size, self.local, self.device = clocks, size, (rank,), torch.device("cpu")

    def receive_buffers(self, label):
        return plain_buffers(self.device)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Waited:
        clocks = self.clocks
        with _disable_current_modes():
            for stream in self.streams:
                clocks.wait(stream, clocks.known[clocks.now])
                clocks.tick(stream)
            clocks.tick(clocks.now)
            for message in outgoing:
                clocks.access(message.tensor, False, f"send {label}", COMMUNICATOR)
            for message in incoming:
                message.tensor.zero_()
                clocks.access(message.tensor, True, f"receive {label}", self.streams[-1])
        return Waited(clocks, clocks.known[[*self.streams]].max(axis=0))


class FakePeers(FakeNccl):
    """One rank whose memory others write into, as soon as they may, and which is the same in every pass."""

    streams = (COMMUNICATOR, OTHERS)

    def __init__(self, clocks: Clocks, size: int, rank: int) -> None:
        super().__init__(clocks, size, rank)
        self.blocks: list[torch.Tensor] = []

    def receive_buffers(self, label):
        taken = itertools.count()

        def allocate(shape, dtype):
            number = next(taken)
            if number == len(self.blocks):
                self.blocks.append(torch.empty(4096, dtype=torch.uint8))
            return self.blocks[number][: math.prod(shape) * dtype.itemsize].view(dtype).view(*shape)

        return nullcontext(allocate)


def races(
    monkeypatch, make_ring, ranks: int, rank: int, mask_of, layout: str, kv_heads: int, sink: bool = False
) -> list[str]:
    """Those of two layers, forward, and backward twice."""
    clocks = Clocks()
    monkeypatch.setattr(execution, "Streams", clocks.streams)
    monkeypatch.setattr(kernels, "select", lambda *args: clocks.kernel())
    length = 16 * ranks
    plan = AttentionPlan(mask_of(length), Layout.named(layout, length, ranks), make_ring(clocks, ranks, rank))
    with Watching(clocks):
        x = torch.randn(len(plan.ring.local), 16, 2 * kv_heads, 4, dtype=torch.float16).requires_grad_()
        h = x
        for layer in range(2):
            k, v = h[:, :, :kv_heads] * 1.0, h[:, :, kv_heads:] * 2.0
            h = ring_attention(h * 1.0, k, v, plan, layer=layer, sink=torch.zeros(2 * kv_heads) if sink else None)
            clocks.let_go()
        for keep in (True, False):
            torch.autograd.grad(h, x, torch.ones_like(h), retain_graph=keep)
    return clocks.races


MASKS = {
    "causal": IntervalMask.causal,
    "full": IntervalMask.full,
    "window": lambda length: IntervalMask.window(length, left=length // 3),
    "documents": lambda length: (
        IntervalMask.causal(length) & IntervalMask.documents([length // 3, length // 2], length)
    ),
}


@pytest.mark.parametrize("make_ring", [FakeNccl, FakePeers, FakeLoopback])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_no_stream_reads_or_overwrites_what_another_is_not_done_with(monkeypatch, make_ring, mask, layout):
    for ranks, kv_heads in ((2, 2), (3, 1), (4, 2)):
        for rank in range(1 if make_ring is FakeLoopback or mask == "full" else ranks):  # then all do the same
            found = races(monkeypatch, make_ring, ranks, rank, MASKS[mask], layout, kv_heads)
            assert found == [], f"rank {rank} of {ranks}, {kv_heads} KV heads"


@pytest.mark.parametrize("rank", range(3))
def test_no_stream_races_where_a_sink_is_merged_after_both(monkeypatch, rank):
    assert races(monkeypatch, FakeNccl, 3, rank, IntervalMask.causal, "zigzag", 2, sink=True) == []


def test_memory_that_stream_1_reuses_too_early_is_found(monkeypatch):
    """Without the fork after the last read, memory is reused too early."""
    fork, calls = FakeStreams.fork, itertools.count(1)
    monkeypatch.setattr(FakeStreams, "fork", lambda self: None if next(calls) % 4 == 0 else fork(self))
    found = races(monkeypatch, FakeNccl, 3, 1, IntervalMask.causal, "zigzag", 2)
    assert "memory of stream 1 is given out while stream 0 uses it" in found


@pytest.mark.parametrize("edge", ["fork", "join"])
def test_a_missing_edge_between_streams_is_found(monkeypatch, edge):
    monkeypatch.setattr(FakeStreams, edge, lambda self, *args: None)
    assert races(monkeypatch, FakeNccl, 3, 1, IntervalMask.causal, "zigzag", 2) != []


def test_a_transfer_that_is_not_waited_for_is_found(monkeypatch):
    monkeypatch.setattr(Waited, "wait", lambda self: None)
    for make_ring in (FakeNccl, FakePeers, FakeLoopback):
        assert races(monkeypatch, make_ring, 3, 1, IntervalMask.causal, "zigzag", 2) != []
