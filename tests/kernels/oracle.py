"""Attention in float64 with the whole score matrix, and how far from it a kernel is and may be.

The tolerance rule: fp32 within 1e-5 of float64 in relative norm; 16-bit dtypes at most twice as far as plain torch
attention computed in that dtype, plus 1e-4 (a fifth of fp16's rounding) for cases where that happens to be exact. This
holds for the output and all gradients; lse is fp32 whatever the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ringflash import IntervalMask
from ringflash.partial import Partial
from tests import reference


@dataclass(frozen=True)
class Problem:
    """One attention call and its incoming gradient: shapes as in the contract of `ringflash.kernels`."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: IntervalMask
    scale: float
    softcap: float | None


def problem(
    mask: IntervalMask,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    softcap: float | None = None,
    seed: int = 0,
    means: tuple[float, float] = (1.0, 0.5),
    value_dim: int | None = None,
) -> Problem:
    """Random tensors for a mask.

    heads: (query heads, KV heads). means: those of keys and values; models' have some.
    value_dim: of values and results; None: head_dim.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(length: int, count: int, mean: float = 0.0, dim: int = head_dim) -> Tensor:
        return (torch.randn(batch, length, count, dim, generator=generator, device=device) + mean).to(dtype)

    of_values = head_dim if value_dim is None else value_dim
    q, dout = draw(mask.queries, heads[0]), draw(mask.queries, heads[0], dim=of_values)
    k, v = draw(mask.keys, heads[1], means[0]), draw(mask.keys, heads[1], means[1], of_values)
    return Problem(2 * q, k, v, dout, mask, head_dim**-0.5, softcap)


def dense(p: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv by autograd through masked softmax over all keys, everything in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (p.q, p.k, p.v))
    out, lse = reference.attention(q, k, v, p.mask.dense(), scale=p.scale, softcap=p.softcap)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), p.dout.to(dtype))
    return {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def by_kernel(
    p: Problem, forward: Callable, backward: Callable, round_dq: Callable, written: bool = False
) -> dict[str, Tensor]:
    """out, lse, dq, dk and dv by a kernel, forward then backward; gradients are added to buffers that hold noise.

    written: dk and dv are written in the inputs' 16 bits, where NaN was.
    """
    intervals = p.mask.intervals(p.q.device)
    state = forward(p.q, p.k, p.v, intervals, scale=p.scale, softcap=p.softcap)
    delta = delta_of(p.dout, state)
    held = {name: torch.randn(x.shape, device=x.device) for name, x in (("dq", p.q), ("dk", p.k), ("dv", p.v))}
    results = {"dk": torch.full_like(p.k, torch.nan), "dv": torch.full_like(p.v, torch.nan)} if written else {}
    sums = {name: x.clone() for name, x in held.items() if name not in results}
    backward(p.dout, p.q, p.k, p.v, state.lse, delta, intervals, scale=p.scale, softcap=p.softcap, **sums, **results)
    added = {name: x.double() - held[name].double() for name, x in sums.items()}
    dq = torch.empty_like(held["dq"])
    round_dq(dq, added["dq"].float(), scale=p.scale)
    return {"out": state.out, "lse": state.lse, **added, **results, "dq": dq}


def in_runs(p: Problem, forward: Callable, runs: Iterable[tuple[int, int]]) -> Partial:
    """The Partial of a forward over runs of keys begin..end - 1, each of which carries the last."""
    state = None
    for begin, end in runs:
        part = p.mask.restrict(torch.arange(p.mask.queries), torch.arange(begin, end)).intervals(p.q.device)
        state = forward(p.q, p.k[:, begin:end], p.v[:, begin:end], part, scale=p.scale, carry=state)
    assert state is not None
    return state


def strided(x: Tensor) -> Tensor:
    """x [B, S, H, D] as a slice of heads of a [B, H, S, D] tensor, whose other heads are NaN."""
    held = torch.full((len(x), x.shape[2] + 3, *x.shape[1::2]), float("nan"), dtype=x.dtype, device=x.device)
    held[:, 2:-1] = x.transpose(1, 2)
    return held[:, 2:-1].transpose(1, 2)


def delta_of(dout: Tensor, state: Partial) -> Tensor:
    """rowsum(dout * out), [B, Hq, Sq], contiguous."""
    return (dout.float() * state.out.float()).sum(-1).transpose(1, 2).contiguous()


def violations(p: Problem, actual: dict[str, Tensor]) -> list[str]:
    """The tensors whose error against float64 exceeds the bound, in words; empty if none does."""
    exact = dense(p, torch.float64)
    plain = None if p.q.dtype == torch.float32 else dense(p, p.q.dtype)
    found = []
    for name, truth in exact.items():
        error = distance(actual[name], truth)
        bound = 1e-5 if plain is None or name == "lse" else 2 * distance(plain[name], truth) + 1e-4
        if not error <= bound:
            found.append(f"{name}: error {error:.2e}, bound {bound:.2e}")
    return found


def poisoned(*shape: Any, **options: Any) -> Tensor:
    """torch.empty filled with NaN, so that results which a kernel does not write are seen."""
    return torch.full(shape[0] if len(shape) == 1 else shape, float("nan"), **options)


def distance(actual: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth, infinite where they disagree on what is infinite or NaN.

    Inputs are of unit size, and so are results as a rule. Where the truth nearly cancels its norm says little: there it
    counts as 0.05 for every element. Where it cancels to nothing (rows that see one key have dq = dk = 0 whatever the
    inputs, dp - delta of two equal numbers) it counts as what cancels does, 1: D terms of size 1, times D ** -0.5.
    """
    actual, truth = actual.double(), truth.double()
    if actual.shape != truth.shape or not torch.equal(actual == float("-inf"), truth == float("-inf")):
        return float("inf")
    finite = truth != float("-inf")
    actual, truth = actual[finite], truth[finite]
    least = 0.05 if truth.abs().sum() > 1e-9 else 1.0
    size = max(truth.norm().item(), least * truth.numel() ** 0.5, 1e-30)
    error = (actual - truth).norm().item() / size
    return error if error == error else float("inf")
