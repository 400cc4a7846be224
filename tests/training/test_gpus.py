"""Any grid of GPUs has the losses and gradient norms of one GPU, and a rank that hangs is reported."""

import pytest
import torch

from ringflash.training.metrics import read
from tests.training.launched import command, failing, run

GPUS = min(torch.cuda.device_count(), 8)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs or more, here are {GPUS}")]
HEADS = [f"model.architecture.num_{kind}_heads={GPUS}" for kind in ("attention", "key_value")]
COMMON = [*HEADS, "model.architecture.head_dim=64", "model.dtype=fp32", f"optim.batch={GPUS}", "optim.steps=4"]
GRIDS = {
    "ring": ["parallel.layout=balanced", "memory.zero=3", "memory.recompute=true"],
    "ulysses": [f"parallel.ulysses={GPUS}", "memory.zero=1"],
    "replicas": ["parallel.ring=1", "memory.zero=2"],
}


def records(text, name, *settings, ranks):
    """(loss, gradient norm) of each step."""
    run(command(text, *COMMON, f"name={name}", *settings, ranks=ranks), timeout=280)
    return [(r["loss"], r["gradient_norm"]) for r in read(text.parent / "runs" / name / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
def test_any_grid_of_gpus_has_the_losses_and_gradient_norms_of_one(text):
    alone = records(text, "alone", ranks=1)
    assert len(alone) == 4
    for grid, settings in GRIDS.items():
        found = records(text, grid, *settings, ranks=GPUS)
        for step, (one, several) in enumerate(zip(alone, found, strict=True), 1):
            assert several == pytest.approx(one, rel=1e-5), f"{grid}, step {step}"


@pytest.mark.slow
def test_a_gpu_that_hangs_ends_the_run_with_a_line_of_every_rank(text):
    lines = failing(text, "hang", "parallel.hop_timeout_seconds=3", "attention.kernel=blocked")
    assert [line[:23] for line in lines] == ["ringflash: rank 0, step", "ringflash: rank 1, step"]
    assert "waits for rank 1 since " in lines[0]
    assert "waits for no rank; its last wait was in layer " in lines[1]
