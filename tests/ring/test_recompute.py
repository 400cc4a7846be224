"""Recomputing a checkpointed layer does not run the ring again, and changes no gradient."""

import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ringflash import IntervalMask, Loopback, flash_attention, keep_attention, kernels
from ringflash.models import ring_inputs
from tests.test_models import loss_and_gradients, tiny


@pytest.fixture
def launches(monkeypatch):
    """How often the kernels ran, forward and backward."""
    counts: Counter = Counter()
    real = kernels.select

    def counting(*args):
        kernel = real(*args)

        def counted(name):
            return lambda *a, **k: (counts.update([name]), getattr(kernel, name)(*a, **k))[1]

        return dataclasses.replace(kernel, forward=counted("forward"), backward=counted("backward"))

    monkeypatch.setattr(kernels, "select", counting)
    return counts


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_one_forward_and_one_backward_ring_a_layer_a_step(launches, model_type):
    model, tokens, ranks = tiny(model_type), torch.randint(1, 97, (1, 32)), 2
    inputs = ring_inputs(tokens, tokens, ring=Loopback(ranks))
    loss, gradients = loss_and_gradients(model.train(), inputs)
    plain = dict(launches)
    launches.clear()
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_attention})
    again, recomputed = loss_and_gradients(model, inputs)
    assert launches == plain
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_without_keeping_the_ring_would_run_again(launches):
    model, tokens = tiny("qwen3"), torch.randint(1, 97, (1, 32))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_and_gradients(model.train(), ring_inputs(tokens, tokens, ring=Loopback(2)))
    layers, halves, computed = 2, 2, 4
    assert launches["forward"] == 2 * layers * halves * computed


def test_a_graph_that_is_kept_can_be_run_backward_twice(launches):
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))

    def layer(q, k, v):
        return flash_attention(q * 2, k, v, IntervalMask.causal(16)).sin()

    out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=keep_attention)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert launches["forward"] == 1
