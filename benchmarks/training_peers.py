"""The peers of a training step: transformers' own layers, also with DeepSpeed's features for long contexts.

All keep weights and AdamW's states in bf16, checkpoint every layer, and train on one causal document per sequence.

- transformers: sdpa as torch chooses it, cuDNN first; Liger's fused loss.
- transformers-flash: the same with torch's FlashAttention 2 forced.
- deepspeed: sdpa as torch chooses it; DeepSpeed's tiled MLP and tiled loss, layer inputs offloaded by its activation
  checkpointing. Tiles as DeepSpeed's own integrations choose them: an MLP's of hidden_size tokens, a loss's of 1 GiB of
  fp32 logits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ringflash.data import Batch
from ringflash.models import read_config
from ringflash.models.configuration import DTYPES
from ringflash.training.config import Config

PEERS = ("transformers", "transformers-flash", "deepspeed")
TILE_BYTES = 2**30  # of a loss tile's fp32 logits

Loss = Callable[[PreTrainedModel, Tensor, Tensor], Tensor]  # model, hidden states [1, S, C], labels [1, S]


def build(name: str, config: Config, device: torch.device) -> tuple[PreTrainedModel, Callable[[Batch], float]]:
    """A peer's model and its step. name: one of PEERS. Weights are drawn as ringflash's."""
    torch.manual_seed(config.seed)
    settings = read_config(config.model)
    with device:
        model = AutoModelForCausalLM.from_config(
            settings, attn_implementation="sdpa", dtype=DTYPES[config.model.dtype]
        ).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    if name == "deepspeed":
        _offload_inputs(model, device)
        _tile_mlps(model)
    loss = _tiled_loss if name == "deepspeed" else _liger_loss
    flash = [SDPBackend.FLASH_ATTENTION]
    backends = flash if name == "transformers-flash" else [SDPBackend.CUDNN_ATTENTION, *flash]
    if device.type == "cpu":
        backends = [SDPBackend.MATH]
    return model, _step(model, config, device, backends, loss)


def _step(
    model: PreTrainedModel, config: Config, device: torch.device, backends: list[SDPBackend], loss_of: Loss
) -> Callable[[Batch], float]:
    """A step of forward, backward, clipping and AdamW."""
    adamw = torch.optim.AdamW(model.parameters(), lr=config.optim.learning_rate(1), betas=(0.9, 0.95), fused=True)

    def step(data: Batch) -> float:
        if len(data.documents[0]) > 1:
            raise ValueError("sdpa takes no packed documents")
        ids, labels = data.tokens.to(device), data.labels.to(device)
        with sdpa_kernel(backends, set_priority=True):
            hidden = model.base_model(ids, use_cache=False).last_hidden_state
            loss = loss_of(model, hidden, labels)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        adamw.step()
        adamw.zero_grad()
        return loss.item()

    return step


# -- pieces


def _liger_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, accumulated in fp32."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(
        hidden.flatten(0, 1), model.lm_head.weight, labels.flatten(), None, None, -100, 0.0, 0.0, "mean", None, False,
        torch.float32,
    )[0]  # fmt: skip


def _tiled_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> Tensor:
    """DeepSpeed's tiled loss: the mean over labels, from the tiles' sums."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    valid = (labels != -100).sum()

    def loss(head: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(head(x).float(), y, reduction="sum") / valid

    tiles = math.ceil(4 * labels.numel() * model.config.vocab_size / TILE_BYTES)
    weights = [model.lm_head.weight]
    return TiledFusedLogitsLoss.apply(loss, model.lm_head, hidden, labels, None, tiles, weights, "sum")


def _tile_mlps(model: PreTrainedModel) -> None:
    """Let each layer's MLP run in tiles of hidden_size tokens, by DeepSpeed's TiledMLP."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def tiled(mlp: nn.Module, whole: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        tiles = math.ceil(x.shape[-2] / x.shape[-1])
        return TiledMLP.apply(lambda _, tile: whole(tile), mlp, x, tiles, list(mlp.parameters()))

    for module in list(model.modules()):
        if isinstance(module, GradientCheckpointingLayer):
            mlp: nn.Module = module.mlp  # type: ignore[assignment]
            mlp.forward = functools.partial(tiled, mlp, mlp.forward)


def _offload_inputs(model: PreTrainedModel, device: torch.device) -> None:
    """Let DeepSpeed checkpoint the layers, their inputs in host memory (which its CPU build cannot do)."""
    from deepspeed import comm
    from deepspeed.runtime.activation_checkpointing import checkpointing

    comm.init_distributed(verbose=False)
    checkpointing.configure(None, checkpoint_in_cpu=device.type == "cuda")
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = checkpointing.checkpoint  # type: ignore[assignment]
