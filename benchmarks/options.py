"""Shared by the benchmarks of attention: options, numbers written as 64k, free memory."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks.report import RESULTS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SUFFIXES = {"k": 2**10, "M": 2**20}


def shared_parser(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """A parser with the shared options. seconds: the default of --seconds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the inputs (default: bf16 on a GPU, fp32 on the CPU)")
    parser.add_argument("--seconds", type=float, default=seconds, help="measured per figure (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and plot")
    parser.add_argument("--commit", help="recorded in the report if the checkout has no .git")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options, with a dtype. Ends with one line for a GPU that is not there."""
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu works anywhere")
    options.dtype = options.dtype or ("bf16" if options.device == "cuda" else "fp32")
    return options


def whole_number(text: str) -> int:
    """A number, in thousands or millions of 1024 if it ends in k or M. Raises ValueError for other text.

    >>> whole_number("64k"), whole_number("1M"), whole_number("1000")
    (65536, 1048576, 1000)
    """
    return int(text.rstrip("kM")) * SUFFIXES.get(text[-1:], 1)


def shortened(number: int) -> str:
    """A number as `whole_number` reads it.

    >>> shortened(65536), shortened(1048576), shortened(1000)
    ('64k', '1M', '1000')
    """
    units = [(name, size) for name, size in SUFFIXES.items() if number >= size and number % size == 0]
    name, size = units[-1] if units else ("", 1)
    return f"{number // size}{name}"


def free_bytes(device: torch.device) -> int:
    """Free memory of the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
