"""Out of GPU memory: one line that names the part of the step that ran out, and the settings that need less.

The part is found in the traceback, as the innermost frame of a module listed here. Gradients that autograd itself
computes have no frame; they belong to the backward of a layer.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ringflash.errors import GpuMemoryError
from ringflash.training.memory import OPTIMIZER_STATES, MemoryConfig

# (a part of the path, what runs there), the more special first
PARTS = (
    ("ringflash/training/loss.py", "the loss, which holds a tile of logits"),
    ("ringflash/ring/", "attention"),
    ("ringflash/kernels/", "attention"),
    ("ringflash/offload.py", "the copies between GPU and host memory"),
    ("ringflash/models/mlp.py", "an MLP"),
    ("ringflash/fused/", "a norm or rotary positions"),
    ("torch/optim/", "the optimizer's step"),
    ("ringflash/training/optimizers/", "the optimizer's step"),
    ("deepspeed/runtime/bf16_optimizer.py", "the optimizer's states"),
    ("deepspeed/runtime/zero/", "ZeRO's weights, gradients or optimizer states"),
    ("ringflash/models/building.py", "the weights"),
    ("deepspeed/__init__.py", "the weights and the optimizer's states"),
    ("transformers/models/", "a layer"),
    ("torch/autograd/", "the backward of a layer"),
)
LOSS, MLP = PARTS[0][1], "an MLP"


@contextmanager
def explained(memory: MemoryConfig, ranks: int) -> Iterator[None]:
    """A context that raises GpuMemoryError, with its one line, instead of CUDA's error. ranks: those of a sequence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise GpuMemoryError(message(error, memory, ranks)) from error


def message(error: torch.OutOfMemoryError, memory: MemoryConfig, ranks: int) -> str:
    """The line: which part asked for how much, how much was in use, and the settings to change."""
    part = part_of(error)
    asked = re.search(r"Tried to allocate ([\d.]+ [KMGT]iB)", str(error))
    used = ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        used = f"; {torch.cuda.memory_allocated() / 2**30:.1f} of {total / 2**30:.1f} GiB were in use"
    return (
        f"out of GPU memory in {part}{f', which asked for {asked[1]}' if asked else ''}{used}. "
        f"To need less, set {', or '.join(levers(part, memory, ranks))}"
    )


def part_of(error: BaseException) -> str:
    """The part that ran: the innermost frame that PARTS lists, and whether it was in its backward."""
    frames = [(frame.filename.replace("\\", "/"), frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    for path, _ in reversed(frames):
        for where, part in PARTS:
            if where in path:
                backward = any(where in other and name == "backward" for other, name in frames)
                return f"{part}, in its backward" if backward and part != LOSS else part
    return "the training step"


def levers(part: str, memory: MemoryConfig, ranks: int) -> list[str]:
    """The settings that need less memory than these, most effective first."""
    found = []
    if part == LOSS:
        found.append("memory.loss_tile to fewer tokens")
    if part.startswith(MLP) and memory.recompute:
        found.append("memory.mlp_tile to fewer tokens")
    if not memory.recompute:
        found.append("memory.recompute=true")
    elif any(place == "gpu" or ":" in place for place in (memory.attention_results, memory.layer_inputs)):
        found.append("memory.attention_results=host memory.layer_inputs=host")
    if "optimizer" in part and memory.optimizer_states != "host":
        smaller = OPTIMIZER_STATES[OPTIMIZER_STATES.index(memory.optimizer_states) + 1 :]
        found.append(f"memory.optimizer_states={' or '.join(smaller)}")
    if ranks > 1 and memory.zero < 3:
        found.append("memory.zero=3")
    return [*found, "fewer tokens per GPU (data.sequence_length, optim.micro_batch, or more GPUs)"]
