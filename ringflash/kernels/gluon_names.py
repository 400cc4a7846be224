"""One name each for functions of Gluon whose names differ between triton 3.6 and 3.9.

    copy_in(descriptor, coordinates, barrier, tile)    memory to shared memory, signals the barrier by bytes
    copy_out(descriptor, coordinates, tile)            shared memory to memory
    add_out(descriptor, coordinates, tile)             the same, as an atomic addition
    reinterpret(tile, dtype, shape, layout)            the same shared memory as another type

The first three run on the copy engine (TMA), asynchronously.

    @aggregate class Name: field: gl.tensor ...        a struct for device code, with the constructor Name(field, ...)
"""

from typing import Any, TypeVar, dataclass_transform

import triton
from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate
from triton.runtime.jit import JITCallable

__all__ = ["TESTED", "add_out", "aggregate", "copy_in", "copy_out", "reinterpret", "triton_version"]

TESTED = ("3.6", "3.7", "3.9")  # the versions that tests/kernels/test_hopper_compiles.py passes with


def triton_version() -> str:
    """Major and minor, as in TESTED."""
    return ".".join(triton.__version__.split(".")[:2])


T = TypeVar("T")


class _Constructor(JITCallable):
    """__init__ of an aggregate: one argument per field, in order.

    A JITCallable, since Triton's cache key includes those of an aggregate: here, the names and types of its fields.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.__name__ = "__init__"
        self.used_global_vals: dict = {}

    @property
    def cache_key(self) -> str:
        return str(self.fields)

    def __call__(self, instance: Any, *values: Any) -> None:
        for (name, kind), value in zip(self.fields.items(), values, strict=True):
            setattr(instance, name, gl.constexpr(value) if kind is gl.constexpr else value)


@dataclass_transform()
def aggregate(cls: type[T]) -> type[T]:
    """A struct for device code, whose fields are the annotations of `cls`."""
    cls.__init__ = _Constructor(cls.__annotations__)  # type: ignore[assignment,misc]
    return _aggregate(cls)


@builtin
def _async_tma_add(tensor_desc, coord, src, _semantic=None):
    """triton 3.9's tma.async_atomic_add, for versions whose compiler has the operation but not the function."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


@builtin
def reinterpret(tile, dtype, shape, layout, _semantic=None):
    """The shared memory of `tile` as another dtype, shape and layout."""
    shape = [_unwrap_if_constexpr(size) for size in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(tile, _unwrap_if_constexpr(dtype), shape, _unwrap_if_constexpr(layout))


# 3.9 keeps the old names as functions that raise, so the new names are tried first.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
add_out = getattr(tma, "async_atomic_add", _async_tma_add)
