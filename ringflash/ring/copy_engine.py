"""CopyEngine: GPUs of one machine write into each other's memory with their copy engines.

NCCL moves data with a kernel. An attention kernel fills all SMs, so NCCL's kernel cannot start until the first programs
of attention end. While NCCL's kernel waits for its neighbour, it holds SMs that attention could use. A copy engine
needs no SM, starts at once, and is faster over NVLink. The n-th exchange that has messages from rank a to rank b:

    b, freeing           free: write n to a's flag
    a, copying                     wait for flag of b, n | copy to b | here: write n to b's flag
    b, current stream                                                            wait for flag of a, n | read

The GPU's front end writes flags and waits for them (stream memory operations), without a kernel and without the host.
Receive buffers are symmetric memory: all ranks allocate tensors of the same sizes in the same order, so an offset in
one rank's buffer is the same offset in any other's. Blocks are reused across passes. If a pass needs a larger block
than all before it, as in the first steps of a run, the hosts of the ranks wait for each other.

The memory is mapped by PyTorch: https://docs.pytorch.org/docs/stable/symmetric_memory.html. The flags are described in
section 6.18 of the CUDA driver's manual; their comparison wraps around, so n may exceed 32 bits.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.ring.message import Message
from ringflash.ring.streams import current_stream
from ringflash.ring.watchdog import Label, Pending, Watchdog, Work

PendingWork = tuple[Work, Pending]  # a work, and the rank that it waits for
_FREE, _HERE = 0, 1  # a flag per other rank and kind: its target is free; its message is here


class CopyEngine:
    """One rank of a ring whose GPUs reach each other's memory. All ranks construct one, and run the same passes.

    Raises RuntimeError if the GPUs' memory cannot be mapped.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._weak_group = weakref.ref(group)  # `_known` keeps an engine for as long as there is a group
        self.device = device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._global_ranks = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self._blocks: list[_Block] = []
        self._taken: dict[int, _Block] = {}  # by address, in the pass that runs
        self._running: Label | None = None  # that pass
        self._broken: Label | None = None  # a pass that ended in an error, after it had exchanged something
        self._watchdog: Watchdog | None = None  # of that pass's ring
        self._over: torch.cuda.Event | None = None  # the last pass
        self._sent, self._received = [0] * self.size, [0] * self.size  # exchanges, by rank
        # Exchanges of both streams go through these in the order in which they are numbered.
        self._freeing, self._copying = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._flags = self._map(2 * self.size * 4)
        self._flags.memory.zero_()
        torch.cuda.synchronize(device)
        dist.barrier(group)  # no rank writes a flag before it is 0

    @property
    def group(self) -> dist.ProcessGroup:
        """The ring's group, which the ring keeps alive during a pass."""
        group = self._weak_group()
        assert group is not None
        return group

    @functools.cached_property
    def watchdog(self) -> Watchdog:
        """A watchdog for rings without one, with the group's timeout: otherwise a wait would never end."""
        watchdog = Watchdog(
            _timeout(self.group, self.device), dist.get_rank(), dist.distributed_c10d._get_default_store()
        )
        weakref.finalize(self, watchdog.close)
        return watchdog

    @contextlib.contextmanager
    def receive_buffers(
        self, label: Label, watchdog: Watchdog
    ) -> Iterator[Callable[[Sequence[int], torch.dtype], Tensor]]:
        """A function for one pass that allocates receive buffers; all ranks call it with the same sizes.

        Raises RuntimeError for a pass inside another pass, and after a pass that failed when it had already exchanged
        something: its messages may still arrive at any time, and the ranks' counts may differ.
        """
        if self._running is not None:
            raise RuntimeError(f"{label}, inside {self._running}: a ring's ranks run its passes one after another")
        if self._broken is not None:
            raise RuntimeError(f"{label}: its ranks no longer agree since an error in {self._broken}; restart them")
        if self._over is not None:
            self._over.wait(current_stream(self.device))
        self._running, self._watchdog = label, watchdog
        exchanged = [*self._sent, *self._received]
        try:
            yield self._tensor
        except BaseException:
            self._broken = label if exchanged != [*self._sent, *self._received] else None
            raise
        finally:
            self._running, self._taken = None, {}
            self._over = current_stream(self.device).record_event()

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message]) -> list[PendingWork]:
        """Start messages whose targets are in the receive buffers of the running pass."""
        here = current_stream(self.device)
        works: list[PendingWork] = []
        for message in incoming:
            self._in_receive_buffers(message.tensor)
        if incoming:
            self._freeing.wait_stream(here)
        for source in dict.fromkeys(m.source for m in incoming):
            self._received[source] += 1
            _write(self._freeing, self._flag(source, _FREE, self.rank), self._received[source])
            arrival = _Arrival(self._flag(self.rank, _HERE, source), self._received[source], self.device)
            works.append((arrival, Pending(sources=(self._global_ranks[source],))))
        if outgoing:
            self._copying.wait_stream(here)
        for destination in dict.fromkeys(m.destination for m in outgoing):
            self._sent[destination] += 1
            _wait(self._copying, self._flag(self.rank, _FREE, destination), self._sent[destination])
            for message in outgoing:
                if message.destination == destination:
                    self._copy(message)
            _write(self._copying, self._flag(destination, _HERE, self.rank), self._sent[destination])
            works.append(
                (
                    _Copied(self._copying.record_event(), self.device),
                    Pending(destinations=(self._global_ranks[destination],)),
                )
            )
        return works

    def _copy(self, message: Message) -> None:
        x, target = message.tensor, self._in_receive_buffers(message.target)
        into = self._taken[_storage(target)].addresses[message.destination] + target.data_ptr() - _storage(target)
        _done(_driver().cuMemcpyDtoDAsync(into, x.data_ptr(), x.nbytes, self._copying.cuda_stream))

    def _in_receive_buffers(self, x: Tensor | None) -> Tensor:
        if x is None or _storage(x) not in self._taken:
            raise ValueError("the target of a message between GPUs must be one of the running pass's receive buffers")
        return x

    def _tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in the smallest free block that is large enough, or in a new block."""
        size = math.prod(shape) * dtype.itemsize
        taken = self._taken.values()
        fitting = [b for b in self._blocks if b not in taken and b.memory.numel() >= size]
        if not fitting:
            self._free_largest()
            fitting = [self._map(_rounded(size))]
            self._blocks += fitting
        block = min(fitting, key=lambda b: b.memory.numel())
        self._taken[_storage(block.memory)] = block
        return block.memory[:size].view(dtype).view(*shape)

    def _free_largest(self) -> None:
        """Free the largest block not taken, which is too small: there are never more blocks than a pass takes."""
        left = [b for b in self._blocks if b not in self._taken.values()]
        if left:
            with self._host_wait():  # no rank writes to it any more: every pass waits for its messages
                torch.cuda.synchronize(self.device)
            self._blocks.remove(max(left, key=lambda b: b.memory.numel()))

    def _map(self, size: int) -> _Block:
        """Memory that all ranks map. All ranks call this, and their hosts wait for each other."""
        memory, error = self._allocate(size)
        self._raise_on_all(error)
        # rendezvous() also blocks on all ranks, but holds the GIL: the watchdog could not report a missing rank.
        addresses = tuple(_symmetric().rendezvous(memory, self.group).buffer_ptrs)
        if addresses[self.rank] != memory.data_ptr():  # type: ignore[union-attr]
            raise RuntimeError("PyTorch's symmetric memory does not begin where its tensor does")
        return _Block(memory, addresses)  # type: ignore[arg-type]

    def _allocate(self, size: int) -> tuple[Tensor | None, str | None]:
        """Memory, or why there is none. It is not from torch's allocator, whose cache may have to be emptied first."""
        error = None
        for _ in range(2):
            try:
                with torch.inference_mode(False):  # training writes to it too, even if an evaluation comes first
                    return _symmetric().empty(size, dtype=torch.uint8, device=self.device), None
            except RuntimeError as refused:
                error = str(refused)
                torch.cuda.empty_cache()
        return None, error

    def _raise_on_all(self, error: str | None) -> None:
        """Let the host wait for all ranks, each with its error or None. On all ranks, any error raises RuntimeError."""
        errors: list[str | None] = [None] * self.size
        with self._host_wait():
            dist.all_gather_object(errors, error, self.group)
        for rank, refused in enumerate(errors):
            if refused is not None:
                raise RuntimeError(
                    f"rank {self._global_ranks[rank]} on {socket.gethostname()} has no memory that its ring can map "
                    f"({refused}); transport='nccl' (parallel.transport=nccl) does without"
                )

    def _host_wait(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the host waits for the other ranks, watched by the watchdog."""
        if self._watchdog is None:
            return contextlib.nullcontext()
        assert self._running is not None
        others = Pending(tuple(self._global_ranks[rank] for rank in range(self.size) if rank != self.rank))
        return self._watchdog.host_wait(self._running.at("memory for messages"), lambda: others)

    def _flag(self, owner: int, kind: int, rank: int) -> int:
        """Address of the flag of a kind that `owner` has for a rank."""
        return self._flags.addresses[owner] + 4 * (kind * self.size + rank)


@dataclass(frozen=True, eq=False)
class _Block:
    memory: Tensor  # uint8, this rank's
    addresses: tuple[int, ...]  # address of each rank's block in this GPU's address space


def _rounded(size: int) -> int:
    """A size rounded up to an eighth of a power of two, so that varying lengths share blocks."""
    step = max(512, 1 << max(0, size.bit_length() - 4))
    return -(-size // step) * step


def _timeout(group: dist.ProcessGroup, device: torch.device) -> float:
    """The timeout of a group's collectives in seconds."""
    return group._get_backend(device).options._timeout.total_seconds()


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Arrival:
    """The arrival of another rank's messages."""

    def __init__(self, flag: int, count: int, device: torch.device) -> None:
        self._flag, self._count, self._device = flag, count, device
        self._waited: torch.cuda.Event | None = None

    def wait(self) -> None:
        here = current_stream(self._device)
        _wait(here, self._flag, self._count)
        self._waited = here.record_event()

    def is_completed(self) -> bool:
        return self._waited is not None and self._waited.query()


@dataclass(frozen=True, eq=False)
class _Copied:
    """The end of this rank's copies to another."""

    event: torch.cuda.Event
    device: torch.device

    def wait(self) -> None:
        self.event.wait(current_stream(self.device))

    def is_completed(self) -> bool:
        return self.event.query()


_known: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, CopyEngine | str]] = weakref.WeakKeyDictionary()


