"""Transports: the three calls that a ring needs, between processes or inside one.

    with ring.receive_buffers(label) as allocate:
        x = allocate(shape, dtype)                              # memory in which messages may arrive
        transfer = ring.exchange(outgoing, incoming, label)     # messages between ranks start
        transfer.wait()                                         # incoming has arrived, outgoing may be overwritten

`ProcessRing` has one rank in each process. GPUs of one machine copy into one another's memory (`ring.copy_engine`),
others use NCCL, processes without a GPU use gloo. `Loopback` has all ranks in one process, for tests and for measuring
one GPU's share of a ring: its tensors hold the ranks side by side. Code written against `Ring` loops over `ring.local`,
the ranks that live here, and runs on either.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import get_worker_info

from ringflash.ring.copy_engine import CopyEngine, PendingWork, copy_engine_of
from ringflash.ring.streams import current_stream
from ringflash.ring.watchdog import Label, Pending, Watchdog

TRANSPORTS = ("auto", "nccl")
COPY_ENGINES = "copy engines"
Allocate = Callable[[Sequence[int], torch.dtype], Tensor]  # makes a tensor


@dataclass(frozen=True, eq=False)
class Message:
    """A contiguous tensor that one rank of the ring sends to another; on the receiving side, where it is written.

    target: on the sending side, the place in this rank's receive buffers that stands for the one in the receiver's. A
    ring whose receive buffers are ordinary memory does not need it.
    """

    source: int
    destination: int
    tensor: Tensor
    target: Tensor | None = None


class Transfer(Protocol):
    """An exchange that has started."""

    def wait(self) -> None:
        """Return when incoming can be read and outgoing overwritten (on CUDA: by work queued after this call)."""


class Ring(Protocol):
    """Ranks 0..size-1 in a circle; `local` are those of this process, `device` is where their tensors live."""

    size: int
    local: tuple[int, ...]
    device: torch.device

    def receive_buffers(self, label: Label) -> AbstractContextManager[Allocate]:
        """For one pass, a function that allocates tensors (shape, dtype) in which messages may arrive.

        All ranks allocate the same sizes in the same order, and use none of them after the pass. label: layer and pass,
        for reports.
        """

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """Start messages from local ranks, and receive those to local ranks.

        Both sides of a message name it in the same exchange, counting exchanges from the start, and several between the
        same two ranks in the same order. No tensor may be written before the wait. label: layer, pass and step, for
        reports.
        """


def plain_buffers(device: torch.device) -> AbstractContextManager[Allocate]:
    """The receive buffers of a ring whose messages may arrive in any memory."""
    return nullcontext(_Anywhere(device).allocate)


@dataclass(frozen=True)
class _Anywhere:
    """Any memory of a device. (torch.compile, which may look in here, follows a method, and not a closure.)"""

    device: torch.device

    def allocate(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


class Loopback:
    """All ranks of a ring in this process. A batch of B sequences is a tensor whose dim 0 holds ranks x B."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        if isinstance(size, bool) or not isinstance(size, (int, Integral)):
            raise TypeError(f"size must be a whole number of ranks, got size={size!r:.100}")
        if size < 1:
            raise ValueError(f"a ring has 1 rank or more, got size={size}")
        self.size = int(size)
        self.local = tuple(range(self.size))
        self.device = torch.device(device)

    def receive_buffers(self, label: Label) -> AbstractContextManager[Allocate]:
        """Memory of torch's allocator."""
        return plain_buffers(self.device)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """Copy at once, in the order of the current stream; whatever stream waits, waits for that."""
        sent: dict[tuple[int, int], list[Tensor]] = {}
        for message in outgoing:
            sent.setdefault((message.source, message.destination), []).append(message.tensor)
        for message in incoming:
            message.tensor.copy_(sent[message.source, message.destination].pop(0))
        if left := sorted(pair for pair, tensors in sent.items() if tensors):
            raise ValueError(f"{label}: messages between ranks {left} were sent and not received")
        if self.device.type == "cpu":
            return _Done()
        return current_stream(self.device).record_event()


