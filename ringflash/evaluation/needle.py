"""Needle in a haystack: does a model find a sentence in a long text, wherever it stands?

    python -m ringflash.evaluation.needle model=FOLDER lengths=4096,32768,131072
    torchrun --nproc-per-node 4 -m ringflash.evaluation.needle model=FOLDER text=book.txt depths=0,50,100

A sentence with a number (the needle) is put into a text, at each depth (0: its beginning, 100: its end) of each length.
The model is then asked for the number. It has found it where the likeliest token is the answer's next one, for each of
its tokens, which is when greedy decoding gives the answer. The loss is the mean over the answer's tokens.

    text ......... needle ............... question answer
    |<-- depth -->|                      |
    |<---------- length, in tokens --------------------->|

The text in front of a needle is read once for all depths. Numbers differ from cell to cell and follow the seed. Results
are a table, needle.json and needle.png, a heat map, in the folder `out`.

Settings are key=value:
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ringflash.data import python_stdlib
from ringflash.errors import ConfigError
from ringflash.models import RingCache, prefill
from ringflash.reading import (
    ReadConfig,
    check_room,
    command,
    ids_of,
    load_encoder,
    load_model,
    make_cache,
    now,
    report,
    start,
    text_of,
)
from ringflash.ring.transport import Ring
from ringflash.training.files import write_whole, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ringflash.data.tokenizer import Encoder
    from ringflash.training.world import World


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(ReadConfig):
    """Which haystacks are searched for which needles."""

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    """Tokens of haystack, needle, question and answer together."""

    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    """Where the needle stands, in percent of the text: 0 is its beginning."""

    text: str | None = None
    """A text file in UTF-8, repeated where it is too short; none: the sources of Python's standard library."""

    needle: str = "\nThe secret number of the lighthouse is {number}.\n"
    """The sentence, with {number} where the answer stands."""

    question: str = "\nThe secret number of the lighthouse is"
    """What follows the text; the answer follows it."""

    out: str = "."
    """Folder for needle.json and needle.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(lengths=1, depths=0)
        if max(self.depths) > 100:
            raise ConfigError(f"depths={','.join(map(str, self.depths))} must be at most 100 percent")
        if self.needle.count("{number}") != 1:
            raise ConfigError(f"needle={self.needle!r} must have {{number}} once, where the answer stands")
        if not Path(self.out).is_dir():
            raise ConfigError(f"out={self.out} is not a folder that exists")


@dataclass(frozen=True)
class Task:
    """What is asked in one cell, in tokens: the needle, the question and the answer, which the question ends before."""

    needle: list[int]
    question: list[int]
    answer: list[int]

    @property
    def tokens(self) -> int:
        return len(self.needle) + len(self.question) + len(self.answer)


@dataclass(frozen=True)
class Found:
    """One cell: whether the answer was found, and the mean loss of its tokens, in nats."""

    length: int
    depth: int
    found: bool
    loss: float


@torch.no_grad()
def search(
    model: PreTrainedModel,
    haystack: list[int],
    tasks: list[Task],
    length: int,
    depths: tuple[int, ...],
    ring: Ring | None = None,
    chunk: int = 16384,
    kernel: str = "auto",
) -> list[Found]:
    """A row of cells: haystacks of `length` tokens with a task's needle at each depth, in percent.

    haystack: tokens, as many as `length` or more, the same on every rank. tasks: one for each depth. Raises ValueError
    for a length that leaves no token of text.
    """
    cache = RingCache(model, length, ring=ring, chunk=chunk, kernel=kernel)
    device = cache.ring.device
    cells, order = {}, sorted(range(len(depths)), key=lambda i: depths[i])
    for i in order:
        task, depth = tasks[i], depths[i]
        text = haystack[: length - task.tokens]
        if not text:
            raise ValueError(f"a length of {length} leaves no text beside {task.tokens} tokens of needle and question")
        place = round(len(text) * depth / 100)
        before = torch.tensor([text[:place]], dtype=torch.int64, device=device)
        # Of a longer text in front of this needle than of the last one, only what is more is read.
        if cache.get_seq_length() > place:
            cache.reset()
        prefill(model, before, cache)
        state = cache.snapshot()
        whole = [*text[:place], *task.needle, *text[place:], *task.question]
        prefill(model, torch.tensor([whole[:-1]], dtype=torch.int64, device=device), cache)
        asked = torch.tensor([[whole[-1], *task.answer[:-1]]], dtype=torch.int64, device=device)
        logits = model(asked, past_key_values=cache, use_cache=True).logits[0].float()
        cells[i] = Found(length, depth, *_score(logits, torch.tensor(task.answer, device=device)))
        cache.restore(state)
    return [cells[i] for i in range(len(depths))]


def _score(logits: Tensor, answer: Tensor) -> tuple[bool, float]:
    """Whether logits [n, vocabulary] are highest for the answer's tokens [n], and their mean loss."""
    loss = torch.nn.functional.cross_entropy(logits, answer)
    return bool((logits.argmax(-1) == answer).all()), float(loss)


