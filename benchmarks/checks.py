"""Correctness before speed: every result is compared with float64 before it is timed.

The bound is that of FlashAttention's own tests: the error may be at most twice that of plain torch attention, with the
whole matrix of scores, in the same dtype. In fp32, where that error is rounding noise, the bound is 1e-5. Errors are
relative norms, |x - reference| / |reference|; a result that is not finite has an infinite error.

A small version of a case is compared in full: out, dq, dk and dv. At full size, where addressing errors would show,
some rows of out and dq are compared, since these need no other row; dk and dv must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import Case

FP32_BOUND = 1e-5
ROWS_AT_FULL_SIZE = 16
NAMES = ("out", "dq", "dk", "dv")
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
UNINITIALISED = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty"))


@contextmanager
def poisoned() -> Iterator[None]:
    """A context in which uninitialised memory holds NaN, so that elements that a kernel leaves unwritten are found.

    It applies to all threads. A TorchFunctionMode would not apply in a backward that torch.autograd.grad runs.
    """

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args, **options) -> Tensor:
            x = allocate(*args, **options)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return filled

    with ExitStack() as patches:
        for owner, name in UNINITIALISED:
            patches.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


@dataclass(frozen=True)
class Errors:
    """Relative errors of one direction by tensor, and the bound on each."""

    found: dict[str, float]
    bound: dict[str, float]

    @property
    def wrong(self) -> str | None:
        """None, or the tensors over their bound, as "dq 1.2e-01 > 4.0e-03"."""
        over = [f"{n} {x:.1e} > {self.bound[n]:.1e}" for n, x in self.found.items() if not x <= self.bound[n]]
        return ", ".join(over) or None

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.found.values())


class Reference:
    """float64 attention for some query rows of a case, all by default, and the error of plain torch in their dtype."""

    def __init__(self, case: Case, inputs: tuple[Tensor, ...], rows: Tensor | None = None) -> None:
        q, k, v, dout = (x.detach() for x in inputs)
        self.rows = torch.arange(case.length) if rows is None else rows
        self._names = NAMES if rows is None else NAMES[:2]
        visible = _visible(case, self.rows, q.device)
        picked = self.rows.to(q.device)
        operands = [q[:, picked], k, v, dout[:, picked]]
        self._exact = dict(zip(NAMES, _dense([x.double() for x in operands], visible), strict=True))
        plain = dict(zip(NAMES, _dense(operands, visible), strict=True))
        self._bound = {name: self._tolerance(name, plain[name]) for name in self._names}

    def _tolerance(self, name: str, plain: Tensor) -> float:
        return FP32_BOUND if plain.dtype == torch.float32 else 2 * relative_error(plain, self._exact[name])

    def errors(self, **results: Tensor) -> Errors:
        """The errors of results against float64; results that need more rows than these must be finite."""
        found, bound = {}, {}
        for name, x in results.items():
            if name in self._names:
                x = x[:, self.rows.to(x.device)] if name in ("out", "dq") else x
                found[name], bound[name] = relative_error(x, self._exact[name]), self._bound[name]
            elif not bool(x.isfinite().all()):
                found[name], bound[name] = float("inf"), 0.0
        return Errors(found, bound)


def some_rows(case: Case, inputs: tuple[Tensor, ...]) -> Reference:
    """The reference for a few rows of the last three quarters; a causal mask's first rows would dominate the norm."""
    rows = torch.linspace(case.length // 4, case.length - 1, ROWS_AT_FULL_SIZE).long()
    return Reference(case, inputs, rows)


def _visible(case: Case, rows: Tensor, device: torch.device) -> Tensor:
    """[rows, S], booleans."""
    mask = case.mask()
    j = torch.arange(case.length, device=device)
    lo, hi = (bound[0, rows, None].to(device) for bound in (mask.lo, mask.hi))
    return (lo <= j) & (j < hi)


def _dense(operands: list[Tensor], visible: Tensor) -> tuple[Tensor, ...]:
    """The definition in the operands' dtype: out, dq, dk, dv from q and dout [B, R, Hq, D], k and v [B, S, Hkv, D]."""
    q, k, v = (x.detach().requires_grad_() for x in operands[:3])
    B, R, Hq, D = q.shape
    group = Hq // k.shape[2]
    # query heads that share a KV head become rows of one product: [B, Hkv, group * R, D]
    folded = q.transpose(1, 2).reshape(B, k.shape[2], group * R, D)
    scores = folded @ k.permute(0, 2, 3, 1) * D**-0.5
    scores = scores.masked_fill(~visible.repeat(group, 1), float("-inf"))
    out = (scores.softmax(-1) @ v.transpose(1, 2)).reshape(B, Hq, R, D).transpose(1, 2)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), operands[3])


def relative_error(x: Tensor, exact: Tensor) -> float:
    """|x - exact| / |exact|, infinite if x is not finite."""
    error = ((x.double() - exact).norm() / exact.norm()).item()
    return error if error == error else float("inf")
