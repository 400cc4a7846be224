"""Decoding on one device: a new token's attention over its KV cache, beside torch's SDPA, in one run.

    python benchmarks/decode.py --device cpu --cases 2,4,2,1k,64   # any machine, seconds: does it work here
    python benchmarks/decode.py                                    # a GPU, all cases, under 3 minutes
    python benchmarks/decode.py --cases 1,28,4,64k,128 --sweep     # tiles and splits of the Triton kernel, best first

A case is `B,Hq,Hkv,C,D`: batch rows, query and KV heads, keys of each row, head size. A figure is of one layer and one
new token per row. The cache is read once, so time is compared with a copy of 2 GiB, measured in the same run: `% copy`
is bytes of keys and values per second over bytes read and written per second by the copy.

Results are checked before they are timed, against float64: all heads at up to 2048 keys, then one KV head at full size.
The error may be at most twice that of plain torch attention in the same dtype. A kernel that is wrong is not timed, and
the exit code is 1. On a GPU each kernel is a CUDA graph, so that the host's launches are not measured. Kernels take
turns (benchmarks/timing.py); a figure is the median. The last line printed is the table as JSON.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report, timing
from ringflash import flash_decode

GPU_CASES = [f"{b},32,8,{c},128" for c in ("1k", "8k", "64k", "256k") for b in (1, 8)]
CPU_CASES = ["2,4,2,1k,64"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKED_LENGTH = 2048
COPIED = 2**31  # bytes


@dataclass(frozen=True)
class Case:
    """Batch rows, query heads, KV heads, keys of each row, head size."""

    batch: int
    heads: int
    kv_heads: int
    keys: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """A case of its text. Raises ValueError for another form."""
        try:
            numbers = [int(x[:-1]) * 1024 if x.endswith("k") else int(x) for x in text.split(",")]
            case = cls(*numbers)
        except (TypeError, ValueError):
            raise ValueError(f"{text} is not B,Hq,Hkv,C,D, such as 1,32,8,64k,128") from None
        if min(numbers) < 1 or case.heads % case.kv_heads:
            raise ValueError(f"{text} must have numbers of 1 or more, and Hq a multiple of Hkv")
        return case

    def __str__(self) -> str:
        keys = f"{self.keys // 1024}k" if self.keys % 1024 == 0 else str(self.keys)
        return f"{self.batch},{self.heads},{self.kv_heads},{keys},{self.dim}"

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values."""
        return 2 * self.batch * self.keys * self.kv_heads * self.dim * dtype.itemsize

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """q, k, v and end; keys and values have a mean, as those of models do."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((1, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
        q, k, v = (
            torch.randn(self.batch, *shape, self.dim, generator=generator, device=device, dtype=dtype).add_(mean)
            for shape, mean in zip(shapes, (0.0, 1.0, 0.5), strict=True)
        )
        return q, k, v, torch.full((1, 1), self.keys, dtype=torch.int32, device=device)


Decode = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
    """torch's, by its own choice of backend."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, in the dtype of its inputs."""
    k, v = (x.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (k, v))
    weights = torch.softmax(q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2)


