"""Ranks for tests: processes started once, that run any function as N ranks of a fresh gloo group.

def total(x):                       # a module-level function: it travels by name
    ...torch.distributed as usual...

ranks.run(total, 4, 1.0)            # its results on 4 ranks, in rank order
"""

import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

LARGEST = 4


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class Pool:
    """`LARGEST` processes that wait for work."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(LARGEST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, size: int, *args, timeout: float = 240.0) -> list:
        """The function's results on `size` ranks. Raises RankError if one raised or did not answer in time."""
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes[:size]:
                pipe.send((function, size, f"file://{folder}/store", args))
            answers = []
            for rank, pipe in enumerate(self.pipes[:size]):
                if not pipe.poll(timeout):
                    self.close()
                    raise RankError(f"rank {rank} of {size} did not answer in {timeout} s")
                answers.append(pipe.recv())
        errors = [answer for ok, answer in answers if not ok]
        if errors:
            raise RankError("\n".join(errors))
        return [answer for _, answer in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        function, size, store, args = pipe.recv()
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, f"rank {rank} of {size}:\n{traceback.format_exc()}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
