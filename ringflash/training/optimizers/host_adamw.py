"""AdamW whose fp32 states are kept in host memory: master weights and both moments, 12 bytes per parameter.

During the step, the states stream through the GPU in chunks, and one kernel updates them there. While a chunk is
updated, the next one is copied in and the previous one is copied out, on separate streams:

    copy in        0 | 1 | 2 | 3 |
    AdamW            | 0 | 1 | 2 | 3 |
    copy out             | 0 | 1 | 2 | 3

The host's CPUs compute nothing, no C++ extension has to be built, and the arithmetic is bit for bit that of AdamW on
the GPU. A step moves 12 bytes per parameter in each direction. For 8B parameters that is 96 GB, about two seconds at 50
GB/s. DeepSpeed holds the bf16 weights and gradients. It does not clip, since that would round the gradients to bf16.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ringflash.offload import PinnedPool
from ringflash.training.optimizers.one_rank import gradients_of, in_chunks

CHUNK = 2**24  # elements per chunk: 192 MiB of states
IN_FLIGHT = 3  # chunks on the GPU: one is copied in, one is updated, one is copied out
CHUNKS = "chunks"
STATES = ("master", "exp_avg", "exp_avg_sq")  # the rows of a chunk
FILE = "host_states_rank_{}.bin"


class HostAdamW(torch.optim.Optimizer):
    """AdamW on bf16 parameters; state: step, and chunks, fp32 [3, n] in host memory: master, exp_avg, exp_avg_sq.

    clip: largest gradient norm, to which larger ones are scaled down; 0: no clipping. `norm` must return the norm.
    """

    def __init__(self, groups: list[dict], fused: bool, clip: float, **settings: Any) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0} | settings)
        self.fused, self.clip = fused, clip
        self.gradients: dict[Tensor, list[Tensor]] = {}  # of weights whose gradients are in parts (`one_rank`)
        self.norm: Callable[[], Any] = lambda: 0.0
        self.pool = PinnedPool(
            torch.cuda.is_available(), "memory.optimizer_states=bf16 has them on the GPU, in 6 bytes per parameter"
        )

    def reserve(self, weights: list[Tensor], log: Callable[[str], None] = lambda message: None) -> None:
        """Allocate the states of the flat bf16 `weights` that DeepSpeed will update, before the first step.

        log: called with lines of progress. Raises ConfigError if this machine has too little host memory.
        """
        parts = [weight.detach().view(-1).split(CHUNK) for weight in weights]
        sizes = [12 * part.numel() for part in itertools.chain(*parts)]
        self.pool.reserve(sizes, "optimizer states", log)
        for weight, of_weight in zip(weights, parts, strict=True):
            chunks = [self.pool.allocate(12 * part.numel()).view(torch.float32).view(3, -1) for part in of_weight]
            for chunk, part in zip(chunks, of_weight, strict=True):
                chunk[0].copy_(part)
            self.state[weight] = {"step": 0, CHUNKS: chunks}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is evaluated
        """Update the weights that have a gradient."""
        scale = None
        if self.clip:  # DeepSpeed's own formula
            scale = 1.0 / torch.clamp((torch.as_tensor(self.norm()) + 1e-6) / self.clip, min=1.0)
        for group in self.param_groups:
            for weight in group["params"]:
                if (gradients := gradients_of(self, weight)) is not None:
                    self.state[weight]["step"] += 1
                    self._update(weight, gradients, group, scale)

    def _update(self, weight: Tensor, gradients: list[Tensor], group: dict[str, Any], scale: Tensor | None) -> None:
        chunks, done = self.state[weight][CHUNKS], self.state[weight]["step"] - 1
        parts, flat = in_chunks(gradients, CHUNK), weight.view(-1).split(CHUNK)
        for states, gradient, part in zip(_streamed(chunks, weight.device), parts, flat, strict=True):
            g = gradient.float()
            if scale is not None:
                g *= scale.to(g.device)
            master, mean, square = states
            step = torch.full((), float(done), device=g.device if self.fused else "cpu")
            adamw(
                [master], [g], [mean], [square], [], [step], foreach=False, fused=self.fused, amsgrad=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=float(group["lr"]),
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip
            part.copy_(master)

    def state_dict(self) -> dict[str, Any]:
        """The state without the chunks, which `save` writes: DeepSpeed's file would be read whole, beside them."""
        found = super().state_dict()
        found["state"] = {n: {"step": state["step"]} for n, state in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the numbers of steps and the groups' settings; `load` reads the chunks."""
        chunks = {weight: state[CHUNKS] for weight, state in self.state.items()}
        super().load_state_dict(state_dict)
        for weight, held in chunks.items():
            self.state[weight][CHUNKS] = held

    def save(self, folder: Path, rank: int) -> None:
        """Write the chunks of this rank, in order."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        with (folder / FILE.format(rank)).open("wb") as out:
            for chunk in itertools.chain(*self.held()):
                chunk.numpy().tofile(out)

    def load(self, folder: Path, rank: int) -> None:
        """Read the chunks back in place. Raises ValueError if the file has another size."""
        held = self.held()
        saved = mapped(folder, rank, [sum(chunk.shape[1] for chunk in chunks) for chunks in held])
        for chunk, source in zip(itertools.chain(*held), itertools.chain(*saved), strict=True):
            chunk.copy_(source)

    def held(self) -> list[list[Tensor]]:
        """The chunks of each flat weight."""
        return [state[CHUNKS] for state in self.state.values()]

    def write_weights(self) -> None:
        """Write the masters, rounded, to the weights."""
        for weight, state in self.state.items():
            for part, (master, *_) in zip(weight.data.view(-1).split(CHUNK), state[CHUNKS], strict=True):
                part.copy_(master)


def mapped(folder: Path, rank: int, sizes: list[int]) -> list[list[Tensor]]:
    """The chunks that a rank saved, for flat weights of these sizes; they are read when they are used.

    Raises ValueError if the file has another size.
    """
    file, total = folder / FILE.format(rank), len(STATES) * sum(sizes)
    if (found := file.stat().st_size) != 4 * total:
        raise ValueError(f"{file} has {found} bytes of optimizer states instead of {4 * total}")
    flat = torch.from_file(str(file), size=total, dtype=torch.float32)
    parts = [[len(STATES) * min(CHUNK, size - at) for at in range(0, size, CHUNK)] for size in sizes]
    chunks = iter(flat.split([*itertools.chain(*parts)]))
    return [[next(chunks).view(len(STATES), -1) for _ in of_weight] for of_weight in parts]


def _streamed(chunks: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Each chunk on the device, to be updated in place; then it goes back to the host."""
    if device.type != "cuda":
        yield from chunks
        return
    compute = torch.cuda.current_stream(device)
    inward, outward = torch.cuda.Stream(device), torch.cuda.Stream(device)
    slots = [torch.empty(3 * CHUNK, dtype=torch.float32, device=device) for _ in chunks[:IN_FLIGHT]]
    emptied: list[Any] = [compute.record_event() for _ in slots]
    arriving: list[tuple[Tensor, Any]] = []

    def send(number: int) -> None:
        slot = slots[number % IN_FLIGHT][: chunks[number].numel()].view(3, -1)
        inward.wait_event(emptied[number % IN_FLIGHT])
        with torch.cuda.stream(inward):
            slot.copy_(chunks[number], non_blocking=True)
        arriving.append((slot, inward.record_event()))

    send(0)
    for number, chunk in enumerate(chunks):
        if number + 1 < len(chunks):
            send(number + 1)
        slot, arrived = arriving.pop(0)
        compute.wait_event(arrived)
        yield slot
        outward.wait_stream(compute)
        with torch.cuda.stream(outward):
            chunk.copy_(slot, non_blocking=True)
        emptied[number % IN_FLIGHT] = outward.record_event()
    compute.wait_stream(outward)  # also for the slots' memory, which belongs to this stream
