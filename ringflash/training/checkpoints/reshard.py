"""Reshard: load a ZeRO checkpoint on another number of ranks, at another stage, or with its states elsewhere.

The optimizer's weights and moments are flat tensors, of which each rank has other fragments of the parameters:

    ZeRO 1 and 2     the parameters of a group end to end, cut into equal parts:

                     | q_proj          | k_proj | v_proj | o_proj     padding |
                     | rank 0            | rank 1            | rank 2         |

    ZeRO 3           every parameter cut into equal parts, a rank's parts end to end:

                     rank 1            | part 1 of q_proj | of k_proj | of v_proj | of o_proj |

Both are lists of `Fragment`, for the ranks that wrote the checkpoint and for those that read it. Each rank maps all
files into memory and copies what its own fragments overlap. Elements are copied as they are, so nothing is rounded.
The 16-bit weights are then derived from the fp32 ones, as after a step.

DeepSpeed's universal checkpoints are not used: they write every state a second time, know AdamW's two moments only, and
at ZeRO 3 give all parameter groups the weight decay of the first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed.checkpoint import constants as ds
from torch import Tensor

from ringflash.distributed.world import World
from ringflash.training.engine import flat_weights
from ringflash.training.optimizers import host_adamw
from ringflash.training.optimizers.host_adamw import HostAdamW

MASTER = host_adamw.STATES[0]  # beside the names of the optimizer's states: the weights that it updates


class Fragment(NamedTuple):
    """Elements begin to end of a parameter, which is flattened, and the position of the first one in a flat tensor."""

    parameter: str
    begin: int
    end: int
    at: int


class Flat(NamedTuple):
    """A flat tensor with its optimizer states, each in consecutive chunks, and the fragments that it consists of."""

    fragments: list[Fragment]
    states: dict[str, list[Tensor]]


def load(engine: deepspeed.DeepSpeedEngine, folder: Path, ranks: int, world: World) -> None:
    """Load what `ranks` ranks wrote at ZeRO 1, 2 or 3; all ranks call it, between steps.

    Buffers and frozen weights are not loaded: training does not change those that the model was built with.
    """
    zero, adamw = engine.optimizer, engine.basic_optimizer
    model = _read(folder, "*mp_rank_00_model_states.pt")
    before = []
    for rank in range(ranks):
        saved = _read(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")[ds.OPTIMIZER_STATE_DICT]
        on_host = (folder / host_adamw.FILE.format(rank)).exists()
        chunks = host_adamw.mapped(folder, rank, _sizes(saved)) if on_host else None
        before += flats(saved, model[ds.PARAM_SHAPES], rank, ranks, chunks)

    if engine.zero_optimization_partition_weights():
        zero.checkpoint_event_prologue()
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model[counter])
    _make_states(engine, _base(saved)["state"].get(0, {}), before[0])
    chunks = adamw.held() if isinstance(adamw, HostAdamW) else None
    fill(flats(zero.state_dict(), engine._get_zero_param_shapes(), world.rank, world.size, chunks), before)
    _derive_weights(engine, world)


def _derive_weights(engine: deepspeed.DeepSpeedEngine, world: World) -> None:
    """Derive the 16-bit weights on all ranks, by DeepSpeed's own loader, which is given what is in place already."""
    zero = engine.optimizer
    if isinstance(engine.basic_optimizer, HostAdamW):
        engine.basic_optimizer.write_weights()
    zero.load_state_dict({world.rank: zero.state_dict()}, load_from_fp32_weights=True)
    if engine.zero_optimization_partition_weights():
        zero.checkpoint_event_epilogue()
    else:
        zero.update_lp_params()


def flats(
    state: dict[str, Any], shapes: list[dict[str, Any]], rank: int, ranks: int, chunks: list[list[Tensor]] | None = None
) -> list[Flat]:
    """The flat tensors of one of `ranks` ranks, from the state that DeepSpeed's ZeRO optimizer saves.

    shapes: of the parameters in each of them, in order. chunks: the states of `HostAdamW`, which are in no state_dict.
    """
    found = []
    for number, (weights, of_group) in enumerate(zip(_weights(state), shapes, strict=True)):
        numels = {name: math.prod(shape) for name, shape in of_group.items()}
        if ds.FP32_FLAT_GROUPS in state:
            fragments = [*_fragments_of_each(numels, rank, ranks)]
        else:
            paddings = state[ds.PARAM_ALIGNMENT_PADDINGS][number] if _leaves_out_padding(state) else [0] * len(numels)
            fragments = [*_fragments_of_group(numels, paddings, rank, _sizes(state)[number])]
        if chunks is not None:
            rows = zip(*chunks[number], strict=True)
            states = {name: [*row] for name, row in zip(host_adamw.STATES, rows, strict=True)}
        else:
            own = _base(state)["state"].get(number, {})  # SGD without momentum has no states
            states = {MASTER: [weights.detach().view(-1)]}
            states |= {name: [x] for name, x in own.items() if _is_flat(x)}
        found.append(Flat(fragments, states))
    return found


