"""Cases: the shapes and masks of benchmarks, with names of the form `B,Hq,Hkv,S,D mask`.

>>> case = Case.parse("1,32,8,32k,128 window 4096")
>>> case.length, case.mask().area()
(32768, 125831168)
>>> str(case.shrunk(2048))
'1,32,8,2k,128 window 256'
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.options import shortened, whole_number
from ringflash import IntervalMask

KINDS = ("causal", "full", "window", "packed")
PACKED_LENGTHS = (1024, 32768)  # tokens of a document, the shortest and the longest, where 128k tokens are packed
PACKED_WHOLE = 131072
ROW_PATTERN = re.compile(r"(\d+),(\d+),(\d+),(\d+[kM]?),(\d+) (\w+)(?: (\d+))?")


@dataclass(frozen=True)
class Case:
    """One shape and mask. window: keys that a query sees, including its own; 0 if the kind is not "window".

    "packed" is causal within documents. Their lengths are lognormal, from 1k to 32k for 128k tokens and in proportion
    for fewer, drawn from a fixed seed.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    kind: str
    window: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"mask {self.kind} is not one of {', '.join(KINDS)}")
        if (self.kind == "window") != (self.window > 0):
            raise ValueError(f"a window case, and no other, has a size (`window 4096`), got {self.kind} {self.window}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide among {self.kv_heads} KV heads")

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case with this name. Raises ValueError, which shows the form of a name, for other text."""
        match = ROW_PATTERN.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{text!r} is not B,Hq,Hkv,S,D mask, such as '1,32,8,32k,128 causal'")
        batch, heads, kv_heads, length, head_dim, kind, window = match.groups()
        return cls(int(batch), int(heads), int(kv_heads), whole_number(length), int(head_dim), kind, int(window or 0))

    def __str__(self) -> str:
        shape = f"{self.batch},{self.heads},{self.kv_heads},{shortened(self.length)},{self.head_dim}"
        return f"{shape} {self.kind}" + (f" {self.window}" if self.window else "")

    def shrunk(self, length: int) -> Case:
        """The case with at most this length and two batch rows, and a window in proportion."""
        length = min(length, self.length)
        window = max(1, self.window * length // self.length) if self.window else 0
        return replace(self, batch=min(2, self.batch), length=length, window=window)

    def documents(self) -> list[int]:
        """The lengths of the packed documents, in order; other kinds have one document."""
        return list(_documents(self.length)) if self.kind == "packed" else [self.length]

    def mask(self) -> IntervalMask:
        """The mask, the same in all batch rows."""
        if self.kind == "full":
            return IntervalMask.full(self.length)
        if self.kind == "window":
            return IntervalMask.window(self.length, left=self.window - 1)
        causal = IntervalMask.causal(self.length)
        return causal & IntervalMask.documents(self.documents()) if self.kind == "packed" else causal

    def head_pairs(self) -> int:
        """Visible (query, key) pairs over all query heads and the batch."""
        return self.mask().area() * self.batch * self.heads

    def flops(self, direction: str) -> float:
        """FLOPs, counted exactly: 4 D per pair and head in the forward, 2.5 times that in the backward."""
        return 4.0 * self.head_pairs() * self.head_dim * {"forward": 1.0, "backward": 2.5}[direction]

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Random q, k, v and dout, [B, S, H, D]; q, k and v require gradients."""
        torch.manual_seed(0)
        heads = (self.heads, self.kv_heads, self.kv_heads, self.heads)
        q, k, v, dout = (
            torch.randn(self.batch, self.length, h, self.head_dim, dtype=dtype, device=device) for h in heads
        )
        return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


GPU_CASES = tuple(
    Case.parse(row)
    for row in (
        "4,32,8,8k,128 causal",
        "1,32,8,32k,128 causal",
        "1,32,8,32k,128 full",
        "1,16,16,32k,128 causal",
        "1,32,8,32k,64 causal",
        "1,32,8,128k,128 causal",
        "1,32,8,128k,128 packed",
        "1,32,8,32k,128 window 4096",
    )
)
GPU_QUICK = (GPU_CASES[1], GPU_CASES[4])
CPU_CASES = tuple(
    Case.parse(row)
    for row in ("1,8,2,2k,64 causal", "1,8,2,2k,64 full", "1,8,2,2k,64 packed", "1,8,2,2k,64 window 256")
)
CPU_QUICK = (Case.parse("1,4,2,512,64 causal"), Case.parse("1,4,2,512,64 packed"))


def selected(wanted: list[str], among: tuple[Case, ...]) -> list[Case]:
    """The listed cases whose name contains an entry of `wanted`, and new cases that it names; all if it is empty.

    Raises ValueError, with the listed names, for an entry that is neither.
    """
    if not wanted:
        return list(among)
    cases = []
    for text in wanted:
        named = [case for case in among if text in str(case)]
        try:
            cases += named or [Case.parse(text)]
        except ValueError as error:
            raise ValueError(f"--cases: {error}; or part of one of: {'; '.join(map(str, among))}") from None
    return list(dict.fromkeys(cases))


@functools.cache
def _documents(length: int) -> tuple[int, ...]:
    shortest, longest = (max(1, tokens * length // PACKED_WHOLE) for tokens in PACKED_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        middle = (shortest * longest) ** 0.5
        drawn = int(middle * torch.randn((), generator=generator).exp().item())
        lengths.append(min(left, max(shortest, min(longest, drawn))))
    return tuple(lengths)