def task_of(config: NeedleConfig, encoder: Encoder, number: int) -> Task:
    """The task whose answer is a number. Raises ConfigError where the answer has no token of its own."""
    question, whole = (ids_of(encoder, text) for text in (config.question, f"{config.question} {number}"))
    shared = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    if not 0 < shared < len(whole):
        raise ConfigError(f"question={config.question!r} has no token in front of the answer's: write a longer one")
    needle = ids_of(encoder, config.needle.replace("{number}", str(number)))
    return Task(needle, whole[:shared], whole[shared:])


def run(config: NeedleConfig, world: World) -> list[Found]:
    """All cells of the grid, reported and written. Raises ConfigError, on every rank, for what cannot work."""
    text = world.broadcast(_text(config) if world.is_first else None)
    if isinstance(text, ConfigError):
        raise text
    model = load_model(config, world.device)
    encoder, _ = load_encoder(config, model)
    haystack, longest = [*encoder.begin, *ids_of(encoder, text)], max(config.lengths)
    while len(haystack) < longest:
        haystack += haystack[len(encoder.begin) :]
    numbers = random.Random(config.seed)
    cells: list[Found] = []
    for length in config.lengths:
        tasks = [task_of(config, encoder, numbers.randrange(10**6, 10**7)) for _ in config.depths]
        if (least := max(task.tokens for task in tasks) + 1) > length:
            raise ConfigError(f"lengths={length} is too short: needle, question and answer are {least - 1} tokens")
        check_room(config, f"lengths={length} tokens", make_cache(config, model, length, world), world)
        begin = now(world.device)
        row = search(
            model, haystack, tasks, length, config.depths, world.ring, chunk=config.chunk, kernel=config.kernel
        )
        seconds = now(world.device) - begin
        shown = "  ".join(f"{cell.depth}%: {'found' if cell.found else 'lost'} {cell.loss:.3f}" for cell in row)
        report(world, f"{length} tokens, {seconds:.1f} s: {shown}")
        cells += row
    if world.is_first:
        _write(config, cells)
    return cells


def _text(config: NeedleConfig) -> str | ConfigError:
    """The haystack's text: of the file, or sources of Python's standard library in the order of their names."""
    if config.text is not None:
        return text_of("text", config.text)
    sources = sorted(Path(python_stdlib()).glob("*.py"))
    return "\n".join(source.read_text(encoding="utf-8", errors="ignore") for source in sources)


def _write(config: NeedleConfig, cells: list[Found]) -> None:
    """needle.json and needle.png."""
    folder = Path(config.out)
    lines = ",\n".join(json.dumps(vars(cell)) for cell in cells)
    write_whole(folder / "needle.json", f"[\n{lines}\n]\n")
    with writing(folder / "needle.png"):
        plot(cells, folder / "needle.png")
    found = sum(cell.found for cell in cells)
    print(f"found {found} of {len(cells)}; wrote {folder / 'needle.json'} and needle.png")


def plot(cells: list[Found], path: Path) -> None:
    """A heat map of the loss by depth and length; what was found is marked."""
    from matplotlib.figure import Figure

    lengths, depths = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("length", "depth"))
    loss = torch.full((len(depths), len(lengths)), float("nan"))
    figure = Figure(figsize=(1.5 + 0.9 * len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
    axes = figure.subplots()
    for cell in cells:
        row, column = depths.index(cell.depth), lengths.index(cell.length)
        loss[row, column] = cell.loss
        axes.text(column, row, "found" if cell.found else "", ha="center", va="center", color="white", fontsize=8)
    image = axes.imshow(loss.numpy(), aspect="auto", cmap="viridis_r", vmin=0.0)
    axes.set_xticks(range(len(lengths)), [str(x) for x in lengths])
    axes.set_yticks(range(len(depths)), [f"{x}%" for x in depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(image, label="loss of the answer (nats per token)")
    figure.savefig(path, dpi=150)


def main(arguments: list[str]) -> None:
    """Parse the settings and search."""
    command(NeedleConfig, __doc__ or "", run, arguments)


if __name__ == "__main__":
    start(main)
