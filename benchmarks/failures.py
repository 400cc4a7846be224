"""Ranks that are killed or hang: what a run reports, and after how many seconds.

    python benchmarks/failures.py               # on every GPU, or on two CPU ranks: two minutes
    python benchmarks/failures.py --ranks 4

Three runs train a tiny model on this benchmark's own text at the same time. After three steps, the last rank is sent
SIGKILL in one run and SIGSTOP in two. The others wait for a stopped rank and report it, in a hop of the ring after 5 s
and as replicas after 30 s. The columns are the seconds until the run printed a line, the seconds until it ended, and
the lines. torchrun waits 30 s before it kills a stopped process. The exit code is 1 if a run does not end within
--limit seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import RESULTS, ROOT, card, card_line, write_json

HOP_TIMEOUT = 5  # seconds
SETTINGS = (
    "model=tiny-llama", "data=text", f"data.path={ROOT / 'benchmarks'}", 'data.files=["*.py"]', "data.held_out=0.2",
    "data.sequence_length=4096", "optim=adamw", "optim.steps=1000000", "optim.warmup=1",
    "checkpoint.every=0", "evaluation.every=0", "evaluation.sequences=1", "logger.mode=disabled",
    f"parallel.hop_timeout_seconds={HOP_TIMEOUT}",
)  # fmt: skip
FAILURES = {
    "a rank is killed": (signal.SIGKILL, "parallel.layout=zigzag"),
    "a rank hangs": (signal.SIGSTOP, "parallel.layout=zigzag"),
    "a replica hangs": (signal.SIGSTOP, "parallel.ring=1"),
}


@dataclass(frozen=True)
class Row:
    """Seconds from the signal to the first line and to the end, None if there was none; and the lines."""

    failure: str
    ranks: int
    reported: float | None
    ended: float | None
    lines: list[str]

    def __str__(self) -> str:
        times = " ".join(f"{'never' if x is None else f'{x:.1f} s':>8}" for x in (self.reported, self.ended))
        first, *rest = self.lines or ["nothing"]
        return "\n".join([f"{self.failure:<18} {times}  {first}", *(f"{'':<36}  {line}" for line in rest)])


def measure(failure: str, ranks: int, limit: float, folder: Path, launched: list[psutil.Process]) -> Row:
    """Train in `folder`, send the last rank the failure's signal after three steps, and wait for the end.

    The launcher is added to `launched`.
    """
    name, (sent, setting) = failure.replace(" ", "-"), FAILURES[failure]
    settings = [
        *SETTINGS, setting, f"optim.batch={ranks}", f"data.cache={folder / name}.cache", f"output_dir={folder}",
        f"name={name}",
    ]  # fmt: skip
    printed = folder / f"{failure}.txt"
    command = [sys.executable, "launch/local.py", "--ranks", str(ranks), *settings]
    with printed.open("w") as file:
        launcher = psutil.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    launched.append(launcher)
    try:
        metrics = folder / name / "metrics.jsonl"
        deadline = time.monotonic() + limit
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            if launcher.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run did not come to its third step:\n{printed.read_text()[-2000:]}")
            time.sleep(0.1)
        before = printed.stat().st_size
        _rank(launcher, ranks - 1).send_signal(sent)
        begun, reported, ended = time.monotonic(), None, None
        while ended is None and (now := time.monotonic() - begun) < limit:
            ended = now if launcher.poll() is not None else None
            if reported is None and _lines(printed.read_bytes()[before:]):
                reported = now
            time.sleep(0.1)
        return Row(failure, ranks, reported, ended, _lines(printed.read_bytes()[before:]))
    finally:
        _kill(launcher)


def _kill(launcher: psutil.Process) -> None:
    """End a launcher and its ranks, each of which leads its own session."""
    with suppress(psutil.NoSuchProcess):
        for process in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _rank(launcher: psutil.Process, rank: int) -> psutil.Process:
    """The process of a rank."""
    for process in launcher.children(recursive=True):
        if process.environ().get("RANK") == str(rank):
            return process
    raise RuntimeError(f"rank {rank} has no process")


def _lines(printed: bytes) -> list[str]:
    """Lines other than those of the run's progress."""
    lines = (line.strip() for line in printed.decode(errors="replace").splitlines())
    return [line for line in lines if line and not re.match(r"step \d+ of \d+: ", line)]


def main() -> int:
    """Measure all failures, print the table, write the JSON. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()), help="(here: %(default)s)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each half of a run (%(default)g)")
    parser.add_argument("--out", type=Path, default=RESULTS / "failures.json", help="JSON file (%(default)s)")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks {args.ranks}: one rank has no neighbour to fail, take 2 or more")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    facts = card(torch.device("cuda" if torch.cuda.is_available() else "cpu"), {}, None)
    print(card_line(facts), flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # of many_gpus.sh
    found: list[Row] = []
    launched: list[psutil.Process] = []
    # All at once, since they mostly wait.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(FAILURES)) as threads:
        try:
            for row in threads.map(
                lambda name: measure(name, args.ranks, args.limit, Path(folder), launched), FAILURES
            ):
                found.append(row)
                print(row, flush=True)
        except BaseException:  # Ctrl-C too: threads end when their launchers have
            for launcher in launched:
                _kill(launcher)
            raise
    write_json(args.out, {"card": facts, "rows": [asdict(row) for row in found]})
    print(json.dumps({row.failure: row.ended for row in found}))
    return 0 if all(row.ended is not None for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
