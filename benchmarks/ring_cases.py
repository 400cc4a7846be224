"""Shared by the modes of benchmarks/ring.py: a case with ranks and a layout, a whole ring, wrapped kernels.

>>> case = RingCase.of("128k", 8, "packed")
>>> str(case), len(case.documents()), sum(case.documents())
('128k/8 packed, zigzag', 64, 131072)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.checks import NAMES
from benchmarks.options import shortened, whole_number
from ringflash import AttentionPlan, Layout, kernels, ring_attention
from ringflash.kernels import Kernel
from ringflash.ring.transport import Ring

USUAL = ", 32/8 heads of 128"  # which a case's name leaves out
Passes = tuple[Callable[[], Any], Callable[[], Any]]  # forward, backward


@dataclass(frozen=True)
class RingCase(Case):
    """A case over `ranks`. packed: documents of a "packed" case, lognormal lengths from a fixed seed."""

    ranks: int = 8
    layout: str = "zigzag"
    packed: int = 64

    @classmethod
    def of(
        cls,
        length: str | int,
        ranks: int,
        kind: str = "causal",
        heads: tuple[int, int] = (32, 8),
        dim: int = 128,
        **rest,
    ) -> RingCase:
        """One sequence of `length` tokens ("128k" is 131072) and (query, KV) heads."""
        tokens = whole_number(length) if isinstance(length, str) else length
        return cls(1, *heads, tokens, dim, kind, ranks=ranks, **rest)

    def documents(self) -> list[int]:
        """The lengths of the packed documents, in order; other kinds have one document."""
        return lognormal_lengths(self.packed, self.length) if self.kind == "packed" else super().documents()

    def plan(self, ring: Ring) -> AttentionPlan:
        """The plan of the case's mask and layout, on a ring of its size."""
        mask = self.mask()
        return AttentionPlan(mask, Layout.of(self.layout, mask, self.ranks), ring)

    def whole(self) -> RingCase:
        """The causal case of this shape on one rank, the reference for the speed of this one."""
        return replace(self, kind="causal", window=0, ranks=1, layout="contiguous")

    def described(self) -> str:
        """The case's name, with its heads."""
        window = f" {self.window}" if self.window else ""
        heads = f"{self.heads}/{self.kv_heads} heads of {self.head_dim}"
        return f"{shortened(self.length)}/{self.ranks} {self.kind}{window}, {self.layout}, {heads}"

    def __str__(self) -> str:
        return self.described().removesuffix(USUAL)


def lognormal_lengths(count: int, total: int) -> list[int]:
    """Tokens of `count` documents that fill `total`: log-lengths normal with deviation 1, from a fixed seed."""
    if count > total:
        raise ValueError(f"{count} documents of 1 token or more do not fit {total} tokens")
    drawn = torch.randn(count, generator=torch.Generator().manual_seed(0)).double().exp()
    ends = (drawn.cumsum(0) / drawn.sum() * (total - count)).round().long() + torch.arange(1, count + 1)
    return ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()


class Noise:
    """Random numbers to copy from, generated once."""

    def __init__(self) -> None:
        self._made: dict[torch.dtype, Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """Random numbers in the shape and dtype of x, on its device."""
        made = self._made.get(x.dtype)
        if made is None or len(made) < x.numel():
            made = self._made[x.dtype] = torch.randn(x.numel(), dtype=x.dtype, device=x.device)
        return made[: x.numel()].view(x.shape)


def passes(inputs: tuple[Tensor, ...], plan: AttentionPlan, kernel: str = "auto") -> Passes:
    """The local ranks' forward, and their backward alone, as functions that can be called repeatedly."""
    *leaves, dout = (plan.shard(x.detach()) for x in inputs)
    q, k, v = (x.requires_grad_() for x in leaves)
    attend = functools.partial(ring_attention, q, k, v, plan, kernel=kernel)
    return attend, functools.partial(torch.autograd.grad, attend(), (q, k, v), dout, retain_graph=True)


def whole_ring(inputs: tuple[Tensor, ...], plan: AttentionPlan, kernel: str = "auto") -> dict[str, Tensor]:
    """out, dq, dk and dv of the whole sequence, from q, k, v and dout, by all ranks of a Loopback."""
    attend, gradients = passes(inputs, plan, kernel)
    results = [attend().detach(), *gradients()]
    return {n: plan.layout.unshard(x.chunk(plan.ring.size)) for n, x in zip(NAMES, results, strict=True)}


@contextmanager
def kernels_wrapped(wrap: Callable[[Kernel], Kernel]) -> Iterator[None]:
    """A context in which ring_attention runs wrap(kernel) instead of the kernel that it selects."""
    select = kernels.select
    with mock.patch.object(kernels, "select", lambda *args, **options: wrap(select(*args, **options))):
        yield
