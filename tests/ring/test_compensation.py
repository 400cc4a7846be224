"""16-bit gradients keep the rule of twice plain torch's error, whatever means the inputs have, on any ring.

The rule is that of `tests.kernels.oracle`. Keys, values and incoming gradients of models have means; PyTorch's own
context-parallel tests draw all inputs uniformly from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ringflash import (
    AttentionPlan,
    IntervalMask,
    Layout,
    Loopback,
    ProcessRing,
    Ulysses,
    flash_attention,
    keep_attention,
)
from ringflash.ring import recompute
from tests.ring.cases import assert_exact, beyond_the_rule, on_ring, oracle, whole

LENGTH, HEADS, KV_HEADS, DIM = 512, 4, 2, 32
INPUTS: dict[str, Callable[..., list[Tensor]]] = {
    "means": lambda *shapes, generator: [
        torch.randn(shape, generator=generator) + mean for shape, mean in zip(shapes, (0.0, 2.0, 1.0, 0.0), strict=True)
    ],
    "uniform": lambda *shapes, generator: [torch.rand(shape, generator=generator) for shape in shapes],
    "normal": lambda *shapes, generator: [torch.randn(shape, generator=generator) for shape in shapes],
    "large scores": lambda *shapes, generator: [
        factor * (torch.randn(shape, generator=generator) + mean)
        for shape, factor, mean in zip(shapes, (25, 5, 1, 1), (0, 1, 1, 0), strict=True)
    ],
    "outliers": lambda *shapes, generator: [
        (torch.randn(shape, generator=generator) + mean) * (1 + 15 * (torch.arange(LENGTH) % every == 3))[:, None, None]
        for shape, mean, every in zip(shapes, (0.0, 2.0, 1.0, 0.0), (LENGTH, 20, LENGTH, LENGTH), strict=True)
    ],
    "an outlier": lambda *shapes, generator: [
        (torch.randn(shape, generator=generator) + mean) * (1 + 15 * (torch.arange(LENGTH) == first))[:, None, None]
        for shape, mean, first in zip(shapes, (0.0, 2.0, 1.0, 0.0), (-1, 1, -1, -1), strict=True)
    ],
}
EXTRAS = {"plain": {}, "softcap": {"softcap": 5.0}, "sink": {"sink": torch.tensor([0.0, 2.0, 4.0, -1.0])}}


def inputs(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and dout of whole sequences, one batch row."""
    shapes = [(1, LENGTH, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [x.to(dtype) for x in INPUTS[kind](*shapes, generator=torch.Generator().manual_seed(3))]


def judged(kind: str, dtype: torch.dtype, ranks: int, extra: str, **options) -> list[str]:
    """What is further from float64 than twice plain torch, and 1e-4."""
    mask, layout = IntervalMask.causal(LENGTH), Layout.zigzag(LENGTH, ranks)
    tensors = inputs(kind, dtype)
    exact, plain = (oracle(tensors, mask.dense(), dtype=into, **EXTRAS[extra]) for into in (torch.float64, dtype))
    found = on_ring(tensors, AttentionPlan(mask, layout, Loopback(ranks)), **EXTRAS[extra], **options)
    return beyond_the_rule(whole(found, layout), exact, plain, spare=1e-4)


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("ranks", [1, 4])
def test_gradients_keep_the_rule_whatever_means_the_inputs_have(ranks, kind, dtype, extra):
    assert judged(kind, dtype, ranks, extra) == []


def test_without_compensation_keys_with_a_mean_break_the_rule():
    """So the inputs above do show what compensation removes."""
    for extra in ("plain", "sink"):
        found = judged("means", torch.bfloat16, 4, extra, compensated=False)
        assert [line.split(":")[0] for line in found] == ["dq"]


def test_a_rank_may_have_keys_of_another_mean_than_the_others():
    tensors = inputs("means", torch.bfloat16)
    tensors[1] = (tensors[1] + torch.linspace(-0.5, 0.5, LENGTH)[:, None, None]).bfloat16()
    mask, layout = IntervalMask.full(LENGTH), Layout.contiguous(LENGTH, 4)
    exact, plain = (oracle(tensors, mask.dense(), dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    found = on_ring(tensors, AttentionPlan(mask, layout, Loopback(4)))
    assert beyond_the_rule(whole(found, layout), exact, plain) == []


@pytest.mark.parametrize("ranks", [1, 4])
def test_keys_around_0_are_left_as_they_are_bit_for_bit(ranks):
    plan = AttentionPlan(IntervalMask.causal(LENGTH), Layout.zigzag(LENGTH, ranks), Loopback(ranks))
    compensated, plain = (on_ring(inputs("normal", torch.bfloat16), plan, compensated=on) for on in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(compensated, plain, strict=True))


@pytest.mark.parametrize("kind", ["means", "uniform", "normal", "an outlier"])  # large scores round lse in fp32
@pytest.mark.parametrize("ranks", [1, 4])
def test_fp32_gradients_are_within_1e_5_whatever_means_the_inputs_have(ranks, kind):
    mask = IntervalMask.causal(LENGTH)
    plan = AttentionPlan(mask, Layout.zigzag(LENGTH, ranks), Loopback(ranks))
    tensors = inputs(kind, torch.float32)
    assert_exact(on_ring(tensors, plan), oracle(tensors, mask.dense()), plan.layout)


def test_fp16_keys_near_the_largest_number_have_finite_gradients_on_ranks_whose_own_keys_are_small():
    plan = AttentionPlan(IntervalMask.causal(LENGTH), Layout.contiguous(LENGTH, 2), Loopback(2))
    q, k, v, dout = inputs("normal", torch.float16)
    k[:, : LENGTH // 2], k[:, LENGTH // 2 :] = -6e4, 8e3
    assert all(x.isfinite().all() for x in on_ring([q / 64, k, v, dout], plan))


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_checkpoint_keeps_all_that_the_gradients_need(extra):
    mask, (q, k, v, dout) = IntervalMask.causal(LENGTH), inputs("means", torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def layer(q, k, v):
        return flash_attention(q, k, v, mask, **EXTRAS[extra])

    plain = torch.autograd.grad(layer(*leaves), leaves, dout)
    out = checkpoint(layer, *leaves, use_reentrant=False, context_fn=keep_attention)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves, dout), plain, strict=True))


def test_no_residue_is_kept_where_no_gradient_will_be_asked_for(monkeypatch):
    results = []
    monkeypatch.setattr(recompute, "keep", lambda *kept: results.append(kept) or kept)
    q, k, v, _ = inputs("means", torch.bfloat16)
    for needs in (False, True):
        flash_attention(q.requires_grad_(needs), k, v, IntervalMask.causal(LENGTH), softcap=5.0)
    assert [len(kept) for kept in results] == [2, 3]  # out and lse, and the residue


def on_grid(extra: str) -> list[Tensor]:
    """This rank's results on a grid of two rings of two ranks, whose rows exchange heads (Ulysses)."""
    rank = dist.get_rank()
    groups = {row: dist.new_group(row) for row in ((0, 1), (2, 3), (0, 2), (1, 3))}
    row, column = ((0, 1), (2, 3))[rank // 2], ((0, 2), (1, 3))[rank % 2]
    layout = Layout.zigzag(LENGTH, 2, ulysses=2)
    plan = AttentionPlan(IntervalMask.causal(LENGTH), layout, ProcessRing(groups[column]), Ulysses(groups[row]))
    return on_ring(inputs("means", torch.bfloat16), plan, **EXTRAS[extra])


@pytest.mark.ranks
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_grid_with_ulysses_keeps_the_rule(ranks, extra):
    results = [list(x) for x in zip(*ranks.run(on_grid, 4, extra), strict=True)]
    found = [*map(torch.cat, results[:4]), *map(sum, results[4:])]
    visible, tensors = IntervalMask.causal(LENGTH).dense(), inputs("means", torch.bfloat16)
    exact, plain = (oracle(tensors, visible, dtype=dtype, **EXTRAS[extra]) for dtype in (torch.float64, torch.bfloat16))
    layout = Layout.zigzag(LENGTH, 2, ulysses=2).split(2)
    assert beyond_the_rule(whole(found, layout), exact, plain) == []
