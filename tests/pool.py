"""Ranks for tests: processes started once, that run any function as N ranks of a fresh group: gloo, or NCCL on GPUs.

def total(x):                       # a module-level function: it travels by name
    ...torch.distributed as usual...

ranks.run(total, 4, 1.0)            # its results on 4 ranks, in rank order
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait

import pytest
import torch
import torch.distributed as dist

from tests.forked import CONTEXT

GPUS = min(torch.cuda.device_count(), 8)
needs_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs or more, here are {GPUS}")


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class Pool:
    """Processes that wait for work, started when a rank is first needed; with "nccl", each has its own GPU."""

    def __init__(self, backend: str = "gloo") -> None:
        self.backend = backend
        self.pipes: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        # Kept until the end: a rank's store opens its file once more after the rank has answered, and waits for it.
        self.stores = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.runs = 0

    def _grow(self, size: int) -> None:
        for rank in range(len(self.processes), size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=_serve, args=(rank, theirs, self.backend), daemon=True)
            process.start()
            theirs.close()  # so that ours ends with the process
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, size: int, *args, timeout: float = 240.0) -> list:
        """The function's results on `size` ranks. Raises RankError if one raised or did not answer in time.

        Ranks that wait for one that raised never answer: then all processes are started again. They also are, once,
        where gloo could not connect them, as happens on a busy machine.
        """
        try:
            return self._run(function, size, *args, timeout=timeout)
        except RankError as error:
            if "Gloo connectFullMesh failed" not in str(error):
                raise
            self.close()
            return self._run(function, size, *args, timeout=timeout)

    def _run(self, function, size: int, *args, timeout: float) -> list:
        self._grow(size)
        self.runs += 1
        for pipe in self.pipes[:size]:
            pipe.send((function, size, f"file://{self.stores.name}/{self.runs}", args))
        answers: dict[int, object] = {}
        until = time.monotonic() + timeout
        while len(answers) < size and time.monotonic() < until:
            for pipe in wait([self.pipes[r] for r in range(size) if r not in answers], timeout=1.0):
                rank = self.pipes.index(pipe)
                ok, answers[rank] = self._answer(rank)
                if not ok:
                    until = min(until, time.monotonic() + 5)
                    answers[rank] = RankError(answers[rank])
        errors = [str(answer) for answer in answers.values() if isinstance(answer, RankError)]
        if len(answers) < size:
            errors.append(f"only ranks {sorted(answers)} of {size} answered; where the others are is on stderr")
            for process in self.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR1)
            time.sleep(1.0)
        if len(answers) < size or not all(process.is_alive() for process in self.processes):
            self.close()
        if errors:
            raise RankError("\n".join(errors))
        return [answers[rank] for rank in range(size)]

    def _answer(self, rank: int) -> tuple[bool, object]:
        try:
            return self.pipes[rank].recv()
        except EOFError:
            self.processes[rank].join()
            return False, f"rank {rank} ended with exit code {self.processes[rank].exitcode}"

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []


def own_device() -> torch.device:
    """The device of a rank in a function that a Pool runs: its GPU, or the CPU over gloo."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _serve(rank: int, pipe: Connection, backend: str) -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    while True:
        function, size, store, args = pipe.recv()
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            dist.init_process_group(backend, init_method=store, rank=rank, world_size=size, device_id=device)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, f"rank {rank} of {size}:\n{traceback.format_exc()}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            _forget_world()


def _forget_world() -> None:
    """DeepSpeed keeps the first world it saw, and numbers modules by process; the next function has other ranks."""
    if "deepspeed" in sys.modules:
        deepspeed = sys.modules["deepspeed"]
        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._WORLD_GROUP = None
        deepspeed.utils.groups._ALL_TO_ALL_GROUP = {}
        deepspeed.zero.Init.param_id = 0
        offload = sys.modules["deepspeed.runtime.zero.parameter_offload"].DeepSpeedZeRoOffload
        offload._register_deepspeed_module.__defaults__[0][0] = 0
