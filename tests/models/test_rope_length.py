"""Length-dependent RoPE gives each document the frequencies that it has alone, or those of a fixed length."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from ringflash import Loopback
from ringflash.errors import ConfigError
from ringflash.models import (
    ModelConfig,
    build_model,
    checkpoint_layers,
    fix_rope_length,
    read_config,
    ring_inputs,
    rope_per_document,
)
from ringflash.models.configuration import check_length
from tests.models.cases import (
    DYNAMIC,
    LONGROPE,
    PHIMOE_ROPE,
    architecture,
    loss_and_gradients,
    plain_of,
    tiny,
    with_weights,
)

TOKENS = torch.randint(1, 97, (1, 48), generator=torch.Generator().manual_seed(0))

LONG = {"rope_parameters": LONGROPE, "max_position_embeddings": 80}
SHORT = {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
LENGTH_DEPENDENT = {
    "longrope": (LONG, [48], 21),
    "longrope, documents of the long side": (LONG, [25, 23], 48),
    "longrope, of the short side": (LONG, [20, 18, 10], 20),
    "dynamic": (SHORT, [48], 48),
    "dynamic, documents of one length": (SHORT, [24, 24], 24),
}


def each_document(model, tokens, documents):
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


@pytest.mark.parametrize(("fields", "documents", "tokens"), LENGTH_DEPENDENT.values(), ids=LENGTH_DEPENDENT)
def test_rope_of_a_fixed_length_is_the_one_that_transformers_gives_each_document(fields, documents, tokens):
    model = with_weights(tiny("llama", **fields))
    expected = each_document(model, TOKENS, [documents])
    fix_rope_length(model, tokens)
    checkpoint_layers(model.train())  # layers that run again in the backward, outside of the model's call
    inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(3), documents=documents)
    assert_equal(loss_and_gradients(model, inputs), expected)


MODELS = {
    "longrope": ("llama", LONG),
    "dynamic": ("llama", SHORT),
    "dynamic, in complex numbers": ("deepseek_v2", SHORT),
}


@pytest.mark.parametrize(("model_type", "fields"), MODELS.values(), ids=MODELS)
def test_each_document_has_the_rope_that_transformers_gives_it_alone(model_type, fields):
    """Documents on both sides of the original length of 20, in one row and in another."""
    model = with_weights(tiny(model_type, **fields))
    tokens, documents = torch.cat([TOKENS, TOKENS.flip(1)]), [[21, 20, 7], [48]]
    expected = each_document(model, tokens, documents)
    inputs = ring_inputs(tokens, tokens, ring=Loopback(3), documents=documents)
    assert_equal(loss_and_gradients(model, inputs), expected)
    fix_rope_length(model, 48)
    with pytest.raises(AssertionError):  # one set of frequencies for all is not enough
        assert_equal(loss_and_gradients(model, inputs), expected)


@pytest.mark.parametrize("fields", [LONG, SHORT], ids=["longrope", "dynamic"])
def test_without_a_plan_the_rope_is_transformers_own(fields):
    model = with_weights(tiny("llama", **fields))
    plain = plain_of(model)
    model.set_attn_implementation("eager")
    for n in (20, 48, 40):
        assert torch.equal(model(TOKENS[:, :n]).logits, plain(TOKENS[:, :n]).logits)


def test_a_rotary_module_in_a_recomputed_layer_is_refused_unless_its_length_is_fixed():
    """As an untested family might have it: in the backward the plan is gone."""
    model, inputs = tiny("llama", **SHORT), ring_inputs(TOKENS, ring=Loopback(1))
    rotary, x = model.model.rotary_emb, torch.ones(1, 48, 8, requires_grad=True)

    def backward():
        rotary.document = inputs["plan"]
        turned = checkpoint(lambda x: x * rotary(x, inputs["position_ids"])[0], x, use_reentrant=False)
        rotary.document = None  # as after the model's forward
        turned.sum().backward()

    with pytest.raises(
        RuntimeError, match=r"a layer that runs again in the backward: call ringflash\.models\.fix_rope"
    ):
        backward()
    fix_rope_length(model, 48)
    backward()


def test_length_dependent_rope_is_refused_if_its_length_is_neither_fixed_nor_per_document():
    config = tiny("llama", **SHORT).config
    inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(3))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    with pytest.raises(ValueError, match=r"beyond 20 tokens, .* use the frequencies .* ringflash\.models\.rope_per_"):
        model(**inputs)
    rope_per_document(model)
    model(**inputs)
    with pytest.raises(ValueError, match=r"beyond 20 tokens, .* or call ringflash\.models\.rope_per_document"):
        model.model.forward(**inputs | {"labels": None, "shift_labels": None})  # which runs no hook
    fix_rope_length(model, 48)
    model(**inputs)
    with pytest.raises(ValueError, match=r"^the model's RoPE is llama3; only dynamic and longrope depend on the"):
        rope_per_document(tiny("llama"))
    with pytest.raises(ValueError, match=r"^a model that also scales by position needs more than 20 tokens, got 20"):
        fix_rope_length(tiny("phimoe", rope_parameters=PHIMOE_ROPE), 20)


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_sequences_within_the_original_positions_are_exact_in_a_model_as_transformers_makes_it(rope):
    """20 tokens of 3 ranks are padded to 24, which no position may show."""
    tokens, plain = TOKENS[:, :20], plain_of(tiny("llama", rope_parameters=rope, max_position_embeddings=20))
    expected = loss_and_gradients(with_weights(plain), {"input_ids": tokens, "labels": tokens})
    plain.set_attn_implementation("ring")
    assert_equal(loss_and_gradients(plain, ring_inputs(tokens, tokens, ring=Loopback(3))), expected)


def test_a_setting_of_the_trainer_fixes_the_length_and_its_errors_name_it():
    fixed = ModelConfig(architecture=architecture("llama", **SHORT), rope_length=32, dtype="fp32")
    by_function = tiny("llama", **SHORT)
    fix_rope_length(by_function, 32)
    inputs = ring_inputs(TOKENS, ring=Loopback(2))
    torch.manual_seed(0)
    assert torch.equal(build_model(fixed)(**inputs).logits, by_function(**inputs).logits)
    with pytest.raises(ConfigError, match=r"^model\.rope_length=48: the model's RoPE is llama3; only dynamic and"):
        build_model(ModelConfig(architecture=architecture("llama"), rope_length=48))
    with pytest.raises(ConfigError, match=r"^model\.rope_length=0 must be 1 or more, or null"):
        ModelConfig(architecture=architecture("llama"), rope_length=0)


def test_layers_that_differ_in_a_length_dependent_rope_are_refused_beyond_it():
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": DYNAMIC}
    fields = {"rope_parameters": rope, "max_position_embeddings": 20}
    model = ModelConfig(architecture=architecture("gemma3_text", **fields), extrapolate_positions=True)
    check_length(model, read_config(model), 20)
    with pytest.raises(ConfigError, match=r"^data\.sequence_length=48: .*rope_type=dynamic .* not supported in layers"):
        check_length(model, read_config(model), 48)
