"""Settings of the data: where the text is, how it is read, and how documents fill sequences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ringflash.data.files import is_below
from ringflash.data.formats import FORMATS
from ringflash.data.records import IDS
from ringflash.errors import ConfigError, check_settings

MALFORMED = ("refuse", "skip")
BY_SUFFIX = "suffix"  # of a source's format: null, which there means data.format
PACKINGS = ("cut", "whole", "truncate", "split")
ALL_TURNS, LAST_TURN = "all_turns", "last_turn"

COLUMNS = ("system", "tools", "prompt", "completion", "chosen", "rejected", "instruction", "input", "output", "history")


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """A source of text. A setting that is null is taken from data.*."""

    path: str | None = None
    """File or folder with the text."""

    files: list[str] | None = None
    """Glob patterns below `path`."""

    format: str | None = None
    """Format of the files; suffix: that of each file's suffix, even if data.format is set."""

    field: str | None = None
    """Name of the field with the text, token ids or messages, if data.field does not apply here."""

    columns: dict[str, str] | None = None
    """Names of the other fields of conversations, if data.columns does not apply here."""

    chat: bool | None = None
    """Whether the records are conversations."""

    chat_template_kwargs: dict[str, Any] | None = None
    """More variables for the chat template."""

    train_on: str | None = None
    """Which of the assistant's turns are trained on: all_turns or last_turn."""

    malformed: str | None = None
    """What happens to unusable records: refuse or skip."""

    packing: str | None = None
    """How documents fill sequences: cut, whole, truncate or split."""


