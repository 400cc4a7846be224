"""Estimate: what a run will take of each GPU, of host memory and of the disk, counted before anything is allocated.

The peak of a GPU falls into the backward of a layer:

    states + max(kept, gradients) + work

The first layer to run backward finds all that is kept, and no gradient yet; the last, all gradients and nothing kept.
`tests/training/test_estimate.py` compares this with peaks that were measured on GPUs. Without recomputation, or with
experts, what layers hold is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ringflash.models import Keep
from ringflash.models.configuration import experts_of
from ringflash.models.layers import (
    StateHeads,
    calls_per_layer,
    input_widths,
    kinds_of_layers,
    layer_kinds,
    state_heads,
    state_layers,
)
from ringflash.ring.attention import GROUP_BYTES
from ringflash.ring.cost import Heads
from ringflash.ring.sequences import CHUNK
from ringflash.training.memory import MemoryConfig

REDUCE_BUCKET = 10**8  # gradients that ZeRO reduces at once, in a buffer of its own; by default that takes a GiB or two
LIVE = 10**9  # parameters that ZeRO 3 holds whole at once, DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class PerParameter:
    """Bytes per parameter: states, on the GPU for the whole run; gradients, only between backward and step; host."""

    states: float
    gradients: float = 0.0
    host: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """Bytes. states, gradients: as `PerParameter`, of one GPU. kept: by layers on the GPU for their backward; work: of
    one layer's backward; None if they are not counted. host: pinned for one rank. checkpoint: of all ranks."""

    states: float
    gradients: float
    kept: float | None
    work: float | None
    host: float
    checkpoint: float

    @property
    def gpu(self) -> float:
        """The peak of a GPU, or what is known of it."""
        return self.states + max(self.gradients, self.kept or 0) + (self.work or 0)

    def __str__(self) -> str:
        def gib(x: float | None) -> str:
            return f"{(x or 0) / 2**30:.{1 if (x or 0) < 100 * 2**30 else 0}f}"

        counted = self.kept is not None
        parts = [f"{gib(self.states)} weights and optimizer states", f"{gib(self.gradients)} gradients"]
        parts += [f"{gib(self.kept)} kept by layers, {gib(self.work)} one layer's backward"] if counted else []
        per_gpu = f"{gib(self.gpu)} GiB per GPU at the peak" if counted else "GiB per GPU"
        rest = "" if counted else "; what layers hold is counted only with memory.recompute, and not of experts"
        host = f"; {gib(self.host)} GiB pinned on the host per rank" if self.host else ""
        return f"{per_gpu}: {', '.join(parts)}{rest}{host}; a checkpoint {gib(self.checkpoint)} GiB"


def estimate(
    config: PreTrainedConfig,
    parameters: int,
    memory: MemoryConfig,
    *,
    bf16: bool,
    tokens: int,
    ranks: int,
    ring: int,
    frozen: float = 0,
    forward_only: int = 0,
) -> Estimate:
    """What one of `ranks` ranks takes. parameters: that are trained; frozen: bytes of those that are not; tokens: of a
    micro-batch, on this rank; ring: ranks of a ring; forward_only: first layers that run no backward."""
    width, each = 2 if bf16 else 4, per_parameter(memory, bf16, ranks)
    buffers = frozen / (ranks if memory.zero == 3 else 1)
    if memory.zero == 3:
        buffers += 4 * REDUCE_BUCKET + min(parameters * width + frozen, LIVE * width) * (ranks > 1)
    elif ranks > 1:
        buffers += 4 * min(parameters, REDUCE_BUCKET)
    kept = work = None
    on_host = sum(kept_sizes(config, memory.keep, tokens, width, "host", forward_only)) if memory.recompute else 0
    if memory.recompute and experts_of(config)[0] == 1:
        kept = sum(kept_sizes(config, memory.keep, tokens, width, "gpu", forward_only))
        work = max(_work(config, kind.heads, tokens, width, ring) for kind in layer_kinds(config))
        if (of_states := state_heads(config)) is not None:
            beside = state_layers(config) + sum(layer_kinds(config).values()) > config.num_hidden_layers
            more = _state_work(config, of_states, tokens, width, ring)
            work = work + more if beside else max(work, more)
        work += on_host / config.num_hidden_layers  # a layer's share is on its way
    return Estimate(
        states=parameters * each.states + buffers,
        gradients=parameters * each.gradients,
        kept=kept,
        work=work,
        host=parameters * each.host + on_host,
        checkpoint=parameters * _checkpoint(memory, bf16),
    )


