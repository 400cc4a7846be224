"""Tensors that wait in host memory between forward and backward.

A checkpointed layer keeps its input and its attention's result until its backward. `HostStore` copies them to pinned
host memory behind the layers that follow, and brings them back one layer ahead of the backward:

    compute stream   layer 0 | layer 1 | layer 2 | ...  loss  ... | backward 2 | backward 1 | backward 0
    copy stream              | 0 out   | 1 out   | ...        ... | 1 in       | 0 in       |

The tensors of a layer are a `Group`. At most two groups are on their way out and two on their way in, so that much GPU
memory is needed whatever the number of layers. GPU memory is given back in the compute stream's order: the host runs
ahead of the GPU, and memory that waits for another stream could not be used again in time.

Host memory comes from a `PinnedPool`. torch's own pinned memory rounds each tensor up to a power of two.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ringflash.errors import ConfigError

IN_FLIGHT = 2  # groups on their way out


class PinnedPool:
    """Blocks of host memory, touched and pinned once, and used again by tensors of their size or smaller.

    So shorter batches need no memory beside what the longest one was given.

    pinned: false without a GPU, where nothing can be. remedy: what needs less of it, for the error where there is too
    little.
    """

    def __init__(self, pinned: bool, remedy: str) -> None:
        self.pinned, self.remedy = pinned, remedy
        self.bytes = 0
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._registered: list[Tensor] = []
        # Memory that is freed while it is registered could not be registered when it is given out again.
        weakref.finalize(self, _unregister, self._registered).atexit = False

    def reserve(self, sizes: list[int], progress: Callable[[int], None] = lambda done: None) -> None:
        """Have a free block of each of `sizes`, in bytes; progress: called with the bytes that this has made so far.

        Raises ConfigError where the machine gives no more.
        """
        made = 0
        spare = {size: len(blocks) for size, blocks in self._free.items()}
        for size in sizes:
            if spare.get(size, 0):
                spare[size] -= 1
                continue
            self._free[size].append(self._made(size))
            made += size
            progress(made)

    def take(self, size: int) -> Tensor:
        """A block of at least `size` bytes, uint8: the smallest that is free, or a new one of this size."""
        fitting = [free for free, blocks in self._free.items() if free >= size and blocks]
        return self._free[min(fitting)].pop() if fitting else self._made(size)

    def give(self, block: Tensor) -> None:
        """Take a block back."""
        self._free[block.numel()].append(block)

    def _made(self, size: int) -> Tensor:
        try:
            block = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise ConfigError(self._too_little(size)) from error
        block.fill_(0)  # touched: pages that do not exist yet would be made during the first step
        if self.pinned:
            status = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0)
            if int(status) != 0:
                raise ConfigError(self._too_little(size))
            self._registered.append(block)
        self.bytes += size
        return block

    def _too_little(self, size: int) -> str:
        return (
            f"this machine pins no more than {self.bytes / 2**30:.1f} GiB of host memory, and {size / 2**30:.2f} more "
            f"were asked for: {self.remedy}"
        )


def _unregister(blocks: list[Tensor]) -> None:
    """Let CUDA forget blocks of a pool that is gone."""
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


class Parked:
    """A tensor in a store. `get` gives it back, once."""

    def __init__(self, group: Group, x: Tensor) -> None:
        self.group = group
        self.x: Tensor | None = x
        self.shape, self.dtype, self.device, self.version = x.shape, x.dtype, x.device, x._version
        self.block: Tensor | None = None

    def get(self) -> Tensor:
        """The tensor, on the device. Raises RuntimeError if it is not what it was, or is not there any more."""
        self.group.arrive()
        if self.x is None:
            raise RuntimeError("a second backward through a layer whose tensors were parked: each is given back once")
        x = self.checked()
        self.x = None
        return x

    def checked(self) -> Tensor:
        """The tensor while it is on the device. Raises RuntimeError if it was changed in place after `put`."""
        assert self.x is not None
        if self.x._version != self.version:
            raise RuntimeError(
                "a tensor that is kept for the backward was changed in place while it was copied: make the operation "
                "that did it out of place, such as out = out + x instead of out += x"
            )
        return self.x

    def __del__(self) -> None:
        if self.block is not None:  # of a graph that was never used
            self.group.store.pool.give(self.block)


class Group:
    """What one layer parks."""

    def __init__(self, store: HostStore, before: Group | None) -> None:
        self.store, self.before = store, before
        self._parked: list[weakref.ref[Parked]] = []  # a graph that is dropped frees what it had parked
        self.copied: torch.cuda.Event | None = None  # the last copy, out or in

    def put(self, x: Tensor) -> Parked:
        """Park a tensor; its copy to the host begins as soon as it is computed."""
        parked = Parked(self, x.detach())
        self._parked.append(weakref.ref(parked))
        self.store.copy_out(parked)
        return parked

    def leave(self) -> None:
        """Give the GPU memory of what was copied out back; the compute stream waits for the copies."""
        self.store.wait(self)
        for parked in self.alive():
            if parked.x is not None:
                parked.checked()
                parked.x = None

    def alive(self) -> list[Parked]:
        """The parked tensors that a graph still needs."""
        return [parked for reference in self._parked if (parked := reference()) is not None]

    def arrive(self) -> None:
        """Have the group on the device, and the one before it on its way."""
        self.store.fetch(self)
        if self.before is not None:
            self.store.fetch(self.before)
            self.before = None
        self.store.wait(self)


class HostStore:
    """Groups of tensors in host memory, copied on a stream of their own. On a CPU, the copies are plain ones."""

    def __init__(self) -> None:
        self.pool = PinnedPool(
            torch.cuda.is_available(),
            "memory.attention_results=host:N memory.layer_inputs=host:N, for the first N layers, need less, and gpu "
            "needs none",
        )
        self._stream: torch.cuda.Stream | None = None
        self._last: Group | None = None
        self._leaving: list[Group] = []

    def group(self, first: bool) -> Group:
        """The group of the layer that begins. first: of the first layer of a forward, which nothing comes before."""
        if first:
            self._last, self._leaving = None, []
        while len(self._leaving) >= IN_FLIGHT:
            self._leaving.pop(0).leave()
        self._last = Group(self, self._last)
        self._leaving.append(self._last)
        return self._last

    def copy_out(self, parked: Parked) -> None:
        """Copy a parked tensor to the host."""
        assert parked.x is not None
        if parked.x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(parked.x.device)
        size = parked.x.numel() * parked.x.element_size()
        parked.block = self.pool.take(size)
        with self._behind():
            _view(parked).copy_(parked.x, non_blocking=True)
            self._mark(parked.group)

    def fetch(self, group: Group) -> None:
        """Begin to copy a group back, unless it is on the device."""
        absent = [parked for parked in group.alive() if parked.block is not None]
        for parked in absent:
            if parked.x is None:
                parked.x = torch.empty(parked.shape, dtype=parked.dtype, device=parked.device)
                with self._behind():
                    parked.x.copy_(_view(parked), non_blocking=True)
                    self._mark(group)
                parked.version = parked.x._version
            self.pool.give(parked.block)  # type: ignore[arg-type]  # absent has those with a block
            parked.block = None  # the copy stream writes into it next, after this copy
        if group in self._leaving:
            self._leaving.remove(group)

    def wait(self, group: Group) -> None:
        """Let the compute stream wait for a group's copies."""
        if self._stream is not None and group.copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(group.copied)

    def _behind(self) -> AbstractContextManager[object]:
        """The copy stream, behind what the compute stream was given so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _mark(self, group: Group) -> None:
        if self._stream is not None:
            group.copied = self._stream.record_event()


def _view(parked: Parked) -> Tensor:
    """The beginning of a parked tensor's block, in its shape and dtype."""
    assert parked.block is not None
    size = parked.shape.numel() * parked.dtype.itemsize
    return parked.block[:size].view(parked.dtype).view(parked.shape)
