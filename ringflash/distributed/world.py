"""World: the ranks of a run, their devices, and the groups that they form.

All ranks together are DeepSpeed's data-parallel world. Consecutive ranks form a replica, and each replica trains on its
own sequences. Inside a replica, neighbours (GPUs of one node) exchange heads, and rings connect their counterparts:

    8 ranks, parallel.ring=2 parallel.ulysses=2

    replica 0    ulysses: 0 1 | 2 3     rings: 0 2 | 1 3
    replica 1    ulysses: 4 5 | 6 7     rings: 4 6 | 5 7
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, is_dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ringflash.distributed import launcher
from ringflash.distributed.parallel import ParallelConfig
from ringflash.distributed.without_timeout import without_timeout
from ringflash.errors import ConfigError
from ringflash.ring.transport import ProcessRing
from ringflash.ring.ulysses import Ulysses
from ringflash.ring.watchdog import Watchdog

T = TypeVar("T")
_PLACES = (".path", "data.cache", "data.tokenizer")  # ends of settings: machines may keep the same files elsewhere


@dataclass(frozen=True, eq=False)
class World:
    """This rank of `size` ranks: its device, watchdog, ring, Ulysses group and replica."""

    rank: int
    size: int
    device: torch.device
    watchdog: Watchdog
    ring: ProcessRing
    ulysses: Ulysses | None
    replica: int
    replicas: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place."""
        dist.all_reduce(x)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Elementwise maximum of x over all ranks, in place."""
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; all ranks call this."""
        return bool(self.max(torch.tensor(float(flag), device=self.device)).item())

    def broadcast(self, value):
        """Rank 0's value, on every rank; any picklable object."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def from_rank_0(self, make: Callable[[], T]) -> T:
        """The result of make() on rank 0, on every rank. A ConfigError that it raises there is raised on every rank."""
        made: T | ConfigError | None = None
        if self.is_first:
            try:
                made = make()
            except ConfigError as error:
                made = error
        made = self.broadcast(made)
        if isinstance(made, ConfigError):
            raise made
        return made  # type: ignore[return-value]  # made on rank 0

    def check_room(self, what: str, cache_bytes: int) -> None:
        """Raise ConfigError on every rank if any has too little memory for a cache. what: its tokens, for the error."""
        if self.device.type == "cuda":
            unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            free = torch.cuda.mem_get_info(self.device)[0] + unused
        else:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        lacking = self.max(torch.tensor(cache_bytes - free, dtype=torch.int64, device=self.device)).item()
        if lacking > 0:
            raise ConfigError(
                f"{what} need a cache of {cache_bytes / 2**30:.2f} GiB on each rank, {lacking / 2**30:.2f} GiB more "
                f"than a rank has free: take more ranks, or fewer tokens"
            )

    def without_timeout(self, what: str) -> AbstractContextManager[None]:
        """Let some ranks work without a timeout: all ranks enter this context, and leave it when all are done.

            with world.without_timeout(f"tokenising data.path={path}"):
                if world.is_first:
                    tokenise()

        parallel.timeout_minutes does not apply inside. Raises OtherRankError if another rank failed.
        """
        return without_timeout(what, self.rank, self.size, self.watchdog)


def join(config: ParallelConfig, settings: Any = None) -> World:
    """Connect this process with the others, on the grid of a resolved configuration.

    settings: a dataclass of all settings as they were given, which must be the same on all ranks; None: not compared.

    Each rank uses a GPU and NCCL, or gloo if the machine has no GPU. The environment is that of torchrun or deepspeed;
    without a launcher, the world is one process. Raises ConfigError if that environment cannot be, if this machine has
    more ranks than GPUs, if the grid does not divide the ranks, and if machines chose different grids or were given
    different settings.
    """
    device = launcher.local_device()
    launcher.complete_environment()
    replicas, size, neighbours = config.grid(launcher.world_size())
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=config.timeout_minutes)
    dist.init_process_group(backend, timeout=timeout, device_id=device if device.type == "cuda" else None)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if settings is not None:
        _check_same_settings(dict(_flattened(settings)), device)
    _check_same_ulysses(neighbours, device)
    grid = torch.arange(ranks).view(replicas, size, neighbours)
    ring = _group_of(rank, grid.movedim(1, 2).reshape(-1, size), timeout)
    row = _group_of(rank, grid.reshape(-1, neighbours), timeout) if neighbours > 1 else None
    watchdog = Watchdog.of_world(config.hop_timeout_seconds, ends_with_store=True)
    return World(
        rank, ranks, device, watchdog,
        ring=ProcessRing(ring, device, watchdog, config.transport),
        ulysses=None if row is None else Ulysses(row, watchdog),
        replica=rank // (size * neighbours), replicas=replicas,
    )  # fmt: skip


def replica_ring(world: World, config: ParallelConfig) -> ProcessRing:
    """A ring of all ranks of a replica: the run's own or, with Ulysses, a new one, which all ranks make together."""
    if world.ulysses is None:
        return world.ring
    members = torch.arange(world.size).view(world.replicas, -1)
    group = _group_of(world.rank, members, timedelta(minutes=config.timeout_minutes))
    return ProcessRing(group, world.device, world.watchdog, config.transport)


