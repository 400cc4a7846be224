"""Processes forked from one that has imported torch, transformers and DeepSpeed, which saves seconds for each.

    result = forked.run([sys.executable, "launch/local.py", "--ranks", "2", "optim.steps=1"])

is what subprocess.run gives, and the ranks that the program launches are forked, too. What a command starts as a user
starts it, in separate processes, is tested by `test_launch.py` and `training/test_run.py`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher import api

ROOT = Path(__file__).resolve().parents[1]
# A process that CUDA was looked for in cannot be forked.
CONTEXT = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
if CONTEXT.get_start_method() == "forkserver":
    CONTEXT.set_forkserver_preload(["tests.preload"])


def run(command, cwd=ROOT, env=None, timeout=280) -> subprocess.CompletedProcess:
    """Exit code, stdout and stderr of a command: Python with a file or -m and a module. TimeoutError after seconds."""
    executable, *arguments = map(os.fsdecode, command)
    assert executable == sys.executable, command
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_program, args=(arguments, str(cwd), dict(env or os.environ), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()  # and its ranks: torch has the kernel end them with it
            raise TimeoutError(f"{command} runs for more than {timeout} s: {[file.read_text() for file in files]}")
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def _program(arguments: list[str], cwd: str, environment: dict[str, str], files: list[Path]) -> None:
    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if encoding := environment.get("PYTHONIOENCODING"):
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(**dict(zip(("encoding", "errors"), encoding.split(":"), strict=True)))
    api.elastic_launch = _ForkedRanks
    dynamic_rendezvous.get_method_name = lambda: "some method"  # for its log: it reads the files of all modules
    _as_main(*arguments)


class _ForkedRanks(api.elastic_launch):
    """torch's launcher, where it would start Python with a program: the same agent with forks for ranks."""

    def __init__(self, config: api.LaunchConfig, entrypoint: str) -> None:
        assert entrypoint == sys.executable
        config.start_method = "spawn" if CONTEXT.get_start_method() == "spawn" else "fork"
        super().__init__(config, _rank)

    def __call__(self, unbuffered: str, *arguments: str) -> dict:
        return super().__call__(*arguments)


def _rank(*arguments: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):  # the launcher's handlers
        signal.signal(number, signal.SIG_DFL)
    _as_main(*arguments)


def _as_main(program: str, *arguments: str) -> None:
    torch.set_num_threads(1)  # which OMP_NUM_THREADS=1 would have set before the import
    if program == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
