"""A process whose Triton kernels are interpreted, for tests of kernels on the CPU.

Triton decides when it is imported whether kernels are compiled or interpreted. This module imports nothing that would
import it, so the new process can set the variable first.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any


@contextmanager
def interpreting() -> Iterator[Callable[..., Any]]:
    """A function that calls module.name(*args) in the interpreting process, and returns what that returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start) as pool:
        yield lambda module, name, *args: pool.submit(_call, module, name, *args).result()


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def _call(module: str, name: str, *args: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*args)
