"""Where a ring of N GPUs would wait: one layer's attention, predicted hop by hop on every rank.

The schedules of all ranks are simulated (`ringflash.ring.simulation`) at given speeds of kernels and links.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.ring_cases import RingCase
from ringflash import Loopback
from ringflash.ring.schedule import OWN, Schedule, Shape
from ringflash.ring.simulation import COMPUTE, GRADIENTS, KEYS, WAITS, Rates, Simulated, simulate

# Kinds of spans, in the order of the legend.
COLOURS = dict(
    zip((COMPUTE, KEYS, GRADIENTS, *WAITS), ("#4477aa", "#66aa77", "#aa88bb", "#dd2222", "#ffb000"), strict=True)
)


@dataclass(frozen=True)
class Speed:
    """Seconds per (query, key) pair of one query head, forward and backward; bytes per second of a link, each way."""

    forward: float
    backward: float
    link: float

    @classmethod
    def of(cls, forward_tflops: float, backward_tflops: float, head_dim: int, gbps: float) -> Speed:
        """From kernel speed in TFLOP/s, at 4 D operations per pair forward and 10 D backward, and GB/s."""
        return cls(4 * head_dim / forward_tflops / 1e12, 10 * head_dim / backward_tflops / 1e12, gbps * 1e9)


def schedules(case: RingCase) -> tuple[Schedule, Schedule]:
    """The forward and the backward of all ranks of a case, of inputs in bf16."""
    shape = Shape(1, case.heads, case.kv_heads, case.head_dim, case.head_dim, torch.bfloat16)
    return case.plan(Loopback(case.ranks)).schedules(shape)


def rates(case: RingCase, schedule: Schedule, seconds_per_pair: float, link: float) -> Rates:
    """What a schedule's steps take."""
    group = case.heads // case.kv_heads
    of_section = [seconds_per_pair * group * (s.heads.end - s.heads.begin) for s in schedule.sections]
    rows = {name: sum(math.prod(x.shape[1:]) * x.dtype.itemsize for x in xs) for name, xs in schedule.buffers.items()}
    rows[OWN] = rows.get("keys 1", 0)
    return Rates(lambda step: step.pairs * of_section[step.section], rows.__getitem__, link)


@dataclass(frozen=True)
class Timeline:
    """Forward and backward of one layer's attention on all ranks of a case."""

    case: RingCase
    speed: Speed
    forward: Simulated
    backward: Simulated

    @property
    def passes(self) -> dict[str, Simulated]:
        """By name, in order."""
        return {"forward": self.forward, "backward": self.backward}

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return self.forward.seconds + self.backward.seconds

    def percent(self, kind: str) -> float:
        """The percentage of all ranks' time in spans of a kind."""
        spent = sum(simulated.total(kind) for simulated in self.passes.values())
        return 100 * spent / (self.seconds * self.case.ranks)

    @property
    def bytes_sent(self) -> list[float]:
        """By each rank."""
        return [f + b for f, b in zip(self.forward.sent, self.backward.sent, strict=True)]

    def summary(self) -> dict[str, float]:
        """What the title says, in numbers."""
        return {
            "forward_ms": 1e3 * self.forward.seconds,
            "backward_ms": 1e3 * self.backward.seconds,
            "compute_percent": self.percent("compute"),
            "exposed_wait_percent": self.percent(WAITS[0]),
            "wait_for_a_rank_percent": self.percent(WAITS[1]),
            "gb_moved": sum(self.bytes_sent) / 1e9,
            "most_gb_sent_by_a_rank": max(self.bytes_sent) / 1e9,
        }


def predict(case: RingCase, speed: Speed, passes: tuple[Schedule, Schedule]) -> Timeline:
    """The timeline of the case's schedules at a speed."""
    simulated = (
        simulate(schedule.steps, rates(case, schedule, seconds, speed.link))
        for schedule, seconds in zip(passes, (speed.forward, speed.backward), strict=True)
    )
    return Timeline(case, speed, *simulated)


def sufficient_link(case: RingCase, speed: Speed, passes: tuple[Schedule, Schedule]) -> float:
    """The lowest link speed, in bytes per second within 1 percent, that costs less than 1 percent of the time."""
    bound = 1.01 * predict(case, dataclasses.replace(speed, link=float("inf")), passes).seconds
    low, high = 1e6, 1e15
    while high > 1.01 * low:
        middle = (low * high) ** 0.5
        if predict(case, dataclasses.replace(speed, link=middle), passes).seconds <= bound:
            high = middle
        else:
            low = middle
    return high


# -- what is printed and drawn


def heading(timeline: Timeline) -> str:
    """Time, exposed wait and traffic in a line."""
    case, found = timeline.case, timeline.summary()
    return (
        f"{case.described()}: predicted {found['forward_ms']:.2f} ms forward"
        f" + {found['backward_ms']:.2f} ms backward, exposed wait {found['exposed_wait_percent']:.1f}%,"
        f" {found['gb_moved']:.2f} GB moved at {timeline.speed.link / 1e9:g} GB/s"
    )


def table(timeline: Timeline) -> str:
    """A line per rank: milliseconds by what they are spent on, and GB sent."""
    columns = ("compute", *WAITS)
    lines = [f"{'rank':>4} " + "".join(f"{name + ', ms':>24}" for name in (*columns, "done")) + f"{'GB sent':>10}"]
    lines.append("-" * len(lines[0]))
    for rank in range(timeline.case.ranks):
        done = [simulated.finished[rank] for simulated in timeline.passes.values()]
        spent = [[simulated.total(kind, rank) for simulated in timeline.passes.values()] for kind in columns]
        cells = "".join(f"{f'{1e3 * f:.2f} + {1e3 * b:.2f}':>24}" for f, b in (*spent, done))
        lines.append(f"{rank:>4} {cells}{timeline.bytes_sent[rank] / 1e9:>10.3f}")
    return "\n".join(lines)


def draw(path: Path, timeline: Timeline, title: str) -> None:
    """Two rows per rank, compute above transfer; forward on the left and backward on the right, to one scale."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = timeline.case.ranks
    figure = Figure(figsize=(13, 1.7 + 0.42 * ranks), layout="constrained")
    widths = [simulated.seconds for simulated in timeline.passes.values()]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=widths)
    for axes, (name, simulated) in zip(panels, timeline.passes.items(), strict=True):
        for kind, colour in COLOURS.items():
            low, high = (0.12, 0.4) if kind in ("keys", "gradients") else (0.42, 0.88)
            for rank in range(ranks):
                bars = [
                    (1e3 * s.begin, 1e3 * (s.end - s.begin))
                    for s in simulated.spans
                    if (s.rank, s.kind) == (rank, kind)
                ]
                place = (rank + 1 - high, high - low)  # ranks downward
                axes.broken_barh(bars, place, facecolor=colour, edgecolor="white", linewidth=0.3)
        for span in simulated.spans:
            if span.kind == "compute" and span.end - span.begin > 0.012 * sum(widths):
                middle = 1e3 * (span.begin + span.end) / 2
                axes.text(middle, span.rank + 0.35, str(span.hop), size=6, color="white", ha="center", va="center")
        axes.set(title=name, xlabel="ms", xlim=(0, 1e3 * simulated.seconds), ylim=(ranks, 0))
        axes.title.set_fontsize(9)
        axes.set_yticks([rank + 0.5 for rank in range(ranks)], [f"rank {rank}" for rank in range(ranks)], fontsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    named = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=90)
