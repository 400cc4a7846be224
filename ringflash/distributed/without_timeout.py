"""Work without a timeout: one rank, or each on its part, works as long as needed, and the others wait.

A barrier would fail after the group's timeout. Here a rank that is done polls the store for the others:

    ringflash/without-timeout/of-RANK      how many of these RANK has entered: the number N of this one
    ringflash/without-timeout/N/RANK       RANK has done its part of the N-th
    ringflash/without-timeout/N/all        all have

While it waits, the watchdog reports which ranks it waits for, and their work. If one fails, the others raise
OtherRankError.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ringflash.distributed import failure
from ringflash.ring.watchdog import Watchdog

FIRST_PAUSE, LONGEST_PAUSE = 1e-3, 0.25  # seconds between two polls of the store
NAMED = 4  # ranks that a report names at the most
NO_LIMIT = timedelta(days=365)

_set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)  # the first from torch 2.14
_PREFIX = "ringflash/without-timeout"


class OtherRankError(RuntimeError):
    """Another rank failed first; the message is that rank's."""


@contextlib.contextmanager
def without_timeout(what: str, rank: int, size: int, watchdog: Watchdog) -> Iterator[None]:
    """`World.without_timeout` for this rank of `size`."""
    store = dist.distributed_c10d._get_default_store()
    barrier = _Barrier(store, f"{_PREFIX}/{store.add(f'{_PREFIX}/of-{rank}', 1)}", rank, size)
    with watchdog.without_limit(what, barrier), _collectives_without_limit():
        try:
            yield
        except BaseException as error:
            failure.claim_report(error)
            raise
        barrier.arrive()
        barrier.wait()


@dataclass
class _Barrier:
    """A barrier of all ranks, each of which arrives when its work is done."""

    store: dist.Store
    key: str
    rank: int
    size: int
    place: int = 0  # in the order of arrivals, from 1; 0: not yet arrived

    def arrive(self) -> None:
        self.store.set(f"{self.key}/{self.rank}", "")
        self.place = self.store.add(f"{self.key}/arrived", 1)
        if self.place == self.size:
            self.store.set(f"{self.key}/all", "")

    def wait(self) -> None:
        """Wait for all ranks. Raises OtherRankError."""
        pause = FIRST_PAUSE
        while not self.store.check([f"{self.key}/all"]):
            if (message := failure.first_failure(self.store)) is not None:
                raise OtherRankError(message)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        self.store.delete_key(f"{self.key}/{self.rank}")  # a long run has many barriers

    def failed(self) -> bool:
        return failure.first_failure(self.store) is not None

    def report(self) -> str | None:
        """Which ranks are missing, from the rank that arrived first; before any arrived, from rank 0."""
        if self.place == 1:
            missing = (rank for rank in range(self.size) if not self.store.check([f"{self.key}/{rank}"]))
            named = list(itertools.islice(missing, NAMED + 1))
            more = " and others" if len(named) > NAMED else ""
            return f"waits for {' and '.join(f'rank {rank}' for rank in named[:NAMED])}{more}" if named else None
        none_arrived = self.place == 0 and not self.store.check([f"{self.key}/arrived"])
        return "is at work" if none_arrived and self.rank == 0 else None


@contextlib.contextmanager
def _collectives_without_limit() -> Iterator[None]:
    """Suspend the timeouts of all groups, also for collectives inside libraries, such as DeepSpeed's when it saves."""
    groups = {
        group: group._get_backend(device).options._timeout
        for group in list(dist.distributed_c10d._world.pg_map)
        for device in group._device_types[:1]
    }
    for group in groups:
        _set_timeout(NO_LIMIT, group)
    try:
        yield
    finally:
        for group, timeout in groups.items():
            _set_timeout(timeout, group)
