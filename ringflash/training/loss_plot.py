"""The plot of a run's losses: by step, and by position in a document, from metrics.jsonl."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

from ringflash.files import write_figure, writing
from ringflash.training import positions
from ringflash.training.metrics import BY_POSITION, FILE, HELD_OUT_BY_POSITION, read

PLOT = "loss.png"
RECENT = 20  # steps whose mean losses by position are drawn


def check_plot(folder: Path) -> None:
    """Raise DiskError, before the first step, if `plot` could not replace loss.png after the last."""
    path = folder / PLOT
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def plot(folder: Path, unigram: float | None, unit: str = "nats per token") -> Path:
    """Draw the training loss, and the held-out loss and unigram entropy if text is held out, to loss.png.

    unit: what a loss is in.
    A second panel has the loss by position in a document: held-out, of the first and the last evaluation that have it,
    and training, as the mean of the last RECENT steps.
    """
    from matplotlib.figure import Figure

    records = read(folder / FILE)
    lines = _lines_by_position(records)
    figure = Figure(figsize=(11 if lines else 7, 4), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if lines else 1, squeeze=False)[0]
    for name, style in (("loss", {"linewidth": 1}), ("held_out_loss", {"marker": "o", "markersize": 4})):
        points = [(r["step"], math.nan if r[name] is None else r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", "-").replace("-loss", " loss"), **style)
    if unigram is not None:
        axes.axhline(unigram, color="grey", linestyle=":", label="unigram entropy, held out")
    axes.set(xlabel="step", ylabel=f"loss, {unit}", title=folder.name)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    for panel in beside:
        _draw_by_position(panel, lines)
    write_figure(folder / PLOT, figure)
    return folder / PLOT


def _lines_by_position(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is drawn by position, by its label: losses by the names of their ranges."""
    held_out, training = (
        [(r["step"], found) for r in records if (found := _by_position(r, prefix))]
        for prefix in (HELD_OUT_BY_POSITION, BY_POSITION)
    )
    lines = {f"held-out, step {step}": found for step, found in held_out[:1] + held_out[1:][-1:]}
    if recent := training[-RECENT:]:
        names = dict.fromkeys(name for _, found in recent for name in found)
        each = {name: [found[name] for _, found in recent if name in found] for name in names}
        steps = f"steps {recent[0][0]} to {recent[-1][0]}" if len(recent) > 1 else f"step {recent[0][0]}"
        lines[f"training, {steps}"] = {name: sum(x) / len(x) for name, x in each.items()}
    return lines


def _by_position(record: dict[str, Any], prefix: str) -> dict[str, float]:
    """A record's losses by position, by the names of their ranges; NaN for one that is not finite."""
    return {
        name.removeprefix(prefix): math.nan if x is None else x for name, x in record.items() if name.startswith(prefix)
    }


def _draw_by_position(axes: Any, lines: dict[str, dict[str, float]]) -> None:
    """The lines over all ranges that any of them has."""
    known = {name for line in lines.values() for name in line}
    for label, line in lines.items():
        ranges = [name for name in positions.names() if name in known]
        losses = [line.get(name, math.nan) for name in ranges]
        axes.plot(ranges, losses, "o" + (":" if label.startswith("training") else "-"), markersize=4, label=label)
    axes.set(xlabel="tokens of the document before", ylabel="nats per token", title="loss by position")
    axes.grid(alpha=0.3)
    axes.legend()
