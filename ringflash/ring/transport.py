"""Transports: the three calls that a ring needs, between processes or within one.

    with ring.receive_buffers(label) as allocate:
        x = allocate(shape, dtype)                              # memory in which messages may arrive
        transfer = ring.exchange(outgoing, incoming, label)     # messages between ranks start
        transfer.wait()                                         # incoming has arrived, outgoing may be overwritten

`ProcessRing` has one rank per process. GPUs of one machine copy into each other's memory (`ring.copy_engine`), other
GPUs use NCCL, and processes without a GPU use gloo. `Loopback` has all ranks in one process, for tests and for
measuring one GPU's share of a ring; its tensors hold the ranks side by side. Code written against `Ring` loops over
`ring.local`, the ranks of this process, and runs on both.
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
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import get_worker_info

from ringflash.ring.copy_engine import CopyEngine, PendingWork, copy_engine_of
from ringflash.ring.message import Message
from ringflash.ring.streams import current_stream
from ringflash.ring.watchdog import Label, Pending, Watchdog

TRANSPORTS = ("auto", "nccl")
COPY_ENGINES = "copy engines"
Allocate = Callable[[Sequence[int], torch.dtype], Tensor]  # makes a tensor


class Transfer(Protocol):
    """An exchange that has started."""

    def wait(self) -> None:
        """Return once incoming can be read and outgoing overwritten (on CUDA: by work queued after this call)."""


class Ring(Protocol):
    """Ranks 0..size-1 in a circle; `local` are the ranks of this process, and their tensors are on `device`."""

    size: int
    local: tuple[int, ...]
    device: torch.device

    def receive_buffers(self, label: Label) -> AbstractContextManager[Allocate]:
        """A function for one pass that allocates tensors (shape, dtype) in which messages may arrive.

        All ranks allocate the same sizes in the same order, and do not use the tensors after the pass. label: layer and
        pass, for reports.
        """

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """Start the messages from local ranks and to local ranks.

        Sender and receiver name a message in the same exchange, counted from the first, and list several messages
        between two ranks in the same order. No tensor may be written before the wait. label: layer, pass and step, for
        reports.
        """


def plain_buffers(device: torch.device) -> AbstractContextManager[Allocate]:
    """The receive buffers of a ring whose messages may arrive in any memory."""
    return nullcontext(_PlainMemory(device).allocate)


@dataclass(frozen=True)
class _PlainMemory:
    """Any memory of a device. It is a class because torch.compile can trace a method, but not a closure."""

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
        """Ordinary memory from torch's allocator."""
        return plain_buffers(self.device)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """Copy at once, on the current stream; the stream that waits then waits for these copies."""
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
    """One rank per process, over a torch.distributed group or a DeviceMesh of one dimension (default: the whole world).

    On GPUs, an exchange runs on a separate stream. It starts after the work that the current stream had queued before
    `exchange`, and `wait` makes the current stream (not the host) wait for it, so a kernel launched between the two
    calls overlaps with the transfer.

    - device: that of the tensors, by default the current GPU if the group has NCCL, otherwise the CPU.
    - watchdog: records every wait, and reports hangs (`Watchdog.of_world`). Without one, copy engines use their own
      watchdog with the group's timeout, since they would otherwise wait forever.
    - transport: "auto" lets GPUs of one machine copy into each other's memory if they can, and uses the group
      otherwise; "nccl" always uses the group. For transfers through the group, give the ring its own group with a
      high-priority stream (`pg_options`): otherwise they queue behind other collectives, and behind kernels that fill
      the GPU.

    `carrier` names what carries the messages, and why.

    On GPUs, all ranks of the group must construct the ring together, and rings on several groups in the same order.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        device: torch.device | str | None = None,
        watchdog: Watchdog | None = None,
        transport: str = "auto",
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(f"transport must be one of {', '.join(TRANSPORTS)}, got {transport!r}")
        self.process = Process.this()
        self.group = process_group(group)
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.local: tuple[int, ...] = (self.rank,)
        self.device = _device_of(self.group) if device is None else torch.device(device)
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
        """Memory that all GPUs of the ring map; without copy engines, ordinary memory from torch's allocator."""
        if self._copy_engine is None:
            return plain_buffers(self.device)
        assert self.watchdog is not None
        return self._copy_engine.receive_buffers(label, self.watchdog)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """Start sends and receives, which are in flight until waited for. Raises RuntimeError in a forked process."""
        self.process.check()
        size = sum(m.tensor.nbytes for m in incoming)
        works = (self._copy_engine.exchange if self._copy_engine else self._through_group)(outgoing, incoming)
        return _InFlight(works, self.watchdog, label, size, self.device) if works else _Done()

    def _through_group(self, outgoing: Sequence[Message], incoming: Sequence[Message]) -> list[PendingWork]:
        """One batch of point-to-point operations of the group: one work per message, or on NCCL one for all."""
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


def process_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup:
    """The process group of a ring's or Ulysses's ranks, given as that, as a mesh, or as None for the whole world.

    Raises TypeError for anything else, ValueError for a mesh of several dimensions and in processes outside the group.
    """
    if group is None:
        return dist.distributed_c10d._get_default_group()
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group must be a mesh of one dimension, such as mesh['cp'], got {group!r:.200}")
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"rank {dist.get_rank()} is not in the group: only the ranks of a group use it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup or a DeviceMesh, got {group!r:.100}")
    return group


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """The current GPU if the group has NCCL, otherwise the CPU."""
    on_gpu = "nccl" in dist.get_backend_config(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@dataclass(frozen=True)
class Process:
    """The process that joined a group. Any other (a fork, a DataLoader worker) would hang in its collectives."""

    id: int

    @classmethod
    def this(cls) -> Process:
        """The current process. Raises RuntimeError in a DataLoader worker."""
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
        """Return at once: there is nothing in flight."""


@dataclass(frozen=True, eq=False)
class _InFlight:
    works: list[PendingWork]
    watchdog: Watchdog | None
    label: Label
    size: int  # bytes received
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
        """The ranks of the first work that has not completed: works are waited for in order."""
        return next((concerned for work, concerned in self.works if not work.is_completed()), self.works[-1][1])
