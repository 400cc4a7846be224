"""A model whose passes are fused has the loss and gradients of the plain one, for every family; and what is refused.

Triton's interpreter runs the kernels, in a process of its own, as in tests/fused/test_fused.py.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from ringflash.errors import ConfigError
from ringflash.models import ARCHITECTURES, FusedConfig, fuse_layers
from tests.interpreter import interpreting
from tests.models.cases import tiny

# What each family has in a form that is fused.
PASSES = {
    "gemma2": ["norm", "mlp"],
    "gpt_oss": ["norm"],
    "llama": ["norm", "rotary", "mlp"],
    "mistral": ["norm", "rotary", "mlp"],
    "olmo2": ["norm", "mlp"],
    "phi3": ["norm"],
    "qwen2": ["norm", "rotary", "mlp"],
    "qwen3": ["norm", "rotary", "mlp"],
    "smollm3": ["norm", "mlp"],
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def interpreter():
    with interpreting() as call:
        yield lambda *args: call("tests.models.test_fused", "distance", *args)


def distance(model_type: str, recompute: bool) -> tuple[list[str], float]:
    """What was fused, and the worst relative error of loss and gradients against the plain model, fp32."""
    from ringflash import Loopback
    from ringflash.models import checkpoint_layers, ring_inputs
    from tests.models.cases import loss_and_gradients

    ids = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = ring_inputs(ids, ids, ring=Loopback(1), documents=[[9, 15], [24]])

    def results(fused: bool):
        model = tiny(model_type).train()
        with torch.no_grad():  # norms start at 1 or 0, which would hide how their weights are used
            for name, p in model.named_parameters():
                if "norm" in name:
                    p += 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name)))
        found = fuse_layers(model, FusedConfig(), CPU) if fused else []
        if recompute:
            checkpoint_layers(model)
        return found, loss_and_gradients(model, inputs | {"kernel": "blocked"})

    _, (loss, gradients) = results(fused=False)
    found, (fused_loss, fused_gradients) = results(fused=True)
    errors = [float((fused_gradients[name] - g).norm() / g.norm()) for name, g in gradients.items() if g.norm() > 0]
    return found, max(errors + [float((fused_loss - loss).abs() / loss)])


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("model_type", sorted(PASSES))
def test_a_fused_model_trains_as_the_plain_one(interpreter, model_type):
    found, error = interpreter(model_type, False)
    assert found == PASSES[model_type]
    assert error < 1e-5


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_fused_model_trains_as_the_plain_one_when_layers_are_recomputed(interpreter):
    found, error = interpreter("qwen3", True)
    assert found == PASSES["qwen3"]
    assert error < 1e-5


def test_every_supported_family_is_listed():
    assert sorted(PASSES) == sorted(ARCHITECTURES)


def test_nothing_is_fused_on_a_cpu():
    model = tiny("llama")
    assert fuse_layers(model, FusedConfig(), CPU) == []
    assert all("forward" not in vars(module) for module in model.modules())


def test_what_must_be_fused_and_cannot_is_refused_by_name():
    for name in ("norm", "rotary", "mlp"):
        message = rf"^fused.{name}=always needs a GPU, .* got device cpu; fused.{name}=auto"
        with pytest.raises(ConfigError, match=message):
            fuse_layers(tiny("llama"), FusedConfig(**{name: "always"}), CPU)
    gpu = torch.device("cuda")
    with pytest.raises(ConfigError, match=r"^fused.rotary=always: no layer of model_type=phi3 has that pass"):
        fuse_layers(tiny("phi3"), FusedConfig(rotary="always"), gpu)


@pytest.mark.parametrize("name", ["norm", "rotary", "mlp", "loss", "optimizer"])
def test_a_value_that_is_none_of_the_three_is_refused(name):
    with pytest.raises(ConfigError, match=rf"^fused.{name}=on is not one of auto, always, never$"):
        FusedConfig(**{name: "on"})
