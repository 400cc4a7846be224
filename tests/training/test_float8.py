"""In fp8, ZeRO stages have the same gradients, and a run evaluates, resumes with the same bits and exports bf16."""

import re
import shutil

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

from ringflash.errors import ConfigError
from ringflash.layout import Layout
from ringflash.models import ModelConfig, build_model
from ringflash.models.float8 import refusal
from ringflash.training import preflight
from ringflash.training.compose import compose
from ringflash.training.engine import build_engine
from ringflash.training.memory import MemoryConfig
from ringflash.training.metrics import read
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.step import prepare, train_step
from tests.models.cases import TINY
from tests.training.engines import LENGTH, SEQUENCES, joined, sequences
from tests.training.runs import fitted, settings

RUN = ["model.dtype=bf16", "model.linear_dtype=fp8"]


def gradients(zero, linear_dtype):
    """Of a step on two ranks that share the sequences, in tiles of an MLP at ZeRO 3."""
    world, layout = joined(2), Layout.zigzag(LENGTH, 2)
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(architecture={"model_type": "llama", **TINY}, dtype="bf16", linear_dtype=linear_dtype)
    )
    optim = OptimConfig(steps=2, batch=SEQUENCES, micro_batch=SEQUENCES, warmup=0, clip=0.0)
    engine = build_engine(model, optim, MemoryConfig(zero=zero, recompute=zero > 0), world)
    found, step = {}, engine.step

    def recording_step():
        found.update({name: safe_get_full_grad(p).float() for name, p in engine.module.named_parameters()})
        step()

    engine.step = recording_step
    train_step(engine, prepare(engine, sequences("full"), world, lambda mask: layout), world)
    return found


def distance(found, exact):
    """The largest relative error of a gradient."""
    return max(float((found[name] - x).norm() / x.norm()) for name, x in exact.items())


@pytest.mark.ranks
def test_zero_stages_and_recomputation_change_no_gradient_and_8_bits_change_it_little(ranks):
    plain, one, *others = (
        ranks.run(gradients, 2, *case)[0] for case in ((1, None), (0, "fp8"), (1, "fp8"), (3, "fp8"))
    )
    assert 0.01 < distance(one, plain) < 0.2
    assert max(distance(other, one) for other in others) < 2**-8


@pytest.mark.ranks
def test_a_resumed_run_has_the_bits_of_a_whole_one_and_exports_bf16(ranks, text):
    run = settings(text, "name=run", *RUN, "optim.batch=2", "optim.steps=2", "checkpoint.every=1", "evaluation.every=2")
    folder, exported = text.parent / "runs" / "run", []
    for resume in ("never", "auto"):
        error, printed = ranks.run(fitted, 1, [*run, f"resume={resume}"])[0]
        assert error is None
        assert re.search(r"^model .* in bf16, products of 14 linear layers in fp8$", printed, re.M)
        exported.append(load_file(folder / "model" / "model.safetensors"))
        shutil.rmtree(folder / "checkpoints" / "step-00000002")
    assert "resumed from" in printed
    assert any("held_out_loss" in record for record in read(folder / "metrics.jsonl"))
    assert {x.dtype for x in exported[0].values()} == {torch.bfloat16}
    assert all(torch.equal(x, exported[1][name]) for name, x in exported[0].items())


@pytest.mark.parametrize(
    ("others", "options", "message"),
    [
        (["model.lora.rank=4"], {"model": ["model=pretrained", "model.path=x"]}, "trains all weights: with model.lora"),
        (["model.architecture.hidden_size=40"], {}, r"up to 32768, and model.layers.0.self_attn.q_proj.weight has "),
    ],
    ids=["lora", "size"],
)  # fmt: skip
def test_a_run_that_cannot_have_them_is_refused_before_it_starts(text, others, options, message):
    with pytest.raises(ConfigError, match=message):
        preflight.check_inputs(compose(settings(text, *RUN, *others, **options))[0], torch.device("cpu"))


def test_gpus_that_are_not_hopper_and_older_cuda_are_refused(text, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    reasons = []
    for capability in ((9, 0), (10, 0), (8, 9)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        reasons.append(refusal(torch.device("cuda")))
    assert [reason.rpartition(" ")[-1] for reason in reasons] == ["12.8", "sm_100", "sm_89"]
    monkeypatch.setattr(preflight, "refusal", lambda device: reasons[-1])
    message = r"model.linear_dtype=fp8 needs a Hopper GPU \(sm_90\), and this one is sm_89; set model.linear_dtype=null"
    with pytest.raises(ConfigError, match=message):
        preflight.check_inputs(compose(settings(text, *RUN))[0], torch.device("cpu"))
