"""The memory that is estimated before a run is what was measured on GPUs, and what a checkpoint takes."""

from types import SimpleNamespace

import pytest

from ringflash.models import ModelConfig, read_config
from ringflash.training import preflight
from ringflash.training.compose import compose
from ringflash.training.estimate import estimate, per_parameter
from ringflash.training.memory import MemoryConfig
from tests.models.cases import architecture
from tests.training.checkpoints.test_checkpoint import write_three
from tests.training.engines import build

GIB = 2**30
PARAMETERS = {1024: 596_049_920, 4096: 8_030_261_248}  # of Qwen3-0.6B and Llama-3-8B, by hidden size
# Settings, tokens, GiB at the peak on one H200: docs/long-context.md
MEASURED = {
    "recompute": (["model=qwen3-0.6b", "memory=recompute"], 131072, 37.7),
    "short": (["model=qwen3-0.6b", "memory=recompute"], 32768, 17.2),
    "host": (["model=qwen3-0.6b", "memory=host"], 262144, 24.8),
    "bf16-states": (["model=qwen3-0.6b", "memory=host", "memory.optimizer_states=bf16"], 131072, 11.5),
    "1m": (["experiment=1m"], 1048576, 111.3),
    "8b-host-states": (
        ["model=llama3-8b", "memory=recompute", "memory.optimizer_states=host", "data.tokenizer=bytes"], 131072, 89.1,
    ),
    "8b-400k": (["experiment=llama3-8b-400k", "data.path=corpus", "data.tokenizer=bytes"], 409600, 114.6),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "tokens", "peak"), MEASURED.values(), ids=MEASURED)
def test_the_estimate_is_within_12_percent_of_what_a_gpu_took(settings, tokens, peak):
    config, _ = compose(settings)
    model_config = read_config(config.model)
    parameters = PARAMETERS[model_config.hidden_size]
    found = estimate(model_config, parameters, config.memory, bf16=True, tokens=tokens, ranks=1, ring=1)
    assert found.gpu / GIB == pytest.approx(peak, rel=0.12)


@pytest.mark.parametrize(("zero", "ranks", "width"), [(1, 1, 2), (2, 8, 2), (3, 8, 2 / 8)])
def test_a_frozen_weight_takes_its_own_bytes_alone(zero, ranks, width):
    config, memory = read_config(compose([])[0].model), MemoryConfig(zero=zero)

    def found(**options):
        return estimate(config, 10**9, memory, bf16=True, tokens=1, ranks=ranks, ring=1, **options)

    assert found(frozen=2e9).gpu - found().gpu == pytest.approx(width * 1e9)
    assert found(frozen=2e9).checkpoint == found().checkpoint


def test_layers_below_those_that_train_keep_nothing():
    config = read_config(compose([])[0].model)  # 4 layers
    for place in ("gpu", "host"):
        memory = MemoryConfig(recompute=True, attention_results=place, layer_inputs=place)
        whole, found = (
            estimate(config, 0, memory, bf16=True, tokens=64, ranks=1, ring=1, forward_only=layers)
            for layers in (0, config.num_hidden_layers // 2)
        )
        assert (found.kept, found.host) == (whole.kept / 2, whole.host / 2)


def test_a_layer_with_attention_and_linear_attention_holds_the_tensors_of_both():
    """Falcon H1's layers have both, and Bamba's one of them."""

    def work(model_type, **fields):
        config = read_config(ModelConfig(architecture=architecture(model_type, **fields)))
        return estimate(config, 0, MemoryConfig(recompute=True), bf16=True, tokens=64, ranks=1, ring=1).work

    attention, alternating = (work("bamba", attn_layer_indices=layers) for layers in ([0, 1], [1]))
    assert attention < alternating
    assert work("falcon_h1", mamba_d_ssm=96) == attention + alternating


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_checkpoint_takes_what_is_estimated(ranks, tmp_path, zero):
    ranks.run(write_three, 1, tmp_path, zero, 1)
    size = sum(file.stat().st_size for file in (tmp_path / "step-00000003" / "state").iterdir())
    parameters = sum(p.numel() for p in build("llama").parameters())
    config = read_config(compose([])[0].model)
    found = estimate(config, parameters, MemoryConfig(zero=zero), bf16=False, tokens=1, ranks=1, ring=1)
    assert size == pytest.approx(found.checkpoint, abs=1.5 * parameters)  # files have heads


@pytest.mark.parametrize("states", ["fp32", "bf16", "host"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_more_ranks_hold_less_and_higher_stages_shard_more(zero, states):
    memory = MemoryConfig(zero=zero, optimizer_states=states)
    of_ranks = [per_parameter(memory, True, ranks) for ranks in (2, 8, 64)]
    totals = [found.states + found.gradients for found in of_ranks]
    assert totals == sorted(totals, reverse=True)
    if zero == 3:
        assert totals[0] == pytest.approx(32 * totals[2])
        assert totals[1] < sum(vars(per_parameter(MemoryConfig(zero=1, optimizer_states=states), True, 8)).values())


def test_print_plans_any_number_of_ranks_on_a_machine_without_them(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    settings = ["model=llama3-8b", "memory=long", "data.sequence_length=131072", "parallel.ring=8", "optim.batch=16"]
    config, _ = compose([*settings, "memory.optimizer_states=bf16", "optim.micro_batch=2"])
    model, ranks, step, found = preflight.planned(config, read_config(config.model))
    assert model == "model      llama, 8,030,261,248 parameters in bf16"
    assert ranks == "ranks      64 x GPU: replicas 8 x ring 8 x ulysses 1, layout auto"
    assert step.startswith("step       16 x 131,072 = 2,097,152 tokens in 1 x 2 sequences per replica")
    assert found.startswith("estimate   ")


def test_a_disk_without_room_for_the_checkpoints_is_reported(tmp_path, monkeypatch):
    config, _ = compose([f"output_dir={tmp_path}/not/yet", "checkpoint.keep=2"])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=300 * GIB))
    assert preflight._disk_warning(config, 100 * GIB) == []
    assert preflight._disk_warning(config, 101 * GIB) == [
        "disk       checkpoint.keep=2 needs room for 3 checkpoints, while one is written: 303.0 GiB, and 300.0 are "
        f"free in output_dir={tmp_path}/not/yet"
    ]
