"""The ring between GPUs: one rank per GPU, with the transfers that training has.

    efficiency = (one call over the whole causal sequence on one GPU) x (pairs of the case / pairs of that) / ranks
                 --------------------------------------------------------------------------------------------------
                                         the slowest rank's time, waiting included

The same ranks are also timed without their neighbours (benchmarks/ring_share.py). The difference is the cost of
transfers that no kernel hides. A round starts on all GPUs at once, after an all-reduce, and takes as long as its
slowest rank. The peers are PyTorch's context_parallel and DeepSpeed's Ulysses on torch's sdpa, in the same processes
and rounds, for masks that they support. TFLOP/s are per GPU, of visible (query, key) pairs; a backward counts as 2.5
forwards.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import ring_share
from benchmarks.checks import relative_error
from benchmarks.ring_cases import Noise, Passes, RingCase, passes, whole_ring
from benchmarks.timing import HEAD_START_CYCLES, in_turns, matrix_products
from ringflash import Loopback, kernels
from ringflash.ring.message import Message
from ringflash.ring.simulation import Span
from ringflash.ring.transport import COPY_ENGINES, ProcessRing, Transfer
from ringflash.ring.watchdog import Label

CLOSE = 2e-3  # of norms: rounded sums, whose order differs
DIRECTIONS = ("forward", "backward")
OURS, BY_NCCL, ALONE = "ringflash", "ringflash, all by NCCL", "ringflash, no transfers"
WHOLE = "one GPU, whole"
TORCH = "torch context_parallel, "
ULYSSES = "deepspeed ulysses, "


@dataclass(frozen=True)
class Between:
    """Times of a case on all GPUs together, in milliseconds by variant and direction.

    host_ms: the host's time to launch it, which is hidden while the host is ahead of the GPU, as it was here. refused:
    why a variant was not timed. gib: the most that one rank receives in a forward and backward. flops: of one rank's
    share, by direction.
    """

    case: str
    kernel: str
    ranks: int
    part: float
    ms: dict[str, dict[str, float]]
    host_ms: dict[str, dict[str, float]]
    refused: dict[str, str]
    gib: float
    flops: dict[str, float]

    def efficiency(self, variant: str, direction: str) -> float:
        """Of the slowest rank, against its share of the whole call; direction may be "both"."""
        of = DIRECTIONS if direction == "both" else (direction,)
        return self.part * sum(self.ms[WHOLE][d] for d in of) / sum(self.ms[variant][d] for d in of)

    def tflops(self, variant: str, direction: str) -> float:
        """TFLOP/s per GPU."""
        flops = self.flops[direction] / (self.part if variant == WHOLE else 1)  # of its causal call
        return flops / self.ms[variant][direction] / 1e9

    def summary(self) -> dict[str, Any]:
        """Efficiencies and TFLOP/s by variant and direction, and GiB received."""
        timed = [name for name in self.ms if name != WHOLE]
        columns = (*DIRECTIONS, "both")
        found: dict[str, Any] = {n: {c: round(self.efficiency(n, c), 4) for c in columns} for n in timed}
        for name in timed:
            found[name]["tflops"] = [round(self.tflops(name, direction), 1) for direction in DIRECTIONS]
        return found | {"gib": round(self.gib, 4)} | self.refused


def measure(
    case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup, seconds: float
) -> Between:
    """Compare with a Loopback, then time the variants interleaved. All ranks call it. Raises if the ring is wrong."""
    ring = _GpuRing(case, group, device)
    name = kernels.select(*case.shrunk(1).inputs(dtype, device)[:2], None, kernel).name
    _check(dataclasses.replace(case, ranks=ring.gpus), kernel, dtype, device, group)
    variants: dict[str, Passes] = {}
    refused: dict[str, str] = {}
    inputs = case.inputs(dtype, device)
    whole = case.whole()
    alone = ring_share.OneRank(1, 0, device)
    variants[WHOLE] = passes(inputs, whole.plan(alone), kernel)
    variants[OURS] = passes(inputs, case.plan(ring), kernel)
    if ring.carrier == COPY_ENGINES:
        variants[BY_NCCL] = passes(inputs, case.plan(_GpuRing(case, group, device, "nccl")), kernel)
    neighbourless = ring_share.OneRank(case.ranks, ring.rank, device)
    variants[ALONE] = passes(inputs, case.plan(neighbourless), kernel)
    backends = ("FLASH_ATTENTION", "CUDNN_ATTENTION")
    for prefix, backend in [(prefix, backend) for prefix in (TORCH, ULYSSES) for backend in backends]:
        peer = prefix + backend.removesuffix("_ATTENTION").lower()
        if case.kind != "causal" or case.ranks != ring.gpus:
            refused[peer] = f"has no {case.kind} mask" if case.kind != "causal" else f"needs {case.ranks} GPUs"
            continue
        try:
            make = _torch_passes if prefix == TORCH else _ulysses_passes
            variants[peer] = make(case, inputs, backend, group)
        except Exception as error:  # a peer may raise anything; the table says what
            refused[peer] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    ms, host_ms = _in_turns(variants, device, seconds)
    part = case.head_pairs() / whole.head_pairs() / case.ranks
    flops = {direction: case.flops(direction) / case.ranks for direction in DIRECTIONS}
    return Between(str(case), name, case.ranks, part, ms, host_ms, refused, _most_gib(ring, variants[OURS]), flops)


def _most_gib(ring: _GpuRing, ours: Passes) -> float:
    """Received in one forward and backward by the rank that receives most."""
    ring.received = 0
    for run in ours:
        run()
    received = torch.tensor(ring.received, device=ring.device)
    dist.all_reduce(received, dist.ReduceOp.MAX)
    return received.item() / 2**30


def _check(case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup) -> None:
    """Raise ArithmeticError unless a small ring between GPUs agrees with a Loopback, and that with float64."""
    if over := ring_share.check(case, kernel, dtype, device).wrong:
        raise ArithmeticError(f"{case}: {over}")
    small = case.shrunk(ring_share.CHECKED_LENGTH)
    assert isinstance(small, RingCase)
    inputs = small.inputs(dtype, device)
    plan = small.plan(ProcessRing(group, device))
    expected = whole_ring(inputs, small.plan(Loopback(small.ranks, device)), kernel)
    attend, gradients = passes(inputs, plan, kernel)
    results = [attend().detach(), *gradients()]
    for (name, reference), found in zip(expected.items(), results, strict=True):
        shard = plan.shard(reference)
        error = relative_error(found, shard.double())
        if not error <= CLOSE:
            rank = plan.ring.local[0]
            raise ArithmeticError(f"{small}: {name} of rank {rank} differs from a Loopback's by {error:.1e}")


class _GpuRing(ProcessRing):
    """A rank of the case's ring on this GPU; `received` adds up bytes.

    If there are fewer GPUs than ranks, every GPU runs the work of the middle rank. It receives from the previous GPU
    all that this rank would receive. So kernels, waits, messages received and their bytes are those of the larger ring,
    on real links; each GPU sends as much as it receives.
    """

    def __init__(
        self,
        case: RingCase,
        group: dist.ProcessGroup,
        device: torch.device,
        transport: str = "auto",
    ) -> None:
        super().__init__(group, device, transport=transport)
        self.gpus, self.gpu, self.received = self.size, self.rank, 0
        self._noise = Noise()
        if case.ranks != self.gpus:
            self.size, self.rank = case.ranks, case.ranks // 2
            self.local = (self.rank,)

    def exchange(self, outgoing: Sequence[Message], incoming: Sequence[Message], label: Label) -> Transfer:
        """As ProcessRing's, between GPUs."""
        if self.size != self.gpus:
            after, before = (self.gpu + 1) % self.gpus, (self.gpu - 1) % self.gpus
            outgoing = [Message(self.gpu, after, self._noise.like(m.tensor), m.tensor) for m in incoming]
            incoming = [Message(before, self.gpu, m.tensor) for m in incoming]
        self.received += sum(m.tensor.nbytes for m in incoming)
        return super().exchange(outgoing, incoming, label)


