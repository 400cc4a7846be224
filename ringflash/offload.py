"""Offloading: tensors are kept in host memory between forward and backward.

A checkpointed layer keeps its input and its attention result until its backward. `HostStore` copies them to pinned host
memory while the next layers run, and copies them back one layer ahead of the backward:

    compute stream   layer 0 | layer 1 | layer 2 | ...  loss  ... | backward 2 | backward 1 | backward 0
    copy stream              | 0 out   | 1 out   | ...        ... | 1 in       | 0 in       |

The tensors of a layer form a `Group`. At most two groups are being copied out and two are being copied in, so the GPU
memory needed does not depend on the number of layers. GPU memory is freed in the order of the compute stream: the host
runs ahead of the GPU, and memory that waited for another stream would not be reused in time.

Host memory comes from a `PinnedPool`, since torch's own pinned memory rounds each tensor up to a power of two.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ringflash.errors import ConfigError

IN_FLIGHT = 2  # groups that are being copied out
LOGGED = 8  # GiB between two lines of progress


class PinnedPool:
    """Blocks of host memory, touched and pinned once, and reused by tensors of their size or smaller.

    Shorter batches therefore need no more memory than the longest one.

    pinned: whether to pin, which needs a GPU. remedy: settings that need less memory, for the error when there is too
    little.
    """

    def __init__(self, pinned: bool, remedy: str) -> None:
        self.pinned, self.remedy = pinned, remedy
        self.bytes = 0
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._registered: list[Tensor] = []
        # malloc may return freed memory again, which could not be registered again if it still were.
        weakref.finalize(self, _unregister, self._registered).atexit = False

    def reserve(self, sizes: list[int], what: str, log: Callable[[str], None] = lambda line: None) -> None:
        """Make sure that there is a free block for each of `sizes`, in bytes.

        log: called with lines of progress, which say `what` is reserved. Raises ConfigError if the machine has too
        little memory.
        """
        total, made, shown = sum(sizes) / 2**30, 0, 0.0
        log(f"host       {total:.1f} GiB of memory to be pinned for {what}")
        spare = {size: len(blocks) for size, blocks in self._free.items()}
        for size in sizes:
            if spare.get(size, 0):
                spare[size] -= 1
                continue
            self._free[size].append(self._new(size))
            made += size
            if made / 2**30 >= shown + LOGGED:
                shown = made / 2**30
                log(f"host       {shown:.0f} of {total:.0f} GiB pinned")

    def allocate(self, size: int) -> Tensor:
        """A block of at least `size` bytes, uint8: the smallest free one, or else a new one of this size."""
        fitting = [free for free, blocks in self._free.items() if free >= size and blocks]
        return self._free[min(fitting)].pop() if fitting else self._new(size)

    def free(self, block: Tensor) -> None:
        """Return a block to the pool."""
        self._free[block.numel()].append(block)

    def _new(self, size: int) -> Tensor:
        try:
            block = torch.empty(size, dtype=torch.uint8)
        except RuntimeError as error:
            raise ConfigError(self._too_little(size)) from error
        block.fill_(0)  # otherwise the pages would be allocated during the first step
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
    """Unregister the blocks of a pool that no longer exists."""
    for block in blocks:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


class Offloaded:
    """An offloaded tensor. `get` returns it, once."""

    def __init__(self, group: Group, x: Tensor) -> None:
        self.group = group
        self.x: Tensor | None = x
        self.shape, self.dtype, self.device, self.version = x.shape, x.dtype, x.device, x._version
        self.block: Tensor | None = None

    def get(self) -> Tensor:
        """The tensor, on the device. Raises RuntimeError if it was changed in place, or returned before."""
        self.group.restore()
        if self.x is None:
            raise RuntimeError("a second backward through a layer whose tensors were offloaded: each is restored once")
        x = self.checked()
        self.x = None
        return x

    def checked(self) -> Tensor:
        """The tensor while it is on the device. Raises RuntimeError if it was changed in place after `offload`."""
        assert self.x is not None
        if self.x._version != self.version:
            raise RuntimeError(
                "a tensor that is kept for the backward was changed in place while it was copied: make the operation "
                "that did it out of place, such as out = out + x instead of out += x"
            )
        return self.x

    def __del__(self) -> None:
        if self.block is not None:  # of a graph that was never used
            self.group.store.pool.free(self.block)


class Group:
    """The tensors that one layer offloads."""

    def __init__(self, store: HostStore, before: Group | None) -> None:
        self.store, self.before = store, before
        self._tensors: list[weakref.ref[Offloaded]] = []  # weak, so that a dropped graph frees its tensors
        self.copied: torch.cuda.Event | None = None  # the last copy, out or in

    def offload(self, x: Tensor) -> Offloaded:
        """Offload a tensor. Its copy to the host starts as soon as it is computed."""
        offloaded = Offloaded(self, x.detach())
        self._tensors.append(weakref.ref(offloaded))
        self.store.copy_out(offloaded)
        return offloaded

    def free_gpu(self) -> None:
        """Free the GPU memory of the copied tensors. The compute stream waits for the copies."""
        self.store.wait(self)
        for offloaded in self.live():
            if offloaded.x is not None:
                offloaded.checked()
                offloaded.x = None

    def live(self) -> list[Offloaded]:
        """The offloaded tensors that a graph still needs."""
        return [offloaded for reference in self._tensors if (offloaded := reference()) is not None]

    def restore(self) -> None:
        """Copy the group back, unless that has started, start the group before it, and wait for this one."""
        self.store.fetch(self)
        if self.before is not None:
            self.store.fetch(self.before)
            self.before = None
        self.store.wait(self)


class HostStore:
    """Groups of tensors in host memory, copied on a separate stream. Without a GPU, they are copied at once."""

    def __init__(self) -> None:
        self.pool = PinnedPool(
            torch.cuda.is_available(),
            "memory.attention_results=host:N memory.layer_inputs=host:N, for the first N layers, need less, and gpu "
            "needs none",
        )
        self._stream: torch.cuda.Stream | None = None
        self._last: Group | None = None
        self._copying_out: list[Group] = []

    def group(self, first: bool) -> Group:
        """A group for the layer that begins. first: whether it is the first layer of a forward."""
        if first:
            self._last, self._copying_out = None, []
        while len(self._copying_out) >= IN_FLIGHT:
            self._copying_out.pop(0).free_gpu()
        self._last = Group(self, self._last)
        self._copying_out.append(self._last)
        return self._last

    def copy_out(self, offloaded: Offloaded) -> None:
        """Copy an offloaded tensor to the host."""
        assert offloaded.x is not None
        if offloaded.x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(offloaded.x.device)
        size = offloaded.x.numel() * offloaded.x.element_size()
        offloaded.block = self.pool.allocate(size)
        with self._on_copy_stream():
            _view(offloaded).copy_(offloaded.x, non_blocking=True)
            self._record_copy(offloaded.group)

    def fetch(self, group: Group) -> None:
        """Begin to copy a group back, unless it is on the device."""
        absent = [offloaded for offloaded in group.live() if offloaded.block is not None]
        for offloaded in absent:
            if offloaded.x is None:
                offloaded.x = torch.empty(offloaded.shape, dtype=offloaded.dtype, device=offloaded.device)
                with self._on_copy_stream():
                    offloaded.x.copy_(_view(offloaded), non_blocking=True)
                    self._record_copy(group)
                offloaded.version = offloaded.x._version
            self.pool.free(offloaded.block)  # type: ignore[arg-type]  # absent has those with a block
            offloaded.block = None  # the copy stream writes into it next, after this copy
        if group in self._copying_out:
            self._copying_out.remove(group)

    def wait(self, group: Group) -> None:
        """Make the compute stream wait for a group's copies."""
        if self._stream is not None and group.copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(group.copied)

    def _on_copy_stream(self) -> AbstractContextManager[object]:
        """A context on the copy stream, which waits for the work queued on the compute stream so far."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _record_copy(self, group: Group) -> None:
        if self._stream is not None:
            group.copied = self._stream.record_event()


def _view(offloaded: Offloaded) -> Tensor:
    """The beginning of an offloaded tensor's block, in its shape and dtype."""
    assert offloaded.block is not None
    size = offloaded.shape.numel() * offloaded.dtype.itemsize
    return offloaded.block[:size].view(offloaded.dtype).view(offloaded.shape)
