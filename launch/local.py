"""Train on this machine: one process per GPU, or two processes on the CPU where there is no GPU.

    python launch/local.py                                  # the demo
    python launch/local.py optim.steps=20 name=short        # settings as for train.py
    python launch/local.py --ranks 4 experiment=qwen3-0.5b-128k

It starts processes as torchrun does. A run that fails ends with one line instead of torchrun's report. SIGUSR1 lets the
run finish its step, write a checkpoint and end with exit code 75; Ctrl-C and SIGTERM end it at once.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import uuid
from pathlib import Path

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted import is no error with a traceback

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from with_signals import INCOMPLETE, hold_signal, stop_note, stop_ranks

from ringflash.distributed import failure

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def main() -> int:
    """Start the ranks and wait for them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=_default_ranks(), help="processes to start (here: %(default)s)")
    options, settings = parser.parse_known_args()
    if options.ranks < 1:
        parser.error(f"--ranks {options.ranks} must be 1 or more")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.ranks)))
    logging.disable(logging.ERROR)  # torch's lines about signals and ranks: one line of ours replaces them
    failure.report_signals()  # until torch's own handlers
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=options.ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex, max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    signal.signal(signal.SIGUSR1, lambda number, frame: stop_ranks(os.getpid()))
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # receives the signal, which this thread holds
    hold_signal()
    try:
        with stop_note() as stopped:
            elastic_launch(config, sys.executable)("-u", str(TRAIN), *settings)
            return INCOMPLETE if stopped() else 0
    except SignalException as end:
        print(f"\n{failure.stopped(end.sigval)}", file=sys.stderr)
        return 128 + end.sigval
    except ChildFailedError as error:
        rank, failed = error.get_first_failure()
        if failed.exitcode < 0:  # it reported nothing itself, and may have left a progress bar
            name = signal.Signals(-failed.exitcode).name
            why = " (out of memory?)" if name == "SIGKILL" else ""
            print(f"\nringflash: rank {rank} was ended by {name}{why}", file=sys.stderr)
        return 1


def _default_ranks() -> int:
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
