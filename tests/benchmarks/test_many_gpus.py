"""benchmarks/many_gpus.sh runs what it was asked for, or reports that it did not."""

import os
import shlex
import signal
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from benchmarks import training

ROOT = Path(__file__).resolve().parents[2]
# Stands in for python3, which counts four GPUs, and for torchrun, which hangs at one length and fails at another.
TORCHRUN = """
printf '%s:' "$CUDA_VISIBLE_DEVICES"; printf ' %q' "$@"; echo
case "$*" in *"--tokens 9 "*) sleep 60;; *"--tokens 64 "*) exit 1; esac
"""
FAKES = {"python3": '[ "$1" = -c ] && echo 4', "torchrun": TORCHRUN}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    for name, text in {"many_gpus.sh": (ROOT / "benchmarks/many_gpus.sh").read_text(), **FAKES}.items():
        path = tmp_path / ("benchmarks" if name.endswith(".sh") else "") / name
        path.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
        path.chmod(stat.S_IRWXU)

    def ran(*parts, begin=subprocess.run, **environment):
        path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [tmp_path / "benchmarks/many_gpus.sh", *parts]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return begin(command, env={**os.environ, **path, **environment}, **streams)

    return ran


@pytest.mark.parametrize(
    ("parts", "gpus"), [(["correct"], "8"), (["correct"], "1"), (["correct", "speed"], "4")], ids=str
)
def test_more_gpus_than_there_are_and_unknown_parts_are_refused_before_anything_runs(run, parts, gpus):
    result = run(*parts, GPUS=gpus)
    assert result.returncode == 2
    assert "==" not in result.stdout
    assert f"GPUS={gpus}, and torch sees 4" in result.stderr or "GPUS=N takes the first N" in result.stdout


def test_the_first_gpus_are_taken_and_what_failed_is_listed(run):
    result = run("training", GPUS="2", CUDA_VISIBLE_DEVICES="3,2,1,0", LENGTHS="64 128")
    assert result.returncode == 1
    assert result.stdout.count("3,2: --standalone --nproc-per-node 2 ") == 2
    assert result.stderr == "== failed: training at 64 tokens\n"


def test_all_variants_of_training_compose_without_data(run, monkeypatch):
    result = run("training", GPUS="2", LENGTHS="128")
    arguments = shlex.split(result.stdout.partition("benchmarks/training.py ")[2])
    configs = []
    world = SimpleNamespace(device=torch.device("cpu"), size=2, is_first=True, watchdog=Mock())
    monkeypatch.setattr(sys, "argv", ["training.py", *arguments])
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(training, "join", lambda config: world)
    monkeypatch.setattr(training, "ringflash", lambda config, *_: configs.append(config) or Mock())
    monkeypatch.setattr(training, "_rows", lambda *_: None)
    assert training.main() == 0
    assert len(configs) == arguments.count("--variant") == 2
    assert [config.model.architecture["vocab_size"] for config in configs] == [151936, 128256]
    assert [(config.parallel.ring, config.memory.zero) for config in configs] == [(2, 1), (2, 3)]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_a_signal_ends_the_part_that_runs_and_no_other_begins(run, sent):
    running = run("training", "efficiency", begin=subprocess.Popen, GPUS="4", LENGTHS="9 128")
    assert "training" in running.stdout.readline()
    assert "--tokens 9" in running.stdout.readline()
    rest = None
    while rest is None:  # bash puts off a signal that comes just before it begins to wait
        running.send_signal(sent)
        with suppress(subprocess.TimeoutExpired):
            rest, _ = running.communicate(timeout=1)  # until the part has closed its end, too
    assert (running.returncode, rest) == (130, "")
