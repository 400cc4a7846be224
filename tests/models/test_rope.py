"""model.rope_parameters extends a pretrained model as an edited config.json does."""

import json

import pytest
import torch

from ringflash import Loopback
from ringflash.errors import ConfigError
from ringflash.models import ModelConfig, build_model, read_config, ring_inputs
from ringflash.models.configuration import check_length
from ringflash.training.compose import compose
from tests.models.cases import PHIMOE_ROPE, tiny, with_weights

TOKENS = torch.randint(1, 97, (1, 48), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.fixture
def folder(tmp_path):
    """A Qwen 3 of 16 positions."""
    tiny(
        "qwen3", max_position_embeddings=16, rope_parameters={"rope_type": "default", "rope_theta": 5e3}
    ).save_pretrained(tmp_path)
    return tmp_path


def edited(folder, **fields):
    """The same folder with an edited config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return ModelConfig(path=str(folder), dtype="fp32")


@pytest.mark.parametrize("changes", [YARN, YARN | {"original_max_position_embeddings": 16, "beta_fast": 16.0}])
def test_an_extended_model_is_that_of_an_edited_file_and_is_exported_as_such(folder, tmp_path_factory, changes):
    inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(2))
    unchanged = build_model(ModelConfig(path=str(folder), dtype="fp32"))(**inputs).loss
    model = build_model(ModelConfig(path=str(folder), rope_parameters=changes, dtype="fp32"))
    rope = {"rope_theta": 5e3, "original_max_position_embeddings": 16, **changes}
    assert model.config.max_position_embeddings == 64
    loss = model(**inputs).loss
    model.save_pretrained(exported := tmp_path_factory.mktemp("exported"))
    again = read_config(ModelConfig(path=str(exported)))
    assert again.rope_parameters == rope
    expected = build_model(edited(folder, rope_parameters=rope, max_position_embeddings=64))
    assert expected.config.rope_parameters == rope
    assert torch.equal(loss, expected(**inputs).loss)
    assert (loss - unchanged).abs() > 1e-4
    assert torch.equal(loss, build_model(ModelConfig(path=str(exported), dtype="fp32"))(**inputs).loss)


def test_dynamic_rope_extends_a_model_and_leaves_documents_within_its_own_positions_as_they_are(folder):
    changes = {"rope_type": "dynamic", "factor": 4.0}
    config = ModelConfig(path=str(folder), rope_parameters=changes, dtype="fp32")
    check_length(config, read_config(config), 64)
    for documents, same in (([16, 16, 16], True), ([15, 17, 16], False)):
        inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(2), documents=documents)
        of_file = with_weights(build_model(ModelConfig(path=str(folder), dtype="fp32")))
        losses = [model(**inputs).loss for model in (of_file, with_weights(build_model(config)))]
        assert torch.equal(*losses) == same


def test_the_length_is_checked_against_the_extended_positions_and_the_error_names_the_setting(folder):
    plain = ModelConfig(path=str(folder))
    with pytest.raises(ConfigError, match=r"48 is more than the 16 .* model\.rope_parameters=\{.*factor: 3"):
        check_length(plain, read_config(plain), 48)
    extended = ModelConfig(path=str(folder), rope_parameters=YARN)
    check_length(extended, read_config(extended), 64)
    with pytest.raises(ConfigError, match="65 is more than the 64 positions"):
        check_length(extended, read_config(extended), 65)


def test_values_that_are_not_named_stay_unless_the_kind_changes(folder):
    llama3 = {"rope_type": "llama3", "rope_theta": 7e3, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 16}  # fmt: skip
    edited(folder, rope_parameters=llama3, max_position_embeddings=32)
    found = [
        read_config(ModelConfig(path=str(folder), rope_parameters=x)).rope_parameters
        for x in ({"factor": 8.0}, {"rope_type": "linear", "factor": 3.0})
    ]
    assert found == [llama3 | {"factor": 8.0}, {"rope_type": "linear", "rope_theta": 7e3, "factor": 3.0}]


def test_layers_of_two_kinds_have_values_of_their_own(tmp_path):
    tiny("gemma3_text").save_pretrained(tmp_path)
    before = read_config(ModelConfig(path=str(tmp_path))).rope_parameters
    after = read_config(ModelConfig(path=str(tmp_path), rope_parameters={"full_attention": YARN})).rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"] == before["full_attention"] | YARN | {"original_max_position_embeddings": 256}
    with pytest.raises(ConfigError, match=r"^model\.rope_parameters\.rope_type=yarn: this model has rotary .* for "):
        read_config(ModelConfig(path=str(tmp_path), rope_parameters=YARN))


WRONG = {
    "a typing error": ({"rope_type": "yarn", "faktor": 4.0}, r"\.faktor is not a value of rope_type=yarn; .* factor\?"),
    "a value of another kind": ({"rope_type": "linear", "beta_fast": 4.0}, r"\.beta_fast is not a value of"),
    "a kind that is none": ({"rope_type": "ntk"}, r"\.rope_type=ntk is not one of default, linear"),
    "no factor": ({"rope_type": "linear"}, "lacks 'factor'|factor"),
    "a factor of 0": ({"rope_type": "yarn", "factor": 0.0}, r"\.factor=0.0 must be above 0"),
    "a factor without an effect": ({"factor": 2.0}, r"\.factor is not a value of rope_type=default"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_what_the_models_rope_cannot_have_is_refused_with_its_key(folder, changes, message):
    with pytest.raises(ConfigError, match=rf"^model\.rope_parameters.*({message})"):
        read_config(ModelConfig(path=str(folder), rope_parameters=changes))


def test_random_weights_have_their_own_setting():
    with pytest.raises(ConfigError, match=r"set model\.architecture\.rope_parameters$"):
        ModelConfig(architecture={"model_type": "llama"}, rope_parameters=YARN)


@pytest.mark.parametrize(
    "overrides",
    [["model.rope_parameters={rope_type: yarn, factor: 4.0}"],
     ["model.rope_parameters.rope_type=yarn", "model.rope_parameters.factor=4.0"]],
)  # fmt: skip
def test_the_command_line_takes_it_whole_or_value_by_value(overrides):
    config, text = compose(["model=pretrained", "model.path=somewhere", *overrides])
    assert config.model.rope_parameters == YARN
    assert "rope_type: yarn" in text


@pytest.mark.parametrize(("model_type", "fields"), [("ministral3", {}), ("phimoe", {"rope_parameters": PHIMOE_ROPE})])
def test_a_model_that_scales_by_position_takes_those_within_documents_alone(model_type, fields):
    inputs = ring_inputs(TOKENS, TOKENS, ring=Loopback(2), documents=[20, 28])
    through = inputs | {"position_ids": inputs["plan"].shard(torch.arange(48)[None])}
    tiny(model_type, **fields)(**inputs)
    tiny("mistral")(**through)
    with pytest.raises(ValueError, match=r"beginning of each document \(plan.position_ids\), by which this model"):
        tiny(model_type, **fields)(**through)
