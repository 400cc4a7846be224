"""The contenders: every kernel of ringflash, and the libraries that people would use instead.

All are given the same q, k, v [B, S, H, D] in the same memory and return the same form. A contender that takes [B, H,
S, D] is given a transposed view, so no copies are timed. Everything that is prepared once per step is made before the
clock starts: AttentionPlan, FlexAttention's BlockMask, the offsets of documents.

| name | what runs |
|---|---|
| ringflash NAME | `ring_attention(..., kernel=NAME)` on a ring of one: `flash_attention` with the plan made before |
| ringflash deterministic | the same with kernel="hopper" and deterministic=True |
| other NAME | the same of another checkout: `git worktree add ../other REVISION`, then `--against ../other` |
| torch FA2 | SDPA, FLASH_ATTENTION, enable_gqa; windows and documents through its operator, which SDPA lacks |
| torch cuDNN | SDPA, CUDNN_ATTENTION, enable_gqa; has neither windows nor documents |
| FlexAttention | torch.compile, static shapes, default options, enable_gqa, a BlockMask of 128 x 128 |
| FA4-CuTe | flash_attn.cute, from the package flash-attn-4 |
| torch flash, torch math | SDPA on the CPU; windows and documents as a dense boolean mask |
"""

from __future__ import annotations

import atexit
import functools
import importlib
import itertools
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask

import ringflash
from benchmarks.cases import Case
from benchmarks.checks import Attention
from ringflash import IntervalMask, kernels

BASELINE = {"cuda": "torch cuDNN", "cpu": "torch flash"}  # what the table's ratios are to
FLEX_BLOCK = 128
PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")


class Absent(Exception):  # noqa: N818  # not an error: a contender that does not take part, and why
    """Why a contender is not timed."""


@dataclass(frozen=True)
class Contender:
    """A contender's name and build(case, q, k), which returns the timed function for such q and k or raises Absent.

    Of decoding, it is build(q, k, v).
    """

    name: str
    build: Callable[..., Attention]
    ours: bool = False


def asked(entrants: list[Contender], only: list[str]) -> list[Contender]:
    """The contenders of whose names --only gives a part, or all. Ends with one line if there are none."""
    found = [entrant for entrant in entrants if not only or any(part in entrant.name for part in only)]
    if not found:
        sys.exit(f"--only {' '.join(only)} is part of none of: {', '.join(x.name for x in entrants)}")
    return found


def contenders(device: torch.device, other: ModuleType | None = None) -> list[Contender]:
    """All contenders, ours first, fastest first. other: another version of ringflash, from `imported`."""
    ours = [
        Contender(f"ringflash {name}", functools.partial(_ringflash, name), ours=True) for name in kernels.FASTEST_FIRST
    ]
    bit_equal = functools.partial(_ringflash, "hopper", deterministic=True)  # the other kernels always are
    ours.append(Contender("ringflash deterministic", bit_equal, ours=True))
    if other is not None:
        ours += [
            Contender(f"other {name}", functools.partial(_ringflash, name, package=other))
            for name in kernels.FASTEST_FIRST
        ]
    gpu = [
        Contender("torch FA2", _fa2),
        Contender("torch cuDNN", _cudnn),
        Contender("FlexAttention", _flex),
        Contender("FA4-CuTe", _fa4),
    ]
    if device.type == "cuda":
        return ours + gpu
    cpu = [
        Contender("torch flash", functools.partial(_cpu_sdpa, SDPBackend.FLASH_ATTENTION)),
        Contender("torch math", functools.partial(_cpu_sdpa, SDPBackend.MATH)),
    ]
    return ours + cpu + [Contender(peer.name, needs_gpu) for peer in gpu]


# -- ours


def _ringflash(
    name: str, case: Case, q: Tensor, k: Tensor, deterministic: bool = False, package: ModuleType = ringflash
) -> Attention:
    if name == "blocked" and q.is_cuda:
        raise Absent("plain torch for CPUs; it would take minutes here")
    try:
        package.kernels.select(q, k, None, name)
    except (ValueError, ImportError) as error:
        raise Absent(str(error)) from error
    if name != "blocked" and not q.is_cuda:
        raise Absent("runs here only in Triton's interpreter, which tells nothing of its speed")
    mask = package.IntervalMask(case.mask().lo, case.mask().hi, case.length)
    plan = package.AttentionPlan(mask, package.Layout.contiguous(case.length, 1), package.Loopback(1, q.device))
    return lambda q, k, v: package.ring_attention(q, k, v, plan, kernel=name, deterministic=deterministic)


