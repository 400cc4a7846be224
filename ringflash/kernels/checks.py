"""Checks of a kernel's inputs, with errors that name the kernel.

A `..._refusal` returns None or the tail of "kernel=NAME ...". A `check_...` raises ValueError with NAME and the values.
"""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ringflash.intervals import Intervals

# Kernels compute in fp32. In this range, a scale, a softcap and their quotient neither overflow nor become 0.
LEAST, MOST = 1e-15, 1e15
OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_tensors(**tensors: Tensor) -> None:
    """Raise TypeError or ValueError unless all are dense tensors of one supported dtype on one device."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.is_meta:
            raise ValueError(f"{name} must have values, got a tensor on the meta device")
        if x.is_nested:
            raise TypeError(
                f"{name} must be a dense tensor, got a nested one: pack its sequences as documents of one row"
            )
        if is_traceable_wrapper_subclass(x):
            raise TypeError(f"{name} must be a plain tensor, got {type(x).__name__}; of a DTensor, give to_local()")
        if x.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}; {name}.to_dense() makes it one")
    names, dtypes, devices = (
        ", ".join(tensors),
        *(", ".join(str(getattr(x, what)) for x in tensors.values()) for what in ("dtype", "device")),
    )
    dtype, device = ({getattr(x, what) for x in tensors.values()} for what in ("dtype", "device"))
    if len(dtype) > 1:
        raise TypeError(f"{names} must have one dtype, got {dtypes}")
    if not dtype <= {*OUT_DTYPES}:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtypes}")
    if len(device) > 1:
        raise ValueError(f"{names} must be on one device, got {devices}")


def number_refusal(value: object) -> str | None:
    """None, or what a scale or a softcap must be instead of `value`."""
    if isinstance(value, Real) and not isinstance(value, bool) and LEAST <= value <= MOST:  # type: ignore[operator]
        return None
    return f"a number above 0, finite in fp32 ({LEAST:g} to {MOST:g}), got {value!r:.60}"


def request_refusal(q: Tensor, k: Tensor, softcap: float | None) -> str | None:
    """None, or why no kernel takes these: the tail of "kernel=NAME ..."."""
    if q.dim() != 4 or k.dim() != 4:
        return f"takes q and k as [B, S, H, D], got {[*q.shape]} and {[*k.shape]}"
    if q.shape[0] != k.shape[0] or q.device != k.device:
        return f"takes q and k of one batch on one device, got {len(q)} and {len(k)} on {q.device} and {k.device}"
    if not k.shape[2] or not q.shape[2] or q.shape[2] % k.shape[2]:
        return f"takes query heads a multiple of KV heads, 1 or more of each, got {q.shape[2]} and {k.shape[2]}"
    if softcap is not None and (reason := number_refusal(softcap)):
        return f"takes as softcap {reason}"
    return None


def stride_refusal(q: Tensor, k: Tensor, copy_engine: bool) -> str | None:
    """None, or why a Triton kernel cannot address q and k. copy_engine: whether it loads tiles by TMA."""
    for name, x in (("q", q), ("k", k)):
        if x.stride(3) != 1:
            return f"takes a contiguous last dimension, got {name} with stride {x.stride(3)}"
        if copy_engine and (reason := address_refusal(name, x)):
            return reason
    return None


def address_refusal(name: str, x: Tensor) -> str | None:
    """None, or why the copy engine (TMA) cannot address x [B, S, H, D]."""
    if x.data_ptr() % 16:
        return f"takes tensors that begin at a multiple of 16 bytes, got {name} at {x.data_ptr() % 16} past one"
    width = x.element_size()
    for dimension, (count, stride) in enumerate(zip(x.shape[:3], x.stride(), strict=False)):
        if count > 1 and stride * width % 16:
            size = stride * width
            return f"takes strides that are multiples of 16 bytes, got {name} with stride({dimension}) of {size} bytes"
    return None


def like_out(q: Tensor, v: Tensor) -> Tensor:
    """A tensor like attention's result: q with heads of v's size. Only its shape, dtype and device may be read."""
    return q if q.shape[3] == v.shape[3] else q[..., :1].expand(*q.shape[:3], v.shape[3])


def check_alike(kernel: str, q: Tensor, k: Tensor, scale: float, v: Tensor, **others: Tensor) -> None:
    """Raise ValueError unless scale is valid, v matches k and dout matches q; v and dout may share another head_dim."""
    if reason := number_refusal(scale):
        raise ValueError(f"kernel={kernel} takes as scale {reason}")
    for name, x in {"v": v, **others}.items():
        like = like_out(q if name == "dout" else k, v) if v.dim() == 4 else k
        if x.shape != like.shape or x.dtype != like.dtype or x.device != like.device or x.stride(3) != 1:
            raise ValueError(
                f"kernel={kernel} takes {name} as {[*like.shape]}, {like.dtype}, last dimension contiguous, on "
                f"{like.device}, got {[*x.shape]}, {x.dtype}, strides {x.stride()}, on {x.device}"
            )


def check_rows(kernel: str, like: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless each is fp32, [B, S, H, D] or [B, H, S] of `like`, with a contiguous last dimension."""
    for name, x in tensors.items():
        _check_row(kernel, like, name, x, torch.float32)


