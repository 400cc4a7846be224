"""Needle in a haystack: hide a sentence with a number in a long text, and ask a model for the number.

    text ......... needle ............... question answer
    |<-- depth -->|                      |
    |<---------- length, in tokens --------------------->|

The model has found the needle if greedy decoding gives the answer, that is, if each token of the answer is the
likeliest one. The loss is the mean over the answer's tokens. Each cell has another number, drawn from the seed.

`needle` searches from the command line, and `training.needle` during a run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ringflash.data import python_stdlib
from ringflash.data.tokenizer import Encoder
from ringflash.errors import ConfigError, shown
from ringflash.generate.loading import text_of
from ringflash.models import RingCache, prefill

CHARACTERS = 32  # tokenised per token of the longest haystack, since a text may be far longer


@dataclass(frozen=True, kw_only=True)
class HaystackConfig:
    """The haystacks to search, and the needle in them."""

    lengths: tuple[int, ...] = (1024, 4096, 16384)
    """Lengths in tokens, of haystack, needle, question and answer together."""

    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    """Positions of the needle, in percent of the text: 0 is its beginning."""

    text: str | None = None
    """The haystack: a text file in UTF-8, repeated if it is too short; null: the sources of Python's standard
    library."""

    needle: str = "\nThe secret number of the lighthouse is {number}.\n"
    """The sentence to find, with {number} in place of the answer."""

    question: str = "\nThe secret number of the lighthouse is"
    """Text that follows the haystack and asks for the answer."""

    group = ""  # what the settings' names begin with

    def __post_init__(self) -> None:
        for name, least in (("lengths", 1), ("depths", 0)):
            values = getattr(self, name)
            given = f"{self.group}{name}={shown(values)}"
            if min(values, default=least) < least:
                raise ConfigError(f"{given} must be {least} or more")
            if len(set(values)) < len(values):
                raise ConfigError(f"{given} has a number more than once")
        if max(self.depths, default=0) > 100:
            raise ConfigError(f"{self.group}depths={shown(self.depths)} must be at most 100 percent")
        if self.needle.count("{number}") != 1:
            raise ConfigError(f"{self.group}needle={self.needle!r} must have {{number}} once, where the answer stands")


@dataclass(frozen=True)
class Task:
    """One cell's token ids: the needle, the question, and the answer that follows the question."""

    needle: list[int]
    question: list[int]
    answer: list[int]

    @property
    def tokens(self) -> int:
        """All of them."""
        return len(self.needle) + len(self.question) + len(self.answer)


@dataclass(frozen=True)
class Row:
    """The cells of one length: a task for each depth, in percent, and the text that fills `length` tokens."""

    text: list[int]
    length: int
    tasks: dict[int, Task]


@dataclass(frozen=True)
class Cell:
    """One cell: whether the answer was found, and the mean loss of its tokens, in nats."""

    length: int
    depth: int
    found: bool
    loss: float


def read_text(config: HaystackConfig) -> str:
    """The text of the file, or the sources of Python's standard library, sorted by name.

    Raises ConfigError if the file is not text.
    """
    if config.text is not None:
        return text_of(f"{config.group}text", config.text)
    sources = sorted(Path(python_stdlib()).glob("*.py"))
    return "\n".join(source.read_text(encoding="utf-8", errors="ignore") for source in sources)


def rows_of(config: HaystackConfig, text: str, encoder: Encoder, seed: int) -> list[Row]:
    """A row for each length, the same on every rank. Raises ConfigError for a length that is too short."""
    longest, numbers = max(config.lengths), random.Random(seed)
    body = encoder.tokens(text[: CHARACTERS * longest])
    haystack = [*encoder.begin, *body * (longest // len(body) + 1)]
    rows = []
    for length in config.lengths:
        tasks = {depth: task_of(config, encoder, numbers.randrange(10**6, 10**7)) for depth in config.depths}
        if (most := max(task.tokens for task in tasks.values())) >= length:
            raise ConfigError(
                f"{config.group}lengths={length} is too short: needle, question and answer are {most} tokens"
            )
        rows.append(Row(haystack[:length], length, tasks))
    return rows


def task_of(config: HaystackConfig, encoder: Encoder, number: int) -> Task:
    """The task whose answer is `number`. Raises ConfigError if the answer has no tokens of its own."""
    question, whole = (encoder.tokens(text) for text in (config.question, f"{config.question} {number}"))
    shared = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
    if not 0 < shared < len(whole):
        raise ConfigError(
            f"{config.group}question={config.question!r} has no token in front of the answer's: write a longer one"
        )
    needle = encoder.tokens(config.needle.replace("{number}", str(number)))
    return Task(needle, whole[:shared], whole[shared:])


@torch.no_grad()
def search(model: PreTrainedModel, row: Row, cache: RingCache) -> list[Cell]:
    """Search all cells of a row with a model in eval mode and an empty cache of the row's length.

    The text in front of a needle is read only once for all depths.
    """
    cells = {}
    for depth in sorted(row.tasks):
        task = row.tasks[depth]
        text = row.text[: row.length - task.tokens]
        place = round(len(text) * depth / 100)
        # The cache keeps the text in front of the last needle; only the text after that is read.
        if cache.get_seq_length() > place:
            cache.reset()
        prefill(model, _ids(text[:place], cache), cache)
        state = cache.snapshot()
        whole = [*text[:place], *task.needle, *text[place:], *task.question]
        prefill(model, _ids(whole[:-1], cache), cache)
        asked = _ids([whole[-1], *task.answer[:-1]], cache)
        logits = model(asked, past_key_values=cache, use_cache=True).logits[0].float()
        cells[depth] = Cell(row.length, depth, *_score(logits, _ids(task.answer, cache)[0]))
        cache.restore(state)
    return [cells[depth] for depth in row.tasks]


def _ids(tokens: list[int], cache: RingCache) -> Tensor:
    return torch.tensor([tokens], dtype=torch.int64, device=cache.ring.device)


def _score(logits: Tensor, answer: Tensor) -> tuple[bool, float]:
    """Whether logits [n, vocabulary] are highest for the answer's tokens [n], and their mean loss."""
    loss = torch.nn.functional.cross_entropy(logits, answer)
    return bool((logits.argmax(-1) == answer).all()), float(loss)


def heat_map(cells: list[Cell]) -> Any:
    """A matplotlib figure of the loss by depth and length, with a mark where the needle was found."""
    from matplotlib.figure import Figure

    lengths, depths = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("length", "depth"))
    loss = torch.full((len(depths), len(lengths)), float("nan"))
    figure = Figure(figsize=(2 + 0.9 * len(lengths), 1.5 + 0.5 * len(depths)), layout="constrained")
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
    return figure
