"""Standard attention against flash attention: memory and time from 1k to 1M tokens, forward and backward.

    python benchmarks/standard.py --device cpu      # any machine: 256 to 8k tokens, in a minute
    python benchmarks/standard.py                   # a GPU: 1k to 1M tokens
    python benchmarks/standard.py --tokens 4k 64k --heads 4 --dim 64

Standard attention is the textbook's definition in four lines of torch. It writes the N x N matrices of scores and
weights to memory, and its backward writes their gradients. Flash attention is `ringflash.ring_attention` on a ring of
one, with the plan already made. Both are causal and give the same result, which is compared at the first length.

Memory is the peak beyond q, k, v and the incoming gradient: for a forward that keeps what a backward needs (`forward`),
and for forward and backward together (`both`). On a GPU, torch's allocator reports it. On a CPU, it is the sum of all
live tensors that torch operations have returned, without memory that an operation uses internally.

The backward of standard attention holds three matrices at once: weights, their gradient and the scores' gradient.
Lengths at which they do not fit are skipped, and the table shows their size. Variants take turns
(benchmarks/timing.py), and a figure is the median. After every length, standard-DEVICE.json is written to the folder
--out (benchmarks/results), and its picture at the end. The last line printed is the table as JSON.
"""

from __future__ import annotations

import functools
import json
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report, timing
from benchmarks.checks import NAMES, Attention, relative_error
from benchmarks.options import DTYPES, free_bytes, parse, shared_parser, shortened, whole_number
from benchmarks.timing import Timing
from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ring_attention

GPU_TOKENS = [2**n for n in range(10, 21)]
CPU_TOKENS = [2**n for n in range(8, 14)]
MATRICES = 3  # N x N matrices that standard attention's backward holds at once
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # largest relative difference of norms


@dataclass(frozen=True)
class Row:
    """One kind of attention at one length. matrix: bytes of one N x N matrix of all heads, even if it is not made.

    forward_bytes, both_bytes: peaks of memory. forward, backward: times. reason: why it was not measured.
    """

    kind: str
    tokens: int
    matrix: int
    reason: str | None = None
    forward_bytes: int | None = None
    both_bytes: int | None = None
    forward: Timing | None = None
    backward: Timing | None = None


