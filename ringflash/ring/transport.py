"""Who sends what to whom: the two verbs that a ring needs, over processes or inside one.

    transfer = ring.rotate(outgoing, incoming)     # every rank sends to the next and receives from the one before
    transfer.wait()                                # incoming is there, outgoing may be overwritten

`ProcessRing` has one rank in each process and talks over NCCL or gloo. `Loopback` has all ranks in one process, for
tests and for measuring one GPU's share of a ring: its tensors hold the ranks side by side. Code written against
`Ring` loops over `ring.local`, the ranks that live here, and runs on either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Transfer(Protocol):
    """A rotation under way."""

    def wait(self) -> None:
        """Return when incoming can be read and outgoing overwritten (on CUDA: by work queued after this call)."""


class Ring(Protocol):
    """Ranks 0..size-1 in a circle; `local` are those of this process, `device` is where their tensors live."""

    size: int
    local: tuple[int, ...]
    device: torch.device

    def rotate(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> Transfer:
        """Start sending outgoing[i] of local rank i to the next rank, and receiving incoming[i] from the one before.

        All tensors are contiguous and of one shape and dtype. Neither list may be written before the wait.
        """


class Loopback:
    """All ranks of a ring in this process. A batch of B sequences is a tensor whose dim 0 holds ranks x B."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.size = size
        self.local = tuple(range(size))
        self.device = torch.device(device)

    def rotate(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> Transfer:
        """Copy at once, in the order of the current stream."""
        for rank, buffer in enumerate(incoming):
            buffer.copy_(outgoing[rank - 1])
        return _Done()


class ProcessRing:
    """One rank a process, over a torch.distributed group (default: the whole world).

    On NCCL a rotation runs on the communicator's own stream: it waits for what the current stream has queued before
    `rotate`, and makes the current stream (not the host) wait at `wait`. So a kernel launched between the two runs
    beside the transfer. Give the ring a group of its own, or its transfers queue behind other collectives.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> None:
        self.group = group if group is not None else dist.group.WORLD
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self.local = (self.rank,)
        self.device = torch.device(device)

    def rotate(self, outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> Transfer:
        """One batch of a send and a receive, in flight until waited for."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        send = dist.P2POp(dist.isend, outgoing[0], group=self.group, group_peer=after)
        receive = dist.P2POp(dist.irecv, incoming[0], group=self.group, group_peer=before)
        return _InFlight(dist.batch_isend_irecv([send, receive]))


class _Done:
    def wait(self) -> None:
        """Nothing is under way."""


class _InFlight:
    def __init__(self, works: list[dist.Work]) -> None:
        self.works = works

    def wait(self) -> None:
        """Wait for every work of the batch."""
        for work in self.works:
            work.wait()
