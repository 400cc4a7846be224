"""What the commands that read long text share: settings, loading of model and tokenizer, and running on ranks."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ringflash.docstrings import field_docstrings
from ringflash.errors import ConfigError, hub_hint, shown
from ringflash.reading import check_positions, check_room
from ringflash.ring.cache_plan import CHUNK
from ringflash.training import failure

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ringflash.data.tokenizer import Encoder
    from ringflash.models import RingCache
    from ringflash.training.world import World


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
                close = difflib.get_close_matches(name, kinds, n=1)
                raise ConfigError(
                    f"{argument[:100]} is not a setting of this command"
                    + (f"; did you mean {close[0]}=...?" if close else f": these are {', '.join(kinds)}, see --help")
                )
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


Config = TypeVar("Config", bound=ReadConfig)


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


def command(kind: type[Config], about: str, run: Callable[[Config, World], object], arguments: list[str]) -> None:
    """Parse a command's settings, connect the ranks, and run it. about: text of --help above the settings."""
    if {"--help", "-h"} & {*arguments}:
        print(f"{about}\n{kind.settings_help()}")
        return
    config = kind.parse([x for x in arguments if not x.startswith("--local_rank=")])
    import torch.distributed as dist

    from ringflash.training.parallel import ParallelConfig
    from ringflash.training.world import join

    world = join(ParallelConfig(layout="zigzag"))
    run(config, world)  # after an error the group stays: by its store, the rank that failed first reports
    world.watchdog.close()
    dist.destroy_process_group()


def start(main: Callable[[list[str]], None]) -> None:
    """Run a command's main as a program, whose errors are one line each."""
    with failure.one_line(os.getppid()):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # there is nothing to resume
        main(sys.argv[1:])


def load_model(config: ReadConfig, device: torch.device) -> PreTrainedModel:
    """The model for generating, with fused layers on a GPU.

    Raises ConfigError, naming the command's setting, if it cannot be loaded or cannot run on the ring.
    """
    from transformers.utils.logging import disable_progress_bar

    from ringflash.models import AttentionConfig, FusedConfig, ModelConfig, attention_kernels, build_model, fuse_layers
    from ringflash.models.lora import ROPE, LoraConfig, merge, read_fields

    disable_progress_bar()
    _check_folder("model", config.model)
    try:
        base = _base_of(config)
        adapter = None if base is None else config.model
        settings = ModelConfig(
            path=base or config.model,
            rope_parameters={} if adapter is None else read_fields(adapter).get(ROPE) or {},
            lora=LoraConfig(path=adapter),
            dtype=config.dtype,
            untested_family=config.untested_family,
            rope_length=config.rope_length,
        )
        attention = AttentionConfig(kernel=config.kernel)
        model = build_model(settings).eval()
        if adapter is not None:
            merge(model, adapter)
        attention_kernels(settings, attention, model.config, device)
    except ConfigError as error:
        raise ConfigError(_in_own_settings(config, str(error))) from error
    fuse_layers(model.to(device), FusedConfig(), device)  # type: ignore[arg-type]
    return model


def _check_folder(name: str, folder: str) -> None:
    if not os.path.isdir(folder):  # pathlib raises for a name that is too long
        raise ConfigError(
            f"{name}={folder} is not a folder that exists: it must be a Hugging Face model folder{hub_hint(folder)}"
        )


def _base_of(config: ReadConfig) -> str | None:
    """The folder of the model that an adapter was trained on; None if model=... is no adapter."""
    from ringflash.models.lora import BASE, is_adapter, read_fields

    if not is_adapter(config.model):
        if config.base is not None:
            raise ConfigError(f"base={config.base} is of an adapter, and model={config.model} is none: leave base out")
        return None
    if config.base is not None:
        _check_folder("base", config.base)
        return config.base
    found = str(read_fields(config.model).get(BASE))
    if not os.path.isdir(found):
        raise ConfigError(
            f"model={config.model} is an adapter of {BASE}={found[:200]}, which is not a folder that exists: "
            f"base=FOLDER names it{hub_hint(found)}"
        )
    return found


def _in_own_settings(config: ReadConfig, message: str) -> str:
    """A message about the trainer's settings, with those of this command instead."""
    from ringflash.models.lora import is_adapter

    message = message.replace("model.lora needs", f"model={config.model} is an adapter, and needs")
    message = message.replace("model.path=", "base=" if is_adapter(config.model) else "model=")
    message = message.replace("model.lora.path=", "model=").replace("attention.kernel=", "kernel=")
    for name in ("dtype", "rope_length", "untested"):
        message = message.replace(f"model.{name}", name)
    return message


def load_encoder(config: ReadConfig, model: PreTrainedModel) -> tuple[Encoder, Any]:
    """The encoder of texts, and the tokenizer, which decodes. Raises ConfigError if it does not fit the model."""
    from ringflash.data.tokenizer import encoder, load_tokenizer, tokenizer_size

    name = config.tokenizer or _tokenizer_folder(config)
    try:
        tokenizer = load_tokenizer(name)
        found = encoder(tokenizer, name)
    except ConfigError as error:
        message = str(error).replace("data.tokenizer=", "tokenizer=" if config.tokenizer else "model=")
        raise ConfigError(message + ("" if config.tokenizer else "; tokenizer=FOLDER names another")) from error
    if (size := tokenizer_size(tokenizer)) > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer={name} does not fit model={config.model}: it has {size} tokens, and the model "
            f"vocab_size={model.config.vocab_size}"
        )
    return found, tokenizer


def _tokenizer_folder(config: ReadConfig) -> str:
    """The model's folder; of an adapter without a tokenizer, that of its model."""
    own = os.path.isfile(os.path.join(config.model, "tokenizer_config.json"))
    return config.model if own else _base_of(config) or config.model


def make_cache(config: ReadConfig, model: PreTrainedModel, capacity: int, world: World, what: str) -> RingCache:
    """A cache of `capacity` tokens, shared by all ranks. what: its contents, for error messages.

    Raises ConfigError for a chunk or a length that it cannot have, and if positions or memory do not suffice.
    """
    from ringflash.models import RingCache

    try:
        cache = RingCache(
            model, capacity, ring=world.ring, chunk=config.chunk, kernel=config.kernel, rope_length=capacity
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not config.extrapolate_positions:
        check_positions(what, capacity, model.config, "extrapolate_positions")
    check_room(what, cache, world)
    return cache


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done its work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def report(world: World, line: str) -> None:
    """Print a line on rank 0's standard error."""
    if world.is_first:
        sys.stdout.flush()
        print(f"ringflash: {line}", file=sys.stderr, flush=True)
