"""Execution: the steps of a schedule, run by the local ranks of a ring: one in a process, all of them in a Loopback."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from ringflash.ring.schedule import Attend, Call, Clear, Fork, Join, Post, Rows, Schedule, Wait
from ringflash.ring.streams import Streams
from ringflash.ring.transport import Allocate, Label, Message, Ring, Transfer


class Memory(dict[str, list[Tensor]]):
    """The buffers of a pass on one rank, by name; each tensor has a row per token."""

    @classmethod
    def of(cls, schedule: Schedule, allocate: Allocate) -> Memory:
        """All of a schedule's, of memory in which messages may arrive."""
        return cls((name, [allocate(*x) for x in buffer]) for name, buffer in schedule.buffers.items())

    def rows(self, rows: Rows) -> list[Tensor]:
        """These rows of each of the buffer's tensors, as views."""
        return [x[rows.begin : rows.end] for x in self[rows.buffer]]


class Worker(Protocol):
    """One rank's work in a pass. A `Call` names a method, which takes the step."""

    memory: Memory

    def attend(self, step: Attend) -> None:
        """Run the kernel on what the step says; on nothing where it has no pairs."""


def run(schedule: Schedule, workers: Sequence[Worker], ring: Ring, label: Label) -> None:
    """Run the steps of all local ranks side by side. workers: of each local rank, in order."""
    under_way: dict[str, Transfer] = {}
    span = torch.profiler.record_function if torch.autograd._profiler_enabled() else _no_span
    with Streams(schedule.streams, ring.device) as streams:
        for steps in zip(*schedule.steps, strict=True):
            step = steps[0]
            streams.switch(step.stream)
            with span(step.label):
                match step:
                    case Attend():
                        for worker, x in zip(workers, steps, strict=True):
                            worker.attend(x)
                    case Post():
                        messages = _messages(workers, steps, ring.local)
                        under_way[step.label] = ring.exchange(*messages, label.at(step.label))
                    case Wait():
                        under_way.pop(step.label).wait()
                    case Clear():
                        for worker, x in zip(workers, steps, strict=True):
                            for rows in x.rows:
                                for tensor in worker.memory.rows(rows):
                                    tensor.zero_()
                    case Fork():
                        streams.fork()
                    case Join():
                        streams.join()
                    case Call():
                        for worker, x in zip(workers, steps, strict=True):
                            getattr(worker, x.method)(x)


def _messages(
    workers: Sequence[Worker], steps: Sequence[Post], ranks: Sequence[int]
) -> tuple[list[Message], list[Message]]:
    """Outgoing and incoming, one per tensor of a buffer."""
    outgoing, incoming = [], []
    for worker, step, rank in zip(workers, steps, ranks, strict=True):
        rows = worker.memory.rows
        for peer, source, target in step.sends:
            outgoing += [Message(rank, peer, *x) for x in zip(rows(source), rows(target), strict=True)]
        for peer, target in step.receives:
            incoming += [Message(peer, rank, x) for x in rows(target)]
    return outgoing, incoming


def _no_span(label: str) -> AbstractContextManager[None]:
    return _NOTHING


_NOTHING = nullcontext()
