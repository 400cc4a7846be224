"""Who sends what to whom: the two verbs that a ring needs, over processes or inside one.

    transfer = ring.exchange(outgoing, incoming, about)     # messages between ranks set off
    transfer.wait()                                         # incoming is there, outgoing may be overwritten

`ProcessRing` has one rank in each process and talks over NCCL or gloo. `Loopback` has all ranks in one process, for
tests and for measuring one GPU's share of a ring: its tensors hold the ranks side by side. Code written against
`Ring` loops over `ring.local`, the ranks that live here, and runs on either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.ring.watch import Pending, Watch


@dataclass(frozen=True, eq=False)
class Message:
    """A contiguous tensor on its way between two ranks of the ring; on the receiving side, where it is to go."""

    source: int
    destination: int
    tensor: Tensor


class Transfer(Protocol):
    """An exchange under way."""

    def wait(self) -> None:
        """Return when incoming can be read and outgoing overwritten (on CUDA: by work queued after this call)."""


class Ring(Protocol):
    """Ranks 0..size-1 in a circle; `local` are those of this process, `device` is where their tensors live."""

    size: int
    local: tuple[int, ...]
    device: torch.device

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], about: str) -> Transfer:
        """Set off messages from local ranks, and receive those to local ranks.

        Both sides of a message name it in the same exchange, counting exchanges from the start, and several between the
        same two ranks in the same order. No tensor may be written before the wait. about: layer, pass and hop, for who
        has to be told.
        """


class Loopback:
    """All ranks of a ring in this process. A batch of B sequences is a tensor whose dim 0 holds ranks x B."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        if size < 1:
            raise ValueError(f"a ring has 1 rank or more, got size={size}")
        self.size = size
        self.local = tuple(range(size))
        self.device = torch.device(device)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], about: str) -> Transfer:
        """Copy at once, in the order of the current stream; whatever stream waits, waits for that."""
        sent: dict[tuple[int, int], list[Tensor]] = {}
        for message in outgoing:
            sent.setdefault((message.source, message.destination), []).append(message.tensor)
        for message in incoming:
            message.tensor.copy_(sent[message.source, message.destination].pop(0))
        if left := sorted(pair for pair, tensors in sent.items() if tensors):
            raise ValueError(f"{about}: messages between ranks {left} were sent and not received")
        if self.device.type == "cpu":
            return _Done()
        return _Copied(torch.cuda.current_stream(self.device).record_event())


class ProcessRing:
    """One rank a process, over a torch.distributed group (default: the whole world).

    On NCCL an exchange runs on the communicator's own stream: it waits for what the current stream has queued before
    `exchange`, and makes the current stream (not the host) wait at `wait`. So a kernel launched between the two runs
    beside the transfer. Give the ring a group of its own, or its transfers queue behind other collectives, and one
    whose stream has high priority (`pg_options`), or they queue behind kernels that fill the GPU. A watch, where given,
    is told of every wait.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        watch: Watch | None = None,
    ) -> None:
        self.group: dist.ProcessGroup = group or dist.distributed_c10d._get_default_group()
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.local: tuple[int, ...] = (self.rank,)
        self.device = torch.device(device)
        self.watch = watch

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], about: str) -> Transfer:
        """One batch of sends and receives, in flight until waited for."""
        operations = [
            *(dist.P2POp(dist.isend, m.tensor, group=self.group, group_peer=m.destination) for m in outgoing),
            *(dist.P2POp(dist.irecv, m.tensor, group=self.group, group_peer=m.source) for m in incoming),
        ]
        if not operations:
            return _Done()
        works = dist.batch_isend_irecv(operations)
        return _InFlight(works, self.group, tuple(outgoing), tuple(incoming), self.watch, about, self.device)


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


@dataclass(frozen=True, eq=False)
class _Copied:
    event: torch.cuda.Event

    def wait(self) -> None:
        """Have the current stream wait for the copies."""
        self.event.wait()


@dataclass(frozen=True, eq=False)
class _InFlight:
    works: list[dist.Work]  # one for each message, or on NCCL one for all
    group: dist.ProcessGroup
    outgoing: tuple[Message, ...]
    incoming: tuple[Message, ...]
    watch: Watch | None
    about: str
    device: torch.device

    def wait(self) -> None:
        """Wait for every work of the batch."""
        if self.watch is not None:
            size = sum(m.tensor.numel() * m.tensor.element_size() for m in self.incoming)
            self.watch.wait(self.works, "ring", self.about, self.pending, size, self.device)
            return
        for work in self.works:
            work.wait()

    def pending(self) -> Pending:
        """Whom this waits for: one rank where works are waited for one by one, else all that it concerns."""
        sent = [dist.get_global_rank(self.group, m.destination) for m in self.outgoing]
        coming = [dist.get_global_rank(self.group, m.source) for m in self.incoming]
        if len(self.works) == len(sent) + len(coming):
            one_by_one = [Pending(destinations=(rank,)) for rank in sent] + [Pending((rank,)) for rank in coming]
            unfinished = (p for p, work in zip(one_by_one, self.works, strict=True) if not work.is_completed())
            return next(unfinished, one_by_one[-1])
        return Pending(tuple(dict.fromkeys(coming)), tuple(dict.fromkeys(sent)))