def _check_same_ulysses(neighbours: int, device: torch.device) -> None:
    """Raise ConfigError, on every rank, if ranks chose different numbers of Ulysses ranks."""
    ends = torch.tensor([neighbours, -neighbours], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    most, least = int(ends[0]), -int(ends[1])
    if least != most:
        raise ConfigError(
            f"parallel.ulysses=null resolves to {least} on some machines and to {most} on others, which have another "
            f"number of ranks: set it, such as parallel.ulysses=1"
        )


def _check_same_settings(settings: dict[str, Any], device: torch.device) -> None:
    """Raise ConfigError, on every rank, if one was given other settings than rank 0, and would train in its own way."""
    box = [settings]
    dist.broadcast_object_list(box, src=0)
    names = [name for name in box[0] if not name.endswith(_PLACES)]
    others = [i for i, name in enumerate(names, 1) if settings.get(name) != box[0][name]]
    last = torch.tensor(max(others, default=0), device=device)
    dist.all_reduce(last, dist.ReduceOp.MAX)
    if last:
        name = names[int(last) - 1]
        own = f" and {settings.get(name)} on this rank" if int(last) in others else ""
        raise ConfigError(
            f"{name} differs between ranks, {box[0][name]} on rank 0{own}: start all machines with the same settings"
        )


def _flattened(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting of a dataclass, and of those in it. For a dict of dataclasses, also its keys."""
    parts = settings if isinstance(settings, dict) else {x.name: getattr(settings, x.name) for x in fields(settings)}
    for name, value in parts.items():
        if is_dataclass(value):
            yield from _flattened(value, f"{prefix}{name}.")
        elif isinstance(value, dict) and all(map(is_dataclass, value.values())):
            yield from _flattened(value, f"{prefix}{name}.")
            yield prefix + name, [*value]
        else:
            yield prefix + name, value


def _group_of(rank: int, members: torch.Tensor, timeout: timedelta) -> dist.ProcessGroup:
    """The group of `rank`: one of the rows of `members`, each with its own communicator.

    Ring transfers therefore do not queue behind ZeRO's collectives. NCCL sets up a communicator when all its ranks
    first use it together. An exchange of the ring may concern only some ranks, so a barrier does this here.
    """
    groups = {
        tuple(row): dist.new_group(row, timeout=timeout, pg_options=_high_priority(timeout) if len(row) > 1 else None)
        for row in members.tolist()
    }
    mine = next(group for row, group in groups.items() if rank in row)
    dist.barrier(mine)
    return mine


def _high_priority(timeout: timedelta) -> dist.ProcessGroupNCCL.Options | None:
    """NCCL options of a group whose transfers overlap attention: a stream of high priority; None on gloo.

    NCCL moves data with a kernel, and attention kernels fill all SMs. With high priority, NCCL's kernel gets the first
    SMs that become free; otherwise it would also wait for the next attention kernel to leave some.
    """
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options._timeout = timeout  # new_group warns where it differs from its own
    return options