# -- the peers


def _torch_passes(case: RingCase, inputs: tuple[Tensor, ...], backend: str, group: dist.ProcessGroup) -> Passes:
    """PyTorch's ring on one of its kernels, with its own layout: head and tail."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = DeviceMesh.from_group(group, "cuda", mesh_dim_names=("cp",))
    shards = [x.detach().transpose(1, 2).contiguous() for x in inputs]
    with context_parallel(mesh, buffers=shards, buffer_seq_dims=[2] * 4, no_restore_buffers=set(shards)):
        q, k, v, dout = (x.clone() for x in shards)
    for x in (q, k, v):
        x.requires_grad_()
    nothing = torch.zeros(2 * case.ranks, device=q.device)  # a context shards something

    def entered(work: Callable[[], object]) -> object:
        with (
            context_parallel(mesh, buffers=[nothing.clone()], buffer_seq_dims=[0]),
            sdpa_kernel(getattr(SDPBackend, backend)),
        ):
            return work()

    def attend() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads
        )

    out = entered(attend)
    gradients = functools.partial(torch.autograd.grad, out, (q, k, v), dout, retain_graph=True)
    entered(gradients)
    return functools.partial(entered, attend), functools.partial(entered, gradients)


def _ulysses_passes(case: RingCase, inputs: tuple[Tensor, ...], backend: str, group: dist.ProcessGroup) -> Passes:
    """DeepSpeed's Ulysses: all-to-all exchanges give each GPU the whole sequence of some heads, for torch's sdpa."""
    from deepspeed import comm
    from deepspeed.sequence.layer import DistributedAttention
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.kv_heads % case.ranks:
        raise ValueError(f"{case.kv_heads} KV heads do not divide among {case.ranks} GPUs")
    comm.init_distributed(verbose=False)
    shards = [x.detach().chunk(case.ranks, dim=1)[dist.get_rank(group)].contiguous() for x in inputs]
    q, k, v, dout = (x.clone() for x in shards)
    for x in (q, k, v):
        x.requires_grad_()

    def local(*heads: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in heads)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=case.heads != case.kv_heads
            )
        return out.transpose(1, 2).contiguous()

    attend = functools.partial(DistributedAttention(local, group, scatter_idx=2, gather_idx=1), q, k, v, 0)
    gradients = functools.partial(torch.autograd.grad, attend(), (q, k, v), dout, retain_graph=True)
    gradients()
    return attend, gradients


# -- the clock


def _in_turns(
    variants: dict[str, Passes], device: torch.device, seconds: float
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Milliseconds by variant and direction, of GPU and host: medians of runs that begin on all GPUs at once.

    Before each run, GPUs multiply matrices for as long as the host takes to launch it, as in `timing`.
    """
    runs = {f"{d} {name}": run for name, both in variants.items() for d, run in zip(DIRECTIONS, both, strict=True)}
    estimates = torch.zeros(2, len(runs), device=device, dtype=torch.float64)
    for i, run in enumerate(runs.values()):
        run()
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        run()
        estimates[0, i] = time.perf_counter() - begun
        torch.cuda.synchronize(device)
        estimates[1, i] = time.perf_counter() - begun
    dist.all_reduce(estimates, dist.ReduceOp.MAX)
    launching, lasting = (dict(zip(runs, of_all, strict=True)) for of_all in estimates.tolist())
    turns = in_turns(lasting, seconds)
    keep_busy = matrix_products(device)
    torch.cuda._sleep(HEAD_START_CYCLES)
    events, launched = [], []
    for name in turns:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        keep_busy(1e3 * launching[name])
        _together(device)
        begin.record()
        begun = time.perf_counter()
        runs[name]()
        launched.append(1e3 * (time.perf_counter() - begun))
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    mine = torch.tensor([[begin.elapsed_time(end) for begin, end in events], launched], device=device)
    of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, mine)
    times = torch.stack(of_all)
    found: tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]] = ({}, {})
    for name in variants:
        for direction in DIRECTIONS:
            own = times[:, :, [i for i, turn in enumerate(turns) if turn == f"{direction} {name}"]]
            # Of the whole call on each GPU the mean; a ring is done when its last rank is.
            by_run = own.mean(0) if name == WHOLE else own.amax(0)
            for ms, values in zip(found, by_run.tolist(), strict=True):
                ms.setdefault(name, {})[direction] = statistics.median(values)
    return found


