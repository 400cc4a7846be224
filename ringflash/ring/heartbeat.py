"""Heartbeat: whether the next rank's process still runs, by counts in the run's store.

A hop that hangs is found by its wait. But ranks may also wait in a collective of ZeRO, which fails only after
parallel.timeout_minutes, and does not say who is missing. So each rank counts in the store, and looks whether
the next rank's count grows. It stays where a process is stopped or its machine is gone.
"""

from __future__ import annotations

import time

import torch.distributed as dist

_KEY = "ringflash/heartbeat"


class Heartbeat:
    """This rank's count, and the next one's. One thread calls all methods, which ask the store."""

    def __init__(self, store: dist.Store, rank: int, ranks: int, interval: float) -> None:
        """interval: seconds between two beats, however often `beat` is called."""
        self.next = (rank + 1) % ranks
        self._store, self._rank, self._interval = store, rank, interval
        self._due = 0.0
        self._count, self._grew = 0, time.monotonic()

    def beat(self) -> float:
        """Count if that is due. Returns for how many seconds the next rank has not.

        A count of 0 is that of a rank which has not begun, or is done: it is not missed.
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
        """This rank is done."""
        self._store.delete_key(f"{_KEY}/{self._rank}")
