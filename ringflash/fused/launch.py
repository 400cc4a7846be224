"""Shared by the launches of fused kernels: devices, the division of rows among programs, contiguous inputs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ringflash.kernels.portable_parts import sm_count

TILE = 2048  # elements of a program's tile: 16 per thread of four warps
LARGEST_ROW = 32768  # elements of a row that one program holds in registers
PROGRAMS_PER_SM = 8  # of the kernels that add a weight's gradient up over many tiles


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), fp32."""
    return 1.0 / (1.0 + tl.exp(-x))


INTERPRETED = not isinstance(sigmoid, triton.JITFunction)  # Triton decides it when it is imported


def refusal(device: torch.device) -> str | None:
    """None, or why the kernels cannot run on a device: the tail of "... needs ..."."""
    if device.type == "cuda" or INTERPRETED:
        return None
    return f"needs a GPU, or TRITON_INTERPRET=1 on the CPU, got device {device}"


def tile_of(width: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a program's tile, for rows of `width` elements; columns are a power of two."""
    columns = triton.next_power_of_2(width)
    if columns > LARGEST_ROW:
        raise ValueError(f"rows of {width} elements are longer than the {LARGEST_ROW} that a fused kernel holds")
    return max(1, TILE // columns), columns, 4 if columns <= 2 * TILE else min(32, columns // 512)


def programs_for(tiles: int, device: torch.device, groups: int = 1) -> int:
    """The number of programs that share the `tiles` tiles of each of some groups, each with its own partial sums."""
    return min(tiles, 4 if INTERPRETED else max(1, sm_count(device) * PROGRAMS_PER_SM // groups))


def dense(x: Tensor | None) -> Tensor | None:
    """x, contiguous."""
    return x if x is None else x.contiguous()