def imported(checkout: Path) -> ModuleType:
    """The ringflash of another checkout: a copy of its files in which the package is called ringflash_other."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)  # not earlier: kernels are compiled from source when they are first called
    shutil.copytree(checkout / "ringflash", folder / "ringflash_other", ignore=shutil.ignore_patterns("__pycache__"))
    for file in folder.rglob("*.py"):
        file.write_text(re.sub(r"\bringflash\b", "ringflash_other", file.read_text()))
    sys.path.insert(0, str(folder))
    other = importlib.import_module("ringflash_other")
    importlib.import_module("ringflash_other.kernels")
    return other


# -- torch


def _sdpa(backend: SDPBackend, causal: bool, visible: Tensor | None = None) -> Attention:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = torch.nn.functional.scaled_dot_product_attention(
                *by_head(q, k, v), visible, is_causal=causal, enable_gqa=True
            )
        return out.transpose(1, 2)

    return attention


def _fa2(case: Case, q: Tensor, k: Tensor) -> Attention:
    if case.kind in ("causal", "full"):
        return _sdpa(SDPBackend.FLASH_ATTENTION, case.kind == "causal")
    operator = torch.ops.aten._flash_attention_forward
    if case.kind == "window":
        window = {"window_size_left": case.window - 1, "window_size_right": 0}
        return lambda q, k, v: operator(
            q, k, v, None, None, case.length, case.length, 0.0, True, False, **window
        )[0]  # fmt: skip
    offsets, longest = _offsets(case, q.device)
    return _without_batch(
        case, lambda q, k, v: operator(q, k, v, offsets, offsets, longest, longest, 0.0, True, False)[0]
    )


def _cudnn(case: Case, q: Tensor, k: Tensor) -> Attention:
    if case.kind not in ("causal", "full"):
        raise Absent(f"SDPA gives its cuDNN backend no {case.kind} mask")
    return _sdpa(SDPBackend.CUDNN_ATTENTION, case.kind == "causal")


def _cpu_sdpa(backend: SDPBackend, case: Case, q: Tensor, k: Tensor) -> Attention:
    if case.kind in ("causal", "full"):
        return _sdpa(backend, case.kind == "causal")
    return _sdpa(backend, False, case.mask().dense()[:, None])


def _flex(case: Case, q: Tensor, k: Tensor) -> Attention:
    from torch._functorch import config as functorch

    functorch.donated_buffer = False  # otherwise a compiled backward can run only once
    return flex(None if case.kind == "full" else block_mask(case, q.device))


def flex(blocks: BlockMask | None) -> Attention:
    """FlexAttention with a block mask, compiled for the shape of its first call."""
    from torch import _dynamo
    from torch.nn.attention.flex_attention import flex_attention

    _dynamo.reset()  # every case is compiled for its shape; the limit on recompilations counts them together
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*by_head(q, k, v), block_mask=blocks, enable_gqa=True).transpose(1, 2)


def block_mask(case: Case, device: torch.device) -> BlockMask:
    """The result of create_block_mask, computed from the case's intervals without the dense mask."""
    some, every = _block_kinds(case.mask())
    lists = [_listed(x, device) for x in (some & ~every, every)]
    return BlockMask.from_kv_blocks(
        *lists[0], *lists[1], BLOCK_SIZE=FLEX_BLOCK, mask_mod=_mask_mod(case, device),
        seq_lengths=(case.length, case.length),
    )  # fmt: skip


def _block_kinds(mask: IntervalMask) -> tuple[Tensor, Tensor]:
    """Which blocks have any visible pair, and which have only visible pairs: booleans [query blocks, key blocks]."""
    first = torch.arange(0, mask.queries, FLEX_BLOCK)
    last = (first + FLEX_BLOCK).clamp(max=mask.queries) - 1
    lo, hi = mask.lo[0], mask.hi[0]
    begin = torch.arange(0, mask.keys, FLEX_BLOCK)
    end = begin + FLEX_BLOCK
    some = (lo[first, None] < end) & (begin < hi[last, None])
    complete = (first + FLEX_BLOCK <= mask.queries)[:, None]
    return some, (lo[last, None] <= begin) & (end <= hi[first, None]) & complete


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of key blocks per query block, int32 [1, 1, n], and all key blocks, these first, [1, 1, n, m]."""
    counts = blocks.sum(-1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
    return counts[None, None].to(device), indices[None, None].to(device)


def _mask_mod(case: Case, device: torch.device) -> Callable[..., Tensor]:
    if case.kind == "window":
        reach = case.window
        return lambda b, h, q, k: (q >= k) & (q - k < reach)
    if case.kind == "packed":
        lengths = torch.tensor(case.documents())
        document = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
        return lambda b, h, q, k: (q >= k) & (document[q] == document[k])
    return lambda b, h, q, k: q >= k


# -- FlashAttention 4


def _fa4(case: Case, q: Tensor, k: Tensor) -> Attention:
    peer = imported_peer("flash_attn.cute.interface")
    if case.kind == "packed":
        offsets, longest = _offsets(case, q.device)
        options = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "max_seqlen_q": longest, "max_seqlen_k": longest}
        packed = functools.partial(peer.flash_attn_varlen_func, causal=True, **options)
        return _without_batch(case, lambda q, k, v: first_of(packed(q, k, v)))
    window = (case.window - 1, 0) if case.kind == "window" else (None, None)
    causal = case.kind == "causal"
    return lambda q, k, v: first_of(peer.flash_attn_func(q, k, v, causal=causal, window_size=window))


# -- shared with the contenders of decoding


def imported_peer(name: str) -> ModuleType:
    """A peer's module. Raises Absent with the reason if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a half-installed one raises more than ImportError
        raise Absent(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


def needs_gpu(*request: Case | Tensor) -> Attention:
    """Refuse to build a contender on the CPU."""
    raise Absent("needs an NVIDIA GPU")


def by_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, S, D] of tensors [B, S, H, D]."""
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def first_of(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """out, of a function that may also return lse."""
    return result[0] if isinstance(result, tuple) else result


# -- packed documents


def _offsets(case: Case, device: torch.device) -> tuple[Tensor, int]:
    """cu_seqlens over all batch rows, int32, and the length of the longest document."""
    lengths = case.documents() * case.batch
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    return offsets, max(lengths)


def _without_batch(case: Case, attention: Attention) -> Attention:
    """Attention on [B, S, H, D], from a function on [B * S, H, D]."""
    return lambda q, k, v: attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)).unflatten(
        0, (case.batch, case.length)
    )