def error(decode: Decode, case: Case, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """The largest relative error over its bound, and the error: of a small version, and of one head at full size."""
    worst = (0.0, 0.0)
    small = Case(case.batch, case.heads, case.kv_heads, min(case.keys, CHECKED_LENGTH), case.dim)
    for version, heads in ((small, slice(None)), (case, slice(0, 1))):
        q, k, v, end = version.inputs(dtype, device)
        q_heads = slice(None) if heads.stop is None else slice(0, case.heads // case.kv_heads)
        batch = slice(None) if version is small else slice(0, 1)
        some = q[batch, :, q_heads], k[batch, :, heads], v[batch, :, heads]
        truth = plain(*(x.double() for x in some))
        found, direct = decode(q, k, v, end)[batch, :, q_heads].double(), plain(*some).double()
        distance, bound = ((x - truth).norm() / truth.norm() for x in (found, direct))
        allowed = 1e-5 if dtype == torch.float32 else 2 * float(bound) + 1e-4
        at = float(distance) if torch.isfinite(found).all() else float("inf")
        worst = max(worst, (at / allowed, at))
    return worst


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes per second that a copy reads and writes."""
    count = COPIED if device.type == "cuda" else COPIED // 32
    source, target = torch.empty(2, count, dtype=torch.uint8, device=device)
    took = timing.interleaved({"copy": functools.partial(target.copy_, source)}, device, seconds)["copy"]
    if isinstance(took, Exception):
        raise took
    return 2 * count / took.ms * 1e3


def measure(
    case: Case, kernels: dict[str, Decode], dtype: torch.dtype, device: torch.device, seconds: float, copied: float
) -> list[dict[str, Any]]:
    """A row per kernel: time, tokens/s, share of the copy rate, error; or what is wrong with it."""
    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], object]] = {}
    inputs = case.inputs(dtype, device)
    for name, decode in kernels.items():
        row: dict[str, Any] = {"case": str(case), "kernel": name}
        try:
            over, row["error"] = error(decode, case, dtype, device)
            if over > 1:
                row["wrong"] = f"error {row['error']:.1e} is {over:.1f} times its bound"
            else:
                run: Callable[[], object] = functools.partial(decode, *inputs)
                if device.type == "cuda":
                    with timing.side_stream(device) as stream:
                        run = timing.Graph.of(run, stream)
                runs[name] = run
        except Exception as failure:
            row["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        rows.append(row)
    found = timing.interleaved(runs, device, seconds) if runs else {}
    for row in rows:
        took = found.get(row["kernel"])
        if isinstance(took, Exception):
            row["failed"] = f"{type(took).__name__}: {took}".splitlines()[0][:200]
        elif took is not None:
            rate = case.nbytes(dtype) / took.ms * 1e3
            row |= {"us": 1e3 * took.ms, "tokens_per_second": 1e3 * case.batch / took.ms, "gb_per_second": rate / 1e9}
            row["percent_of_copy"] = 100 * rate / copied
    return rows


def tunings() -> dict[str, Decode]:
    """The Triton kernel under other tiles and splits than its table's."""
    from ringflash.kernels import portable_decode
    from ringflash.kernels.portable_parts import Tuning

    def under(tuning: Tuning, programs: int) -> Decode:
        def decode(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
            with (
                mock.patch.object(portable_decode, "tuning_for", return_value=tuning),
                mock.patch.object(portable_decode, "PROGRAMS_PER_SM", programs),
            ):
                return flash_decode(q, k, v, end)

        return decode

    return {
        f"{block_k} keys, {stages} stages, {warps} warps, {programs} per SM": under(
            Tuning(16, block_k, warps, stages, tma=False), programs
        )
        for block_k, stages, warps, programs in itertools.product((32, 64, 128), (2, 3, 4), (4, 8), (1, 2, 3, 4))
        if block_k * stages <= 384 and (block_k, warps) != (32, 8)
    }


def table(rows: list[dict]) -> str:
    """Aligned, a line per row."""
    lines = [f"{'B,Hq,Hkv,C,D':<20} {'kernel':<42} {'us':>9} {'tokens/s':>10} {'GB/s':>7} {'% copy':>7} {'error':>8}"]
    for row in rows:
        if "us" in row:
            figures = (
                f"{row['us']:>9.1f} {row['tokens_per_second']:>10.0f} {row['gb_per_second']:>7.0f} "
                f"{row['percent_of_copy']:>7.1f} {row['error']:>8.1e}"
            )
        else:
            figures = row.get("wrong") or row.get("failed", "")
        lines.append(f"{row['case']:<20} {row['kernel']:<42} {figures}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Returns the exit code: 1 if a kernel is wrong, or ours raises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the inputs (default: bf16 on a GPU, fp32 on the CPU)")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="B,Hq,Hkv,C,D (default: all)")
    parser.add_argument("--seconds", type=float, default=0.3, help="measured per figure (%(default)s)")
    parser.add_argument("--sweep", action="store_true", help="tiles and splits of the Triton kernel, best first")
    parser.add_argument("--commit", help="recorded in the report if the checkout has no .git")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu works anywhere")
    if options.sweep and options.device == "cpu":
        parser.error("--sweep times Triton kernels and needs --device cuda")
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    try:
        chosen = [Case.parse(x) for x in options.cases or (GPU_CASES if device.type == "cuda" else CPU_CASES)]
    except ValueError as wrong:
        parser.error(f"--cases: {wrong}")
    copied = copy_rate(device, options.seconds)
    facts = report.card(device, {}, options.commit) | {"copy": f"{copied / 1e9:.0f} GB/s", "inputs": str(dtype)}
    print("; ".join(f"{name} {value}" for name, value in facts.items()), flush=True)
    kernels: dict[str, Decode] = {"ringflash": flash_decode, "torch SDPA": sdpa}
    if options.sweep:
        kernels = tunings()
    rows: list[dict[str, Any]] = []
    for case in chosen:
        found = measure(case, kernels, dtype, device, options.seconds, copied)
        if options.sweep:
            found.sort(key=lambda row: row.get("us", float("inf")))
        print(table(found), flush=True)
        rows += found
        if device.type == "cuda":
            torch.cuda.empty_cache()
    ours = [row for row in rows if row["kernel"] != "torch SDPA"]
    print(json.dumps({"benchmark": "decode", "card": facts, "rows": rows}))
    return int(any("wrong" in row for row in rows) or (not options.sweep and any("failed" in row for row in ours)))


if __name__ == "__main__":
    sys.exit(main())
