"""Times of several variants, taken in turns.

A GPU at its power limit slows down by 10 to 20 percent, and so does the next thing it runs. So the variants take
turns, in an order that is shuffled in every round (fixed seed), and each is described by the median of its rounds and
their 20th and 80th percentile. On a GPU the time is between CUDA events on the stream, and the whole queue is sent
without waiting: the host's work hides behind the GPU's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = (3, 100)  # fewest and most
HEAD_START_CYCLES = 20_000_000  # about 10 ms in which the host gets ahead of the GPU


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median, 20th and 80th percentile, and how many rounds they are of."""

    ms: float
    p20: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        """What describes these milliseconds."""
        ordered = sorted(times)

        def at(fraction: float) -> float:
            return ordered[round(fraction * (len(ordered) - 1))]

        return cls(at(0.5), at(0.2), at(0.8), len(ordered))


def interleaved(
    variants: Mapping[str, Callable[[], object]], device: torch.device, seconds: float
) -> dict[str, Timing | Exception]:
    """Each variant's times, from about `seconds` of measuring a variant; or what it raised instead.

    Each runs once untimed, then once to see how many rounds fit.
    """
    clock = _gpu_times if device.type == "cuda" else _cpu_times
    found: dict[str, Timing | Exception] = {}
    runnable: dict[str, Callable[[], object]] = {}
    estimate = 0.0
    for name, run in variants.items():
        try:
            run()
            estimate += clock([run], device)[0] / 1e3
            runnable[name] = run
        except Exception as error:  # a peer may raise anything; the table says what
            found[name] = error
    if not runnable:
        return found
    fewest, most = ROUNDS
    rounds = max(fewest, min(most, int(seconds * len(runnable) / max(estimate, 1e-9))))
    shuffle = random.Random(0)
    turns = [name for _ in range(rounds) for name in shuffle.sample(list(runnable), len(runnable))]
    times: dict[str, list[float]] = {name: [] for name in runnable}
    for name, ms in zip(turns, clock([runnable[name] for name in turns], device), strict=True):
        times[name].append(ms)
    return found | {name: Timing.of(values) for name, values in times.items()}


def _gpu_times(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in runs]
    torch.cuda.synchronize(device)
    torch.cuda._sleep(HEAD_START_CYCLES)
    for run, (begin, end) in zip(runs, events, strict=True):
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def _cpu_times(runs: list[Callable[[], object]], device: torch.device) -> list[float]:
    times = []
    for run in runs:
        begin = time.perf_counter()
        run()
        times.append((time.perf_counter() - begin) * 1e3)
    return times
