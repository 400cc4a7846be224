"""Memory: the settings that save GPU memory. `engine` applies them, and `estimate` counts what they save."""

from __future__ import annotations

from dataclasses import dataclass

from ringflash.errors import ConfigError, check_choice
from ringflash.models import Keep
from ringflash.models.checkpointing import ATTENTION_PLACES, INPUT_PLACES, place_refusal

OPTIMIZER_STATES = ("fp32", "bf16", "host")


@dataclass(frozen=True)
class MemoryConfig:
    """Settings that save GPU memory, most effective first."""

    zero: int = 1
    """DeepSpeed's ZeRO stage: 0 shards nothing, 1 the optimizer states, 2 also gradients, 3 also weights."""

    recompute: bool = False
    """Keep only each layer's input and its attention result, and recompute the rest in the backward."""

    attention_results: str = "gpu"
    """With recompute, where attention results are kept for the backward: gpu, host (pinned memory), or recomputed (not
    at all). host:N and recomputed:N apply to the first N layers, and the others use the GPU."""

    layer_inputs: str = "gpu"
    """With recompute, where layer inputs are kept for the backward: gpu, host or host:N."""

    optimizer_states: str = "fp32"
    """With bf16 weights: fp32 (master weights, moments and gradients; 18 bytes per parameter); bf16 (moments and
    gradients, with the low 16 bits of exact fp32 master weights; 10 bytes per parameter on one GPU, 12 on several); or
    host (fp32 master weights and moments in pinned host memory, 12 bytes; 4 on one GPU, 4 to 6 on several)."""

    mlp_tile: int | None = None
    """With recompute, tokens that an MLP processes at once; null: as many as give 2^27 activations, 256 MiB in bf16.
    Experts are not tiled."""

    loss_tile: int | None = None
    """Tokens whose logits are held at once; null: as many as give 2^28 logits, half a GiB in bf16."""

    def __post_init__(self) -> None:
        check_choice("memory.zero", self.zero, range(4))
        check_choice("memory.optimizer_states", self.optimizer_states, OPTIMIZER_STATES)
        if self.optimizer_states != "fp32" and self.zero == 0:
            raise ConfigError(
                f"memory.optimizer_states={self.optimizer_states} needs memory.zero=1, 2 or 3, got memory.zero=0"
            )
        for name, places in (("attention_results", ATTENTION_PLACES), ("layer_inputs", INPUT_PLACES)):
            if (refusal := place_refusal(place := getattr(self, name), places)) is not None:
                raise ConfigError(f"memory.{name}={place} {refusal}")
            if place != "gpu" and not self.recompute:
                raise ConfigError(
                    f"memory.{name}={place} needs memory.recompute=true: without it layers keep all that they compute"
                )
        for name in ("mlp_tile", "loss_tile"):
            if (tile := getattr(self, name)) is not None and tile < 1:
                raise ConfigError(f"memory.{name}={tile} must be 1 or more")
        if self.mlp_tile is not None and not self.recompute:
            raise ConfigError(
                f"memory.mlp_tile={self.mlp_tile} needs memory.recompute=true: without it MLPs keep their activations"
            )

    @property
    def keep(self) -> Keep:
        """Where layers keep what their backward needs, with recompute."""
        return Keep(self.attention_results, self.layer_inputs)
