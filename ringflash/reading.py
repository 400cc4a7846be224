"""Reading long text: the text of a file, its tokens, and room for a cache of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ringflash.errors import ConfigError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ringflash.data.tokenizer import Encoder
    from ringflash.models import RingCache
    from ringflash.training.world import World

STDIN = "-"


def text_of(name: str, path: str) -> str:
    """The text of a file, or of standard input (-). Raises ConfigError, with `name`, if it is empty or not UTF-8."""
    where = "standard input" if path == STDIN else f"{name}={path}"
    try:
        held = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
        text = held.decode()
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{where} is not text in UTF-8: byte {error.start} is {byte:#04x}") from error
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or reason(error)}") from error
    if not text.strip():
        raise ConfigError(f"{where} {'holds white space alone' if text else 'is empty'}")
    return text


def ids_of(encoder: Encoder, text: str) -> list[int]:
    """Tokens of a text, nothing added."""
    return encoder.ids([text])[0].tolist()


def check_positions(what: str, tokens: int, config: PreTrainedConfig, setting: str) -> None:
    """Raise ConfigError for more tokens than a model has positions. what: they are; setting: allows more positions."""
    from ringflash.models.rope import supported_positions

    known = supported_positions(config)
    if known is not None and tokens > known:
        raise ConfigError(
            f"{what} are {tokens} positions, more than the {known} that the model supports: shorten them, or allow it "
            f"by {setting}=true"
        )


def check_room(what: str, cache: RingCache, world: World) -> None:
    """Raise ConfigError, on every rank, if the memory of any does not suffice for a cache. what: it is for."""
    import torch

    if world.device.type == "cuda":
        unused = torch.cuda.memory_reserved(world.device) - torch.cuda.memory_allocated(world.device)
        free = torch.cuda.mem_get_info(world.device)[0] + unused
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lacking = world.max(torch.tensor([cache.nbytes - free], dtype=torch.int64, device=world.device)).item()
    if lacking > 0:
        raise ConfigError(
            f"{what} need a cache of {cache.nbytes / 2**30:.2f} GiB on each rank, {lacking / 2**30:.2f} GiB more than "
            f"a rank has free: take more ranks, or fewer tokens"
        )
