"""Hugging Face models on the ring: attn_implementation="ring".

Importing this module registers "ring" with transformers. A model then takes a shard of each sequence and, as the
keyword `plan`, the step's AttentionPlan, which its attention layers pass to `ring_attention`:

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="ring")
    checkpoint_layers(model)    # optional: recompute layers in the backward, without running the ring again
    loss = model(**ring_inputs(input_ids, labels, ring=ProcessRing())).loss     # sums over ranks to the mean loss

To generate, the model takes a cache instead of a plan, which ranks may share (`RingCache`, `prefill`).

The plan is the mask. An error refuses everything else that could change a mask in transformers (padding masks, dropout,
other caches, keywords that attention.py does not know). An error also refuses models whose results would be wrong on
shards: other architectures, whose tokens may interact outside attention, and models whose loss or positions need the
whole sequence.

    configuration, building         settings to a model; architecture checks their values
    families, layers                the architectures that are known, and the attention of each of their layers
    inputs, ring_mask               a rank's inputs from whole sequences, and the mask that only the ring can read
    attention, checks               what transformers calls in each layer, and the calls that it refuses
    rope, rope_length, llama4       positions that depend on the model, on a document's length, on a chunk
    linear_attention, mixer         linear attention: the exchange around it, and the functions of a kind of layer
    delta_net, mamba2               the kinds: gated DeltaNet and Mamba-2
    linear_kernels                  convolutions and recurrences on CPUs and GPUs
    router_loss                     the experts' load-balancing loss over whole sequences
    checkpointing, mlp, fused       recomputation, tiled MLPs, fused passes: set on a model's modules
    freezing                        weights that are not trained
    lora, lora_linear, lora_experts adapters, and their products on linear layers and on experts
    quantized                       QLoRA's 4-bit weights
    float8, linear_dtype            linear layers in 8 bits, and which ones
    cache, graph                    generation: the KV cache, and a CUDA graph of each step
    digests                         recognises code of transformers by its source
"""

from ringflash.models.attention import ring_attention_forward
from ringflash.models.building import build_model
from ringflash.models.cache import RingCache, prefill
from ringflash.models.checkpointing import Keep, checkpoint_layers
from ringflash.models.configuration import AttentionConfig, ModelConfig, read_config
from ringflash.models.families import ARCHITECTURES, allow_untested
from ringflash.models.fused import FusedConfig, fuse_layers
from ringflash.models.graph import step_graph
from ringflash.models.inputs import ring_inputs
from ringflash.models.mlp import tile_mlps
from ringflash.models.ring_mask import RingMask
from ringflash.models.rope_length import fix_rope_length, rope_per_document
from ringflash.models.router_loss import router_loss

__all__ = [
    "ARCHITECTURES",
    "AttentionConfig",
    "FusedConfig",
    "Keep",
    "ModelConfig",
    "RingCache",
    "RingMask",
    "allow_untested",
    "build_model",
    "checkpoint_layers",
    "fix_rope_length",
    "fuse_layers",
    "prefill",
    "read_config",
    "ring_attention_forward",
    "ring_inputs",
    "rope_per_document",
    "router_loss",
    "step_graph",
    "tile_mlps",
]