def standard(future: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The textbook's definition. q, k, v [1, N, H, D]; future [N, N]: whether a key is after a query."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = torch.softmax(scores.masked_fill_(future, float("-inf")), dim=-1)
    return (weights @ v).transpose(1, 2)


def build(kind: str, tokens: int, device: torch.device) -> Attention:
    """The measured function, with its mask or plan."""
    if kind == "standard":
        return functools.partial(standard, torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu_(1))
    plan = AttentionPlan(IntervalMask.causal(tokens), Layout.contiguous(tokens, 1), Loopback(1, device))
    return lambda q, k, v: ring_attention(q, k, v, plan)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors that operations have returned, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self.known: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        return out

    def count_nothing_of(self, *tensors: Tensor) -> None:
        """Exclude tensors that already exist."""
        self.known |= {x.untyped_storage()._cdata: None for x in tensors}

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return

        def gone() -> None:
            self.now -= size
            del self.known[key]

        self.known[key] = weakref.finalize(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def peaks(kind: str, inputs: Sequence[Tensor], device: torch.device) -> tuple[int, int]:
    """Peak bytes beyond the inputs, in a forward and in forward and backward."""
    q, k, v, dout = inputs

    def run(peak: Callable[[], int]) -> tuple[int, int]:
        out = build(kind, q.shape[1], device)(q, k, v)
        forward = peak()
        torch.autograd.grad(out, (q, k, v), dout)
        return forward, peak()

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        return run(lambda: torch.cuda.max_memory_allocated(device) - before)
    with LiveTensors() as live:
        live.count_nothing_of(*inputs)
        return run(lambda: live.peak)


def measure(
    tokens: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device, seconds: float, check: bool
) -> list[Row]:
    """Measure both kinds at one length. check: compare their results. Raises ValueError if they differ."""
    matrix = heads * tokens * tokens * dtype.itemsize
    needed, free = MATRICES * matrix + tokens * tokens, free_bytes(device)
    rows = {
        "standard": Row("standard", tokens, matrix, f"{MATRICES} matrices need {size(needed)}, {size(free)} are free")
    }
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, dout = inputs = [
        torch.randn(1, tokens, heads, dim, dtype=dtype, device=device, generator=generator) for _ in range(4)
    ]
    for x in (q, k, v):
        x.requires_grad_()
    kinds = ["flash", "standard"] if needed < free else ["flash"]
    found: dict[str, tuple[int, int]] = {}
    runs: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "backward": {}}
    outs: dict[str, Tensor] = {}
    for kind in list(kinds):
        try:
            peaks(kind, inputs, device)  # compiles
            found[kind] = peaks(kind, inputs, device)
            attention = build(kind, tokens, device)
            outs[kind] = attention(q, k, v)
        except torch.OutOfMemoryError as error:
            rows[kind] = Row(kind, tokens, matrix, report.error_line(error))
            kinds.remove(kind)
            continue
        runs["forward"][kind] = functools.partial(attention, q, k, v)
        runs["backward"][kind] = functools.partial(
            torch.autograd.grad, outs[kind], (q, k, v), dout, retain_graph=True
        )  # fmt: skip
    if check and len(outs) == 2:
        _compare(outs, runs["backward"], dtype)
    times = {name: timing.interleaved(variants, device, seconds) for name, variants in runs.items()}
    for kind in kinds:
        took = {name: found[kind] for name, found in times.items()}
        wrong = [error for error in took.values() if isinstance(error, Exception)]
        if wrong:
            rows[kind] = Row(kind, tokens, matrix, report.error_line(wrong[0]))
        else:
            rows[kind] = Row(kind, tokens, matrix, None, *found[kind], **took)  # type: ignore[arg-type]
    return [rows[kind] for kind in ("standard", "flash")]


def _compare(outs: dict[str, Tensor], backwards: dict[str, Callable[[], Any]], dtype: torch.dtype) -> None:
    results = {kind: [out.detach(), *backwards[kind]()] for kind, out in outs.items()}
    for name, flash, other in zip(NAMES, results["flash"], results["standard"], strict=True):
        error = relative_error(flash, other.double())
        if not error <= CLOSE[dtype]:
            raise ValueError(f"flash attention's {name} differs from standard attention's by {error:.1e}")


# -- what is printed and drawn


def size(count: float) -> str:
    """A number of bytes with its unit, such as 2.0 MiB."""
    power = max((n for n in range(5) if count >= 1024**n), default=0)
    return f"{count / 1024**power:.1f} {['B', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"


HEADER = (
    f"{'tokens':>7} {'N x N':>10} | {'kind':<9} {'forward':>10} {'both':>10} {'forward ms':>11} {'backward ms':>12}"
)


def table(rows: Sequence[Row]) -> str:
    """Aligned, a line per row."""
    lines = []
    for row in rows:
        if row.forward is None or row.backward is None:
            figures = f"not measured: {row.reason}"
        else:
            figures = (
                f"{size(row.forward_bytes or 0):>10} {size(row.both_bytes or 0):>10} "
                f"{row.forward.ms:>11.3f} {row.backward.ms:>12.3f}"
            )
        lines.append(f"{row.tokens:>7} {size(row.matrix):>10} | {row.kind:<9} {figures}")
    return "\n".join(lines)


def plot(path: Path, rows: Sequence[Row], capacity: int, title: str) -> None:
    """Memory and time by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    memory, time = figure.subplots(1, 2)
    tokens = sorted({row.tokens for row in rows})
    matrices = {row.tokens: row.matrix for row in rows}
    memory.plot(tokens, [matrices[n] for n in tokens], ":", color="grey", label="one N x N matrix, counted")
    memory.axhline(capacity, color="grey", linewidth=0.8)
    memory.annotate("free on this device", (tokens[0], capacity), xytext=(0, 3), textcoords="offset points",
                    fontsize=7, color="grey")  # fmt: skip
    for kind, colour in (("standard", "C3"), ("flash", "C0")):
        found = [row for row in rows if row.kind == kind and row.forward is not None and row.backward is not None]
        lengths = [row.tokens for row in found]
        memory.plot(lengths, [row.both_bytes or 0 for row in found], "o-", color=colour, markersize=4,
                    label=f"{kind} attention")  # fmt: skip
        both = [row.forward.ms + row.backward.ms for row in found if row.forward and row.backward]
        time.plot(lengths, both, "o-", color=colour, markersize=4)
    for axes, label in ((memory, "memory, forward and backward"), (time, "ms, forward and backward")):
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(tokens, [*map(shortened, tokens)], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    exponents = range(20, 43, 4)
    memory.set_yticks([2**n for n in exponents], [size(2**n).replace(".0", "") for n in exponents])
    memory.set_ylim(min(matrices.values()) / 2, 4 * max(capacity, *matrices.values()))
    memory.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write."""
    parser = shared_parser(__doc__, seconds=0.05)
    parser.add_argument("--tokens", nargs="+", type=whole_number, help="lengths, as 4k or 1M (default: see above)")
    parser.add_argument("--heads", type=int, default=1, help="query and KV heads (%(default)s)")
    parser.add_argument("--dim", type=int, help="head size (default: 128 on a GPU, 64 on the CPU)")
    options = parse(parser, arguments)
    device, on_gpu = torch.device(options.device), options.device == "cuda"
    dtype = DTYPES[options.dtype]
    dim = options.dim or (128 if on_gpu else 64)
    capacity = free_bytes(device)
    facts = report.card(device, {}, options.commit)
    facts |= {
        "inputs": f"{options.dtype}, {options.heads} head{'s' * (options.heads > 1)} of {dim}, causal",
        "free": size(capacity),
    }
    print(report.card_line(facts), HEADER, sep="\n", flush=True)
    file = options.out / f"standard-{report.slug(device)}.json"
    title = f"one layer's attention, {facts['inputs']}, {report.signature(facts)}"
    rows: list[Row] = []
    for tokens in options.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS):
        found = measure(tokens, options.heads, dim, dtype, device, options.seconds, check=not rows)
        print(table(found), flush=True)
        rows += found
        report.write_json(file, {"benchmark": "standard", "card": facts, "rows": [asdict(row) for row in rows]})
    report.print_written(file, report.drawn(plot, file, rows, capacity, title))
    shown = [
        {"kind": row.kind, "tokens": row.tokens, "both_bytes": row.both_bytes, "reason": row.reason} for row in rows
    ]
    print(json.dumps({"benchmark": "standard", "device": facts["device"], "rows": shown}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