def _together(device: torch.device) -> None:
    """Make this GPU wait for all others; the host does not wait."""
    dist.all_reduce(torch.zeros(1, device=device))


# -- what ran when


def profiled(
    case: RingCase, kernel: str, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
) -> dict[str, list[Span]]:
    """The spans of all GPUs in a forward and in a backward, by direction; the same result on every rank.

    Times are seconds from a common start. `hop` is the stream: 0 and 1 for compute, -1 for transfers. A process that
    has been profiled launches more slowly from then on, so time first.
    """
    ours = passes(case.inputs(dtype, device), case.plan(_GpuRing(case, group, device)), kernel)
    found: dict[str, list[Span]] = {}
    for direction, run in zip(DIRECTIONS, ours, strict=True):
        for _ in range(2):
            run()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            # The host gets ahead, although the profiler costs it half a millisecond per launch: gaps in the picture are
            # then the GPUs' own.
            torch.cuda._sleep(10 * HEAD_START_CYCLES)
            _together(device)
            run()
            torch.cuda.synchronize(device)
        mine = _spans(profiler.profiler.kineto_results.events(), dist.get_rank())
        of_all: list[list[Span]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_all, mine)
        found[direction] = [span for spans in of_all for span in spans]
    return found


def _spans(events: Iterable[Any], rank: int) -> list[Span]:
    """One rank's kernels after the first collective, which ends on all ranks at the same time."""
    ran = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and e.duration_ns() > 0]
    start = min(e.start_ns() + e.duration_ns() for e in ran if "AllReduce" in e.name())
    streams = sorted({e.device_resource_id() for e in ran if _attention(e.name())})
    spans = []
    for event in ran:
        begin = event.start_ns() - start
        if begin < 0:
            continue
        kind, stream = "passes", -1
        if "nccl" in event.name() or "PtoP" in event.name():
            kind = "transfer"
        elif event.device_resource_id() in streams:
            kind = "compute" if _attention(event.name()) else "passes"
            stream = streams.index(event.device_resource_id())
        spans.append(Span(rank, kind, begin / 1e9, (begin + event.duration_ns()) / 1e9, stream))
    return spans


