"""Error against ring size: the precision lost by merging partial results and sending gradients in 16 bits.

The same kernel runs in four rings. The first is ringflash's own. The others are emulated by rounding to 16 bits:

| name | what is rounded |
|---|---|
| ringflash | nothing: (out, lse) and sent gradients are fp32, and the result is rounded once |
| 16-bit blocks | each hop's output, before it is merged in fp32 |
| 16-bit merging | the running output, after each hop |
| 16-bit gradients | dk and dv, each time they are sent |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import checks
from benchmarks.ring_cases import RingCase, kernels_wrapped, whole_ring
from ringflash import Loopback, Partial, merge
from ringflash.kernels import Kernel
from ringflash.ring.message import Message
from ringflash.ring.transport import Transfer
from ringflash.ring.watchdog import Label

SIZES = (1, 2, 4, 8, 16, 32)
OURS = "ringflash"
GROWTH = 1.3  # the largest growth of the error, from 1 rank to any other number, that counts as flat


def blocks_rounded(kernel: Kernel) -> Kernel:
    """The kernel with each block's output in the inputs' dtype, merged in fp32 outside it."""

    def forward(q: Tensor, *args, carry: Partial | None, out: Tensor | None, seen: Tensor | None, **options) -> Partial:
        block = kernel.forward(q, *args, carry=None, out=torch.empty_like(q), **options)
        merged = block if carry is None else merge(carry, block)
        if out is not None:
            out.copy_(merged.out)  # the last call for a row writes its final result
        return Partial(merged.out.float(), merged.lse)

    return dataclasses.replace(kernel, forward=forward)


def state_rounded(kernel: Kernel) -> Kernel:
    """The kernel with a running output rounded to the inputs' dtype."""

    def forward(q: Tensor, *args, **options) -> Partial:
        state = kernel.forward(q, *args, **options)
        state.out.copy_(state.out.to(q.dtype))
        return state

    return dataclasses.replace(kernel, forward=forward)


class GradientsRounded(Loopback):
    """A ring that sends fp32 as bf16."""

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """As Loopback, with fp32 messages rounded."""
        rounded = [dataclasses.replace(message, tensor=_sent(message.tensor)) for message in outgoing]
        return super().exchange(rounded, incoming, label)


def _sent(x: Tensor) -> Tensor:
    return x.bfloat16().float() if x.dtype == torch.float32 else x


def _untouched(kernel: Kernel) -> Kernel:
    return kernel


RINGS: dict[str, tuple[type[Loopback], Callable[[Kernel], Kernel]]] = {
    OURS: (Loopback, _untouched),
    "16-bit blocks": (Loopback, blocks_rounded),
    "16-bit merging": (Loopback, state_rounded),
    "16-bit gradients": (GradientsRounded, _untouched),
}


@dataclass(frozen=True)
class Row:
    """One ring at one size: relative errors against float64, by tensor."""

    ring: str
    ranks: int
    errors: dict[str, float]


def measure(case: RingCase, sizes: Sequence[int], kernel: str, device: torch.device) -> tuple[list[Row], dict]:
    """Errors of every ring at every size, with bf16 inputs, and the bound: twice the error of plain torch in bf16."""
    inputs = case.inputs(torch.bfloat16, device)
    reference = checks.Reference(case, inputs)
    found = []
    bound: dict[str, float] = {}
    for ranks in sizes:
        for name, (ring, wrap) in RINGS.items():
            plan = dataclasses.replace(case, ranks=ranks).plan(ring(ranks, device))
            with kernels_wrapped(wrap):
                errors = reference.errors(**whole_ring(inputs, plan, kernel))
            found.append(Row(name, ranks, errors.found))
            bound = errors.bound
    return found, bound


def growth(found: list[Row], ring: str) -> dict[str, float]:
    """Each tensor's largest error at any size, relative to that at the smallest size."""
    rows = [row for row in found if row.ring == ring]
    return {name: max(row.errors[name] for row in rows) / rows[0].errors[name] for name in checks.NAMES}


def wrong(found: list[Row], bound: dict[str, float]) -> list[str]:
    """The errors of ringflash that exceed the bound or grow with the ring, one line each."""
    over = [
        f"{name} {row.errors[name]:.1e} > {bound[name]:.1e} at {row.ranks} ranks"
        for row in found
        if row.ring == OURS
        for name in checks.NAMES
        if not row.errors[name] <= bound[name]
    ]
    grown = growth(found, OURS)
    return over + [f"{name} grows {x:.2f} times with the ring" for name, x in grown.items() if not x <= GROWTH]


def table(found: list[Row], bound: dict[str, float]) -> str:
    """A line per ring and tensor, a column per size."""
    sizes = sorted({row.ranks for row in found})
    lines = [f"{'ring':<18} {'of':<4}" + "".join(f"{f'{n} ranks':>10}" for n in sizes) + f"{'grows':>8}{'bound':>10}"]
    lines.append("-" * len(lines[0]))
    for ring in dict.fromkeys(row.ring for row in found):
        for name in checks.NAMES:
            errors = {row.ranks: row.errors[name] for row in found if row.ring == ring}
            cells = "".join(f"{errors[n]:>10.2e}" for n in sizes)
            lines.append(f"{ring:<18} {name:<4}{cells}{growth(found, ring)[name]:>8.2f}{bound[name]:>10.1e}")
    return "\n".join(lines)


def draw(path: Path, found: list[Row], bound: dict[str, float], title: str) -> None:
    """Error against ring size: a panel per tensor, a line per ring."""
    from matplotlib.figure import Figure

    sizes = sorted({row.ranks for row in found})
    figure = Figure(figsize=(9, 6.2), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, name in zip(panels.flat, checks.NAMES, strict=True):
        for ring, marker in zip(RINGS, "os^D", strict=True):
            ours = ring == OURS
            errors = {row.ranks: row.errors[name] for row in found if row.ring == ring}
            style = {"linewidth": 2.2, "zorder": 3} if ours else {"linewidth": 1.2, "linestyle": "--"}
            axes.plot(sizes, [errors[n] for n in sizes], marker=marker, markersize=4, label=ring, **style)
        axes.axhline(bound[name], color="grey", linewidth=0.8, linestyle=":", label="2 x plain torch, bf16")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3, which="both")
    for axes in panels[:, 0]:
        axes.set_ylabel("error against float64")
    for axes in panels[1]:
        axes.set_xlabel("ranks")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)
