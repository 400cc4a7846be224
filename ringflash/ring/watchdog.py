"""Watchdog: measures what a rank waits for, for the metrics, and makes every rank report when a ring hop hangs.

If a rank hangs, all others wait for it silently, in a hop of the ring or an exchange of heads. The watchdog is a thread
that checks the oldest wait in progress. If no wait has ended for `limit` seconds, it notifies the other ranks through
their store, and every rank reports where it is:

    ringflash: rank 2, step 12, layer 5, backward, hop 3: waits for rank 1 since 300 s
    ringflash: rank 0, step 12, layer 5, backward, hop 3: waits for rank 1 to receive what it sent since 300 s
    ringflash: rank 1, step 12: waits for no rank; its last wait was in layer 5, backward, hop 2

Then all ranks exit. The same happens if a rank's process no longer runs, whatever the others wait for (`heartbeat`):

    ringflash: rank 0, step 12: rank 1 has not answered since 300 s

Layers never block on the watchdog: on CUDA, two events enclose each wait on the compute stream, and the thread queries
them. The watchdog never blocks on the store either, which may be on the rank that hangs: a second thread queries it. If
the store is gone, its launcher or the rank that held it has ended, and this rank exits.

Work without a limit (tokenising, saving) does not end the run; the second thread reports it every half minute:

    ringflash: rank 1, step 0: waits for rank 0 since 30 s: tokenising data.path=books
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist

from ringflash.ring.heartbeat import Heartbeat
from ringflash.ring.streams import current_stream

POLL = 0.25  # seconds between two checks
BEAT = 5.0  # seconds between two heartbeats
SILENCE = 30.0  # seconds without an answer that are always allowed: threads wait while a rank imports or compiles
EXIT_DELAY = 3.0  # seconds between a rank's report and its exit: launchers end all ranks as soon as one exits
REPORT = 30.0  # seconds between two reports of work without a limit
GRACE = 10.0  # seconds for a rank to end by itself once another has failed
_KEY = "ringflash/hangs"

Kind = Literal["ring", "ulysses"]


class Label(NamedTuple):
    """A layer, forward or backward, and a step of that pass. It is formatted only when it is shown."""

    layer: str
    direction: str
    step: str = ""

    def at(self, step: str) -> Label:
        """A step of this pass."""
        return Label(self.layer, self.direction, step)

    def __str__(self) -> str:
        return ", ".join(filter(None, self))


class Work(Protocol):
    """A part of an exchange that can be waited for, like torch.distributed.Work."""

    def wait(self) -> object:
        """Make the current stream wait for it."""

    def is_completed(self) -> bool:
        """Whether it is complete."""


@dataclass
class Traffic:
    """The cost of this rank's exchanges of one kind: seconds of waiting, bytes received, number of exchanges."""

    seconds: float = 0.0
    bytes: int = 0
    exchanges: int = 0


@dataclass(frozen=True)
class Pending:
    """Ranks of the run that an exchange still waits for, as senders and as receivers."""

    sources: tuple[int, ...] = ()
    destinations: tuple[int, ...] = ()

    def __str__(self) -> str:
        receiving = tuple(rank for rank in self.destinations if rank not in self.sources)
        senders, receivers = (" and ".join(f"rank {rank}" for rank in ranks) for ranks in (self.sources, receiving))
        return ", or for ".join(filter(None, [senders, receivers and f"{receivers} to receive what it sent"]))


@dataclass(eq=False)
class _Wait:
    label: Label
    pending: Callable[[], Pending]
    kind: Kind | None = None  # of traffic, if it is counted
    on_gpu: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # before and after it, on the compute stream
    queued: bool = False  # both events; one that is not recorded yet counts as passed

    def passed(self) -> bool:
        """Whether the GPU has passed this wait."""
        return self.on_gpu is not None and self.queued and self.on_gpu[1].query()


class Barrier(Protocol):
    """Ranks that work without a limit and wait for each other. Both methods may query the store."""

    def report(self) -> str | None:
        """What this rank is doing, such as "waits for rank 0"; None if another rank reports."""

    def failed(self) -> bool:
        """Whether a rank has failed and will not arrive."""


@dataclass(eq=False)
class _Work:
    what: str
    barrier: Barrier
    begun: float
    due: float


