"""benchmarks/failures.py: which process it hits, and what counts as printed."""

import os
import subprocess
import sys

import psutil
import pytest

from benchmarks import failures

SLEEPER = (
    "import subprocess, sys, os; [subprocess.Popen(['sleep', '60'], env={'RANK': str(r)}) for r in range(2)]; input()"
)


def test_progress_bars_are_not_printed_lines():
    printed = b"0%|  | 3/9 [00:01, 2.1it/s]\rringflash: rank 0 waits\n\n 0%|  | 4/9 [00:01, 2.9step/s]\n"
    assert failures._lines(printed) == ["ringflash: rank 0 waits"]


def test_the_rank_that_is_named_is_found():
    launcher = psutil.Popen([sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, start_new_session=True)
    try:
        while len(launcher.children()) < 2:
            assert launcher.poll() is None
        assert failures._rank(launcher, 1).environ()["RANK"] == "1"
        with pytest.raises(RuntimeError, match="rank 2 has no process"):
            failures._rank(launcher, 2)
    finally:
        os.killpg(launcher.pid, 9)


def test_a_row_shows_both_times_and_all_lines():
    assert str(failures.Found("a rank hangs", 2, 5.0, None, ["one", "two"])).splitlines() == [
        "a rank hangs          5.0 s    never  one", " " * 38 + "two",
    ]  # fmt: skip
