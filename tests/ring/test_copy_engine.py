"""Copies arrive where the other rank expects them, whatever the streams' timing; `test_gpus` runs on real GPUs."""

import contextlib
import ctypes
import gc
import io
import math
import random
import socket
import threading
import types
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from ringflash import AttentionPlan, IntervalMask, Layout, ProcessRing, kernels, ring_attention
from ringflash.ring import copy_engine, watchdog
from ringflash.ring.message import Message
from ringflash.ring.watchdog import Label, Watchdog
from tests.ring.cases import idle_kernel

A_PASS = Label("a layer", "forward")


class Noting:
    """One rank, whose receive_buffers has numbered blocks: what it sends and receives, by exchange."""

    def __init__(self, size: int, rank: int) -> None:
        self.size, self.local, self.device = size, (rank,), torch.device("cpu")
        self.blocks: list[torch.Tensor] = []
        self.sizes: list[int] = []
        self.sent: list[list[tuple]] = []
        self.received: list[list[tuple]] = []

    def receive_buffers(self, context):
        self.blocks = []

        def allocate(shape, dtype):
            self.sizes.append(math.prod(shape) * dtype.itemsize)
            self.blocks.append(torch.zeros(shape, dtype=dtype))
            return self.blocks[-1]

        return nullcontext(allocate)

    def place(self, message: Message, x: torch.Tensor) -> tuple:
        """Sender and receiver, the number of the block that receives the message, and the offset in it."""
        storages = [block.untyped_storage()._cdata for block in self.blocks]
        number = storages.index(x.untyped_storage()._cdata)
        offset = x.data_ptr() - self.blocks[number].data_ptr()
        return message.source, message.destination, number, offset, x.nbytes

    def exchange(self, outgoing, incoming, context):
        for message in outgoing:
            assert message.target.shape == message.tensor.shape
        self.sent.append([self.place(m, m.target) for m in outgoing])
        self.received.append([self.place(m, m.tensor) for m in incoming])
        return self

    def wait(self) -> None:
        pass


def noted(mask, layout, rank, kv_heads, batch) -> Noting:
    ring = Noting(layout.ranks, rank)
    plan = AttentionPlan(mask, layout, ring)
    shapes = [(batch, layout.shard_length, heads, 4) for heads in (2 * kv_heads, kv_heads, kv_heads)]
    q, k, v = (torch.zeros(shape, dtype=torch.float16, requires_grad=True) for shape in shapes)
    ring_attention(q, k, v, plan).sum().backward()
    return ring


