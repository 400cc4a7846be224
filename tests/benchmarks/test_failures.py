"""benchmarks/failures.py: which process it signals, and what counts as printed."""

import os
import subprocess
import sys
from contextlib import suppress

import psutil
import pytest

from benchmarks import failures

SLEEPER = """
import subprocess
for rank in range(2):
    subprocess.Popen(["sleep", "60"], env={"RANK": str(rank)}, start_new_session=True)
input()
"""


def test_lines_of_progress_are_no_report():
    printed = b"step 3 of 9: loss 2.1, 2 tok/s\n\nringflash: rank 0, step 3: waits\nstep 4 of 9: loss 2.1, 2 tok/s\n"
    assert failures._lines(printed) == ["ringflash: rank 0, step 3: waits"]


def test_the_rank_that_is_named_is_found_and_ends_with_its_launcher():
    launcher = psutil.Popen([sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, start_new_session=True)
    try:
        while [child.name() for child in launcher.children()] != ["sleep", "sleep"]:  # before exec: python's variables
            assert launcher.poll() is None
        assert failures._rank(launcher, 1).environ()["RANK"] == "1"
        with pytest.raises(RuntimeError, match="rank 2 has no process"):
            failures._rank(launcher, 2)
        ranks = launcher.children()
        failures._kill(launcher)
        assert psutil.wait_procs(ranks, timeout=20)[1] == []
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, 9)


def test_a_row_shows_both_times_and_all_lines():
    assert str(failures.Row("a rank hangs", 2, 5.0, None, ["one", "two"])).splitlines() == [
        "a rank hangs          5.0 s    never  one", " " * 38 + "two",
    ]  # fmt: skip
