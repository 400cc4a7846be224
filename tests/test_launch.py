"""Every launcher starts train.py with the ranks and settings it was given."""

import os
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
# What stands in for Slurm: scontrol names this machine, srun runs the command on it.
FAKES = {"scontrol": "echo localhost", "srun": 'shift; exec "$@"'}
SLURM = {
    "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "4711", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2",
    "SLURM_SUBMIT_DIR": str(ROOT),
}  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("some words to learn " * 20)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["torchrun.sh", "2"], ["deepspeed.sh", "2"], ["slurm.sh"]], ids=lambda x: x[0])
def test_a_launcher_trains_with_its_ranks_and_settings(launcher, corpus):
    fakes = corpus / "bin"
    fakes.mkdir()
    for name, body in FAKES.items():
        (fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(stat.S_IRWXU)
    settings = [
        "name=launched", f"output_dir={corpus}/runs", "data=text", f"data.path={corpus}", f"data.cache={corpus}/cache",
        "data.held_out=0.3", "data.sequence_length=32", "optim.steps=1", "optim.warmup=0", "evaluation.every=0",
        "evaluation.sequences=1", "logger.mode=disabled", "model.dtype=fp32",
    ]  # fmt: skip
    environment = {**os.environ, **SLURM, "PATH": f"{fakes}:{os.environ['PATH']}", "MASTER_PORT": "0"}
    result = subprocess.run(
        [str(ROOT / "launch" / launcher[0]), *launcher[1:], *settings],
        cwd=corpus, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    folder = corpus / "runs" / "launched"
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["sequence_length"] == 32
    assert "replicas 1 x ring 2" in result.stdout
    assert (folder / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.sh")))
def test_a_script_is_sound_shell_and_its_head_shows_its_command(script):
    source = (ROOT / "launch" / script).read_text()
    assert f"launch/{script}" in source.split("set -euo pipefail")[0]
    assert subprocess.run(["bash", "-n", str(ROOT / "launch" / script)]).returncode == 0