MASKS = {
    "causal": (IntervalMask.causal, "zigzag"),
    "causal, contiguous": (IntervalMask.causal, "contiguous"),
    "full": (IntervalMask.full, "striped"),
    "window": (lambda n: IntervalMask.window(n, left=n // 10), "contiguous"),
    "documents": (lambda n: IntervalMask.causal(n) & IntervalMask.documents([n // 8, n // 2], n), "zigzag"),
    "documents, balanced": (lambda n: IntervalMask.causal(n) & IntervalMask.documents([n // 8, n // 2], n), "balanced"),
}


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_sent_arrives_in_the_other_ranks_receive_buffers(monkeypatch, name, ranks):
    monkeypatch.setattr(kernels, "select", lambda *args: idle_kernel())
    make, layout = MASKS[name]
    mask = make(64 * ranks)
    layout = Layout.of(layout, mask, ranks) if layout == "balanced" else Layout.named(layout, 64 * ranks, ranks)
    for kv_heads, batch in ((2, 1), (1, 2)):
        rings = [noted(mask, layout, rank, kv_heads, batch) for rank in range(ranks)]
        assert all(ring.sizes == rings[0].sizes for ring in rings)  # so the n-th block is known to all by its number
        for exchange in zip(*(ring.sent for ring in rings), *(ring.received for ring in rings), strict=True):
            sent, received = (
                sorted(place for positions in side for place in positions)
                for side in (exchange[:ranks], exchange[ranks:])
            )
            assert sent == received
        assert any(any(ring.sent) for ring in rings)


# -- the protocol, on streams that advance in any order


QUIET = types.SimpleNamespace(host_wait=lambda label, pending: nullcontext())  # a watchdog


class FakeStream:
    """Work in order. Each piece returns whether it is done or has to wait."""

    def __init__(self, device=None) -> None:
        self.cuda_stream = self
        self.queue: list = []

    def put(self, work) -> None:
        self.queue.append(work)

    def wait_stream(self, other) -> None:
        other.record_event().wait(self)

    def record_event(self):
        event = FakeEvent()
        self.put(event.pass_)
        return event


class FakeEvent:
    """As torch's; wait has the current stream wait."""

    def __init__(self) -> None:
        self.passed = False

    def pass_(self) -> bool:
        self.passed = True
        return True

    def wait(self, stream=None) -> None:
        (stream or Machine.current).put(lambda: self.passed)

    def query(self) -> bool:
        return self.passed


class FakeDriver:
    """Stream memory operations and copies between addresses, which are real ones here."""

    class CUresult:
        CUDA_SUCCESS = 0

    class CUstreamWaitValue_flags:  # noqa: N801
        CU_STREAM_WAIT_VALUE_GEQ = 0

    @staticmethod
    def at(address):
        return ctypes.c_int32.from_address(address)

    def cuStreamWriteValue32(self, stream, address, value, flags):  # noqa: N802
        assert 0 <= value < 2**32

        def write():
            self.at(address).value = value
            return True

        stream.put(write)
        return (0,)

    def cuStreamWaitValue32(self, stream, address, value, flags):  # noqa: N802
        assert 0 <= value < 2**32
        stream.put(lambda: ctypes.c_int32(self.at(address).value - value).value >= 0)
        return (0,)

    def cuMemcpyDtoDAsync(self, into, source, size, stream):  # noqa: N802
        stream.put(lambda: ctypes.memmove(into, source, size) is not None)
        return (0,)


@dataclass(eq=False)
class FakeGroup:
    rank: int
    maps: int = 0


class Machine:
    """GPUs whose streams advance one piece of work at a time, in an order that a test draws."""

    current: FakeStream

    def __init__(self, monkeypatch, size: int) -> None:
        self.size, self.streams = size, []
        self.groups = [FakeGroup(rank) for rank in range(size)]
        self.blocks: list[list[torch.Tensor]] = []  # each of all ranks
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(copy_engine, "current_stream", lambda device: Machine.current)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(copy_engine, "_driver", FakeDriver)
        monkeypatch.setattr(copy_engine.dist, "get_rank", lambda group: group.rank)
        monkeypatch.setattr(copy_engine.dist, "get_world_size", lambda group: size)
        monkeypatch.setattr(copy_engine.dist, "get_global_rank", lambda group, rank: rank)
        self.called: list[str] = []
        monkeypatch.setattr(copy_engine.dist, "barrier", lambda group: self.called.append("barrier"))
        monkeypatch.setattr(copy_engine.dist, "all_gather_object", self.meet)
        monkeypatch.setattr(copy_engine, "_symmetric", lambda: self)

    def stream(self, device=None) -> FakeStream:
        self.streams.append(FakeStream())
        return self.streams[-1]

    # -- what stands for torch.distributed and its symmetric memory

    def meet(self, errors, error, group) -> None:
        self.called.append("meet")
        errors[group.rank] = error

    def empty(self, size, dtype, device) -> torch.Tensor:
        self.called.append("allocate")
        return torch.zeros(size, dtype=dtype)

    def rendezvous(self, memory, group):
        """The memory of all ranks, in which this rank's is the one given."""
        self.called.append("map")
        number, group.maps = group.maps, group.maps + 1
        if number == len(self.blocks):
            self.blocks.append([torch.zeros(len(memory), dtype=torch.uint8) for _ in range(self.size)])
        everywhere = self.blocks[number]
        memory.set_(everywhere[group.rank].untyped_storage())
        return types.SimpleNamespace(buffer_ptrs=[x.data_ptr() for x in everywhere])

    def run(self, seed: int) -> bool:
        """Advance all streams as far as they can, some far ahead of others. Returns whether all are done."""
        draw = random.Random(seed)
        while left := [stream for stream in self.streams if stream.queue]:
            if draw.random() < 0.1:
                draw.shuffle(self.streams)
            moved = next((stream for stream in left if stream.queue[0]()), None)
            if moved is None:
                return False
            moved.queue.pop(0)
        return True


def passed_on(machine: Machine, exchanges: int, first_count: int = 0) -> list[str]:
    """Have every rank send numbers on in two passes, and note those that are not what was sent."""
    wrong: list[str] = []
    for group in machine.groups:
        Machine.current = machine.stream()
        peer = copy_engine.CopyEngine(group, torch.device("cpu"))
        peer._sent, peer._received = [first_count] * machine.size, [first_count] * machine.size
        peer._flags.memory.view(torch.int32).fill_(ctypes.c_int32(first_count).value)
        for _ in range(2):
            run_a_pass(machine, peer, exchanges, wrong)
    return wrong


def run_a_pass(machine: Machine, peer: copy_engine.CopyEngine, exchanges: int, wrong: list[str]) -> None:
    """On streams that no pass before was on, which take turns, as in the backward.

    What arrives with one exchange is read and then overwritten for the next of the same stream.
    """
    rank, streams = peer.rank, [machine.stream(), machine.stream()]
    after, before = (rank + 1) % machine.size, (rank - 1) % machine.size
    Machine.current = streams[0]
    with peer.receive_buffers(A_PASS, QUIET) as allocate:
        here = [[allocate((4,), torch.int64) for _ in range(2)] for _ in streams]
        streams[1].wait_stream(streams[0])
        for n in range(exchanges):
            stream = n % 2
            Machine.current = streams[stream]
            mine, into = here[stream][n // 2 % 2], here[stream][(n // 2 + 1) % 2]

            def fill(mine=mine, number=n * machine.size + rank) -> bool:
                mine.fill_(number)
                return True

            def look(into=into, number=n * machine.size + before) -> bool:
                if into.tolist() != [number] * 4:
                    wrong.append(f"{into.tolist()} for {number}")
                return True

            streams[stream].put(fill)
            for work, _ in peer.exchange([Message(rank, after, mine, into)], [Message(before, rank, into)]):
                work.wait()
            streams[stream].put(look)
        streams[0].wait_stream(streams[1])
        Machine.current = streams[0]


@pytest.mark.parametrize("size", [2, 3, 5])
@given(seed=st.integers(0, 2**32), exchanges=st.integers(1, 9), count=st.sampled_from([0, 2**31 - 3, 2**32 - 3]))
def test_in_whatever_order_streams_advance_all_arrives_and_nothing_is_overwritten(size, seed, exchanges, count):
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = Machine(monkeypatch, size)
        wrong = passed_on(machine, exchanges, count)
        assert machine.run(seed)
        assert wrong == []


@pytest.fixture
def machine(monkeypatch):
    machine = Machine(monkeypatch, 2)
    Machine.current = machine.stream()
    return machine


@pytest.fixture
def alone(machine):
    """A rank of two."""
    return copy_engine.CopyEngine(machine.groups[0], torch.device("cpu"))


def test_all_ranks_have_come_before_memory_is_mapped_in_a_pass(machine, alone):
    """Mapping waits for the other ranks while it holds the GIL, so that nothing could report a missing rank."""
    for _ in range(2):
        with alone.receive_buffers(A_PASS, QUIET) as allocate:
            allocate((4,), torch.float32)
            allocate((4,), torch.float32)
    assert machine.called == ["allocate", "meet", "map", "barrier"] + 2 * ["allocate", "meet", "map"]


def test_a_rank_without_memory_is_named_on_all_ranks_and_none_maps(machine, alone, monkeypatch):
    given_back = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    monkeypatch.setattr(machine, "empty", mock.Mock(side_effect=RuntimeError("CUDA out of memory")))
    told = r"rank 0 on .* has no memory that its ring can map \(CUDA out of memory\); transport='nccl'"
    with pytest.raises(RuntimeError, match=told), alone.receive_buffers(A_PASS, QUIET) as allocate:
        allocate((4,), torch.float32)
    assert given_back
    memory = torch.zeros(32768, dtype=torch.uint8)
    machine.empty.side_effect = [RuntimeError("CUDA out of memory"), torch.zeros(512, dtype=torch.uint8), memory]
    with alone.receive_buffers(A_PASS, QUIET) as allocate:  # there was, once torch's allocator gave some back
        allocate((4,), torch.float32)
    monkeypatch.setattr(
        copy_engine.dist, "all_gather_object", lambda errors, error, group: errors.__setitem__(1, "full")
    )
    with (
        pytest.raises(RuntimeError, match=r"rank 1 on .* \(full\)"),
        alone.receive_buffers(A_PASS, QUIET) as allocate,
    ):
        allocate((8192,), torch.float32)


def test_memory_is_kept_from_pass_to_pass_and_the_smallest_that_fits_is_taken(alone):
    with alone.receive_buffers(A_PASS, QUIET) as allocate:
        large, small = allocate((8, 512), torch.float32), allocate((2,), torch.float16)
    with alone.receive_buffers(A_PASS, QUIET) as allocate:
        assert allocate((2,), torch.bfloat16).data_ptr() == small.data_ptr()
        assert allocate((512,), torch.uint8).data_ptr() == large.data_ptr()
        assert allocate((1,), torch.uint8).data_ptr() not in {large.data_ptr(), small.data_ptr()}


def test_passes_that_grow_keep_no_more_blocks_than_one_takes(alone):
    for length in (*range(1, 40), *range(40, 0, -1)):
        with alone.receive_buffers(A_PASS, QUIET) as allocate:
            wanted = [(100 * length,), (100 * length,), (200 * length,)]
            made = [allocate(shape, torch.float32) for shape in wanted]
        assert [tuple(x.shape) for x in made] == wanted
        assert len({x.data_ptr() for x in made}) == 3
        assert len(alone._blocks) == 3
        assert sum(b.memory.numel() for b in alone._blocks) <= 4 * 400 * 40 * 9 / 8 + 3 * 512


def test_a_pass_inside_another_is_refused(alone):
    with (
        pytest.raises(RuntimeError, match="layer 2, forward, inside layer 1, backward: a ring's ranks run its passes"),
        alone.receive_buffers(Label("layer 1", "backward"), QUIET),
        alone.receive_buffers(Label("layer 2", "forward"), QUIET),
    ):
        pass


def fail(alone, label, exchanging):
    with alone.receive_buffers(label, QUIET) as allocate:
        place = allocate((4,), torch.float32)
        if exchanging:
            alone.exchange([Message(0, 1, place, place)], [])
        raise ArithmeticError


def test_after_an_error_passes_run_only_if_nothing_was_exchanged(alone):
    """Messages in flight arrive at any time, in memory that the next pass may use."""
    for label, exchanging in ((Label("layer 1", "forward"), False), (Label("layer 2", "forward"), True)):
        with pytest.raises(ArithmeticError):
            fail(alone, label, exchanging)
    with pytest.raises(RuntimeError, match="layer 3, forward: its ranks no longer agree since an error in layer 2"):
        fail(alone, Label("layer 3", "forward"), False)


def test_sizes_are_rounded_to_an_eighth_of_a_power_of_two():
    for size, expected in ((1, 512), (512, 512), (513, 1024), (2**27, 2**27), (2**27 + 1, 2**27 + 2**24)):
        assert copy_engine._rounded(size) == expected


def test_messages_whose_place_no_other_rank_knows_are_refused(alone):
    elsewhere = torch.zeros(4)
    with alone.receive_buffers(A_PASS, QUIET) as allocate:
        place = allocate((4,), torch.float32)
        for outgoing, incoming in (
            ([Message(0, 1, place)], []),
            ([Message(0, 1, place, elsewhere)], []),
            ([], [Message(1, 0, elsewhere)]),
        ):
            with pytest.raises(ValueError, match="must be one of the running pass's receive buffers"):
                alone.exchange(outgoing, incoming)
    with pytest.raises(ValueError, match="running pass"):
        alone.exchange([Message(0, 1, elsewhere, place)], [])


class OwnMemory:
    """Memory that is this rank's alone."""

    def empty(self, size, dtype, device):
        return torch.zeros(size, dtype=dtype)

    def rendezvous(self, memory, group):
        return types.SimpleNamespace(buffer_ptrs=[memory.data_ptr()] * 2)


def with_one_rank_that_never_maps_memory():
    """The report of a rank that waits for the other one in a pass that first needs memory."""
    said, ended, rank = io.StringIO(), threading.Event(), dist.get_rank()
    guard = Watchdog(1.0, rank, end=ended.set)
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stderr(said):
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(copy_engine, "current_stream", lambda device: FakeStream())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        monkeypatch.setattr(watchdog, "EXIT_DELAY", 0.1)
        monkeypatch.setattr(copy_engine, "_symmetric", OwnMemory)
        peer = copy_engine.CopyEngine(dist.distributed_c10d._get_default_group(), torch.device("cpu"))
        store = dist.distributed_c10d._get_default_store()
        if rank == 0:
            threading.Thread(target=ask_in_vain, args=(peer, guard), daemon=True).start()
            assert ended.wait(60)
            store.set("told", "1")
        store.wait(["told"])
    guard.close()
    return said.getvalue().strip()


def ask_in_vain(peer, guard):
    with (
        contextlib.suppress(RuntimeError),
        peer.receive_buffers(Label("layer 3", "backward"), guard) as allocate,
    ):  # it breaks when the test is over
        allocate((4,), torch.float32)


@pytest.mark.ranks
def test_a_rank_that_never_maps_memory_is_reported(ranks):
    first, second = ranks.run(with_one_rank_that_never_maps_memory, 2)
    assert first.startswith(
        "ringflash: rank 0, step 0, layer 3, backward, memory for messages: waits for rank 1 since "
    )
    assert second == ""


class Mapped(copy_engine.CopyEngine):
    """Without memory."""

    made = 0

    def __init__(self, group, device) -> None:
        Mapped.made += 1
        self._weak_group, self.device = weakref.ref(group), device


def rings_made_each_step():
    """How many engines are made, what carries messages, and whether a ring without a watchdog gets one with a limit."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(copy_engine, "CopyEngine", Mapped)
        monkeypatch.setattr(copy_engine, "_timeout", lambda group, device: 1200.0)
        monkeypatch.setattr(copy_engine, "refusal", lambda group, device: None)
        guard = Watchdog(60.0)
        rings = [ProcessRing(device="cuda:0", watchdog=given) for given in (None, None, guard)]
        found = Mapped.made, {ring.carrier for ring in rings}, [ring.watchdog.limit for ring in rings]
        own = rings[0].watchdog
        assert own is rings[1].watchdog
        other = ProcessRing(device="cuda:0", transport="nccl")
        assert (other.watchdog, other.carrier) == (None, "gloo")
        copy_engine._known.clear()
        del rings
        gc.collect()
        assert own._closed.is_set()
        guard.close()
    return found


@pytest.mark.ranks
def test_rings_constructed_in_each_step_share_memory_and_none_waits_forever(ranks):
    assert ranks.run(rings_made_each_step, 2) == [(1, {"copy engines"}, [1200.0, 1200.0, 60.0])] * 2


def ring_that_cannot():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(copy_engine, "refusal", lambda group, device: "the ring's ranks are on 2 machines")
        ring = ProcessRing(device="cuda:0")
        copy_engine._known.clear()
    return ring.carrier, ring.watchdog


@pytest.mark.ranks
def test_a_ring_whose_ranks_cannot_be_peers_says_why(ranks):
    assert ranks.run(ring_that_cannot, 2) == [("gloo, since the ring's ranks are on 2 machines", None)] * 2


def test_a_transport_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="transport must be one of auto, nccl, got 'mpi'"):
        ProcessRing(transport="mpi")


def refusals(machines, indices, reached, seen=2):
    """The reasons why the ranks of a gloo group have no copy engine."""
    rank = dist.get_rank()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(socket, "gethostname", lambda: machines[rank])
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other in reached)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
        monkeypatch.setattr(copy_engine, "_driver", FakeDriver)
        group = dist.distributed_c10d._get_default_group()
        return copy_engine.refusal(group, torch.device("cuda", indices[rank]))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("machines", "indices", "reached", "expected"),
    [
        ("aa", (0, 1), (0, 1), None),
        ("ab", (0, 0), (0, 1), "the ring's ranks are on 2 machines"),
        ("aa", (0, 0), (0, 1), "the ring's processes cannot see one another's GPUs"),
        ("aa", (0, 1), (0,), "GPU 0 does not reach the memory of GPU 1"),
    ],
)
def test_ranks_that_cannot_be_peers_agree_on_why(ranks, machines, indices, reached, expected):
    assert ranks.run(refusals, 2, machines, indices, reached) == [expected] * 2


def test_what_one_rank_cannot_is_a_reason_and_no_error_for_which_others_would_wait(monkeypatch):
    def missing():
        raise OSError("libcuda.so.1 is not there")

    one, both = torch.device("cuda", 0), [0, 1]
    monkeypatch.setattr(copy_engine, "_driver", FakeDriver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert copy_engine._own_refusal(one, both) == "the process of GPU 0 does not see GPU 1"
    monkeypatch.setattr(copy_engine, "_driver", missing)
    assert copy_engine._own_refusal(one, both) == "a library does not load (libcuda.so.1 is not there)"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert copy_engine._own_refusal(one, both) == "NCCL_P2P_DISABLE is set"
