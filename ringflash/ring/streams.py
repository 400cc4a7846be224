"""Streams: the two streams on which the halves of a layer's heads are computed.

When a kernel's last programs run, some multiprocessors have nothing left to do: a hop of 31.03 tiles a processor takes
the time of 32. The halves of the heads are independent, so each has a stream of its own, and one's next kernel begins
where the other's ends:

    stream 0     | hop 0, half 0 ........ | hop 1, half 0 ........ | hop 2, half 0
    stream 1          | hop 0, half 1 ........ | hop 1, half 1 ........ | hop 2, half 1

Stream 0 is the current stream, so what the caller does before and after needs no care. Stream 1 waits for it at `fork`,
and it waits for stream 1 at the end. Memory allocated before the first fork may be used on both until the end. Memory
allocated on stream 1 goes back to stream 1 when it is freed: a reader on stream 0 forks once more before that.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch


class Streams:
    """One stream or two, on a device, as a context; on the CPU there is one order of things and nothing to wait for."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.last = count - 1
        self._other = None
        if device.type == "cuda" and count == 2:
            self._other = _second_stream(torch.cuda.current_device() if device.index is None else device.index)

    def on(self, stream: int) -> AbstractContextManager:
        """While entered, what is launched is queued on this stream."""
        return nullcontext() if self._other is None or stream == 0 else torch.cuda.stream(self._other)

    def fork(self) -> None:
        """Have stream 1 wait for what stream 0 has queued."""
        if self._other is not None:
            self._other.wait_stream(torch.cuda.current_stream(self._other.device))

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *error: object) -> None:
        """Have stream 0 wait for what stream 1 has queued, also where something went wrong on the way."""
        if self._other is not None:
            torch.cuda.current_stream(self._other.device).wait_stream(self._other)


@functools.cache
def _second_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
