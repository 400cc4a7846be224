"""Streams: the two streams on which the halves of a layer's heads are computed.

When a kernel's last programs run, some multiprocessors have nothing left to do: a hop of 31.03 tiles per multiprocessor
takes the time of 32. The halves of the heads are independent, so each has a stream of its own, and one's next kernel
begins where the other's ends:

    stream 0     | hop 0, half 0 ........ | hop 1, half 0 ........ | hop 2, half 0
    stream 1          | hop 0, half 1 ........ | hop 1, half 1 ........ | hop 2, half 1

Stream 0 is the current stream, so what the caller does before and after needs no care. Stream 1 waits for it at `fork`,
and it waits for stream 1 at `join`. Memory allocated before the first fork may be used on both until the join. Memory
allocated on stream 1 goes back to stream 1 when it is freed: a reader on stream 0 forks once more before that.
"""

from __future__ import annotations

import functools

import torch


class Streams:
    """One stream or two, on a device, as a context; on the CPU there is one order of things and nothing to wait for."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        self._now = 0
        if device.type == "cuda" and count == 2:
            index = torch.cuda.current_device() if device.index is None else device.index
            self._streams = (current_stream(device), _second_stream(index))
            self._queued, self._device = torch.cuda.Event(), torch.cuda.device(index)

    def switch(self, stream: int) -> None:
        """From now on, what is launched is queued on this stream."""
        if self._streams and stream != self._now:
            torch.cuda.set_stream(self._streams[stream])
            self._now = stream

    def fork(self) -> None:
        """Have stream 1 wait for what stream 0 has queued."""
        if self._streams:
            self._queued.record(self._streams[0])
            self._streams[1].wait_event(self._queued)

    def join(self) -> None:
        """Have stream 0 wait for what stream 1 has queued."""
        if self._streams:
            self._queued.record(self._streams[1])
            self._streams[0].wait_event(self._queued)

    def __enter__(self) -> Streams:
        if self._streams:
            self._device.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Go back to stream 0; after an error, which may have come before the join, with what stream 1 has queued."""
        if self._streams:
            self.switch(0)
            self._device.__exit__(*error)
            if error[0] is not None:
                self.join()


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """As torch.cuda.current_stream, whose 10 microseconds would be a fifth of a hop's host time."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _stream(index, torch._C._cuda_getCurrentRawStream(index))


@functools.cache
def _stream(device: int, handle: int) -> torch.cuda.Stream:
    """That of a handle which is the device's current one, as long as it is not known. PyTorch never frees a stream."""
    return torch.cuda.current_stream(device)


@functools.cache
def _second_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
