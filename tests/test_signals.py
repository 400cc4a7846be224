"""A signal ends a run with one line of its own; ranks end with their launcher, which passes SIGUSR1 on to them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 280  # seconds: a machine may do other work
STOPPED = "ringflash: stopped by {}; resume=auto continues from the last checkpoint"
ASKED = "ringflash: the run ends after its step, with a checkpoint"
# Ends as train.py does; shows a progress bar, then tells its process and waits where Python runs no handler.
RANK = """
import os, signal, sys
parent = os.getppid()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from ringflash.distributed import failure
with failure.one_line(parent):
    sys.stderr.write(" 50%|#####     | 3/6")
    sys.stderr.flush()
    print(os.getpid(), flush=True)
    while True:
        signal.pause()
"""
# Is sent SIGUSR1 before it listens, as during imports, and ends as a run that was stopped before its last step.
STOPPED_RANK = """
import os, pathlib, signal
print(os.getpid(), flush=True)
signal.sigwait({signal.SIGUSR1})
pathlib.Path(os.environ["RINGFLASH_STOPPED"]).touch()
"""
# launch/local.py, which starts another program than train.py.
LAUNCHER = """
import sys
sys.path.insert(0, "launch")
import local
local.TRAIN = sys.argv.pop(1)
sys.exit(local.main())
"""
DEEPSPEED = ["-m", "deepspeed.launcher.runner", "--num_gpus", "1", "--no_local_rank"]
GONE = "ringflash: rank 0 ends: its launcher was killed"
# How it is started, which process is sent which signal, and then the exit code and the line.
CASES = {
    "ctrl-c": ("local", "launcher", signal.SIGINT, 130, STOPPED.format("SIGINT")),
    "preempted": ("local", "launcher", signal.SIGTERM, 143, STOPPED.format("SIGTERM")),
    "rank-killed": ("local", "rank", signal.SIGKILL, 1, "ringflash: rank 0 was ended by SIGKILL (out of memory?)"),
    "stopped": ("local", "launcher", signal.SIGUSR1, 75, ASKED),
    "deepspeed-stopped": ("deepspeed", "launcher", signal.SIGUSR1, 75, ASKED),
    "launcher-killed": ("local", "launcher", signal.SIGKILL, -9, GONE),
    "deepspeed-killed": ("deepspeed-alone", "launcher", signal.SIGKILL, -9, GONE),
    "alone-ctrl-c": ("alone", "rank", signal.SIGINT, 130, STOPPED.format("SIGINT")),
    "alone-preempted": ("alone", "rank", signal.SIGTERM, 143, STOPPED.format("SIGTERM")),
}


def started(how, program, stderr):
    """A process that runs a rank, by its launcher or alone."""
    arguments = {
        "local": ["-c", LAUNCHER, program, "--ranks", "1"],
        "deepspeed": ["launch/with_signals.py", sys.executable, *DEEPSPEED, program],
        "deepspeed-alone": [*DEEPSPEED, program],
        "alone": [program],
    }[how]
    environment = {name: x for name, x in os.environ.items() if name not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment |= {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(4 * LIMIT)
def test_a_signal_ends_the_run_with_a_line_of_its_own(tmp_path):
    for number in {number for _, _, number, *_ in CASES.values()}:
        program = STOPPED_RANK if number == signal.SIGUSR1 else RANK
        (tmp_path / f"{number.name}.py").write_text(program)
    stderrs = {name: (tmp_path / name).open("w+") for name in CASES}
    runs = {
        name: started(how, f"{tmp_path}/{number.name}.py", stderrs[name])
        for name, (how, _, number, *_) in CASES.items()
    }
    outcomes = {}
    for name, (_, target, number, *_) in CASES.items():
        rank = psutil.Process(next(int(line) for line in runs[name].stdout if line.strip().isdigit()))
        (runs[name] if target == "launcher" else rank).send_signal(number)
        code = runs[name].wait(LIMIT)
        rank.wait(LIMIT)
        stderrs[name].seek(0)
        lines = stderrs[name].read().splitlines()
        outcomes[name] = code, [line for line in lines if "ringflash:" in line or "death signal" in line]
    assert outcomes == {name: (code, [line]) for name, (*_, code, line) in CASES.items()}