class Watchdog:
    """The waits of one process, which ring and Ulysses record here. The caller may set `step`, which reports name.

        watchdog = Watchdog.of_world(300)       # once torch.distributed is initialized
        ring = ProcessRing(watchdog=watchdog)
        ...
        watchdog.close()                        # before destroy_process_group

    limit: in seconds. rank: that of this process in the run. store: that of the run, or None for a single process. end:
    called to end the process after its report. ends_with_store: whether `end` is also called when the store is gone,
    for callers that close the watchdog before the store may go. ranks: of the run; 1 to watch no other rank.
    """

    def __init__(
        self,
        limit: float,
        rank: int = 0,
        store: dist.Store | None = None,
        end: Callable[[], None] | None = None,
        ends_with_store: bool = False,
        ranks: int = 1,
    ) -> None:
        self.limit, self.rank, self.step = limit, rank, 0
        self._store, self._end, self._ends_with_store = store, end or (lambda: os._exit(1)), ends_with_store
        self._waits: deque[_Wait] = deque()
        self._spare_events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._work: _Work | None = None
        self._moved = time.monotonic()
        self._last: Label | None = None
        self._traffic: dict[Kind, Traffic] = {"ring": Traffic(), "ulysses": Traffic()}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._others_report = threading.Event()
        self._watcher = threading.Thread(target=self._watch, args=(device,), name="ring-watch", daemon=True)
        self._watcher.start()
        self._silent = ""  # the report on the next rank, once it has not answered for too long
        self._listener: threading.Thread | None = None
        if store is not None:
            heartbeat = Heartbeat(store, rank, ranks, BEAT) if ranks > 1 else None
            listen = (store, heartbeat)
            self._listener = threading.Thread(target=self._listen, args=listen, name="ring-watch-store", daemon=True)
            self._listener.start()

    @classmethod
    def of_world(cls, limit: float, end: Callable[[], None] | None = None, ends_with_store: bool = False) -> Watchdog:
        """The watchdog of this process in torch.distributed's default group, with the group's store and ranks."""
        store = dist.distributed_c10d._get_default_store()
        return cls(limit, dist.get_rank(), store, end, ends_with_store, dist.get_world_size())

    def wait(
        self, works: Sequence[Work], kind: Kind, label: Label, pending: Callable[[], Pending], size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        """Wait for works that receive `size` bytes (on CUDA: make the current stream wait).

        pending: returns the ranks that they wait for; called from another thread.
        """
        on_gpu = None
        if device.type == "cuda":
            on_gpu = self._two_events()
        with self._lock:
            self._traffic[kind].bytes += size
            self._traffic[kind].exchanges += 1
        wait = _Wait(label, pending, kind, on_gpu)
        if on_gpu is None:
            with self._host_waits(wait):
                for work in works:
                    work.wait()
            return
        self._begin(wait)
        try:
            on_gpu[0].record(current_stream(device))
            for work in works:
                work.wait()
            on_gpu[1].record(current_stream(device))
            wait.queued = True
        except BaseException:
            self._over(wait)
            raise

    def _two_events(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Two events, reused if possible: creating them takes longer than recording them."""
        with self._lock:
            if self._spare_events:
                return self._spare_events.pop()
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def host_wait(self, label: Label, pending: Callable[[], Pending]) -> AbstractContextManager[None]:
        """A context in which the host waits for other ranks. It is not counted as traffic."""
        return self._host_waits(_Wait(label, pending))

    @contextmanager
    def without_limit(self, what: str, barrier: Barrier) -> Iterator[None]:
        """A context in which `what` is reported every REPORT seconds, and ended only if a rank has failed."""
        now = time.monotonic()
        self._work, before = _Work(what, barrier, now, now + REPORT), self._work
        try:
            yield
        finally:
            self._work = before

    @contextmanager
    def _host_waits(self, wait: _Wait) -> Iterator[None]:
        self._begin(wait)
        start = time.perf_counter()
        try:
            yield
        finally:
            self._over(wait, time.perf_counter() - start)

    def _begin(self, wait: _Wait) -> None:
        with self._lock:
            if not self._waits:
                self._moved = time.monotonic()
            self._waits.append(wait)

    def _over(self, wait: _Wait, seconds: float = 0.0) -> None:
        with self._lock:
            self._waits.remove(wait)  # not always the first: the GPU may not have passed earlier ones
            self._passed(wait, seconds)

    def drain(self) -> dict[Kind, Traffic]:
        """The cost of the exchanges since the last call.

        Seconds are the time that streams waited for transfers. One of two streams may have computed while the other
        waited, so this is an upper bound of the exposed communication time.
        """
        with self._lock:
            self._advance()
            taken, self._traffic = self._traffic, {"ring": Traffic(), "ulysses": Traffic()}
        return taken

    def close(self) -> None:
        """Stop watching at the end of a run. A thread that is inside the store when Python exits aborts the process."""
        self._closed.set()
        if self._listener is not None:
            self._listener.join(EXIT_DELAY)

    def _advance(self) -> None:
        """Remove waits that the GPU has passed."""
        while self._waits and self._waits[0].passed():
            wait = self._waits.popleft()
            before, after = wait.on_gpu  # type: ignore[misc]
            self._passed(wait, before.elapsed_time(after) / 1e3)
            self._spare_events.append((before, after))

    def _passed(self, wait: _Wait, seconds: float) -> None:
        if wait.kind is not None:
            self._traffic[wait.kind].seconds += seconds
        self._last, self._moved = wait.label, time.monotonic()

    def _watch(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        while not self._closed.wait(POLL):
            if self._is_late() or self._others_report.is_set():
                self._report()
                if not self._closed.wait(EXIT_DELAY):
                    self._end()
                return

    def _is_late(self) -> bool:
        """Whether the oldest wait exceeds the limit, or cannot be queried because the GPU is in an error state."""
        with self._lock:
            try:
                self._advance()
            except RuntimeError:
                return True
            return bool(self._waits) and time.monotonic() - self._moved > self.limit

    def _report(self) -> None:
        """Report where this rank is, and make the others report."""
        try:
            message = self.describe()
        except Exception as error:  # a group that is gone, a GPU in an error state: the run ends in any case
            message = f"{self._here}: hangs, and where is not known ({error})"
        _print(message)
        if self._store is not None:
            threading.Thread(target=self._store.set, args=(_KEY, "1"), daemon=True).start()

    def _listen(self, store: dist.Store, heartbeat: Heartbeat | None) -> None:
        """Watch work without a limit and the next rank; end if a rank hangs or the store is gone."""
        while not self._closed.wait(POLL):
            try:
                silent = heartbeat.beat() if heartbeat else 0.0
                if (work := self._work) is not None:
                    self._check_work(work)
                elif heartbeat and silent > max(self.limit, SILENCE):
                    self._silent = f"rank {heartbeat.next} has not answered since {silent:.0f} s"
                if self._silent or store.check([_KEY]):
                    self._others_report.set()
                    return
            except dist.DistNetworkError:
                if self._ends_with_store:
                    self._end_without_store()
                return
            except RuntimeError:
                continue
        if heartbeat:
            with suppress(RuntimeError):  # the store may be gone
                heartbeat.stop()

    def _check_work(self, work: _Work) -> None:
        """Report the work when that is due. End if a rank has failed while this one is in a collective with it."""
        if work.barrier.failed():
            if not self._closed.wait(GRACE) and self._work is work:
                self._end()
            return
        now = time.monotonic()
        if now < work.due:
            return
        work.due = now + REPORT
        message = work.barrier.report()
        if message is not None and self._work is work:
            _print(f"{self._here}: {message} since {now - work.begun:.0f} s: {work.what}")

    def _end_without_store(self) -> None:
        """End because the launcher, or the rank that held the store, has ended: nothing else would end this rank."""
        if self._closed.wait(EXIT_DELAY):  # the store went at the end of a complete run
            return
        _print(f"{self._here}: ends: the run's store is gone: its launcher, or the rank that held it, has ended")
        self._end()

    def describe(self) -> str:
        """Rank, step, and what the rank waits for, as one line of a report."""
        with self._lock:
            if not self._waits:
                last = f"; its last wait was in {self._last}" if self._last else ", and has waited for none yet"
                return f"{self._here}: {self._silent or f'waits for no rank{last}'}"
            wait, seconds = self._waits[0], time.monotonic() - self._moved
        return f"{self._here}, {wait.label}: waits for {wait.pending()} since {seconds:.0f} s"

    @property
    def _here(self) -> str:
        return f"rank {self.rank}, step {self.step}"


def _print(line: str) -> None:
    print(f"\nringflash: {line}", file=sys.stderr, flush=True)  # below a progress bar
