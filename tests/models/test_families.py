"""Every family of docs/models.md is exact on the ring; others are refused by name, or allowed by the user."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash import Loopback
from ringflash.errors import ConfigError
from ringflash.models import ARCHITECTURES, ModelConfig, allow_untested, build_model, families, read_config, ring_inputs
from ringflash.models.families import REFUSED
from tests.models.cases import TINY, architecture
from tests.models.proof import PACKED, PLAIN, Prover
from tests.models.sweep import PAGE

TOKENS = torch.randint(1, 97, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_loss_and_every_gradient_equal_eager_attention(model_type):
    """One layout and number of ranks; `make models` proves the others."""
    for prover in Prover.all_of(model_type):
        errors = [prover.error(PLAIN, ranks=4), prover.error(PACKED, ranks=3, recompute=True, trainer=True)]
        assert all(error.passes for error in errors), errors
        assert prover.attention(PACKED) == prover.attention_of_configuration(PACKED)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_saved_configuration_is_taken_as_the_one_it_was(model_type, tmp_path):
    config = read_config(ModelConfig(architecture=architecture(model_type)))
    config.save_pretrained(tmp_path)
    assert read_config(ModelConfig(path=str(tmp_path))).to_diff_dict() == config.to_diff_dict()


def test_the_page_of_models_lists_every_family_with_pass_and_every_refusal_with_its_reason():
    tested, refused = PAGE.read_text().split("## Families that are refused")
    assert re.findall(r"^\| `(\w+)` .* PASS \|$", tested, re.MULTILINE) == [*ARCHITECTURES]
    found = re.findall(r"^\| (`.*`) \| (.*) \|$", refused, re.MULTILINE)
    assert {name: reason for names, reason in found for name in re.findall(r"`(\w+)`", names)} == REFUSED


UNTESTED = {name: x for name, x in architecture("jais2").items() if name != "model_type"}  # of a Llama's shape


@pytest.fixture
def untested(monkeypatch):
    """A family that the table lacks, as jais2 would be."""
    monkeypatch.setattr(families, "FAMILIES", {k: v for k, v in families.FAMILIES.items() if k != "jais2"})
    monkeypatch.setattr(families, "_allowed", set())


@pytest.mark.usefixtures("untested")
def test_a_family_that_the_table_lacks_runs_if_the_user_allows_it():
    fields = {"model_type": "jais2", **UNTESTED}
    config = AutoConfig.for_model(**fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(2))
    message = r"model_type=jais2 is not one of the \d+ families .* model\.untested_family=true, or ringflash"
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(architecture=fields))
    with pytest.raises(ValueError, match=message):
        model(**inputs)
    build_model(ModelConfig(architecture=fields, untested_family=True))
    loss = model(**inputs).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(loss, model(input_ids=TOKENS, labels=TOKENS).loss)


@pytest.mark.usefixtures("untested")
def test_an_untested_family_can_be_allowed_without_the_trainer():
    allow_untested("jais2")
    assert families.family_refusal("jais2") is None


@pytest.mark.parametrize("model_type", ["mamba2", "qwen3_5", "llama4"])
def test_a_family_that_is_refused_for_a_reason_cannot_be_allowed(model_type):
    with pytest.raises(ValueError, match=rf"^model_type={model_type} is not supported on the ring: "):
        allow_untested(model_type)
    for untested in (False, True):
        with pytest.raises(ConfigError, match=rf"model_type={model_type} is not supported on the ring: "):
            read_config(ModelConfig(architecture={"model_type": model_type}, untested_family=untested))


@pytest.mark.parametrize(("name", "message"), [("qwen33", "did you mean qwen3"), (None, "model_type=None is not one")])
def test_a_family_that_transformers_lacks_is_refused_with_the_nearest(name, message):
    with pytest.raises(ValueError, match=message):
        allow_untested(name)
    with pytest.raises(ConfigError, match=message):
        read_config(ModelConfig(architecture={"model_type": name}))


def test_a_window_that_only_the_mask_knows_limits_a_layer():
    """phimoe's layers pass no sliding_window to attention; eager attention reads it off the mask."""
    prover = Prover("phimoe")
    windowed = prover.attention(PLAIN)
    prover.model.config.sliding_window = None
    assert [pairs for pairs, *_ in prover.attention(PLAIN)] > [pairs for pairs, *_ in windowed]


def test_a_layer_that_asks_for_another_window_than_its_mask_has_is_refused():
    model = Prover("mistral").model
    model.model.layers[0].self_attn.config.sliding_window = 5
    model.config = AutoConfig.for_model("mistral", **TINY, sliding_window=None)
    model.model.config = model.config
    model.config._attn_implementation = "ring"
    with pytest.raises(ValueError, match=r"sliding_window=5 and transformers gave it a mask of window None"):
        model(**ring_inputs(TOKENS, ring=Loopback(1)))


def test_a_text_model_that_sees_later_tokens_is_refused():
    fields = architecture("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(ConfigError, match=r"use_bidirectional_attention=True is not supported on the ring"):
        read_config(ModelConfig(architecture=fields))
