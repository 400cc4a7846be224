"""Runs of train.py in separate processes, started as a user starts them, or forked."""

import os
import subprocess
import sys
from pathlib import Path

from tests import forked
from tests.training import runs

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 280  # seconds for a run: the machine may do other work

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# Threads decide in which order sums are taken, which runs that are compared must do alike.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(text, *others, ranks=2):
    return [sys.executable, "launch/local.py", "--ranks", str(ranks), *runs.settings(text, *others)]


def run(arguments, code=0, timeout=LIMIT):
    """stdout and stderr of a run that ends with this exit code."""
    result = subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


def failing(text, failure, *settings):
    """The lines that ranks print in a run whose rank 1 fails in the ring."""
    chosen = runs.settings(text, "name=fails", "data.held_out=0", *settings)
    program = [*LAUNCHER, "tests/training/failing_rank.py", failure, *chosen]
    result = forked.run(program, env=ENVIRONMENT, timeout=LIMIT)
    assert result.returncode == 1, result
    lines = sorted(line for line in result.stderr.splitlines() if line.startswith("ringflash: "))
    assert lines, result.stderr
    return lines