def per_parameter(memory: MemoryConfig, bf16: bool, ranks: int) -> PerParameter:
    """What each of `ranks` ranks holds of weights, gradients and optimizer states."""
    n, zero, states = ranks, memory.zero, memory.optimizer_states
    alone = n == 1 and zero < 3
    if not bf16:
        of_zero = {0: PerParameter(12, 4), 1: PerParameter(4 + 12 / n, 4 / n), 3: PerParameter(20 / n)}
    elif states == "bf16":
        of_zero = {1: PerParameter(8, 2) if alone else PerParameter(2 + 8 / n, 2 / n), 3: PerParameter(12 / n)}
    elif states == "host":
        of_zero = {
            1: PerParameter(2, 2, 12) if alone else PerParameter(2 + 2 / n, 2 / n, 12 / n),
            3: PerParameter(6 / n, 0, 12 / n),
        }
    else:  # fp32: at ZeRO 1 the sums of gradients are whole, and never freed
        of_zero = {
            0: PerParameter(14, 2),
            1: PerParameter(6 + 12 / n),
            2: PerParameter(2 + 12 / n, 4 / n),
            3: PerParameter(18 / n),
        }
    return of_zero[zero if zero in of_zero else 1]


def kept_sizes(
    config: PreTrainedConfig, keep: Keep, tokens: int, width: int, place: str, forward_only: int = 0
) -> list[int]:
    """Bytes of each tensor that layers keep in a place, "gpu" or "host", for the backward of `tokens` tokens.

    forward_only: first layers that run no backward.
    """
    of_input = [tokens * x * width for x in input_widths(config)]
    sizes: list[int] = []
    for layer, kind in [*enumerate(kinds_of_layers(config))][forward_only:]:
        at = keep.at(layer)
        sizes += of_input * (at.inputs == place)
        if kind is not None:
            of_result = [tokens * kind.heads.query * kind.heads.value_dim * width, tokens * kind.heads.query * 4]
            sizes += of_result * calls_per_layer(config) * (at.attention == place)
    return sizes


def _work(config: PreTrainedConfig, heads: Heads, tokens: int, width: int, ring: int) -> float:
    """Bytes that one layer's backward holds while attention's runs: its tensors per token, and fp32 gradients."""
    projected = heads.query * heads.dim + heads.key_width
    rotated = (heads.query + heads.key) * heads.dim
    result = heads.query * heads.value_dim
    # q, k, v and their gradients; q and k rotated; attention's result, one layer's before it, and its gradient; inputs
    # of two layers, a norm's result and the residual stream's gradient
    numbers = 2 * projected + rotated + 2 * result + 4 * sum(input_widths(config))
    gradients = 4 * tokens * projected
    if ring == 1:  # by groups of heads; dk and dv of 16-bit inputs are written in 16 bits
        gradients = min(4 * tokens * (heads.query * heads.dim if width == 2 else projected), GROUP_BYTES)
    # a ring's keys and values, and their gradients in fp32, are received while others are used
    received = 2 * tokens * heads.key_width * (width + 4) if ring > 1 else 0
    return tokens * numbers * width + gradients + received


def _state_work(config: PreTrainedConfig, heads: StateHeads, tokens: int, width: int, ring: int) -> float:
    """Bytes that the backward of a layer of linear attention holds, of flash-linear-attention's tensors and the norm's.

    A rank has some tokens of all heads or all tokens of some heads, which are as many numbers.
    """
    of_values, of_keys = heads.value * heads.value_dim, heads.value * heads.dim
    states = of_keys * heads.value_dim / CHUNK
    kept = 2 * heads.convolved + of_values + heads.value * CHUNK
    norm = 12 * of_values  # in fp32
    rule = 6 * of_values + 5 * of_keys + 2 * states
    exchanged = 3 * heads.convolved if ring > 1 else 0
    return tokens * width * (4 * sum(input_widths(config)) + kept + max(norm, rule) + exchanged)


def _checkpoint(memory: MemoryConfig, bf16: bool) -> float:
    """Bytes per parameter on the disk: weights, where no rank has them as states, and states with their masters."""
    width = 2 if bf16 else 4
    if memory.zero == 0:
        return width + (12 if bf16 else 8)
    return width * (memory.zero < 3) + {"fp32": 12, "bf16": 8, "host": 14}[memory.optimizer_states]
