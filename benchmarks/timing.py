"""Times of several variants, measured in interleaved rounds.

A GPU at its power limit slows down by 10 to 20 percent, which also affects whatever runs next. The variants therefore
take turns, in an order that is shuffled each round with a fixed seed, so that all run on an equally warm card. A short
variant runs several times in a row. Results are the median of a variant's runs and their 20th and 80th percentile.

On a GPU, times are between CUDA events on the stream. All runs are queued without waiting, so the GPU hides the host's
work. A run that takes the host long to launch follows matrix products that take as long, so that the GPU neither waits
for the host nor cools down. Matrix products heat the card more than attention does, so a run after them is slower. If
runs are short and the host is slow, time a `Graph`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

ROUNDS = (3, 100)  # fewest and most
REPEATS = 16  # runs in a row, at most
HEAD_START_CYCLES = 20_000_000  # about 10 ms, in which the host gets ahead of the GPU


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile, the number of runs, and the host's time to launch one."""

    ms: float
    p20: float
    p80: float
    runs: int
    host_ms: float = 0.0

    @classmethod
    def of(cls, times: list[float], host_ms: float = 0.0) -> Timing:
        """Statistics of these milliseconds."""
        ordered = sorted(times)

        def at(fraction: float) -> float:
            return ordered[round(fraction * (len(ordered) - 1))]

        return cls(at(0.5), at(0.2), at(0.8), len(ordered), host_ms)


def interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, Timing | Exception]:
    """Each variant's times, measured for about `seconds` per variant, or the exception that it raised.

    Each variant first runs a few times to determine how many rounds fit and how often it runs in each.
    """
    clock = _gpu_times if device.type == "cuda" else _cpu_times
    found: dict[str, Timing | Exception] = {}
    runnable: dict[str, Callable[[], object]] = {}
    host: dict[str, float] = {}
    estimates: dict[str, float] = {}
    for name, run in variants.items():
        try:
            run()
            host[name] = _launching(run, device)
            estimates[name] = clock([(run, host[name])], device)[0] / 1e3
            runnable[name] = run
        except Exception as error:  # a peer may raise anything; the table shows the error
            found[name] = error
    if not runnable:
        return found
    turns = in_turns(estimates, seconds)
    times: dict[str, list[float]] = {name: [] for name in runnable}
    for name, ms in zip(turns, clock([(runnable[name], host[name]) for name in turns], device), strict=True):
        times[name].append(ms)
    return found | {name: Timing.of(values, host[name]) for name, values in times.items()}


def in_turns(estimates: Mapping[str, float], seconds: float) -> list[str]:
    """The order of runs: rounds of all variants, for about `seconds` per variant; the same on all ranks."""
    longest = max(estimates.values())
    repeats = {name: max(1, min(REPEATS, int(longest / max(took, 1e-9)))) for name, took in estimates.items()}
    a_round = sum(took * repeats[name] for name, took in estimates.items())
    fewest, most = ROUNDS
    rounds = max(fewest, min(most, int(seconds * len(estimates) / max(a_round, 1e-9))))
    shuffle, names = random.Random(0), list(estimates)
    order = [name for _ in range(rounds) for name in shuffle.sample(names, len(names))]
    return [name for name in order for _ in range(repeats[name])]


def _launching(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until the host has launched a run; on the CPU, 0."""
    if device.type == "cpu":
        return 0.0
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def _gpu_times(runs: list[tuple[Callable[[], object], float]], device: torch.device) -> list[float]:
    """Milliseconds of each run. Each run is given with the milliseconds that the host takes to launch it."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs]
    keep_busy = matrix_products(device)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START_CYCLES)
    for (run, host_ms), (begin, end) in zip(runs, events, strict=True):
        keep_busy(host_ms)
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def matrix_products(device: torch.device) -> Callable[[float], None]:
    """A function that queues the given milliseconds of matrix products, in steps of about 1.5 ms."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)

    def keep_busy(ms: float) -> None:
        for _ in range(round(ms / 1.5)):
            torch.mm(a, b, out=out)

    return keep_busy


@contextmanager
def side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A context whose work runs on a new stream, after the work queued on the current stream."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@dataclass(frozen=True)
class Graph:
    """A run as a CUDA graph, which the host launches at once."""

    run: Callable[[], object]  # it holds the memory
    recorded: torch.cuda.CUDAGraph

    @classmethod
    def of(cls, run: Callable[[], object], stream: torch.cuda.Stream) -> Graph:
        """Capture a run whose memory and work belong to this side stream, after one run that compiles."""
        run()
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, stream=stream):
            run()
        return cls(run, recorded)

    def __call__(self) -> None:
        """Queue it on the current stream."""
        self.recorded.replay()


def _cpu_times(runs: list[tuple[Callable[[], object], float]], device: torch.device) -> list[float]:
    times = []
    for run, _ in runs:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return times
