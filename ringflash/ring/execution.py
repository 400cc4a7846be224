"""Execution: run the steps of a schedule on a ring's local ranks, one in a ProcessRing and all in a Loopback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ringflash.ring.message import Message
from ringflash.ring.schedule import Attend, Call, Clear, Fork, Join, Post, Rows, Schedule, Wait
from ringflash.ring.streams import Streams
from ringflash.ring.transport import Allocate, Ring, Transfer
from ringflash.ring.watchdog import Label


class Memory(dict[str, list[Tensor]]):
    """The buffers of a pass on one rank, by name. Each tensor has one row per token."""

    @classmethod
    def of(cls, schedule: Schedule, allocate: Allocate) -> Memory:
        """All buffers of a schedule, in memory in which messages may arrive."""
        return cls((name, [allocate(*x) for x in buffer]) for name, buffer in schedule.buffers.items())

    def rows(self, rows: Rows) -> list[Tensor]:
        """These rows of each of the buffer's tensors, as views."""
        return [x[rows.begin : rows.end] for x in self[rows.buffer]]

    def zero(self, several: Sequence[Rows]) -> None:
        """Zero these rows, on a GPU in one launch: one launch per range would take longer than writing the zeros."""
        if views := [x for rows in several for x in self.rows(rows)]:
            torch._foreach_zero_(views)


class Worker(Protocol):
    """One rank's work in a pass. A `Call` step names a method of the worker, which is given the step."""

    memory: Memory

    def attend(self, step: Attend) -> None:
        """Run the kernel on the step's rows, which may have no pairs."""


def run(schedule: Schedule, workers: Sequence[Worker], ring: Ring, label: Label) -> None:
    """Run the steps of all local ranks side by side. workers: one per local rank, in order. label: the pass."""
    in_flight: dict[str, Transfer] = {}
    side_by_side: Iterator[tuple[Any, ...]] = zip(*schedule.steps, strict=True)
    if torch.autograd._profiler_enabled():
        side_by_side = _profiled(side_by_side)
    with Streams(schedule.streams, ring.device) as streams:
        for steps in side_by_side:
            step = steps[0]
            streams.switch(step.stream)
            match step:
                case Attend():
                    for worker, x in zip(workers, steps, strict=True):
                        worker.attend(x)
                case Post():
                    messages = _messages(workers, steps, ring.local)
                    in_flight[step.label] = ring.exchange(*messages, label.at(step.label))
                case Wait():
                    in_flight.pop(step.label).wait()
                case Clear():
                    for worker, x in zip(workers, steps, strict=True):
                        worker.memory.zero(x.rows)
                case Fork():
                    streams.fork()
                case Join():
                    streams.join()
                case Call():
                    for worker, x in zip(workers, steps, strict=True):
                        getattr(worker, x.method)(x)


def _profiled(side_by_side: Iterator[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """The same steps, each in a profiler span that lasts until the next step."""
    for steps in side_by_side:
        with torch.profiler.record_function(steps[0].label):
            yield steps


def _messages(
    workers: Sequence[Worker], steps: Sequence[Post], ranks: Sequence[int]
) -> tuple[list[Message], list[Message]]:
    """Outgoing and incoming messages, one per tensor of a buffer."""
    outgoing, incoming = [], []
    for worker, step, rank in zip(workers, steps, ranks, strict=True):
        rows = worker.memory.rows
        for peer, source, target in step.sends:
            outgoing += [Message(rank, peer, *x) for x in zip(rows(source), rows(target), strict=True)]
        for peer, target in step.receives:
            incoming += [Message(peer, rank, x) for x in rows(target)]
    return outgoing, incoming
