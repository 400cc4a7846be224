"""Settings of a command that reads long text: the model, and how it reads. Each is key=value."""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from dataclasses import dataclass
from typing import Any, Self

from ringflash.docstrings import field_docstrings
from ringflash.errors import ConfigError, did_you_mean, shown
from ringflash.ring.cache_plan import CHUNK


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """The model, and how it reads. Commands add their own settings."""

    model: str
    """Folder of a Hugging Face model, or of a LoRA adapter, which is merged into its model."""

    base: str | None = None
    """With an adapter, the folder of its model; by default base_model_name_or_path in adapter_config.json."""

    tokenizer: str | None = None
    """Folder of a tokenizer, or bytes; by default the model's folder, or the adapter's where it has one."""

    dtype: str = "auto"
    """dtype of weights and cache: bf16, fp32, or auto: bf16 on a GPU, else fp32."""

    kernel: str = "auto"
    """Attention kernel for long text: auto, hopper, portable or blocked."""

    chunk: int = CHUNK
    """Tokens that a forward reads at once, over all ranks."""

    seed: int = 0
    """Seed of all random numbers."""

    extrapolate_positions: bool = False
    """Allow more tokens than the model supports (max_position_embeddings, or the length that RoPE scales to)."""

    rope_length: int | None = None
    """With longrope and dynamic RoPE, the document length whose frequencies to use, like the trainer's
    model.rope_length; by default that of the document, which the answer must not change."""

    untested_family: bool = False
    """Allow a model_type that docs/models.md does not list, like the trainer's model.untested_family."""

    def __post_init__(self) -> None:
        self.at_least(chunk=2, seed=0)
        if self.seed >= 2**64:
            raise ConfigError(f"seed={self.seed} must be below 2^64")

    def at_least(self, **least: int) -> None:
        """Raise ConfigError for a setting, or one of its values, below its least."""
        for name, lowest in least.items():
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=lowest) < lowest:
                raise ConfigError(f"{name}={shown(value)} must be {lowest} or more")

    @classmethod
    def parse(cls, arguments: list[str]) -> Self:
        """Settings of key=value. Raises ConfigError naming one that cannot be.

        A tuple of text is given by repeating its name, one of numbers as the trainer's lists: [1,2].
        """
        kinds = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if not equals or name not in kinds:
                meant = did_you_mean(name, kinds, "{}=...", f": these are {', '.join(kinds)}, see --help")
                raise ConfigError(f"{argument[:100]} is not a setting of this command{meant}")
            if kinds[name] == "tuple[str, ...]":
                given[name] = (*given.get(name, ()), value)
            elif name in given:
                raise ConfigError(f"{name} is set more than once: {name}={given[name]} and {name}={value}")
            else:
                given[name] = _typed(name, value, kinds[name])
        if "model" not in given:
            raise ConfigError("model is not set: model=FOLDER is a Hugging Face model")
        return cls(**given)

    @classmethod
    def settings_help(cls) -> str:
        """Every setting with its default, if it has one, and its meaning."""
        lines = []
        for name, meaning in field_docstrings(cls).items():  # type: ignore[arg-type]  # a class is hashable
            value = cls.__dataclass_fields__[name].default
            default = "" if value in (dataclasses.MISSING, None, ()) else f"={shown(value)}"
            head = f"  {name + default:<28}"
            lines.append(textwrap.fill(f"{head} {meaning}", 120, subsequent_indent=" " * 31, break_on_hyphens=False))
        return "\n".join(lines)


def _typed(name: str, value: str, kind: str) -> Any:
    """A setting's value of its type. Raises ConfigError naming what it must be."""
    kind = kind.removesuffix(" | None")
    try:
        if kind == "bool":
            return {"true": True, "false": False}[value.lower()]
        if kind == "tuple[int, ...]":
            return _whole_numbers(value)
        return {"int": int, "float": float}.get(kind, str)(value)
    except (ValueError, KeyError):
        example = f"'{name}=[{','.join(re.findall('[0-9]+', value)) or 4096}]'"
        wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(
            kind, f"a list of whole numbers, such as {example}"
        )
        raise ConfigError(f"{name}={value} must be {wanted}") from None


def _whole_numbers(value: str) -> tuple[int, ...]:
    """One or more, as [1,2]. Raises ValueError for any other value."""
    found = json.loads(value)
    if not (isinstance(found, list) and found and all(type(x) is int for x in found)):
        raise ValueError(value)
    return tuple(found)
