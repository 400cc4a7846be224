"""Streams: the two CUDA streams that compute the two halves of a layer's heads.

While a kernel's last programs run, some multiprocessors are already idle: a hop of 31.03 tiles per multiprocessor takes
the time of 32. The halves of the heads are independent, so each has its own stream, and the next kernel of one half
starts while the other's last programs finish:

    stream 0     | hop 0, half 0 ........ | hop 1, half 0 ........ | hop 2, half 0
    stream 1          | hop 0, half 1 ........ | hop 1, half 1 ........ | hop 2, half 1

Stream 0 is the current stream, so the caller's work before and after needs no synchronisation. At `fork`, stream 1
waits for stream 0; at `join`, stream 0 waits for stream 1. Memory allocated before the first fork may be used on both
streams until the join. Memory allocated on stream 1 is reused by stream 1 when it is freed, so a reader on stream 0
must fork again before that.
"""

from __future__ import annotations

import functools

import torch


class Streams:
    """One or two streams of a device, as a context manager. On the CPU, all methods do nothing."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._streams: tuple[torch.cuda.Stream, ...] = ()
        self._now = 0
        if device.type == "cuda" and count == 2:
            index = torch.cuda.current_device() if device.index is None else device.index
            self._streams = (current_stream(device), _second_stream(index))
            self._queued, self._device = torch.cuda.Event(), torch.cuda.device(index)

    def switch(self, stream: int) -> None:
        """Queue all following launches on this stream."""
        if self._streams and stream != self._now:
            torch.cuda.set_stream(self._streams[stream])
            self._now = stream

    def fork(self) -> None:
        """Make stream 1 wait for the work queued on stream 0."""
        if self._streams:
            self._queued.record(self._streams[0])
            self._streams[1].wait_event(self._queued)

    def join(self) -> None:
        """Make stream 0 wait for the work queued on stream 1."""
        if self._streams:
            self._queued.record(self._streams[1])
            self._streams[0].wait_event(self._queued)

    def __enter__(self) -> Streams:
        if self._streams:
            self._device.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Return to stream 0. After an error, which may have skipped the join, join stream 1."""
        if self._streams:
            self.switch(0)
            self._device.__exit__(*error)
            if error[0] is not None:
                self.join()


def current_stream(device: torch.device) -> torch.cuda.Stream:
    """torch.cuda.current_stream without its 10 microseconds, which would be a fifth of a hop's host time."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _stream(index, torch._C._cuda_getCurrentRawStream(index))


@functools.cache
def _stream(device: int, handle: int) -> torch.cuda.Stream:
    """The stream of a handle, which must be the device's current one when first seen. PyTorch never frees a stream."""
    return torch.cuda.current_stream(device)


@functools.cache
def _second_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