@dataclasses.dataclass(frozen=True)
class WeightedSource(SourceConfig):
    """A source, and its share of the training sequences."""

    weight: float | None = None
    """Its share of the training sequences, relative to the weights of the other sources. null for all sources: shares
    by size, so that an epoch has each document once."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text to train on, and how documents fill sequences."""

    path: str | None = None
    """File or folder with the text."""

    sources: dict[str, WeightedSource] = dataclasses.field(default_factory=dict)
    """Several named sources instead of data.path: {books: {path: books, weight: 2}, web: {path: web}}. A setting that a
    source leaves out is taken from data.*. Each sequence comes from a single source."""

    evaluation: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    """A separate source to evaluate on, instead of held-out documents."""

    files: list[str] = dataclasses.field(
        default_factory=lambda: [
            *("**/*.txt", "**/*.json", "**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst", "**/*.ndjson"),
            *("**/*.csv", "**/*.tsv", "**/*.parquet", "**/*.arrow"),
        ]
    )
    """Glob patterns below `path`, if that is a folder. Hidden files match only patterns that begin with a dot."""

    format: str | None = None
    """Format of the files: text (each file is one document), jsonl, json, csv, tsv, parquet or arrow; null: by each
    file's suffix."""

    field: str | None = None
    """Name of the JSON field or column with the text; null: "text". input_ids: the field holds a list of token ids,
    which are used as they are. If such a record also has labels, these are predicted: one id per token, in its place,
    or -100 for none."""

    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """With data.chat=true, the names that fields have in the records, such as {instruction: question, output: answer}.
    The names to give are system, tools, prompt, completion, chosen, rejected, instruction, input, output, history."""

    chat: bool = False
    """The records are conversations (messages, optionally tools), prompts with completions, or Alpaca's (instruction,
    input, output). The loss is computed on the assistant's turns. data.field names the field with the messages; null:
    "messages"."""

    preferences: bool = False
    """The records of data.chat=true are pairs: prompt, chosen and rejected, all texts or all messages. The loss is
    preference.loss_type. The prompt may also be the messages that chosen and rejected both begin with."""

    chat_template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    """More variables for the tokenizer's chat template, such as {enable_thinking: false}."""

    train_on: str = ALL_TURNS
    """Which of the assistant's turns of a conversation are trained on. all_turns: every message of the assistant;
    last_turn: the last one. Messages with weight 0 or train false are never trained on."""

    tokenizer: str = "bytes"
    """"bytes" (ByT5: one token per byte, vocabulary 384), or a local folder with any Hugging Face tokenizer."""

    stream: bool = False
    """Tokenise file by file during training instead of everything before the first step, for corpora of many files of
    about 100 MB. Each epoch draws a new order of the files, and documents are shuffled within a file."""

    malformed: str = "refuse"
    """What happens to unusable records, such as broken JSON or a missing field. refuse: an error gives file and line;
    skip: they are left out and counted."""

    cache: str = "runs/.cache"
    """Folder for tokenised text, 2 or 4 bytes per token. Its entries may be deleted whenever no run uses them."""

    held_out: float = 0.05
    """Fraction of the documents that are held out for evaluation, at least one document; 0: none."""

    seed: int = 0
    """Seed of the choice of held-out documents and of the training order."""

    sequence_length: int = 8192
    """Tokens in a packed sequence, over all ranks that share it."""

    packing: str = "cut"
    """How documents fill sequences. cut: end to end, and cut where a sequence ends. whole: never cut, packed by best
    fit; longer documents are dropped and counted. truncate: as whole, but longer documents keep their first
    sequence_length tokens. split: as whole, but longer documents become pieces of sequence_length tokens."""

    def __post_init__(self) -> None:
        self._check_values()
        self._check_combinations()
        self._check_sources()
        self.parts()  # whose values are checked as these are
        self.evaluated()

    def _check_values(self) -> None:
        patterns = not isinstance(self.files, str) and len(self.files) > 0 and all(map(is_below, self.files))
        checks = (
            ("path", self.path != "", "a file or folder"),
            ("files", patterns, "a list of one or more patterns below data.path, such as ['*.txt']"),
            ("format", self.format is None or self.format in FORMATS, f"null or one of {', '.join(FORMATS)}"),
            ("field", self.field != "", "null or the name of a field"),
            ("tokenizer", bool(self.tokenizer), "bytes or a folder"),
            ("cache", bool(self.cache), "a folder"),
            ("held_out", 0 <= self.held_out < 1, "a fraction, 0 or more and below 1"),
            ("malformed", self.malformed in MALFORMED, f"one of {', '.join(MALFORMED)}"),
            ("packing", self.packing in PACKINGS, f"one of {', '.join(PACKINGS)}"),
            ("train_on", self.train_on in (ALL_TURNS, LAST_TURN), f"{ALL_TURNS} or {LAST_TURN}"),
            ("seed", 0 <= self.seed < 2**64, "0 or more and below 2^64"),
            ("sequence_length", self.sequence_length >= 2, "2 or more tokens"),
        )
        check_settings("data", self, checks)

    def _check_combinations(self) -> None:
        if self.preferences:
            self._check_preferences()
        if self.chat and self.packing in ("cut", "split"):
            raise ConfigError(
                f"data.packing={self.packing} would cut conversations, and data.chat=true: use whole or truncate"
            )
        if self.chat and self.field == IDS:
            raise ConfigError(f"data.field={IDS} and data.chat=true exclude each other: tokens have no messages")
        if self.chat_template_kwargs and not self.chat:
            raise ConfigError("data.chat_template_kwargs is only read with data.chat=true")
        if self.train_on != ALL_TURNS and not self.chat:
            raise ConfigError(f"data.train_on={self.train_on} is only read with data.chat=true")
        if self.columns:
            self._check_columns()
        if not self.path and not self.sources:
            raise ConfigError("data.path is not set; add data.path=... to the command line, or data.sources")
        if self.stream and self.sources:
            raise ConfigError("data.stream=true is for the files of data.path, not for data.sources")
        if self.stream and self.held_out:
            raise ConfigError(
                f"data.stream=true has no documents to hold out, and data.held_out={self.held_out}: set "
                f"data.held_out=0, and data.evaluation.path to evaluate"
            )
        if self.path and self.sources:
            raise ConfigError(f"data.path={self.path} and data.sources exclude each other: make it one of the sources")
        if self.evaluation.path and self.held_out:
            raise ConfigError(
                f"data.evaluation.path={self.evaluation.path} and data.held_out={self.held_out} exclude each other: "
                f"set data.held_out=0"
            )
        if not self.evaluation.path and any(vars(self.evaluation).values()):
            raise ConfigError("data.evaluation has no path; add data.evaluation.path=... to the command line")

    def _check_columns(self) -> None:
        shown = "data.columns={" + ", ".join(f"{name}: {column}" for name, column in self.columns.items()) + "}"
        if not self.chat:
            raise ConfigError(f"{shown} is only read with data.chat=true; data.field names the field of the text")
        if wrong := next((name for name in self.columns if name not in COLUMNS), None):
            of_messages = "; data.field names the field of the messages" if wrong == "messages" else ""
            raise ConfigError(f"{shown}: {wrong} must be one of {', '.join(COLUMNS)}{of_messages}")
        if not all(isinstance(column, str) and column for column in self.columns.values()):
            raise ConfigError(f"{shown} must give the name of a field for each")

    def _check_preferences(self) -> None:
        checks = (
            ("chat", self.chat, "true, by which chosen and rejected are read"),
            ("field", self.field is None, "null: the fields are prompt, chosen and rejected"),
            ("train_on", self.train_on == ALL_TURNS, f"{ALL_TURNS}: answers are compared whole"),
            ("packing", self.packing == "whole", "whole: the answers of a pair are neither cut nor divided"),
        )
        check_settings("data.preferences=true: data", self, checks)

    def _check_sources(self) -> None:
        weights = {name: source.weight for name, source in self.sources.items()}
        if None in weights.values() and any(weights.values()):
            lacks = next(name for name, weight in weights.items() if weight is None)
            raise ConfigError(f"data.sources.{lacks} has no weight, and others have: give all of them one, or none")
        for name, source in self.sources.items():
            if not source.path:
                raise ConfigError(f"data.sources.{name} has no path")
            if source.weight is not None and not 0 < source.weight < math.inf:
                raise ConfigError(f"data.sources.{name}.weight={source.weight} must be more than 0 and finite")

    def parts(self) -> dict[str, DataConfig]:
        """The settings of each source, by its name; of data.path, if that is the only one."""
        if self.path:
            return {"": self}
        return {name: self._part(f"sources.{name}", source) for name, source in self.sources.items()}

    def evaluated(self) -> DataConfig | None:
        """The settings of the source to evaluate on, if there is one of its own."""
        return self._part("evaluation", self.evaluation) if self.evaluation.path else None

    def _part(self, name: str, source: SourceConfig) -> DataConfig:
        given = {key: value for key, value in vars(source).items() if value is not None and key != "weight"}
        if source.format == BY_SUFFIX:
            given["format"] = None
        try:
            return dataclasses.replace(self, sources={}, evaluation=SourceConfig(), stream=False, **given)
        except ConfigError as error:
            raise ConfigError(f"data.{name}: {error}") from error
