"""Draw the pictures of docs/why.md that explain: traffic, tiles, the online softmax, split keys.

python docs/draw_why.py
"""

import math
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent
BLUE, RED, GREEN, YELLOW, GREY, PALE = "#4477aa", "#ee6677", "#228833", "#ccbb44", "#bbbbbb", "#f2f2f2"
SCORES, VALUES = ((1.0, 2.0), (4.0, 3.0)), ((10.0, 20.0), (30.0, 40.0))  # those of the page's example


def main() -> None:
    """Draw all."""
    for name, draw in (("traffic", traffic), ("tiles", tiles), ("softmax", softmax), ("decode", decode)):
        draw().savefig(FOLDER / f"why-{name}.png", dpi=80)


def traffic() -> Figure:
    """What crosses the border between a GPU's memory and its chip, in standard and in flash attention."""
    figure = Figure(figsize=(10, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, title in ((left, "standard: 4 N² + 4 N D values"), (right, "flash: 4 N D values")):
        _blank(axes, title, (0, 10), (0, 7))
        axes.add_patch(Rectangle((0, 0), 10, 3.3, facecolor=PALE, edgecolor=GREY))
        axes.add_patch(Rectangle((0, 5.2), 10, 1.6, facecolor="#fff6dd", edgecolor=GREY))
        axes.text(0.1, 0.12, "memory (HBM)", fontsize=8, color="#555555")
        axes.text(0.1, 6.45, "chip", fontsize=8, color="#555555")
    _matrices(left, {"Q": 0.5, "K": 1.2, "V": 1.9, "O": 9.2})
    for x, name in ((3.2, "S"), (6.1, "P")):
        left.add_patch(Rectangle((x, 0.6), 2.4, 2.4, facecolor=RED, alpha=0.75))
        left.text(x + 1.2, 1.8, f"{name}\nN x N", ha="center", va="center", color="white")
    for x, name in ((2.2, "Q Kᵀ"), (5.3, "softmax"), (8.4, "P V")):
        left.text(x, 5.8, name, ha="center", va="center", fontsize=10)
    _arrow(left, (1.2, 3.1), (1.9, 5.4), BLUE)
    for a, b in (
        ((2.5, 5.4), (3.9, 3.1)),
        ((4.7, 3.1), (5.1, 5.4)),
        ((5.6, 5.4), (6.8, 3.1)),
        ((7.7, 3.1), (8.2, 5.4)),
    ):
        _arrow(left, a, b, RED)
    _arrow(left, (8.6, 5.4), (9.3, 3.1), BLUE)
    _matrices(right, {"Q": 0.5, "K": 1.2, "V": 1.9, "O": 9.2})
    right.text(
        5.3, 5.95, "a tile of S and P at a time,\nwith m, z and acc of its rows", ha="center", va="center", fontsize=9
    )
    _arrow(right, (1.2, 3.1), (3.0, 5.4), BLUE)
    _arrow(right, (7.6, 5.4), (9.3, 3.1), BLUE)
    return figure


def _matrices(axes, places: dict[str, float]) -> None:
    for name, x in places.items():
        axes.add_patch(Rectangle((x, 0.6), 0.4, 2.4, facecolor=BLUE))
        axes.text(x + 0.2, 1.8, name, ha="center", va="center", color="white")


def tiles() -> Figure:
    """The tiles of a causal mask: one row of tiles under way."""
    figure = Figure(figsize=(5.4, 4.6), layout="constrained")
    axes = figure.subplots()
    _blank(axes, "", (-1.6, 10.6), (8.6, -1.8))
    axes.set_aspect("equal")
    for row in range(8):
        for column in range(8):
            if column > row:
                colour = "white"
            elif row < 4 or (row == 4 and column < 2):
                colour = GREY
            else:
                colour = RED if (row, column) == (4, 2) else PALE
            hatch = "//" if column == row else None
            axes.add_patch(
                Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="#999999", linewidth=0.6, hatch=hatch)
            )
    for i in range(8):
        axes.add_patch(Rectangle((-1.0, i), 0.7, 1, facecolor=BLUE, alpha=1.0 if i == 4 else 0.35, edgecolor="white"))
        axes.add_patch(Rectangle((i, -1.0), 1, 0.7, facecolor=BLUE, alpha=1.0 if i == 2 else 0.35, edgecolor="white"))
        axes.add_patch(
            Rectangle(
                (8.3, i),
                0.7,
                1,
                facecolor=YELLOW if i == 4 else GREEN,
                alpha=1.0 if i <= 4 else 0.25,
                edgecolor="white",
            )
        )
    axes.text(-1.45, 4, "queries", rotation=90, ha="center", va="center", fontsize=9)
    axes.text(4, -1.4, "keys and values", ha="center", va="center", fontsize=9)
    axes.text(9.25, 2, "out\nand lse,\nwritten", va="center", fontsize=8)
    axes.text(9.25, 4.5, "m, z, acc\non the chip", va="center", fontsize=8)
    axes.text(6.1, 1.6, "hidden:\nno work", ha="center", va="center", fontsize=8, color="#777777")
    axes.text(1.0, 3.0, "computed,\nused, gone", ha="center", va="center", fontsize=8)
    return figure


def softmax() -> Figure:
    """The page's example: what one tile leaves, and what the next one changes."""
    figure = Figure(figsize=(9, 3.0), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown = [(SCORES[0], 2.0, "after tile 1: m = 2", 2), (SCORES[0], 4.0, "rescaled by exp(2 - 4)", 2),
             (SCORES[0] + SCORES[1], 4.0, "after tile 2: m = 4", 4)]  # fmt: skip
    values = VALUES[0] + VALUES[1]
    for axes, (scores, m, title, count) in zip(panels, shown, strict=True):
        weights = [math.exp(s - m) for s in scores]
        bars = axes.bar(range(len(weights)), weights, color=[BLUE, BLUE, RED, RED][:count])
        axes.bar_label(bars, [f"{w:.3f}" for w in weights], fontsize=8)
        z, acc = sum(weights), sum(w * v for w, v in zip(weights, values, strict=False))
        axes.set_title(f"{title}\nz = {z:.4f}, acc = {acc:.4f}, acc / z = {acc / z:.4f}", fontsize=9)
        axes.set_xticks(
            range(4), [f"s = {s:.0f}\nv = {v:.0f}" for s, v in zip((1, 2, 4, 3), values, strict=True)], fontsize=8
        )
        axes.set(xlim=(-0.6, 3.6), ylim=(0, 1.2))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("weight exp(s - m)")
    return figure


def decode() -> Figure:
    """One query over a long cache: one program, or one per split."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    _blank(axes, "", (-3.2, 16.5), (0, 6.2))
    colours = [BLUE, RED, GREEN, YELLOW]
    axes.text(-0.2, 5.2, "one program\nper KV head", ha="right", va="center", fontsize=9)
    axes.text(-0.2, 2.6, "one program\nper split", ha="right", va="center", fontsize=9)
    for i in range(16):
        axes.add_patch(Rectangle((i * 0.8, 4.8), 0.76, 0.8, facecolor=BLUE, alpha=0.6))
        axes.add_patch(Rectangle((i * 0.8, 2.2), 0.76, 0.8, facecolor=colours[i // 4], alpha=0.8))
    _arrow(axes, (0, 4.55), (12.8, 4.55), BLUE)
    axes.text(13.0, 5.2, "16 steps, one after another", va="center", fontsize=9)
    for n, colour in enumerate(colours):
        _arrow(axes, (n * 3.2, 1.95), (n * 3.2 + 3.1, 1.95), colour)
        axes.text(n * 3.2 + 1.55, 1.35, f"(out, lse) {n}", ha="center", va="center", fontsize=8, color=colour)
        _arrow(axes, (n * 3.2 + 1.55, 1.1), (6.4, 0.35), GREY)
    axes.text(13.0, 2.6, "4 steps each, all at once", va="center", fontsize=9)
    axes.text(13.0, 0.5, "combine: a weighted mean", va="center", fontsize=9)
    axes.text(6.4, 0.1, "out", ha="center", va="center", fontsize=9)
    axes.text(6.4, 5.95, "keys and values of the cache", ha="center", va="center", fontsize=8, color="#555555")
    return figure


def _blank(axes, title: str, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y, xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def _arrow(axes, begin: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=1.6))


if __name__ == "__main__":
    main()