def _attention(name: str) -> bool:
    return name.startswith(("forward_kernel", "backward_kernel", "dq_kernel", "dkdv_kernel"))


def hidden(spans: Sequence[Span]) -> float:
    """The share of transfer time that the rank's attention kernels cover; the smallest over all ranks."""
    return min((_hidden([s for s in spans if s.rank == rank]) for rank in {s.rank for s in spans}), default=1.0)


def _hidden(spans: Sequence[Span]) -> float:
    covered = _union([(s.begin, s.end) for s in spans if s.kind == "compute"])
    transfers = _union([(s.begin, s.end) for s in spans if s.kind == "transfer"])
    total = sum(end - begin for begin, end in transfers)
    both = sum(max(0.0, min(e, f) - max(b, c)) for b, e in transfers for c, f in covered)
    return both / total if total else 1.0


def _union(stretches: list[tuple[float, float]]) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    for begin, end in sorted(stretches):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


# -- what is printed and drawn


def table(found: Between, header: bool) -> str:
    """A line per variant: efficiency of the slowest rank, milliseconds; then the bytes received."""
    lines = []
    if header:
        lines.append(_line("case", "variant", [*DIRECTIONS, "both", "TFLOP/s", "ms fwd + bwd", "host, ms"]))
        lines.append("-" * len(lines[0]))
    for name, ms in found.ms.items():
        cells = [f"{found.efficiency(name, d):.3f}" if name != WHOLE else "" for d in (*DIRECTIONS, "both")]
        cells.append(" / ".join(f"{found.tflops(name, d):.0f}" for d in DIRECTIONS))
        for took in (ms, found.host_ms[name]):
            cells.append(" + ".join(f"{took[d]:.2f}" for d in DIRECTIONS))
        lines.append(_line(found.case, name, cells))
    lines += [f"{found.case:<26} {name:<30} not timed: {why}" for name, why in found.refused.items()]
    lines.append(f"{'':<26} each rank receives at most {found.gib:.3f} GiB")
    return "\n".join(line.rstrip() for line in lines)


def _line(case: str, variant: str, cells: list[str]) -> str:
    numbers = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, (8, 8, 8, 11, 18, 16), strict=True))
    return f"{case:<26} {variant:<30} {numbers}"


COLOURS = {"compute": "#4477aa", "transfer": "#66aa77", "passes": "#bbbbbb"}


def draw(path: Path, ran: dict[str, list[Span]], title: str) -> None:
    """What every GPU ran: two streams of compute, one of transfers; forward on the left, backward on the right."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    gpus = 1 + max(s.rank for spans in ran.values() for s in spans)
    figure = Figure(figsize=(13, 1.7 + 0.7 * gpus), layout="constrained")
    widths = [max((s.end for s in spans), default=1e-3) for spans in ran.values()]
    panels = figure.subplots(1, 2, sharey=True, width_ratios=widths)
    for axes, width, (direction, spans) in zip(panels, widths, ran.items(), strict=True):
        for kind, colour in COLOURS.items():
            for stream, place in ((0, 0.08), (1, 0.37), (-1, 0.66)):
                for rank in range(gpus):
                    bars = [
                        (1e3 * s.begin, 1e3 * (s.end - s.begin))
                        for s in spans
                        if (s.rank, s.kind, s.hop) == (rank, kind, stream)
                    ]
                    axes.broken_barh(bars, (rank + place, 0.27), facecolor=colour, edgecolor="white", linewidth=0.3)
        axes.set(title=direction, xlabel="ms", xlim=(0, 1e3 * width), ylim=(gpus, 0))
        axes.title.set_fontsize(9)
        axes.set_yticks([rank + 0.5 for rank in range(gpus)], [f"GPU {r}" for r in range(gpus)])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
    labels = {"compute": "attention kernels, two streams", "transfer": "transfers", "passes": "other passes"}
    named = [Patch(color=colour, label=labels[kind]) for kind, colour in COLOURS.items()]
    figure.legend(handles=named, loc="outside lower center", ncols=len(named), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=90)
