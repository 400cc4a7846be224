"""Every launcher starts train.py with the ranks and settings it was given."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch.distributed.run
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
SETTINGS = ["name=launched", "data.sequence_length=32", "optim.steps=1"]
# Stand-ins for Slurm: scontrol names two machines, srun writes its command to a file.
FAKES = {"scontrol": "echo first; echo second", "srun": 'printf "%s\\n" "$@" > "$COMMAND"'}
SLURM = {
    "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_ID": "4711", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
    "SLURM_SUBMIT_DIR": str(ROOT),
}  # fmt: skip


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


def test_slurm_runs_one_torchrun_per_machine_that_meet_at_the_first(tmp_path):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    path = f"{tmp_path}:{os.environ['PATH']}"
    result = launch("slurm.sh", *SETTINGS, **SLURM, PATH=path, COMMAND=str(tmp_path / "command"))
    assert result.returncode == 0, result.stderr
    options, program, *command = (tmp_path / "command").read_text().splitlines()
    assert (options, program) == ("--kill-on-bad-exit=1", "torchrun")
    parsed = torch.distributed.run.get_args_parser().parse_args(command)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    assert (parsed.rdzv_endpoint, parsed.rdzv_id) == ("first:24711", "4711")
    assert [parsed.training_script, *parsed.training_script_args] == ["train.py", *SETTINGS]


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