def _check_row(kernel: str, like: Tensor, name: str, x: Tensor, dtype: torch.dtype) -> None:
    B, S, H, D = like.shape
    shape = (B, H, S) if x.dim() == 3 else (B, S, H, D)
    contiguous = x.stride(-1) == 1 or x.shape[-1] == 1
    if x.shape != shape or x.dtype != dtype or not contiguous:
        raise ValueError(
            f"kernel={kernel} takes {name} as {[*shape]}, {dtype}, last dimension contiguous, "
            f"got {[*x.shape]}, {x.dtype}, strides {x.stride()}"
        )


def check_key_gradients(kernel: str, k: Tensor, v: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Raise ValueError unless dk and dv fit k and v and are both fp32, to add to, or both of k's dtype, to write."""
    if dk.dtype != dv.dtype or dk.dtype not in (torch.float32, k.dtype):
        raise ValueError(
            f"kernel={kernel} takes dk and dv both as torch.float32, to add to, or both as {k.dtype}, to write, "
            f"got {dk.dtype} and {dv.dtype}"
        )
    _check_row(kernel, k, "dk", dk, dk.dtype)
    _check_row(kernel, v, "dv", dv, dk.dtype)


def check_center(kernel: str, k: Tensor, center: Tensor | None) -> None:
    """Raise ValueError unless center is None or [B, 1, Hkv, D] in k's dtype, with a contiguous last dimension."""
    if center is None:
        return
    shape = (len(k), 1, *k.shape[2:])
    if center.shape != shape or center.dtype != k.dtype or center.device != k.device or center.stride(3) != 1:
        raise ValueError(
            f"kernel={kernel} takes center as {[*shape]}, {k.dtype}, last dimension contiguous, on {k.device}, "
            f"got {[*center.shape]}, {center.dtype}, strides {center.stride()}, on {center.device}"
        )


def check_out(kernel: str, q: Tensor, out: Tensor) -> None:
    """Raise ValueError unless out has q's shape, a dtype that kernels write, and a contiguous last dimension."""
    if out.shape != q.shape or out.dtype not in OUT_DTYPES or out.stride(3) != 1:
        raise ValueError(
            f"kernel={kernel} takes out as {[*q.shape]}, float16, bfloat16 or float32, last dimension contiguous, "
            f"got {[*out.shape]}, {out.dtype}, strides {out.stride()}"
        )


def check_seen(kernel: str, q: Tensor, seen: Tensor | None) -> None:
    """Raise ValueError unless seen is None or contiguous, int32 [2, 1 or B, Sq + 1]."""
    if seen is None:
        return
    B, S = q.shape[:2]
    if seen.dtype != torch.int32 or seen.shape not in ((2, 1, S + 1), (2, B, S + 1)) or not seen.is_contiguous():
        raise ValueError(
            f"kernel={kernel} takes seen as [2, 1 or {B}, {S + 1}], torch.int32, contiguous, "
            f"got {[*seen.shape]}, {seen.dtype}, strides {seen.stride()}"
        )


def check_intervals(kernel: str, q: Tensor, k: Tensor, intervals: Intervals) -> None:
    """Raise ValueError unless every query and key has its bounds, as contiguous rows of int32."""
    for x, bounds in ((q, ("start", "end")), (k, ("query_start", "query_end"))):
        for name in bounds:
            bound = getattr(intervals, name)
            fits = bound.dim() == 2 and bound.shape[0] in (1, len(x)) and bound.shape[1] == x.shape[1]
            if not fits or bound.dtype != torch.int32 or not bound.is_contiguous():
                raise ValueError(
                    f"kernel={kernel} takes intervals.{name} as [1 or {len(x)}, {x.shape[1]}], torch.int32, "
                    f"contiguous, got {[*bound.shape]}, {bound.dtype}, strides {bound.stride()}"
                )


def check_spans(q: Tensor, k: Tensor, spans: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError unless each span (start, end) has bounds for every query, as contiguous rows of int32."""
    for name, span in spans.items():
        for side, bound in zip(("end", "start"), reversed(span), strict=True):
            what = f"{side} of {name}" if name else side
            if not isinstance(bound, Tensor) or bound.dtype != torch.int32 or bound.device != q.device:
                kind = f"{bound.dtype} on {bound.device}" if isinstance(bound, Tensor) else type(bound).__name__
                raise ValueError(f"{what} must be int32 on {q.device}, as the cache is, got {kind}")
            if bound.dim() != 2 or len(bound) not in (1, len(q)) or bound.shape[1] != q.shape[1]:
                raise ValueError(f"{what} must be [1 or {len(q)}, {q.shape[1]}], got {[*bound.shape]}")
            if not bound.is_contiguous():
                raise ValueError(f"{what} must be contiguous, got strides {bound.stride()}")
            least, most = (0, 0) if bound.is_cuda or not bound.numel() else (int(bound.min()), int(bound.max()))
            if least < 0 or most > k.shape[1]:
                raise ValueError(f"{what} must lie in 0..{k.shape[1]}, the cache's capacity, got {least}..{most}")
        if span[0].shape != span[1].shape:
            raise ValueError(f"start and end must have one shape, got {[*span[0].shape]} and {[*span[1].shape]}")
