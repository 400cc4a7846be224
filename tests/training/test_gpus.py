"""Several GPUs have the losses, gradient norms, adapters and states of one; what cannot be is refused or reported."""

import pytest
import torch.distributed as dist
from safetensors.torch import load_file

from ringflash.models.lora import WEIGHTS
from ringflash.training.metrics import read
from tests.pool import GPUS, needs_gpus
from tests.training.checkpoints.test_reshard import check_continued
from tests.training.launched import command, failing, run
from tests.training.pairs import PRECOMPUTED, preference_run
from tests.training.preferences.test_preference_loss import REWARDS
from tests.training.runs import fitted, settings, tiny_qwen3
from tests.training.test_lora import NF4, lora_run
from tests.training.test_needle import SEARCHES

pytestmark = [pytest.mark.gpu, needs_gpus]
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
    for grid, others in GRIDS.items():
        found = records(text, grid, *others, ranks=GPUS)
        for step, (one, several) in enumerate(zip(alone, found, strict=True), 1):
            assert several == pytest.approx(one, rel=1e-5), f"{grid}, step {step}"


@pytest.mark.slow
def test_a_gpu_that_hangs_ends_the_run_with_a_line_of_every_rank(text):
    lines = failing(text, "hang", "parallel.hop_timeout_seconds=3", "attention.kernel=blocked")
    assert [line[:23] for line in lines] == ["ringflash: rank 0, step", "ringflash: rank 1, step"]
    assert "waits for rank 1 since " in lines[0]
    assert "waits for no rank; its last wait was in layer " in lines[1]


ON_THE_HOST = ["memory.recompute=true", "memory.layer_inputs=host", "memory.attention_results=host"]
WAYS = {
    "ring": ["memory.zero=3", *ON_THE_HOST],
    "ulysses": ["parallel.ulysses=2", "memory.zero=1"],
    "replicas": ["parallel.ring=1", "memory.zero=2"],
}
# Without accuracies: in the first step all margins are 0 but for rounding.
FIGURES = ("step", "loss", "gradient_norm", "held_out_loss", "needle_loss", *REWARDS[1:])


def figures(gpus, ranks, runs, name, run):
    """FIGURES of each record of a run on this many GPUs, which is written into `runs`."""
    error, _ = gpus.run(fitted, ranks, [*run, f"output_dir={runs}", f"name={name}"])[0]
    assert error is None
    return [[r.get(x, 0.0) for x in FIGURES] for r in read(runs / name / "metrics.jsonl")]


def change(records):
    """Of the loss, between the first and the last step."""
    losses = [loss for _, loss, *_ in records if loss]
    return losses[-1] - losses[0]


def check_two_equal_one(gpus, runs, run, ways):
    """The figures of each step on two GPUs, in each way, and the adapters, if any, are those of one GPU."""
    expected = figures(gpus, 1, runs, "alone", run)
    assert abs(change(expected)) > 1e-3
    for way, others in ways.items():
        for record, one in zip(figures(gpus, 2, runs, way, [*run, *others]), expected, strict=True):
            assert record == pytest.approx(one, rel=1e-4, abs=1e-5), way
        files = [runs / name / "adapter" / WEIGHTS for name in (way, "alone")]
        assert len({file.exists() for file in files}) == 1
        found, adapter = (load_file(file) if file.exists() else {} for file in files)
        assert found.keys() == adapter.keys()
        for name, x in adapter.items():
            assert (found[name] - x).norm() <= 1e-3 * x.norm(), f"{way}, {name}"


@pytest.fixture
def base(tmp_path):
    """A small published model whose heads are large enough for kernels of GPUs."""
    return tiny_qwen3(tmp_path / "base", 384, head_dim=64)


def test_lora_and_searches_for_needles_on_two_gpus_are_those_of_one(gpus, text, base):
    check_two_equal_one(gpus, base.parent, [*lora_run(text, base), *SEARCHES], WAYS)


def test_lora_on_a_base_in_4_bits_on_two_gpus_is_that_of_one(gpus, text, base):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    check_two_equal_one(gpus, base.parent, lora_run(text, base, *NF4), {"ring": ["memory.zero=2"]})


@pytest.mark.parametrize("others", [[], PRECOMPUTED], ids=["lora", "all weights"])
def test_dpo_on_two_gpus_is_that_of_one(gpus, pair_folder, others):
    tiny_qwen3(pair_folder / "base", 320, head_dim=64)
    run = preference_run(pair_folder, *others)
    check_two_equal_one(gpus, pair_folder, run, {x: WAYS[x] for x in ("ring", "replicas")})


WIDE = ["model.architecture.head_dim=64", "optim.batch=2", "optim.lr=1e-2"]


@pytest.mark.parametrize("earlier", [1, 2])
def test_a_run_continues_on_another_number_of_gpus(gpus, text, earlier):
    run, now = [*settings(text, "name=run", *WIDE), "model.dtype=fp32"], 3 - earlier
    before, after = ([*run, f"parallel.ring={size}", f"memory.zero={2 * size - 1}"] for size in (earlier, now))
    changes = "".join(f"; {name}={now} replaces {earlier}" for name in ("ranks", "ring"))
    changes += f"; memory.zero={2 * now - 1} replaces {2 * earlier - 1}"
    check_continued(gpus, text, (earlier, before), (now, after), changes, rel=1e-4)


@pytest.mark.parametrize("states", ["bf16", "host"])
def test_states_in_16_bits_and_on_the_host_are_divided_between_gpus(gpus, text, states):
    run = settings(text, *WIDE, "model.dtype=bf16", f"memory.optimizer_states={states}", "parallel.ring=1")
    expected = figures(gpus, 1, text.parent, "one", [*run, "optim.micro_batch=2"])
    found = figures(gpus, 2, text.parent, "two", run)
    assert change(expected) < -0.5
    for record, one in zip(found, expected, strict=True):
        assert record == pytest.approx(one, rel=5e-3)


def of_its_own(text):
    """The error of a run whose learning rate is another on each rank."""
    return fitted(settings(text, f"optim.lr=0.{1 + dist.get_rank()}"))[0]


def test_settings_that_differ_between_gpus_are_refused_on_every_rank(gpus, text):
    first, second = gpus.run(of_its_own, 2, text)
    assert first.startswith("optim.lr differs between ranks, 0.1 on rank 0: start all machines")
    assert second.startswith("optim.lr differs between ranks, 0.1 on rank 0 and 0.2 on this rank: start all")
