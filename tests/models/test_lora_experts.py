"""Adapters on experts compute what peft's do, token by token, and are written and merged as peft does."""

from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from ringflash.errors import ConfigError
from ringflash.models.lora import (
    LoraConfig,
    adapted,
    add_lora,
    description,
    merge,
    merged,
    without_adapters,
    write_adapter,
)
from ringflash.models.lora_experts import replace_experts
from tests.models.cases import loss_and_gradients, tiny

BOTH = ["gate_up_proj", "down_proj"]
RANK = LoraConfig(rank=3, alpha=5, experts=BOTH)


def with_adapters(model_type, config=RANK, std=0.3):
    """A model in eager attention, whose adapters are not 0, and the adapters by name."""
    model = tiny(model_type)
    model.set_attn_implementation("eager")
    add_lora(model, config)
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in found.values():
        nn.init.normal_(p, std=std)
    return model, found


@pytest.mark.parametrize(
    ("model_type", "names", "tokens"),
    [
        ("qwen3_moe", BOTH, 2),  # so few tokens that some experts have none
        ("qwen3_moe", ["down_proj"], 20),
        ("gpt_oss", BOTH, 20),  # transposed, with biases and gate and up interleaved
        ("nemotron_h", ["up_proj", "down_proj"], 20),  # without a gate
    ],
)
def test_losses_and_gradients_are_those_of_peft(model_type, names, tokens):
    model, _ = with_adapters(model_type, replace(RANK, experts=names))
    tokens = torch.arange(3, 3 + tokens)[None]
    loss, gradients = loss_and_gradients(model, {"input_ids": tokens, "labels": tokens})
    replace_experts(model)
    found, found_gradients = loss_and_gradients(model, {"input_ids": tokens, "labels": tokens})
    assert torch.allclose(found, loss, rtol=1e-6, atol=0)
    for name, x in gradients.items():
        assert torch.allclose(found_gradients[name], x, rtol=1e-5, atol=1e-6), name
    assert min(x.norm() for name, x in gradients.items() if ".experts." in name) > 0


def test_experts_without_tokens_get_a_gradient_of_0():
    model, found = with_adapters("qwen3_moe")
    replace_experts(model)
    experts, x = model.model.layers[0].mlp.experts, torch.randn(6, 32)
    experts(x, torch.tensor([[0, 2]] * 6), torch.rand(6, 2)).sum().backward()
    for name, p in found.items():
        if "layers.0.mlp.experts" in name:
            of_expert = p.grad.view(4, -1) if "lora_A" in name else p.grad.view(-1, 4).T
            assert of_expert.any(1).tolist() == [True, False, True, False]


def test_without_adapters_experts_compute_what_they_did_before():
    tokens = torch.arange(3, 43)[None]
    plain = tiny("qwen3_moe")
    plain.set_attn_implementation("eager")
    model, _ = with_adapters("qwen3_moe")
    replace_experts(model)
    before = model(tokens).logits
    with without_adapters(model):
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert torch.equal(model(tokens).logits, before)
    assert (before - plain(tokens).logits).abs().max() > 0.1
    model.model.layers[0].mlp.experts.merge()
    with pytest.raises(RuntimeError, match="had them merged"):
        model(tokens)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_an_adapter_on_experts_is_read_back_and_merged_as_peft_does(tmp_path, model_type):
    model, found = with_adapters(model_type, replace(RANK, rslora=True))
    write_adapter(model, found, tmp_path / "adapter", "base")
    again, _ = with_adapters(model_type, LoraConfig(path=str(tmp_path / "adapter")), std=0)
    add = peft.PeftModel.from_pretrained(tiny(model_type), tmp_path / "adapter")
    add.set_attn_implementation("eager")
    tokens = torch.arange(3, 20)[None]
    expected = add(tokens).logits
    assert torch.equal(model(tokens).logits, expected)
    whole = tiny(model_type)
    whole.load_state_dict(merged(model, dict(model.named_parameters())), strict=False)
    merge(again, str(tmp_path / "adapter"))
    assert torch.allclose(again(tokens).logits, expected, rtol=0, atol=1e-5)
    theirs = add.merge_and_unload()
    for name, p in whole.named_parameters():
        assert torch.allclose(p, theirs.get_parameter(name), atol=1e-6), name
        assert torch.equal(p, again.get_parameter(name)), name
    assert [*again.state_dict()] == [*whole.state_dict()]


def test_what_is_adapted_is_described_and_only_what_is_named_gets_adapters():
    model, _ = with_adapters("glm4_moe", replace(RANK, targets=["q_proj"], experts=["1.mlp.experts.down_proj"]))
    assert description(model).endswith(
        "LoRA of rank 3, alpha 5 on 2 linear layers (q_proj) and the experts of 1 layers (down_proj)"
    )
    assert [name for name in adapted(model) if "experts" in name] == ["model.layers.1.mlp.experts"]
    everything, _ = with_adapters("glm4_moe")
    assert {name.rpartition(".")[2] for name in adapted(everything)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "experts", "base_layer"
    }  # fmt: skip


ATTENTION = "k_proj, o_proj, q_proj, v_proj"


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        (
            "mixtral",
            LoraConfig(rank=3),
            rf"targets=\[\]: model_type=mixtral has experts, .* of {ATTENTION}, or also .*\.experts, of down_proj, ",
        ),
        ("mixtral", replace(RANK, experts=["w1"]), "experts: w1 is not one of .* are down_proj, gate_up_proj in model"),
        ("llama", RANK, "experts: gate_up_proj is not one of .* are none in model_type=llama"),
        ("llama4_text", RANK, "experts: gate_up_proj is not one of .* are none in model_type=llama4_text"),
        (
            "glm4_moe",
            replace(RANK, targets=["mlp.gate_proj"]),
            "targets: peft reads mlp.gate_proj as experts' weights in model_type=glm4_moe",
        ),
        ("mixtral", replace(RANK, targets=["experts"]), "targets: experts is not one of the layers that can have"),
    ],
)
def test_what_cannot_have_an_adapter_is_refused_by_name(model_type, config, message):
    with pytest.raises(ConfigError, match=rf"^model\.lora\.{message}"):
        add_lora(tiny(model_type), config)


def test_dropout_and_4_bits_are_refused_with_experts(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^model\.lora\.dropout=0\.1 is not supported with adapters on experts: model"
    ):
        replace(RANK, dropout=0.1)
    model, found = with_adapters("qwen3_moe")
    write_adapter(model, found, tmp_path / "adapter", "base")
    with pytest.raises(
        ConfigError, match=r"^model\.lora\.dropout=0\.1 is not supported .*: model\.lora\.path=.* has them"
    ):
        add_lora(tiny("qwen3_moe"), LoraConfig(path=str(tmp_path / "adapter"), dropout=0.1))


def test_an_adapter_on_a_router_is_refused(tmp_path):
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["gate.weight"])
    peft.get_peft_model(tiny("qwen3_moe"), config).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^model\.lora\.path=.*: model\.layers\.0\.mlp\.gate\.weight is no weight of"
    ):
        add_lora(tiny("qwen3_moe"), LoraConfig(path=str(tmp_path)))
