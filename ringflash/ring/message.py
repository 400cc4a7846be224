"""Message: what the ranks of a ring send to each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Message:
    """A contiguous tensor that one rank of the ring sends to another; on the receiving side, the tensor to write it to.

    target: on the sending side, the place in this rank's own receive buffers that corresponds to the receiver's. It is
    not needed if receive buffers are ordinary memory.
    """

    source: int
    destination: int
    tensor: Tensor
    target: Tensor | None = None