def fill(now: list[Flat], before: list[Flat]) -> None:
    """Copy into the flat tensors of this rank what those of all earlier ranks hold.

    Raises ValueError for a parameter of which they do not hold all elements.
    """
    holders: dict[str, list[tuple[Fragment, Flat]]] = {}
    for flat in before:
        for fragment in flat.fragments:
            holders.setdefault(fragment.parameter, []).append((fragment, flat))
    for flat in now:
        for mine in flat.fragments:
            missing = mine.end - mine.begin
            for theirs, source in holders.get(mine.parameter, []):
                begin, end = max(mine.begin, theirs.begin), min(mine.end, theirs.end)
                if begin < end:
                    missing -= end - begin
                    for name, chunks in flat.states.items():
                        given = _cut(source.states[name], begin - theirs.begin + theirs.at, end - begin)
                        taken = _cut(chunks, begin - mine.begin + mine.at, end - begin)
                        for part, x in zip(taken, torch.cat(given).split([*map(len, taken)]), strict=True):
                            part.copy_(x)
            if missing:
                raise ValueError(f"elements {mine.begin} to {mine.end} of {mine.parameter}: {missing} are in no file")


def _make_states(engine: deepspeed.DeepSpeedEngine, saved: dict[str, Any], flat: Flat) -> None:
    """Make the states that the optimizer would make in its first step, with the saved number of steps.

    saved, flat: the states of one flat tensor, of any rank.
    """
    on_host = isinstance(engine.basic_optimizer, HostAdamW)
    for weights in flat_weights(engine):
        state = engine.basic_optimizer.state[weights]
        if on_host:
            state["step"] = int(saved["step"])
            continue
        state |= {name: copy.deepcopy(x) for name, x in saved.items() if not _is_flat(x)}
        for name in flat.states.keys() - {MASTER}:
            state[name] = torch.zeros_like(weights, dtype=flat.states[name][0].dtype)


def _fragments_of_group(numels: dict[str, int], paddings: list[int], rank: int, size: int) -> Iterator[Fragment]:
    """A rank's fragments where all parameters, end to end, are cut into parts of `size` elements."""
    start, offset = rank * size, 0
    for (name, numel), padding in zip(numels.items(), paddings, strict=True):
        begin, end = max(offset, start), min(offset + numel, start + size)
        if begin < end:
            yield Fragment(name, begin - offset, end - offset, begin - start)
        offset += numel + padding


def _fragments_of_each(numels: dict[str, int], rank: int, ranks: int) -> Iterator[Fragment]:
    """A rank's fragments where every parameter is cut into `ranks` parts."""
    at = 0
    for name, numel in numels.items():
        size = math.ceil(numel / ranks)
        begin, end = rank * size, min((rank + 1) * size, numel)
        if begin < end:
            yield Fragment(name, begin, end, at)
        at += size


def _cut(chunks: list[Tensor], begin: int, size: int) -> list[Tensor]:
    """Elements begin to begin + size of consecutive chunks, which are flat.

    >>> _cut([torch.arange(3), torch.arange(3, 6)], 2, 3)
    [tensor([2]), tensor([3, 4])]
    """
    found, end = [], begin + size
    for chunk in chunks:
        if begin < len(chunk) and end > 0:
            found.append(chunk[max(begin, 0) : end])
        begin, end = begin - len(chunk), end - len(chunk)
    return found


def _weights(state: dict[str, Any]) -> list[Tensor]:
    return state.get(ds.FP32_FLAT_GROUPS) or state[ds.SINGLE_PARTITION_OF_FP32_GROUPS]


def _base(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's own state_dict."""
    return state[ds.OPTIMIZER_STATE_DICT if ds.FP32_FLAT_GROUPS in state else ds.BASE_OPTIMIZER_STATE]


def _sizes(state: dict[str, Any]) -> list[int]:
    """Elements of each flat tensor, also where padding is left out of the weights that are saved."""
    left_out = state[ds.GROUP_PADDINGS] if _leaves_out_padding(state) else [0] * len(_weights(state))
    return [weights.numel() + more for weights, more in zip(_weights(state), left_out, strict=True)]


def _leaves_out_padding(state: dict[str, Any]) -> bool:
    """Whether padding is left out, as by all of DeepSpeed's optimizers below ZeRO 3 but that of ZeRO 1 with bf16."""
    return ds.PARAM_ALIGNMENT_PADDINGS in state


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _read(folder: Path, name: str) -> dict[str, Any]:
    """The first file of DeepSpeed's of that name, in which * is anything; its tensors are read when they are used."""
    return torch.load(min(folder.glob(name)), map_location="cpu", mmap=True, weights_only=False)
