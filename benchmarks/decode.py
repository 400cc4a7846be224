"""Decoding on one device: a new token's attention over its KV cache, in ringflash and other libraries, in one run.

    python benchmarks/decode.py --device cpu                       # any machine, seconds: does it work here
    python benchmarks/decode.py                                    # a GPU, all cases
    python benchmarks/decode.py --cases 1,32,8,64k,128 --only ringflash SDPA
    python benchmarks/decode.py --cases 1,28,4,64k,128 --sweep     # tiles and splits of the Triton kernel, best first

A case is `B,Hq,Hkv,C,D`: batch rows, query and KV heads, keys per row, head size. Figures are for one layer and one new
token per row. benchmarks/decode_contenders.py lists the contenders. The table gives the reason for each one that is not
timed, and for a case that does not fit in memory. A peer that has compiled for a minute in total is left out of later
cases, so that a run ends.

The cache is read once, so time is compared with a copy of 2 GiB, measured in the same run: `% copy` is bytes of keys
and values per second, relative to the bytes that the copy reads and writes per second. In a model, the caches of other
layers evict a layer's own from L2. So on a GPU, a run reads several caches, 256 MiB in total, and the figure is the
time per cache. Each run is a CUDA graph, so that the host's launches are not measured.

Results are checked before they are timed, against float64, for all heads at full size. The error may be at most twice
that of plain torch attention in the same dtype. A kernel with wrong results is not timed, and the exit code is 1, as it
is if ringflash raises. Kernels take turns (benchmarks/timing.py), and a figure is the median.

After every case, decode-DEVICE.json is written to the folder --out (benchmarks/results), and its picture at the end.
The last line printed is the summary in JSON: % copy, or the reason why there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import checks, decode_contenders, report, timing
from benchmarks.checks import Attention, relative_error
from benchmarks.contenders import Absent, Contender, asked
from benchmarks.options import DTYPES, free_bytes, parse, shared_parser, shortened, whole_number
from benchmarks.timing import Timing

CONTEXTS = ("1k", "8k", "64k", "256k", "1M")
GPU_CASES = [f"{b},{h},{c},128" for h in ("32,8", "28,4") for c in CONTEXTS for b in (1, 8)]
CPU_CASES = ["2,4,2,1k,64"]
COPIED = 2**31  # bytes
COLD = 2**28  # bytes of caches that a run reads: several times any L2
MOST_LAYERS = 64
PATIENCE = 60.0  # seconds that a peer may compile, over all cases; later cases leave it out


@dataclass(frozen=True)
class Case:
    """Batch rows, query heads, KV heads, keys per row, head size."""

    batch: int
    heads: int
    kv_heads: int
    keys: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case with this name. Raises ValueError for another form."""
        try:
            numbers = [*map(whole_number, text.split(","))]
            case = cls(*numbers)
        except (TypeError, ValueError):
            raise ValueError(f"{text} is not B,Hq,Hkv,C,D, such as 1,32,8,64k,128") from None
        if min(numbers) < 1 or case.heads % case.kv_heads:
            raise ValueError(f"{text} must have numbers of 1 or more, and Hq a multiple of Hkv")
        return case

    def __str__(self) -> str:
        return f"{self.batch},{self.heads},{self.kv_heads},{shortened(self.keys)},{self.dim}"

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of keys and values."""
        return 2 * self.batch * self.keys * self.kv_heads * self.dim * dtype.itemsize

    def layers(self, dtype: torch.dtype, device: torch.device) -> int:
        """The number of caches that a run reads, one after another."""
        if device.type == "cpu":
            return 1
        return min(MOST_LAYERS, -(-COLD // self.nbytes(dtype)))

    def memory(self, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes that a run and its check need: all caches, and a head's keys, values and scores in float64."""
        head = 8 * self.keys * (2 * self.dim + 4 * self.heads // self.kv_heads)
        return self.layers(dtype, device) * self.nbytes(dtype) + head + 2**28

    def inputs(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [layers, B, S, H, D]. Keys and values have a mean, as in models."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = ((1, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads))
        count = self.layers(dtype, device)
        q, k, v = (
            torch.randn(count, self.batch, *shape, self.dim, generator=generator, device=device, dtype=dtype).add_(mean)
            for shape, mean in zip(shapes, (0.0, 1.0, 0.5), strict=True)
        )
        return q, k, v


@dataclass(frozen=True)
class Row:
    """One contender on one case. status: "timed", "absent" (it does not take part), "failed" (it raised) or "WRONG".

    reason: why it is not timed. timing: of one layer. error: relative, of the norm, against float64.
    """

    case: str
    kernel: str
    status: str
    reason: str | None = None
    timing: Timing | None = None
    tokens_per_second: float | None = None
    gb_per_second: float | None = None
    percent_of_copy: float | None = None
    error: float | None = None


def plain(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Plain attention in a dtype, one KV head of one batch row at a time: [B, 1, Hq, D]."""
    out = torch.empty_like(q, dtype=dtype)
    group = q.shape[2] // k.shape[2]
    for b, h in itertools.product(range(k.shape[0]), range(k.shape[2])):
        heads = slice(h * group, (h + 1) * group)
        keys, values = (x[b, :, h].to(dtype) for x in (k, v))
        weights = torch.softmax(q[b, 0, heads].to(dtype) @ keys.T * q.shape[-1] ** -0.5, dim=-1)
        out[b, 0, heads] = weights @ values
    return out


def copy_rate(device: torch.device, seconds: float) -> float:
    """Bytes per second that a copy reads and writes."""
    count = COPIED if device.type == "cuda" else COPIED // 32
    source, target = torch.empty(2, count, dtype=torch.uint8, device=device)
    took = timing.interleaved({"copy": functools.partial(target.copy_, source)}, device, seconds)["copy"]
    if isinstance(took, Exception):
        raise took
    return 2 * count / took.ms * 1e3


def measure(
    case: Case,
    entrants: Sequence[Contender],
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    copied: float,
    prepared: dict[str, float],
) -> list[Row]:
    """Check, then time, all entrants on a case. prepared: seconds of preparation per entrant, over all cases."""
    needed, free = case.memory(dtype, device), free_bytes(device)
    if needed > free:
        reason = f"needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
        return [Row(str(case), entrant.name, "absent", reason) for entrant in entrants]
    inputs = case.inputs(dtype, device)
    q, k, v = (x[0] for x in inputs)
    truth = plain(q, k, v, torch.float64)
    by_plain = relative_error(plain(q, k, v, dtype), truth)
    allowed = checks.FP32_BOUND if dtype == torch.float32 else 2 * by_plain + 1e-4
    rows: dict[str, Row] = {}
    errors: dict[str, float] = {}
    runs: dict[str, Callable[[], object]] = {}
    for entrant in entrants:
        name, begin = entrant.name, time.perf_counter()
        try:
            if (spent := prepared.get(name, 0.0)) > PATIENCE and not entrant.ours:
                raise Absent(f"it took {spent:.0f} s to compile in earlier cases; name this one alone (--cases)")
            decode = entrant.build(q, k, v)
            with checks.poisoned() if entrant.ours else contextlib.nullcontext():
                errors[name] = relative_error(decode(q, k, v), truth)
            if errors[name] > allowed:
                reason = f"error {errors[name]:.1e}, and {allowed:.1e} is allowed"
                rows[name] = Row(str(case), name, "WRONG", reason, error=errors[name])
            else:
                runs[name] = _all_layers(decode, inputs, device)
        except Absent as absent:
            rows[name] = Row(str(case), name, "absent", str(absent))
        except Exception as error:  # a peer may raise anything; the table shows the error
            rows[name] = Row(str(case), name, "failed", report.error_line(error))
        prepared[name] = prepared.get(name, 0.0) + time.perf_counter() - begin
    found = timing.interleaved(runs, device, seconds) if runs else {}
    for name, took in found.items():
        rows[name] = _row(case, name, took, dtype, device, copied, errors[name])
    return [rows[entrant.name] for entrant in entrants]


def _all_layers(decode: Attention, inputs: tuple[Tensor, ...], device: torch.device) -> Callable[[], object]:
    """A run over the caches of all layers; on a GPU, as a CUDA graph."""

    def run() -> list[Tensor]:
        return [decode(*layer) for layer in zip(*inputs, strict=True)]

    if device.type == "cpu":
        return run
    with timing.side_stream(device) as stream:
        return timing.Graph.of(run, stream)


def _row(
    case: Case,
    name: str,
    took: Timing | Exception,
    dtype: torch.dtype,
    device: torch.device,
    copied: float,
    error: float,
) -> Row:
    if isinstance(took, Exception):  # correct when it was checked, but it raised while it was timed
        return Row(str(case), name, "failed", report.error_line(took), error=error)
    count = case.layers(dtype, device)
    of_layer = Timing(took.ms / count, took.p20 / count, took.p80 / count, took.runs, took.host_ms)
    rate = case.nbytes(dtype) / of_layer.ms * 1e3
    return Row(
        str(case), name, "timed", None, of_layer, 1e3 * case.batch / of_layer.ms, rate / 1e9, 100 * rate / copied, error
    )  # fmt: skip


def tunings() -> list[Contender]:
    """The Triton kernel with other tiles and splits than its table's."""
    from ringflash.kernels import decode, portable_decode
    from ringflash.kernels.portable_parts import Tuning, sm_count

    def under(tuning: Tuning, programs_per_sm: int, q: Tensor, k: Tensor, v: Tensor) -> Attention:
        end = torch.full((1, 1), k.shape[1], dtype=torch.int32, device=q.device)
        spans = ((torch.zeros_like(end), end),)
        splits = portable_decode.splits_for(k.shape[1], k.shape[0] * k.shape[2], sm_count(q.device), programs_per_sm)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = portable_decode.decode(
                q, k, v, spans, scale=q.shape[-1] ** -0.5, softcap=None, tuning=tuning, splits=splits
            )
            return decode.combine(parts, out_dtype=q.dtype).out

        return run

    return [
        Contender(
            f"{block_k} keys, {stages} stages, {warps} warps, {programs} per SM",
            functools.partial(under, Tuning(16, block_k, warps, stages, tma=False), programs),
        )
        for block_k, stages, warps, programs in itertools.product((32, 64, 128), (2, 3, 4), (4, 8), (1, 2, 3, 4))
        if block_k * stages <= 384 and (block_k, warps) != (32, 8)
    ]


# -- what is printed and drawn


HEADER = f"{'B,Hq,Hkv,C,D':<16} {'kernel':<34} {'us':>9} {'tokens/s':>10} {'GB/s':>7} {'% copy':>7} {'error':>8}"


def table(rows: Sequence[Row]) -> str:
    """Aligned, a line per row."""
    lines = []
    for row in rows:
        if row.timing is None:
            figures = f"{row.status}: {row.reason}"
        else:
            figures = (
                f"{1e3 * row.timing.ms:>9.1f} {row.tokens_per_second:>10.0f} {row.gb_per_second:>7.0f} "
                f"{row.percent_of_copy:>7.1f} {row.error:>8.1e}"
            )
        lines.append(f"{row.case:<16} {row.kernel:<34} {figures}")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> dict[str, dict[str, float | str]]:
    """% copy, or the status, by case and kernel."""
    found: dict[str, dict[str, float | str]] = {}
    for row in rows:
        value = row.status if row.percent_of_copy is None else round(row.percent_of_copy, 1)
        found.setdefault(row.case, {})[row.kernel] = value
    return found


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Time and share of the copy rate by context, a column per batch and heads."""
    from matplotlib.figure import Figure

    timed = [(Case.parse(row.case), row) for row in rows if row.timing is not None]
    shapes = list(dict.fromkeys((case.batch, case.heads, case.kv_heads, case.dim) for case, _ in timed))
    names = list(dict.fromkeys(row.kernel for row in rows))
    figure = Figure(figsize=(3 * len(shapes) + 1.5, 6), layout="constrained")
    panels = figure.subplots(2, len(shapes), sharex=True, sharey="row", squeeze=False)
    lines: dict[str, Any] = {}
    for shape, (above, below) in zip(shapes, panels.T, strict=True):
        for i, name in enumerate(names):
            points = [
                (case.keys, 1e3 * row.timing.ms, row.percent_of_copy)
                for case, row in timed
                if (case.batch, case.heads, case.kv_heads, case.dim) == shape and row.kernel == name and row.timing
            ]
            if points:
                keys, us, share = zip(*sorted(points), strict=True)
                lines[name] = above.plot(keys, us, "o-", color=f"C{i}", markersize=3)[0]
                below.plot(keys, share, "o-", color=f"C{i}", markersize=3)
        batch, heads, kv_heads, dim = shape
        above.set(title=f"batch {batch}, {heads}/{kv_heads} heads of {dim}", yscale="log")
        below.set(xscale="log", xlabel="keys of a row")
        below.axhline(100, color="grey", linewidth=0.8, linestyle=":")
        for axes in (above, below):
            axes.title.set_fontsize(9)
            axes.grid(alpha=0.3)
        ticks = sorted({case.keys for case, _ in timed})
        below.set_xticks(ticks, [*map(shortened, ticks)], minor=False)
        below.minorticks_off()
    panels[0, 0].set_ylabel("microseconds per layer")
    panels[1, 0].set(ylabel="% of copy rate", ylim=(0, None))
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=len(lines), fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = shared_parser(__doc__, seconds=0.1)
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="B,Hq,Hkv,C,D (default: all)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of contenders' names")
    parser.add_argument("--sweep", action="store_true", help="tiles and splits of the Triton kernel, best first")
    options = parse(parser, arguments)
    if options.sweep and options.device == "cpu":
        parser.error("--sweep times Triton kernels and needs --device cuda")
    try:
        given = options.cases or (GPU_CASES if options.device == "cuda" else CPU_CASES)
        options.cases = [Case.parse(x) for x in given]
    except ValueError as wrong:
        parser.error(f"--cases: {wrong}")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write. Returns the exit code: 1 if a kernel is wrong, or ours raises."""
    options = _options(arguments)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    copied = copy_rate(device, options.seconds)
    facts = report.card(device, report.versions(decode_contenders.PACKAGES), options.commit)
    facts |= {"copy": f"{copied / 1e9:.0f} GB/s", "inputs": options.dtype}
    print(report.card_line(facts), HEADER, sep="\n", flush=True)
    entrants = asked(tunings() if options.sweep else decode_contenders.contenders(device), options.only)
    file = options.out / f"decode-{'sweep-' if options.sweep else ''}{report.slug(device)}.json"
    title = f"decoding, {options.dtype}, {report.signature(facts)}"
    rows: list[Row] = []
    prepared: dict[str, float] = {}
    for case in options.cases:
        try:
            found = measure(case, entrants, dtype, device, options.seconds, copied, prepared)
        except Exception as error:  # such as a GPU's, which no contender can be named for
            found = [Row(str(case), entrant.name, "failed", report.error_line(error)) for entrant in entrants]
        if options.sweep:
            found.sort(key=lambda row: row.timing.ms if row.timing else float("inf"))
        print(table(found), flush=True)
        rows += found
        report.write_json(file, {"benchmark": "decode", "card": facts, "rows": [asdict(row) for row in rows]})
    undrawn = "a sweep has none" if options.sweep else None if any(row.timing for row in rows) else "nothing was timed"
    report.print_written(file, undrawn or report.drawn(plot, file, rows, title))
    ours = [entrant.name for entrant in entrants if entrant.ours]
    wrong = [row for row in rows if row.status == "WRONG" or (row.status == "failed" and row.kernel in ours)]
    print(json.dumps({"benchmark": "decode", "device": facts["device"], "percent_of_copy": summary(rows)}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
