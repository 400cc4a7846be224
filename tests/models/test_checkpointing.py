"""Where layers keep tensors for the backward changes no bit of the loss or of a gradient."""

import pytest
import torch

from ringflash import Loopback
from ringflash.models import Keep, checkpoint_layers, ring_inputs
from ringflash.models.checkpointing import host_store
from ringflash.models.freezing import freeze
from tests.models.cases import loss_and_gradients, tiny

KEEPS = {
    "attention-host": Keep("host"),
    "inputs-host": Keep(inputs="host"),
    "both-host": Keep("host", "host"),
    "first-layer": Keep("host:1", "host:1"),
    "one-of-each": Keep("recomputed:1", "host:2"),
    "recomputed": Keep("recomputed"),
    "recomputed-and-host": Keep("recomputed", "host"),
}

BYTES_OF_LAYER = 4 * (32 * 32 + 32 * 4 * 8 + 4 * 32)  # its input, out of 4 heads of 8, and lse, fp32 of 32 tokens


def inputs_of(ranks=1):
    tokens = torch.randint(1, 97, (1, 32), generator=torch.Generator().manual_seed(1))
    return ring_inputs(tokens, tokens, ring=Loopback(ranks), documents=[20, 12])


@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_no_place_changes_a_gradient(model_type, keep):
    model, inputs = tiny(model_type).train(), inputs_of()
    checkpoint_layers(model)
    loss, gradients = loss_and_gradients(model, inputs)
    checkpoint_layers(model, keep)
    for _ in range(2):
        again, found = loss_and_gradients(model, inputs)
        assert torch.equal(loss, again)
        assert all(torch.equal(gradient, found[name]) for name, gradient in gradients.items())
    assert (host_store(model) is not None) == keep.uses_host


def test_attention_results_wait_on_the_host_also_on_a_ring():
    model, inputs = tiny("qwen3").train(), inputs_of(ranks=2)
    loss, gradients = loss_and_gradients(model, inputs)
    checkpoint_layers(model, Keep("host", "host"))
    again, found = loss_and_gradients(model, inputs)
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients.items())


def test_recomputing_attention_on_a_ring_is_refused_in_the_backward():
    model = tiny("qwen3").train()
    checkpoint_layers(model, Keep("recomputed"))
    with pytest.raises(RuntimeError, match="the ring would run again"):
        model(**inputs_of(ranks=2)).loss.backward()


def test_the_host_holds_what_layers_keep_and_nothing_else():
    model = tiny("qwen3").train()
    checkpoint_layers(model, Keep("host", "host"))
    loss_and_gradients(model, inputs_of())
    store = host_store(model)
    assert store is not None
    assert store.pool.bytes == 2 * BYTES_OF_LAYER


@pytest.mark.parametrize("keep", [Keep(), Keep("host", "host")], ids=str)
def test_frozen_layers_below_those_that_train_keep_nothing(keep):
    model, inputs = tiny("llama", num_hidden_layers=3).train(), inputs_of()
    freeze(model, ["*", "!model.layers.2", "!*.1.mlp", "!lm_head"])
    expected = loss_and_gradients(model, inputs)
    checkpoint_layers(model, keep)
    for _ in range(2):
        loss, gradients = loss_and_gradients(model, inputs)
        assert torch.equal(loss, expected[0])
        assert gradients.keys() == expected[1].keys()
        assert all(torch.equal(gradient, gradients[name]) for name, gradient in expected[1].items())
    if (store := host_store(model)) is not None:
        assert store.pool.bytes == 2 * BYTES_OF_LAYER


def test_without_gradients_nothing_is_offloaded():
    model = tiny("qwen3").train()
    checkpoint_layers(model, Keep("host", "host"))
    with torch.no_grad():
        model(**inputs_of())
    store = host_store(model)
    assert store is not None
    assert store.pool.bytes == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "disk"}, "^attention=disk is not one of gpu, host, recomputed, nor host:N or recomputed:N, for"),
        ({"inputs": "recomputed"}, "^inputs=recomputed is not one of gpu, host, nor host:N, for the first N layers$"),
        ({"inputs": "host:-1"}, "^inputs=host:-1 is not one of"),
        ({"attention": "gpu:3"}, "^attention=gpu:3 is not one of"),
    ],
)
def test_a_place_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Keep(**settings)


def test_places_of_a_number_of_layers_leave_the_others_on_the_gpu():
    keep = Keep("recomputed:1", "host:2")
    assert [keep.at(layer) for layer in range(3)] == [Keep("recomputed", "host"), Keep("gpu", "host"), Keep()]
    assert keep.layers == 2
    assert not Keep("host:0").uses_host
    assert not Keep("recomputed:0").recomputes_attention
