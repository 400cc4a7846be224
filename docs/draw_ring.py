"""Draw docs/ring.png: a packed causal mask, the shards of four ranks, and what each rank computes on each hop.

python docs/draw_ring.py
"""

from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback

COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44"]
LENGTH, RANKS = 64, 4
DOCUMENTS = [23, 30, 11]


def main() -> None:
    """Draw the whole mask on the left and each hop on the right."""
    mask = IntervalMask.causal(LENGTH) & IntervalMask.documents(DOCUMENTS)
    layout = Layout.zigzag(LENGTH, RANKS)
    plan = AttentionPlan(mask, layout, Loopback(RANKS))
    owner = np.empty(LENGTH, dtype=int)
    for rank in range(RANKS):
        owner[layout.positions(rank).numpy()] = rank

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.7])
    axes = left.subplots()
    seen = mask.dense()[0].numpy()
    _show(axes, np.where(seen, owner[:, None] + 1, 0))
    axes.set(title="mask: causal, three documents", xlabel="key", ylabel="query, in its rank's colour")

    grid = right.subplots(RANKS, RANKS, sharex=True, sharey=True)
    for s, hops in enumerate(plan.hops):
        for rank, hop in enumerate(hops):
            _show(grid[rank, s], _block(hop, layout.shard_length) * (rank + 1))
            grid[rank, s].set_title(f"{hop.pairs} pairs" if hop.pairs else "nothing: skipped", fontsize=8)
            if rank == RANKS - 1:
                grid[rank, s].set_xlabel(f"hop {s}")
            if s == 0:
                grid[rank, s].set_ylabel(f"rank {rank}")
    right.suptitle("each rank's queries (rows) against the keys it has on that hop (columns)")
    figure.savefig(Path(__file__).with_name("ring.png"), dpi=110)


def _block(hop, length: int) -> np.ndarray:
    seen, keys = np.zeros((length, length), dtype=int), np.arange(length)
    for intervals in hop.intervals:
        start, end = (x[0].numpy()[:, None] for x in (intervals.start, intervals.end))
        seen |= (start <= keys) & (keys < end)
    return seen


def _show(axes, ranks: np.ndarray) -> None:
    axes.imshow(ranks, cmap=ListedColormap(["#f2f2f2", *COLOURS]), vmin=0, vmax=RANKS, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


if __name__ == "__main__":
    main()
