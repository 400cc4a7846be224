"""Tiny models of every family, and their loss and gradients on a ring."""

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash.models import ModelConfig, build_model
from ringflash.models.configuration import field_refusal
from ringflash.models.families import FAMILIES, Windows

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip

# What some configurations have: token ids below vocab_size, small experts, nothing random, and low ranks of MLA.
WHERE_KNOWN = {
    "eos_token_id": 1, "bos_token_id": 2, "max_position_embeddings": 256, "sliding_window": 7,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "n_shared_experts": 1, "shared_expert_intermediate_size": 16, "shared_intermediate_size": 16,
    "attention_dropout": 0.0, "residual_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0,
    "embedding_dropout": 0.0, "router_jitter_noise": 0.0,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip

DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 12, "linear_num_value_heads": 24,
    "linear_key_head_dim": 4, "linear_value_head_dim": 2,
}  # fmt: skip
# 12 heads in 2 groups: blocks of 2 and 4 ranks are of one group, and those of 3 ranks are of one or of both.
MAMBA = {
    "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 12, "mamba_n_groups": 2, "mamba_d_state": 6,
    "mamba_expand": 3, "time_step_limit": (0.9, 1.6),
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip

SPECIFIC = {
    "bamba": {**{name: x for name, x in MAMBA.items() if name != "layer_types"}, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "cohere2_moe": {"logit_scale": 0.3},
    "diffllama": {"lambda_std_dev": 0.3},  # gradients of lambda are otherwise a thousandth of all, and rounding shows
    "falcon_h1": {**{name: x for name, x in MAMBA.items() if name != "layer_types"}, "mamba_d_ssm": 48,
                  "key_multiplier": 0.7, "lm_head_multiplier": 0.3, "ssm_in_multiplier": 1.3, "mamba_rms_norm": True,
                  "ssm_multipliers": [0.8, 1.2, 0.9, 1.1, 0.7], "mamba_norm_before_gate": False},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
               "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 6,
                     "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [64] * 4,
                     "activation_sparsity_pattern": [0.5, 0.0] * 2, "laurel_rank": 4, "vocab_size_per_layer_input": 97,
                     "final_logit_softcapping": 4.0},
    "gemma4_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
                    "num_kv_shared_layers": 2, "global_head_dim": 16, "use_double_wide_mlp": True,
                    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 97,
                    "final_logit_softcapping": 4.0},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": YARN,
                "max_position_embeddings": 64},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "granite_swa": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0},
    "granitemoe_swa": {"logits_scaling": 3.0},
    "granitemoeshared": {"logits_scaling": 3.0},
    "granitemoehybrid": {**MAMBA, "logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 0.3},
    "llama": {"rope_parameters": LLAMA3},
    "llama4_text": {"intermediate_size_mlp": 64, "attention_chunk_size": 7, "no_rope_layer_interval": 2,
                    "floor_scale": 4, "attn_scale": 0.5, "interleave_moe_layer_step": 2, "num_experts_per_tok": 1},
    "minicpm3": {"dim_model_base": 8},
    "ministral3": {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3}, "max_position_embeddings": 64},
    "mistral": {"sliding_window": 7},
    "nanochat": {"final_logit_softcapping": 4.0},
    "nemotron_h": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
                   "mamba_num_heads": 12, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 6, "time_step_min": 0.9,
                   "moe_shared_expert_intermediate_size": 16},
    "olmo_hybrid": DELTA,
    "phi3": {"sliding_window": 6, "eos_token_id": 1, "bos_token_id": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"layer_types": ["full_attention"] * 2},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 7},
    "qwen3_5_moe_text": DELTA,
    "qwen3_5_text": DELTA,
    "qwen3_next": DELTA,
    "smollm3": {"eos_token_id": 1, "bos_token_id": 2, "no_rope_layer_interval": 2},
    "vaultgemma": {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
}  # fmt: skip


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 20,
}  # fmt: skip
PHIMOE_ROPE = LONGROPE | {"short_mscale": 1.2, "long_mscale": 1.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
# Gemma 4's models with experts share no keys, and their full layers have other KV heads, whose keys are values too.
GEMMA4_EXPERTS = {
    "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "use_double_wide_mlp": False,
    "hidden_size_per_layer_input": 0, "enable_moe_block": True, "top_k_experts": 2,
}  # fmt: skip


def architecture(model_type, **fields):
    """model.architecture of a tiny model."""
    known = AutoConfig.for_model(model_type)
    some = {name: value for name, value in WHERE_KNOWN.items() if hasattr(known, name)}
    if FAMILIES[model_type].windows is Windows.SOME:
        some["layer_types"] = ["sliding_attention", "full_attention"]
    if hasattr(known, "kv_lora_rank"):
        some["num_key_value_heads"] = 4
    settings = {"model_type": model_type, **TINY, **some, **SPECIFIC.get(model_type, {}), **fields}
    if hasattr(known, "kv_lora_rank"):  # head_dim is qk_nope_head_dim + qk_rope_head_dim
        del settings["head_dim"]
    return {name: value for name, value in settings.items() if name not in TINY or not field_refusal(model_type, name)}


def tiny(model_type, **fields):
    torch.manual_seed(0)
    return build_model(ModelConfig(architecture=architecture(model_type, **fields), dtype="fp32"))


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def with_weights(model, weights=None):
    """The model with weights at which rotary positions matter, or with others' weights."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in () if weights else model.parameters():
            p.add_(torch.randn(p.shape, generator=random) * 0.3)
    if weights:
        model.load_state_dict(weights)
    return model


def plain_of(model, attention="eager"):
    """transformers' own model with the same weights, whose rotary module nothing has replaced."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation=attention)
    return with_weights(plain, model.state_dict())
