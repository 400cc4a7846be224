"""Counted FLOPs are those of the formula, with each layer's own window."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash.models import windows_of_layers
from ringflash.ring.cost import peak_flops
from ringflash.training.flops import matmul_parameters, step_flops

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip


def test_layers_with_a_window_are_counted_apart():
    sizes = SIZES | {"sliding_window": 10}
    assert windows_of_layers(AutoConfig.for_model("llama", **SIZES)) == [(None, 4)]
    assert windows_of_layers(AutoConfig.for_model("mistral", **sizes)) == [(10, 4)]
    assert windows_of_layers(AutoConfig.for_model("gemma2", **sizes)) == [(None, 2), (10, 2)]


def test_weights_that_are_looked_up_only_do_not_count():
    for tied in (False, True):
        config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=tied)
        layer = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32
        assert matmul_parameters(AutoModelForCausalLM.from_config(config)) == 4 * layer + 50 * 16


def test_of_the_experts_those_that_a_token_meets_count():
    sizes = SIZES | {"num_local_experts": 8, "num_hidden_layers": 1, "tie_word_embeddings": True}
    counts = [
        matmul_parameters(
            AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes, num_experts_per_tok=n))
        )
        for n in (1, 2)
    ]
    assert counts[1] - counts[0] == 3 * 16 * 32  # gate, up and down of one expert


def test_a_step_is_six_operations_a_weight_and_token_and_twelve_a_pair_head_and_dimension():
    config = AutoConfig.for_model("llama", **SIZES)
    assert step_flops(config, weights=1000, tokens=7, pairs=11) == 6 * 1000 * 7 + 12 * 11 * 2 * 8


def test_the_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