def copy_engine_of(group: dist.ProcessGroup, device: torch.device) -> CopyEngine | str:
    """The group's engine, or why it cannot have one; all ranks call it.

    The result is cached, so that a ring may be constructed again in each step.
    """
    known = _known.setdefault(group, {})
    if device not in known:
        known[device] = refusal(group, device) or CopyEngine(group, device)
    return known[device]


def refusal(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """None, or why the group's GPUs cannot copy into each other's memory; the same on every rank."""
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, (socket.gethostname(), device.index), group)
    machines = {machine for machine, _ in places}
    if len(machines) > 1:
        return f"the ring's ranks are on {len(machines)} machines"
    if len(set(places)) < len(places):
        return "the ring's processes cannot see one another's GPUs"  # each calls its own cuda:0
    reasons: list[Any] = [None] * len(places)
    dist.all_gather_object(reasons, _own_refusal(device, [index for _, index in places]), group)
    return next(filter(None, reasons), None)


def _own_refusal(device: torch.device, indices: list[int]) -> str | None:
    """`refusal` as seen from this rank. It never raises, since the other ranks wait for the answer."""
    if os.environ.get("NCCL_P2P_DISABLE", "0") != "0":
        return "NCCL_P2P_DISABLE is set"
    try:
        _driver()
        _symmetric()
    except Exception as error:  # what loading a library raises is that library's
        return f"a library does not load ({error})"
    for i in indices:
        if i >= torch.cuda.device_count():
            return f"the process of GPU {device.index} does not see GPU {i}"
        if i != device.index and not torch.cuda.can_device_access_peer(device, i):
            return f"GPU {device.index} does not reach the memory of GPU {i}"
    return None


# -- PyTorch's symmetric memory, and the driver's stream memory operations


@functools.cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _symmetric() -> Any:
    from torch.distributed import _symmetric_memory

    return _symmetric_memory


def _write(stream: torch.cuda.Stream, address: int, count: int) -> None:
    """Write the count once all work queued on the stream is done, including copies to other GPUs."""
    _done(_driver().cuStreamWriteValue32(stream.cuda_stream, address, count % 2**32, 0))


def _wait(stream: torch.cuda.Stream, address: int, count: int) -> None:
    """Make the stream wait until the count at the address is this one or a later one."""
    driver = _driver()
    reached = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
    _done(driver.cuStreamWaitValue32(stream.cuda_stream, address, count % 2**32, reached))


def _done(result: tuple[Any, ...]) -> None:
    if (error := result[0]) != _driver().CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver reports {error.name}")
