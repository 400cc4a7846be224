"""Every launcher starts train.py with the ranks and settings it was given."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.run
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
SETTINGS = ["name=launched", "data.sequence_length=32", "optim.steps=1"]
# Stand-ins for Slurm: scontrol names two machines or writes its command, srun writes its own, and runs a test's script.
FAKES = {
    "scontrol": '[ "$1" = show ] && echo first && echo second || echo "$@" > "$FOLDER/scontrol.txt"',
    "srun": 'printf "%s\\n" "$@" > "$FOLDER/srun.txt"; $SCRIPT',
}
SLURM = {
    "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "32", "SLURM_SUBMIT_DIR": str(ROOT),
}  # fmt: skip
# Stands in for torchrun: starts train.py as its child, and ends as it does.
TORCHRUN = """printf "%s\\n" "$@" > torchrun.txt
LOCAL_RANK=0 python train.py "${@: -1}" & wait $!
"""
# Stands in for train.py: after SIGUSR1, stops before its last step, completes, or fails.
RANK = """
import os, pathlib, signal, sys
pathlib.Path("started").write_text("")
signal.sigwait({signal.SIGUSR1})
if sys.argv[1] == "stops":
    pathlib.Path(os.environ["RINGFLASH_STOPPED"]).touch()
sys.exit(3 if sys.argv[1] == "fails" else 0)
"""


@pytest.fixture
def corpus(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("some words to learn " * 20)
    return tmp_path


def launch(script, *arguments, **environment):
    return subprocess.run(
        [str(ROOT / "launch" / script), *arguments],
        cwd=ROOT.parent, env={**os.environ, **environment}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
def test_a_launcher_trains_with_its_ranks_and_settings(corpus):
    """DeepSpeed's; torchrun's is tested in `training/test_run.py`."""
    settings = [
        *SETTINGS, f"output_dir={corpus}/runs", "data=text", f"data.path={corpus}", f"data.cache={corpus}/cache",
        "data.held_out=0", "optim.warmup=0", "evaluation.every=0", "logger.mode=disabled", "model.dtype=fp32",
    ]  # fmt: skip
    result = launch("deepspeed.sh", "2", *settings, MASTER_PORT="0")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = corpus / "runs" / "launched"
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["sequence_length"] == 32
    assert "ranks      2 x CPU: replicas 1 x ring 2" in result.stdout
    assert (folder / "model" / "model.safetensors").exists()


def fakes(folder, programs):
    """An environment in which programs are shell scripts of these bodies."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "FOLDER": str(folder)}


def test_slurm_starts_a_launcher_per_machine_with_all_its_cores(tmp_path):
    result = launch("slurm.sh", *SETTINGS, **SLURM, **fakes(tmp_path, FAKES), SRUN="--container-image=x", SCRIPT="env")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "srun.txt").read_text().splitlines() == [
        "--kill-on-bad-exit=1", "--cpus-per-task", "32", "--container-image=x", f"{ROOT}/launch/torchrun.sh", "8",
        *SETTINGS,
    ]  # fmt: skip
    assert {"NNODES=2", "HEAD=first:24711", "RDZV_ID=4711"} <= {*result.stdout.splitlines()}
    assert not (tmp_path / "scontrol.txt").exists()


def test_slurm_queues_a_stopped_job_again_and_resumes_it(tmp_path):
    environment = {**SLURM, **fakes(tmp_path, FAKES), "SLURM_RESTART_COUNT": "1"}
    result = launch("slurm.sh", *SETTINGS, **environment, SCRIPT='eval touch "$RINGFLASH_STOPPED" ; false')
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "srun.txt").read_text().splitlines()[-1] == "resume=auto"
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"
    failed = launch("slurm.sh", *SETTINGS, **environment | {"SLURM_JOB_ID": "4712"}, SCRIPT="false")
    assert failed.returncode == 1
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize(("rank", "code"), [("stops", 75), ("completes", 0), ("fails", 3)])
def test_a_signal_to_the_launcher_reaches_the_ranks_and_its_exit_code_says_how_they_ended(tmp_path, number, rank, code):
    (tmp_path / "launch").mkdir()
    (tmp_path / "train.py").write_text(RANK)
    for name in ("torchrun.sh", "with_signals.py"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "launch")
    environment = {**os.environ, **fakes(tmp_path, {"torchrun": TORCHRUN}), "NNODES": "2", "HEAD": "first:1"}
    environment |= {"LOGS": "logs", "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with subprocess.Popen([tmp_path / "launch" / "torchrun.sh", "8", rank], env=environment) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == code
    parsed = torch.distributed.run.get_args_parser().parse_args((tmp_path / "torchrun.txt").read_text().splitlines())
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert (parsed.rdzv_endpoint, parsed.log_dir, parsed.tee) == ("first:1", f"logs/{socket.gethostname()}", "3")
    assert [parsed.training_script, *parsed.training_script_args] == ["train.py", rank]


def test_several_machines_without_a_place_to_meet_are_refused():
    result = launch("torchrun.sh", "8", NNODES="2")
    assert (result.returncode, result.stdout) == (2, "")
    assert "NNODES=2 needs HEAD=first-machine:port" in result.stderr


def test_a_launcher_that_is_not_installed_is_named_in_one_line():
    command = [sys.executable, ROOT / "launch" / "with_signals.py", "no-torchrun", "train.py"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 127
    assert result.stderr == "launch/with_signals.py: no-torchrun cannot be started: No such file or directory\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_a_scripts_command(script):
    for arguments, code in ((["--help"], 0), ([], 2)):
        result = launch(script, *arguments)
        assert result.returncode == code, result.stderr
        assert f"launch/{script}" in result.stdout
        assert "SBATCH" not in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_sound_shell_and_its_head_shows_its_command(script):
    source = (ROOT / "launch" / script).read_text()
    assert f"launch/{script}" in source.split("set -euo pipefail")[0]
    assert subprocess.run(["bash", "-n", str(ROOT / "launch" / script)]).returncode == 0
