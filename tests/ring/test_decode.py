"""A cache that ranks share gives what one rank gives: prefill in chunks, new tokens, windows, another prompt.

Random queries, keys and values of every position stand for a model's layers, against float64 over all of them.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from ringflash import IntervalMask, Layout, Loopback, ProcessRing
from ringflash.kernels import decode as kernel
from ringflash.ring import cache_plan, decode
from ringflash.ring.cache_plan import CachePlan
from ringflash.ring.decode import Attention, LayerCache, cached_attention
from tests import reference

TOKENS, DIM = 150, 16


class Layer:
    """One layer's tensors of all positions, its cache, and the outputs of each forward, in order of positions."""

    def __init__(self, ring, plan: CachePlan, left: int | None, **options) -> None:
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (
            torch.randn(2, TOKENS, heads, dim, generator=generator) + mean
            for heads, dim, mean in ((4, DIM, 0.0), (2, DIM, 1.0), (2, 8, 0.5))
        )
        self.ring, self.plan, self.left = ring, plan, left
        self.attention = Attention(ring, DIM**-0.5, **options)
        with mock.patch("torch.empty", _poisoned):
            self.cache = LayerCache(len(ring.local), plan.rows(left), self.k, self.v, batch=2)

    def forward(self, begin: int, tokens: int, layout: Layout | None = None) -> Tensor:
        """The outputs of the local ranks, side by side, of positions that `begin` has been called for."""
        new = [x[:, begin : begin + tokens] for x in (self.q, self.k, self.v)]
        if layout is not None:
            new = [torch.cat([layout.shard(x, rank) for rank in self.ring.local]) for x in new]
        return cached_attention(*new, self.cache, self.plan.steps(self.left), self.attention)

    def expected(self, begin: int, tokens: int) -> Tensor:
        mask = IntervalMask.causal(TOKENS) if self.left is None else IntervalMask.window(TOKENS, self.left)
        options = {"softcap": self.attention.softcap}
        if self.attention.sink is not None:
            options["sink"] = self.attention.sink.double()
        inputs = (x.double() for x in (self.q, self.k, self.v))
        out, _ = reference.attention(*inputs, mask.dense(), scale=self.attention.scale, **options)
        return out[:, begin : begin + tokens]


def _poisoned(*shape, **options) -> Tensor:
    return torch.full(shape, float("nan"), **options)


def error_of(ring, layout: str, windows=(None,), chunk=16, **options) -> float:
    """The greatest distance of any forward from float64: prefill of 100 tokens, a prompt, and tokens one by one."""
    plan = CachePlan(ring, TOKENS, chunk, windows)
    layers = [Layer(ring, plan, left, **options) for left in windows]
    worst, begin = 0.0, 0
    for tokens, shared in ((64, True), (36, True), (25, False), *[(1, False)] * 25):
        of_chunk = Layout.named(layout, tokens, ring.size) if shared else None
        plan.begin(tokens, of_chunk)
        for layer in layers:
            out, truth = layer.forward(begin, tokens, of_chunk), layer.expected(begin, tokens)
            if of_chunk is not None:
                truth = torch.cat([of_chunk.shard(truth, rank) for rank in ring.local])
            worst = max(worst, float((out - truth).norm() / truth.norm()))
            assert out.shape == truth.shape
        begin += tokens
    return worst


def error_on_a_process(*args, **options) -> float:
    return error_of(ProcessRing(), *args, **options)


SINK = torch.tensor([0.0, 3.0, -torch.inf, 1.0])


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "striped"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_forward_is_attention_to_all_tokens_before(size, layout):
    assert error_of(Loopback(size), layout, chunk=64) < 1e-6


@pytest.mark.parametrize("size", [1, 3])
def test_windows_sinks_and_softcaps(size):
    assert error_of(Loopback(size), "zigzag", (None, 9, 40), 66, sink=SINK, softcap=2.0) < 1e-6


def test_windows_keep_their_window_alone(monkeypatch):
    monkeypatch.setattr(cache_plan, "SPARE", 5)
    for size in (1, 2):
        ring = Loopback(size)
        assert CachePlan(ring, TOKENS, 16, (9,)).rows(9) == 9 + 16
        assert error_of(ring, "zigzag", (9, None), 64) < 1e-6


