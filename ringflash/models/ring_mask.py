"""RingMask: the attention_mask of ring_inputs, which only ring attention can read.

A model that is not on the ring would silently attend within its shard and across documents. Every other attention
implementation reads attention_mask, so this mask raises an error when it is read:

    >>> mask = RingMask(shape=(1, 4), labels=3)
    >>> mask.to("cpu").detach().shape
    torch.Size([1, 4])
    >>> mask[:, None, None, :]
    Traceback (most recent call last):
    ValueError: inputs of ring_inputs went to a model that is not on the ring (its attention_mask was read by \
Tensor.__getitem__): load the model with attn_implementation="ring" and a configuration of its own, since a model \
made of it later changes this one; ring_inputs(config=model.config) refuses models that cannot run on the ring, and \
chunked and linear attention need it

Models that do not read attention_mask raise no error: those without attention (RWKV, xLSTM), CPM-Ant, and attention
registered with transformers' AttentionInterface without a function for its masks. ring_inputs(config=...) refuses such
models by their configuration.

A RingMask is not a torch.Tensor, since torch.compile cannot trace a subclass whose functions raise. The usual
operations on inputs (move, pin, detach, copy, read the shape) return the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ringflash.ring.plan import AttentionPlan

_JOINS = {"cat", "concat", "concatenate", "hstack", "stack", "pad", "new_ones", "new_zeros", "new_full"}
_UNREAD = ("to", "cpu", "cuda", "pin_memory", "detach", "clone", "contiguous", "bool", "record_stream")
_READ = (
    "setitem", "iter", "bool", "int", "float", "index", "contains", "array", "eq", "ne", "lt", "le", "gt",
    "ge", "invert", "neg", "abs", "and", "rand", "or", "ror", "xor", "rxor", "add", "radd", "sub", "rsub", "mul",
    "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul",
    "lshift", "rshift",
)  # fmt: skip


class RingMask:
    """Stands for the mask that an AttentionPlan holds.

    shape: that of the input_ids. labels: the number of labels of the whole sequences, None if none were given. window:
    the number of tokens that a query of these layers sees, None for no window. plan: the step's AttentionPlan. other:
    whether transformers' own mask limits these layers further, which only a plan can express.
    Every use that would read it raises ValueError.
    """

    def __init__(
        self,
        shape: Sequence[int],
        labels: int | None = None,
        device: torch.device | str = "cpu",
        window: int | None = None,
        plan: AttentionPlan | None = None,
        other: bool = False,
    ) -> None:
        self.shape = torch.Size(shape)
        self.labels = labels
        self.window = window
        self.plan = plan
        self.other = other
        self.device = torch.device(device)
        self.dtype = torch.bool
        self.ndim = len(self.shape)
        self.requires_grad = False

    def windowed(self, window: int | None) -> RingMask:
        """The mask of layers with a sliding window, or of those without one."""
        return RingMask(self.shape, self.labels, self.device, window, self.plan)

    def size(self, dim: int | None = None) -> torch.Size | int:
        """As torch.Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As torch.Tensor.dim."""
        return self.ndim

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> RingMask:
        """This mask, for slices that leave nothing out, which newer versions of Gemma 4 take; an error for others."""
        parts = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(x, slice) and (x.start or 0, x.stop, x.step) == (0, None, None) for x in parts):
            _refuse("__getitem__")
        return self

    def __repr__(self) -> str:
        return f"RingMask(shape={[*self.shape]}, labels={self.labels})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(f"RingMask has no attribute {name}")
        _refuse(name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(func, "__name__", str(func)))

    __hash__ = object.__hash__


def _refuse(name: str) -> NoReturn:
    if name in _JOINS:
        raise ValueError(
            f"the attention_mask of ring_inputs was made longer (torch.{name}): prompt tuning, prefix tuning and "
            f"generate add tokens or keys, which are not in the plan. Use LoRA to adapt a model on the ring, and "
            f"generate from input_ids with past_key_values=RingCache(model, capacity=N)"
        )
    raise ValueError(
        f"inputs of ring_inputs went to a model that is not on the ring (its attention_mask was read by "
        f'Tensor.{name}): load the model with attn_implementation="ring" and a configuration of its own, since a model '
        f"made of it later changes this one; ring_inputs(config=model.config) refuses models that cannot run on the "
        f"ring, and chunked and linear attention need it"
    )


def _refuses(name: str) -> Callable:
    return lambda self, *args, **kwargs: _refuse(name)


for _name in _UNREAD:
    setattr(RingMask, _name, lambda self, *args, **kwargs: self)
for _name in (f"__{short}__" for short in _READ):
    setattr(RingMask, _name, _refuses(_name))
