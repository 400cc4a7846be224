"""Heartbeat: whether the next rank's process still runs, from counters in the run's store.

A hop that hangs is found by its wait. But ranks may also wait in a collective of ZeRO, which fails only after
parallel.timeout_minutes and does not report who is missing. Each rank therefore increments a counter in the store, and
checks whether the next rank's counter grows. It stops if that process is stopped or its machine is gone.
"""

from __future__ import annotations

import time

import torch.distributed as dist

_KEY = "ringflash/heartbeat"


class Heartbeat:
    """This rank's counter and the next rank's. One thread calls all methods, which query the store."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, interval: float) -> None:
        """interval: seconds between two increments, however often `beat` is called."""
        self.next = (rank + 1) % ranks
        self._store, self._rank, self._interval = store, rank, interval
        self._due = 0.0
        self._count, self._grew = 0, time.monotonic()

    def beat(self) -> float:
        """Increment this rank's counter if that is due. Returns the seconds since the next rank's counter last grew.

        A counter of 0 belongs to a rank that has not begun or is done, which does not count as silent.
        """
        now = time.monotonic()
        if now >= self._due:
            self._due = now + self._interval
            self._store.add(f"{_KEY}/{self._rank}", 1)
            count = self._store.add(f"{_KEY}/{self.next}", 0)
            if count != self._count or count == 0:
                self._count, self._grew = count, now
        return now - self._grew

    def stop(self) -> None:
        """Delete this rank's counter: the rank is done."""
        self._store.delete_key(f"{_KEY}/{self._rank}")
