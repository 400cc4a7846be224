"""Tiny models of every supported family, and their loss and gradients on a ring."""

import torch

from ringflash.models import (
    ModelConfig,
    build_model,
    field_refusal,
)

TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
}  # fmt: skip

SPECIFIC = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "gpt_oss": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "olmo2": {},
    "phi3": {"sliding_window": 6, "eos_token_id": 1, "bos_token_id": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "smollm3": {"eos_token_id": 1, "bos_token_id": 2, "no_rope_layer_interval": 2},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
}  # fmt: skip


def tiny(model_type, **fields):
    torch.manual_seed(0)
    architecture = {"model_type": model_type, **TINY, **SPECIFIC[model_type], **fields}
    if field_refusal(model_type, "head_dim"):  # hidden_size / num_attention_heads
        del architecture["head_dim"]
    return build_model(ModelConfig(architecture=architecture, dtype="fp32"))


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}
