"""model.path takes the text model of a folder of a model of images and text, and exports it as one of text."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from ringflash import Loopback
from ringflash.errors import ConfigError
from ringflash.models import ModelConfig, build_model, read_config, ring_inputs
from ringflash.models.families import TEXT_MODELS
from tests.models.cases import architecture, tiny, with_weights

TOKENS = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16, "patch_size": 2}  # fmt: skip
VISION = {
    "gemma3": SMALL,
    "gemma4": {"model_type": "gemma4_vision", **SMALL, "head_dim": 8, "num_key_value_heads": 2},
    "llama4": {**SMALL, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16},
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
}
TOKENS_OF_WHOLE = {"bos_token_id": 91, "eos_token_id": [92, 93], "pad_token_id": 94}
UNCAPPED = {"gemma3": {"final_logit_softcapping": None}}  # transformers caps the text model's logits alone


def save_whole(model_type, folder):
    """A folder of a small model of images and text, whose text_config leaves out tied weights and special tokens."""
    text = architecture(TEXT_MODELS[model_type]) | UNCAPPED.get(model_type, {})
    tied = model_type != "llama4"
    config = AutoConfig.for_model(
        model_type, text_config=text, vision_config=VISION[model_type], tie_word_embeddings=tied
    )
    whole = with_weights(AutoModelForImageTextToText.from_config(config)).eval()
    whole.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    for name in ("tie_word_embeddings", *TOKENS_OF_WHOLE):
        settings["text_config"].pop(name, None)
    settings |= TOKENS_OF_WHOLE
    (folder / "config.json").write_text(json.dumps(settings))
    return whole


def names_in(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {*file.keys()}


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_a_folder_of_a_model_with_images_is_taken_for_its_text_model(model_type, tmp_path):
    whole = save_whole(model_type, tmp_path / "whole")
    model = build_model(ModelConfig(path=str(tmp_path / "whole"), dtype="fp32")).eval()
    assert model.config.model_type == TEXT_MODELS[model_type]
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (model_type != "llama4")
    assert {name: getattr(model.config, name) for name in TOKENS_OF_WHOLE} == TOKENS_OF_WHOLE
    found = model(**ring_inputs(TOKENS, ring=Loopback(1), config=model.config)).logits
    torch.testing.assert_close(found, whole(input_ids=TOKENS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=f"model_type={model_type} is not supported on the ring: a model of images"):
        ring_inputs(TOKENS, ring=Loopback(1), config=whole.config)
    with pytest.raises(ConfigError, match=r"model of images and text.* model\.path takes the text model"):
        read_config(ModelConfig(architecture={"model_type": model_type}))
    model.save_pretrained(tmp_path / "text")
    tiny(TEXT_MODELS[model_type], tie_word_embeddings=tied).save_pretrained(tmp_path / "same")
    assert names_in(tmp_path / "text") == names_in(tmp_path / "same")


def test_more_layers_of_text_than_the_configuration_has_are_refused(tmp_path):
    save_whole("gemma3", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["text_config"] |= {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"has \d+ weights that its config\.json lacks, such as .*layers\.1\."):
        build_model(ModelConfig(path=str(tmp_path), dtype="fp32"))
