"""Recomputing a checkpointed layer does not run the ring again, and changes no gradient."""

import copy
import gc
import inspect
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ringflash import IntervalMask, Loopback, flash_attention, keep_attention
from ringflash.models import checkpoint_layers, ring_inputs
from ringflash.ring import recompute
from tests.models.cases import loss_and_gradients, tiny
from tests.ring.cases import note_calls


@pytest.fixture
def launches(monkeypatch):
    """How often the kernels ran, forward and backward."""
    counts: Counter = Counter()
    note_calls(monkeypatch, lambda name, options: counts.update([name]))
    return counts


class Telling(Loopback):
    """A Loopback that records the label of each exchange."""

    def __init__(self, size):
        super().__init__(size)
        self.told = []

    def exchange(self, outgoing, incoming, label):
        self.told.append(str(label))
        return super().exchange(outgoing, incoming, label)


OPEN = {"use_reentrant": None, "context_fn": None}
PLAIN, KEPT = {"use_reentrant": False}, {"use_reentrant": False, "context_fn": keep_attention}


@pytest.mark.parametrize("given", [(), (None,), (OPEN,), (PLAIN,), (KEPT,)], ids=["-", "none", "open", "plain", "kept"])
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_a_layer_runs_one_forward_and_one_backward_ring_per_step(launches, model_type, given):
    model, tokens, ring = tiny(model_type), torch.randint(1, 97, (1, 32)), Telling(2)
    inputs = ring_inputs(tokens, tokens, ring=ring)
    loss, gradients = loss_and_gradients(model.train(), inputs)
    plain = dict(launches)
    launches.clear()
    ring.told.clear()
    checkpoint_layers(model)
    model.gradient_checkpointing_enable(*given)
    again, recomputed = loss_and_gradients(model, inputs)
    assert launches == plain
    once = [f"layer {layer}, {what}, hop 1" for layer in range(2) for what in ("forward", "backward")]
    assert sorted(context for context in ring.told if "gradients" not in context) == sorted(once)
    assert sum("gradients" in context for context in ring.told) == 2 * 2  # layers, halves of the heads
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, recomputed[name]), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"use_reentrant": True}, '"use_reentrant": True} is not supported by ring attention'),
        ({"context_fn": torch.utils.checkpoint.noop_context_fn}, '"context_fn": <function noop_context_fn'),
    ],
    ids=["reentrant", "context"],
)
def test_checkpointing_that_cannot_keep_anything_is_refused(given, message):
    model = tiny("qwen3")
    checkpoint_layers(model)
    with pytest.raises(ValueError, match=message):
        model.gradient_checkpointing_enable(given)


def test_a_checkpoint_that_keeps_nothing_is_refused_where_the_ring_would_run_again():
    model, tokens, ring = tiny("qwen3").train(), torch.randint(1, 97, (1, 32)), Telling(2)
    model.gradient_checkpointing_enable()  # transformers' own
    inputs = ring_inputs(tokens, tokens, ring=ring)
    loss = model(**inputs).loss
    with pytest.raises(RuntimeError, match=r"the ring would run again: .*checkpoint_layers\(model\)"):
        loss.backward()
    assert not any("backward" in context for context in ring.told)
    assert len(ring.told) == 2  # of the forwards
    checkpoint_layers(model)
    model(**inputs).loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_ring_of_one_may_be_recomputed(launches, reentrant):
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))
    out = checkpoint(flash_attention, q, k, v, IntervalMask.causal(16), use_reentrant=reentrant)
    out.sum().backward()
    assert launches["forward"] == 2


def test_a_model_that_left_the_ring_is_checkpointed_as_ever():
    model, tokens = tiny("qwen3").train(), torch.randint(1, 97, (1, 32))
    checkpoint_layers(model)
    model.set_attn_implementation("sdpa")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_a_model_that_is_not_on_the_ring_is_refused():
    model = tiny("qwen3")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='checkpoint_layers needs a model on the ring, got attn_implementation="sdpa"'):
        checkpoint_layers(model)


def test_nothing_of_transformers_is_replaced():
    plain = inspect.getsourcefile(PreTrainedModel.gradient_checkpointing_enable)
    assert plain.endswith("transformers/modeling_utils.py")
    model = tiny("qwen3")
    checkpoint_layers(model)
    assert copy.deepcopy(model).gradient_checkpointing_enable.args[0] is not model


@pytest.mark.parametrize("attention_is_last", [False, True])
def test_a_graph_that_is_kept_can_be_run_backward_twice(launches, attention_is_last):
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))

    def layer(q, k, v):
        out = flash_attention(q * 2, k, v, IntervalMask.causal(16))
        return out if attention_is_last else out.sin()

    out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=keep_attention)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    second = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert launches["forward"] == 1


def test_a_checkpoint_inside_another_runs_no_ring_again():
    model, tokens, ring = tiny("qwen3").train(), torch.randint(1, 97, (1, 32)), Telling(2)
    inputs = ring_inputs(tokens, tokens, ring=ring)
    loss, gradients = loss_and_gradients(model, inputs)
    checkpoint_layers(model)
    ring.told.clear()
    again = checkpoint(lambda: model(**inputs).loss, **KEPT)
    recomputed = torch.autograd.grad(again, list(model.parameters()))
    assert sum("forward" in context for context in ring.told) == 2  # layers
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients.values(), recomputed, strict=True))


def test_a_checkpoint_that_keeps_inside_one_that_does_not_is_refused():
    model, tokens = tiny("qwen3").train(), torch.randint(1, 97, (1, 32))
    checkpoint_layers(model)
    loss = checkpoint(lambda: model(**ring_inputs(tokens, tokens, ring=Loopback(2))).loss, **PLAIN)
    with pytest.raises(RuntimeError, match="the ring would run again"):
        loss.backward()


def test_a_graph_that_is_dropped_leaves_nothing_kept(monkeypatch):
    kept, of = [], recompute._Kept.of

    def noted(*results, group):
        kept.append(StorageWeakRef(results[0].untyped_storage()))
        return of(*results, group=group)

    monkeypatch.setattr(recompute._Kept, "of", noted)
    model, tokens = tiny("qwen3").train(), torch.randint(1, 97, (1, 32))
    checkpoint_layers(model)
    loss = model(**ring_inputs(tokens, tokens, ring=Loopback(2))).loss
    assert len(kept) == 2
    assert not any(ref.expired() for ref in kept)
    del loss
    gc.collect()
    assert all(ref.expired() for ref in kept)


@pytest.mark.parametrize("where", ["in the layer", "lse in the layer", "after the checkpoint"])
def test_a_kept_result_that_was_changed_in_place_is_refused(where):
    q, k, v = (torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3))

    def layer(q, k, v):
        out, lse = flash_attention(q, k, v, IntervalMask.causal(16), return_lse=True)
        if where == "lse in the layer":
            return out + lse.mul_(2.0).sum()
        return out.mul_(q) if where == "in the layer" else out

    out = checkpoint(layer, q, k, v, use_reentrant=False, context_fn=keep_attention)
    if where == "after the checkpoint":
        out.add_(1.0)
    with pytest.raises(RuntimeError, match="attention's result, which a checkpoint keeps, was changed in place"):
        out.sum().backward()
