"""Train on this machine: a rank on every GPU, or without a GPU two ranks on the CPU.

    python launch/local.py                                  # the demo
    python launch/local.py optim.steps=20 name=short        # settings as for train.py
    python launch/local.py --ranks 4 experiment=qwen3-0.5b-128k

The same as torchrun, in the words of one line when a run fails.
"""

import argparse
import logging
import os
import signal
import sys
import uuid
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def main() -> int:
    """Start the ranks and wait for them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=_default_ranks(), help="processes to start (here: %(default)s)")
    options, settings = parser.parse_known_args()
    if options.ranks < 1:
        parser.error(f"--ranks {options.ranks} must be 1 or more")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.ranks)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=options.ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex, max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-u", str(TRAIN), *settings)
    except SignalException as stopped:
        name = signal.Signals(stopped.sigval).name
        print(f"\nringflash: stopped by {name}; resume=auto goes on from the last checkpoint", file=sys.stderr)
        return 128 + stopped.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:  # it had no time to say anything itself
            name = signal.Signals(-failure.exitcode).name
            print(f"ringflash: rank {rank} was ended by {name} (out of memory?)", file=sys.stderr)
        return 1
    return 0


def _default_ranks() -> int:
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
