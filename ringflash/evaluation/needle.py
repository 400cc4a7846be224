"""Needle in a haystack: does a model find a sentence in a long text, wherever it stands?

    python -m ringflash.evaluation.needle model=FOLDER 'lengths=[4096,32768,131072]'
    torchrun --nproc-per-node 4 -m ringflash.evaluation.needle model=FOLDER text=book.txt 'depths=[0,50,100]'

A sentence with a number (the needle) is put into a text, at each depth (0: its beginning, 100: its end) of each length.
The model is then asked for the number. `ringflash.evaluation.haystack` says what counts as found. Results are a table,
needle.json and needle.png, a heat map, in the folder `out`. FOLDER is a model's, or a LoRA adapter's.

Settings are key=value:
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from ringflash.evaluation.haystack import Cell, HaystackConfig, heat_map, read_text, rows_of, search
from ringflash.files import write_atomically, write_figure
from ringflash.generate.command import command, now, report, start
from ringflash.generate.loading import load_encoder, load_model, make_cache
from ringflash.generate.settings import ReadConfig
from ringflash.models.rope import check_positions


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(ReadConfig, HaystackConfig):
    """Which model searches which haystacks."""

    out: str = "."
    """Folder for needle.json and needle.png."""

    def __post_init__(self) -> None:
        ReadConfig.__post_init__(self)
        HaystackConfig.__post_init__(self)
        if not Path(self.out).is_dir():
            raise ConfigError(f"out={self.out} is not a folder that exists")


def run(config: NeedleConfig, world: World) -> list[Cell]:
    """All cells of the grid, reported and written. Raises ConfigError, on every rank, for what cannot work."""
    text = world.from_rank_0(lambda: read_text(config))
    model = load_model(config, world.device)
    encoder, _ = load_encoder(config, model)
    if not config.extrapolate_positions:  # before hours with the shorter ones
        check_positions(
            f"lengths={max(config.lengths)} tokens", max(config.lengths), model.config, "extrapolate_positions"
        )
    cells: list[Cell] = []
    for row in rows_of(config, text, encoder, config.seed):
        cache = make_cache(config, model, row.length, world, f"lengths={row.length} tokens")
        begin = now(world.device)
        found = search(model, row, cache)
        seconds = now(world.device) - begin
        shown = "  ".join(f"{cell.depth}%: {'found' if cell.found else 'lost'} {cell.loss:.3f}" for cell in found)
        report(world, f"{row.length} tokens, {seconds:.1f} s: {shown}")
        cells += found
    if world.is_first:
        _write(Path(config.out), cells)
    return cells


def _write(folder: Path, cells: list[Cell]) -> None:
    """needle.json and needle.png."""
    lines = ",\n".join(json.dumps(vars(cell)) for cell in cells)
    write_atomically(folder / "needle.json", f"[\n{lines}\n]\n")
    write_figure(folder / "needle.png", heat_map(cells))
    found = sum(cell.found for cell in cells)
    print(f"found {found} of {len(cells)}; wrote {folder / 'needle.json'} and needle.png")


def main(arguments: list[str]) -> None:
    """Parse the settings and search."""
    command(NeedleConfig, __doc__ or "", run, arguments)


if __name__ == "__main__":
    start(main)
