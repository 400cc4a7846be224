"""Counted FLOPs are those of the formula, with each layer's own heads."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash import Loopback
from ringflash.models import ModelConfig, read_config, ring_inputs
from ringflash.models.freezing import freeze
from ringflash.models.lora import LoraConfig, add_lora
from ringflash.ring.cost import Heads, peak_flops
from ringflash.training.flops import (
    attention_flops,
    forward_only_parameters,
    matmul_parameters,
    state_flops,
    step_flops,
)
from ringflash.training.step import _work
from tests.models.cases import architecture

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip


def test_weights_that_are_looked_up_only_do_not_count():
    for tied in (False, True):
        config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=tied)
        layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
        assert matmul_parameters(AutoModelForCausalLM.from_config(config)) == 4 * layer + 50 * 16


def test_a_second_embedding_of_the_tokens_does_not_count():
    sizes = SIZES | {"hidden_size_per_layer_input": 6, "laurel_rank": 4, "num_hidden_layers": 2,
                     "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2,
                     "activation_sparsity_pattern": [0.0] * 2}  # fmt: skip
    counts = []
    for rows in (50, 60):
        config = AutoConfig.for_model("gemma3n_text", **sizes, vocab_size_per_layer_input=rows)
        counts.append(matmul_parameters(AutoModelForCausalLM.from_config(config)))
    assert counts[0] == counts[1]


def test_of_the_experts_those_that_a_token_meets_count():
    sizes = SIZES | {"num_local_experts": 8, "num_hidden_layers": 1, "tie_word_embeddings": True}

    def counts(active):
        config = AutoConfig.for_model("gpt_oss", **sizes, num_experts_per_tok=active)
        model = AutoModelForCausalLM.from_config(config)
        own = matmul_parameters(model)
        add_lora(model, LoraConfig(rank=2, targets=["q_proj"], experts=["gate_up_proj", "down_proj"]))
        assert matmul_parameters(model, frozen=True) == own
        return own, matmul_parameters(model) - own

    (one, of_one), (two, of_two) = counts(1), counts(2)
    expert = 3 * 16 * 32  # gate, up and down, without their biases
    assert one == 2 * 16 * 16 + 2 * 16 * 8 + 8 * 16 + expert + 50 * 16  # attention, router, expert, lm_head
    assert two - one == expert
    adapters = 2 * (16 + 64) + 2 * (32 + 16)  # of an expert
    assert (of_one, of_two - of_one) == (2 * (16 + 16) + adapters, adapters)


def test_a_step_is_six_operations_per_weight_and_token_and_six_per_pair_head_and_dimension_of_keys_and_values():
    attention = attention_flops(11, Heads(query=2, key=1, dim=8, value_dim=6))
    assert attention == 6 * 11 * 2 * (8 + 6)
    assert step_flops(weights=1000, tokens=7, attention=attention) == 6 * 1000 * 7 + attention
    with_reference = step_flops(weights=1000, tokens=7, attention=attention, frozen=900, reference=True)
    assert with_reference == (6 * 1000 - 2 * 900 + 2 * 900) * 7 + attention * 4 / 3


def test_the_delta_rule_is_18_operations_per_token_head_and_element_of_its_state():
    config = read_config(ModelConfig(architecture=architecture("qwen3_5_text", num_hidden_layers=3, layer_types=[
        "linear_attention", "full_attention", "linear_attention"])))  # fmt: skip
    assert state_flops(config, 7) == 18 * 2 * 7 * 24 * 4 * 2
    scan = read_config(ModelConfig(architecture=architecture("falcon_h1", num_hidden_layers=3)))
    assert state_flops(scan, 7) == 12 * 3 * 7 * 12 * 6 * 4
    assert state_flops(AutoConfig.for_model("llama", **SIZES), 7) == 0
    experts = AutoModelForCausalLM.from_config(read_config(ModelConfig(architecture=architecture("qwen3_5_moe_text"))))
    convolution = experts.model.layers[0].linear_attn.conv1d.weight
    before = matmul_parameters(experts)
    convolution.data = convolution.data[..., :1]
    assert before - matmul_parameters(experts) == 3 * convolution.numel()  # of every token, unlike experts


def test_a_frozen_weight_below_adapters_needs_four_operations_per_token():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True))
    own = matmul_parameters(model)
    add_lora(model, LoraConfig(rank=2, targets=["q_proj"]))
    weights, frozen = matmul_parameters(model), matmul_parameters(model, frozen=True)
    assert (weights - frozen, frozen) == (4 * 2 * (16 + 16), own)
    assert step_flops(weights, 7, 0.0, frozen) == 7 * (6 * (weights - frozen) + 4 * frozen)


def test_a_layer_below_those_that_train_runs_a_forward_alone():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False))
    freeze(model, ["*", "!model.layers.[23]", "!lm_head"])
    layer, head = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32, 50 * 16
    frozen, forward_only = matmul_parameters(model, frozen=True), forward_only_parameters(model)
    assert (frozen, forward_only) == (2 * layer, 2 * layer)
    operations = step_flops(matmul_parameters(model), 7, 0.0, frozen, forward_only=forward_only)
    assert operations == 7 * (6 * (2 * layer + head) + 2 * 2 * layer)

    tokens = torch.zeros(1, 8, dtype=torch.int64)
    for kind, linear in (("gemma2", 0), ("qwen3_5_text", 18 * 8 * 24 * 4 * 2)):
        kinds = {"layer_types": ["linear_attention", "full_attention"]} if linear else {}
        config = read_config(ModelConfig(architecture=architecture(kind, **kinds)))
        plan = ring_inputs(tokens, ring=Loopback(1), config=config)["plan"]
        (pairs, whole), (same, found) = (_work(config, plan, layers) for layers in (0, 1))
        of_window = 6 * (5 * 6 // 2 + 3 * 5) * 4 * (8 + 8)  # of the first layer of Gemma 2, whose window is 5
        assert pairs == same
        assert whole - found == pytest.approx(2 / 3 * (linear or of_window))


def test_the_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
