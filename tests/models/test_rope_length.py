"""RoPE that goes by length gives each document what transformers gives it alone, or what it is pinned to."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from ringflash import Loopback
from ringflash.errors import ConfigError
from ringflash.models import (
    ModelConfig,
    build_model,
    check_length,
    checkpoint_layers,
    pin_rope,
    read_config,
    ring_inputs,
    rope_by_document,
)
from tests.models.cases import LONGROPE, architecture, loss_and_gradients, tiny

TOKENS = torch.randint(1, 97, (1, 48), generator=torch.Generator().manual_seed(0))

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_parameters": LONGROPE, "max_position_embeddings": 80}
SHORT = {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
BY_LENGTH = {
    "longrope": (LONG, [48], 21),
    "longrope, documents of the long side": (LONG, [25, 23], 48),
    "longrope, of the short side": (LONG, [20, 18, 10], 20),
    "dynamic": (SHORT, [48], 48),
    "dynamic, documents of one length": (SHORT, [24, 24], 24),
}


def with_weights(model, weights=None):
    """The model with weights at which rotary positions matter, or with others' weights."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in () if weights else model.parameters():
            p.add_(torch.randn(p.shape, generator=random) * 0.3)
    if weights:
        model.load_state_dict(weights)
    return model


def plain_of(model):
    """transformers' own model with the same weights, whose rotary module nothing has replaced."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    return with_weights(plain, model.state_dict())


def document_by_document(model, tokens, documents):
    """Loss and gradients of transformers' own model, which gets each document alone, in a module that saw no other."""
    losses, count = [], 0
    plain = plain_of(model)
    for row, lengths in zip(tokens, documents, strict=True):
        for x in row[None].split(lengths, dim=1):
            plain.model.rotary_emb = type(plain.model.rotary_emb)(plain.config)
            losses.append(plain(input_ids=x, labels=x, use_cache=False).loss * (x.shape[1] - 1))
            count += x.shape[1] - 1
    loss = sum(losses) / count
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in plain.named_parameters()}


def assert_equal(found, expected):
    """Of losses and gradients, in relative norms."""
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=0)
    for name, gradient in expected[1].items():
        error = float((found[1][name] - gradient).norm() / gradient.norm())
        assert error < 2e-5, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize(("fields", "documents", "tokens"), BY_LENGTH.values(), ids=BY_LENGTH)
def test_a_pinned_rope_is_the_one_that_transformers_gives_each_document(fields, documents, tokens):
    model = with_weights(tiny("llama", **fields))
    expected = document_by_document(model, TOKENS, [documents])
    pin_rope(model, tokens)
    checkpoint_layers(model.train())  # layers that run again in the backward, outside of the model's call
    inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(3), documents=documents)
    assert_equal(loss_and_gradients(model, inputs), expected)


def test_longrope_is_the_one_that_transformers_gives_each_document_alone():
    """Documents on both sides of the original length of 20, in one row and in another."""
    model = with_weights(tiny("llama", **LONG))
    tokens, documents = torch.cat([TOKENS, TOKENS.flip(1)]), [[21, 20, 7], [48]]
    expected = document_by_document(model, tokens, documents)
    inputs = ring_inputs(tokens, tokens, ring=Loopback(3), documents=documents)
    found = loss_and_gradients(model, inputs)
    assert_equal(found, expected)
    pin_rope(model, 48)
    with pytest.raises(AssertionError):  # one set of frequencies for all is not enough
        assert_equal(loss_and_gradients(model, inputs), expected)


def test_without_a_plan_longrope_is_transformers_own():
    model = with_weights(tiny("llama", **LONG))
    plain = plain_of(model)
    model.set_attn_implementation("eager")
    for n in (20, 48):
        assert torch.equal(model(TOKENS[:, :n]).logits, plain(TOKENS[:, :n]).logits)


def test_rope_that_goes_by_length_is_refused_where_it_is_neither_pinned_nor_by_document():
    config = tiny("llama", **LONG).config
    inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(3))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    with pytest.raises(ValueError, match=r"more than 20, .* pin it .* or call ringflash\.models\.rope_by_document"):
        model(**inputs)
    rope_by_document(model)
    model(**inputs)
    with pytest.raises(ValueError, match=r"more than 20, .* or call ringflash\.models\.rope_by_document"):
        model.model.forward(**inputs | {"labels": None, "shift_labels": None})  # which runs no hook
    dynamic = tiny("llama", **SHORT)
    with pytest.raises(ValueError, match=r"rope_type=dynamic turns by a document's length .*pin_rope\(model, N\)$"):
        dynamic(**inputs)
    with pytest.raises(ValueError, match=r"^model_type=llama with dynamic RoPE cannot go by document"):
        rope_by_document(dynamic)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_sequences_within_the_original_positions_need_no_pin(rope):
    model, tokens = tiny("llama", rope_parameters=rope, max_position_embeddings=20), TOKENS[:, :20]
    loss = model(**ring_inputs(tokens, tokens, ring=Loopback(3))).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(loss, model(input_ids=tokens, labels=tokens).loss, rtol=1e-5, atol=1e-6)


def test_the_trainer_pins_by_a_setting_and_names_it_where_it_is_missing():
    settings = architecture("llama", **SHORT)
    unset = ModelConfig(architecture=settings)
    pinned = ModelConfig(architecture=settings, rope_length=48, dtype="fp32", extrapolate_positions=True)
    check_length(unset, read_config(unset), 20)
    with pytest.raises(ConfigError, match=r"^data\.sequence_length=48: .*rope_type=dynamic .* model\.rope_length=N"):
        check_length(unset, read_config(unset), 48)
    check_length(pinned, read_config(pinned), 48)
    loss = build_model(pinned)(**ring_inputs(TOKENS, ring=Loopback(2))).logits
    assert loss.isfinite().all()
    with pytest.raises(ConfigError, match=r"^model\.rope_length=48: the model's RoPE is llama3: dynamic and"):
        build_model(ModelConfig(architecture=architecture("llama"), rope_length=48))
    with pytest.raises(ConfigError, match=r"^model\.rope_length=0 must be 1 or more, or null"):
        ModelConfig(architecture=settings, rope_length=0)
