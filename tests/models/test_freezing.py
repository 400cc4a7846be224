"""model.freeze freezes what its patterns name, as in .gitignore, and nothing else; errors name what cannot be."""

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash.errors import ConfigError
from ringflash.models import ModelConfig
from ringflash.models.freezing import forward_only_layers, freeze
from ringflash.models.lora import LoraConfig
from tests.models.cases import TINY, tiny


def model_of(patterns=(), **fields):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **TINY | {"num_hidden_layers": 12} | fields))
    freeze(model, patterns)
    return model


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("patterns", "expected", "layers"),
    [
        ([], lambda name: True, 0),
        (["model.embed_tokens"], lambda name: "embed" not in name, 0),
        (["model.layers.1"], lambda name: ".layers.1." not in name, 0),
        (["*", "!model.layers.1?"], lambda name: ".layers.1" in name and ".layers.1." not in name, 10),
        (["*", "!*.mlp", "*.0.mlp.*"], lambda name: ".mlp." in name and ".layers.0." not in name, 1),
        (["*norm*", "model.layers.0.*"], lambda name: "norm" not in name and ".layers.0." not in name, 0),
        (["*", "!lm_head.weight", "!model.norm"], lambda name: name in ("lm_head.weight", "model.norm.weight"), 12),
    ],
    ids=lambda x: str(x) if isinstance(x, list) else None,
)  # fmt: skip
def test_the_last_pattern_that_matches_decides(patterns, expected, layers):
    model = model_of(patterns)
    assert trained(model) == {name for name, _ in model.named_parameters() if expected(name)}
    assert forward_only_layers(model) == layers


def test_tied_weights_are_one_parameter_under_either_name():
    for name in ("lm_head", "model.embed_tokens"):
        model = model_of([name], tie_word_embeddings=True)
        assert not model.lm_head.weight.requires_grad
    assert forward_only_layers(model_of(["*", "!lm_head"], tie_word_embeddings=True)) == 0


@pytest.mark.parametrize(
    ("model_type", "patterns", "layers"),
    [
        ("gpt_neox", ["*embed_in", "*.layers.0"], 1),
        ("nemotron_h", ["*embeddings", "*.layers.0"], 1),
        ("falcon_h1", ["*", "!model.final_layernorm"], 2),
        ("gemma4_text", ["*", "!*.per_layer_projection_norm", "!*.layers.1"], 0),
    ],
)
def test_layers_run_no_backward_unless_something_before_them_trains(model_type, patterns, layers):
    model = tiny(model_type)
    freeze(model, patterns)
    assert forward_only_layers(model) == layers


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["model.layer.0"], "model.freeze: model.layer.0 matches no parameter of this model; did you mean model"),
        (["*", "!xyz"], "model.freeze: !xyz matches no parameter of this model; a name is model.embed_tokens.weight"),
        (["*"], "model.freeze=['*'] leaves no parameter to train: !PATTERN trains some again"),
        (["!model.norm"], "model.freeze=['!model.norm'] freezes nothing: the last pattern that matches decides"),
    ],
    ids=str,
)  # fmt: skip
def test_patterns_without_an_effect_are_refused(patterns, message):
    with pytest.raises(ConfigError) as caught:
        model_of(patterns)
    assert str(caught.value).startswith(message)


def test_random_weights_and_adapters_are_refused():
    with pytest.raises(ConfigError, match=r"^model\.freeze=\['lm_head'\] freezes weights of model\.path: random"):
        ModelConfig(architecture={"model_type": "llama"}, freeze=["lm_head"])
    with pytest.raises(ConfigError, match=r"^model\.freeze=\['lm_head'\] has no effect with model\.lora, which"):
        ModelConfig(path="here", freeze=["lm_head"], lora=LoraConfig(rank=2))