def test_many_new_tokens_take_the_block_kernels(monkeypatch):
    for module in (cache_plan, decode):
        monkeypatch.setattr(module, "FEW", 8)
    monkeypatch.setattr(kernel, "RUN", 32)
    assert error_of(Loopback(2), "zigzag", (None, 20), 64, sink=SINK) < 1e-6
    assert error_of(Loopback(1), "zigzag", (None, 20), 64) < 1e-6


def test_processes_give_the_same(ranks):
    assert max(ranks.run(error_on_a_process, 4, "zigzag", (None, 9), 64)) < 1e-6


def test_a_new_token_takes_one_exchange_of_out_and_lse():
    ring, sent = Loopback(4), []
    plan = CachePlan(ring, TOKENS, 64)
    layer = Layer(ring, plan, None)
    plan.begin(64, layout := Layout.zigzag(64, 4))
    layer.forward(0, 64, layout)
    exchange = ring.exchange
    ring.exchange = lambda *args: sent.append(args) or exchange(*args)
    plan.begin(1)
    layer.forward(64, 1)
    ((outgoing, incoming, _),) = sent
    assert len(outgoing) == len(incoming) == 4 * 3
    assert {x.tensor.numel() for x in outgoing} == {2 * 4 * (8 + 1)}


def test_receive_buffers_of_a_rank_do_not_grow_with_the_ranks():
    numbers = []
    for size in (2, 4):
        ring = Loopback(size)
        plan = CachePlan(ring, TOKENS, 64)
        plan.begin(64, layout := Layout.zigzag(64, size))
        plain = ring.receive_buffers

        @contextmanager
        def counted(label, plain=plain):
            with plain(label) as allocate:
                yield lambda shape, dtype: numbers.append(math.prod(shape)) or allocate(shape, dtype)

        ring.receive_buffers = counted
        Layer(ring, plan, None).forward(0, 64, layout)
    assert len(numbers) == 2 * 2 + 2 * 4  # a rank's queries and results
    assert {*numbers[:4]} == {*numbers[4:]}


def test_new_keys_go_to_the_rank_with_the_least():
    plan = CachePlan(Loopback(3), 40, 24)
    plan.begin(10, Layout.contiguous(10, 3))  # 4, 4 and 2 tokens
    plan.begin(5)
    assert plan.count(None) == [5, 5, 5]
    for _ in range(7):
        plan.begin(1)
    assert plan.count(None) == [8, 7, 7]


def test_another_prompt_on_the_same_document():
    ring = Loopback(2)
    plan = CachePlan(ring, TOKENS, 32, (None, 9))
    layers = [Layer(ring, plan, left) for left in (None, 9)]
    plan.begin(30, layout := Layout.zigzag(30, 2))
    for layer in layers:
        layer.forward(0, 30, layout)
    state, firsts = plan.snapshot(), []
    for _ in range(2):
        plan.begin(20)
        firsts.append([layer.forward(30, 20) for layer in layers])
        plan.restore(state)
    for layer, *outs in zip(layers, *firsts, strict=True):
        assert torch.equal(*outs)
        torch.testing.assert_close(outs[0].double(), layer.expected(30, 20), atol=1e-6, rtol=1e-6)
    assert (plan.length, sum(plan.count(None))) == (30, 30)


def test_what_a_cache_cannot_hold_is_refused_with_its_capacity():
    plan = CachePlan(Loopback(2), 20, 16)
    plan.begin(12, Layout.zigzag(12, 2))
    with pytest.raises(ValueError, match=r"capacity=20 .* holds 12, and cannot hold 9 more: .* capacity=21 or"):
        plan.begin(9)
    with pytest.raises(ValueError, match="layout of 8 tokens on 1 ranks does not fit 8 new tokens on a ring of 2"):
        plan.begin(8, Layout.contiguous(8, 1))
    with pytest.raises(ValueError, match="capacity must be 1 or more"):
        CachePlan(Loopback(2), 0, 16)