class ProcessRing:
    """One rank per process, over a torch.distributed group (default: the whole world).

    On GPUs an exchange runs on a stream of its own: it waits for what the current stream has queued before `exchange`,
    and makes the current stream (not the host) wait at `wait`. So a kernel launched between the two runs beside the
    transfer. transport: with "auto", GPUs of one machine that reach one another's memory copy into it; all others go
    through the group, and with "nccl" these, too. For that, give the ring a group of its own with a stream of high
    priority (`pg_options`): otherwise transfers queue behind other collectives, and behind kernels that fill the GPU.
    The watchdog, where given, records every wait. Copy engines would wait for ever, so without one they have their own,
    with the group's timeout. `carrier` names what carries messages, and why.

    On GPUs all ranks of the group make it together, and rings on several groups in the same order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        watchdog: Watchdog | None = None,
        transport: str = "auto",
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
        self.process = Process.this()
        self.group: dist.ProcessGroup = group or dist.distributed_c10d._get_default_group()
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.local: tuple[int, ...] = (self.rank,)
        self.device = torch.device(device)
        self.watchdog = watchdog
        self.carrier: str = dist.get_backend(self.group)
        self._copy_engine: CopyEngine | None = None
        if transport == "auto" and self.device.type == "cuda" and self.size > 1:
            place = torch.device("cuda", torch.cuda.current_device()) if self.device.index is None else self.device
            engine = copy_engine_of(self.group, place)
            if isinstance(engine, CopyEngine):
                self.carrier, self._copy_engine, self.watchdog = COPY_ENGINES, engine, watchdog or engine.watchdog
            else:
                self.carrier += f", since {engine}"

    def receive_buffers(self, label: Label) -> AbstractContextManager[Allocate]:
        """Memory that the ring's GPUs map; without copy engines, of torch's allocator."""
        if self._copy_engine is None:
            return plain_buffers(self.device)
        assert self.watchdog is not None
        return self._copy_engine.receive_buffers(label, self.watchdog)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """Sends and receives, in flight until waited for. Raises RuntimeError in a fork of this process."""
        self.process.check()
        size = sum(m.tensor.nbytes for m in incoming)
        works = (self._copy_engine.exchange if self._copy_engine else self._through_group)(outgoing, incoming)
        return _InFlight(works, self.watchdog, label, size, self.device) if works else _Done()

    def _through_group(self, outgoing: Sequence[Message], incoming: Sequence[Message]) -> list[PendingWork]:
        """One batch of the group's: a work for each message, or on NCCL one for all."""
        operations = [
            *(dist.P2POp(dist.isend, m.tensor, group=self.group, group_peer=m.destination) for m in outgoing),
            *(dist.P2POp(dist.irecv, m.tensor, group=self.group, group_peer=m.source) for m in incoming),
        ]
        if not operations:
            return []
        works = dist.batch_isend_irecv(operations)
        sent = [dist.get_global_rank(self.group, m.destination) for m in outgoing]
        coming = [dist.get_global_rank(self.group, m.source) for m in incoming]
        if len(works) == len(operations):
            concerned = [Pending(destinations=(rank,)) for rank in sent] + [Pending((rank,)) for rank in coming]
        else:
            concerned = [Pending(tuple(dict.fromkeys(coming)), tuple(dict.fromkeys(sent)))]
        return list(zip(works, concerned, strict=True))


@dataclass(frozen=True)
class Process:
    """The process that joined a group: another one (a fork, a DataLoader's worker) would hang in its collectives."""

    id: int

    @classmethod
    def this(cls) -> Process:
        """The one that runs. Raises RuntimeError in a DataLoader's worker."""
        here = cls(os.getpid())
        here.check()
        return here

    def check(self) -> None:
        """Raise RuntimeError in any other process."""
        if self.id != os.getpid() or get_worker_info() is not None:
            raise RuntimeError(
                f"process {os.getpid()} (a fork, or a DataLoader's worker) cannot exchange anything with the ranks of "
                f"a ring: have workers load whole sequences, and call ring_inputs where the model is called, or set "
                f"num_workers=0 (Trainer: dataloader_num_workers=0)"
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a ring cannot be copied or sent to another process, such as a DataLoader's worker: call ring_inputs where "
            "the model is called, or set num_workers=0 (Trainer: dataloader_num_workers=0)"
        )


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True, eq=False)
class _InFlight:
    works: list[PendingWork]
    watchdog: Watchdog | None
    label: Label
    size: int  # bytes that come
    device: torch.device

    def wait(self) -> None:
        """Wait for every work of the batch."""
        works = [work for work, _ in self.works]
        if self.watchdog is not None:
            self.watchdog.wait(works, "ring", self.label, self.pending, self.size, self.device)
            return
        for work in works:
            work.wait()

    def pending(self) -> Pending:
        """The ranks that this waits for: works are waited for one after another."""
        return next((concerned for work, concerned in self.works if not work.is_completed()), self.works[-1][1])
