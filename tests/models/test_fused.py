"""A model whose passes are fused has the loss and gradients of the plain one, for every family; and what is refused.

Triton's interpreter runs the kernels, in a separate process, as in tests/fused/test_fused.py.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch

from ringflash.errors import ConfigError
from ringflash.models import ARCHITECTURES, FusedConfig, fuse_layers, fused
from ringflash.models.lora import LoraConfig
from tests.models.cases import tiny
from tests.models.test_mlp import kernel_error  # noqa: F401  # which the interpreting process calls

# What each family has in a form that is fused, and whether its layers' additions are fused with the norms after them.
ALL, NORM_ROTARY, NORM_MLP = ("norm", "rotary", "mlp"), ("norm", "rotary"), ("norm", "mlp")
PASSES = {
    (ALL, True): "cwm dots1 gemma llama ministral mistral qwen2 qwen2_moe qwen3 solar_open",
    (ALL, False): "gemma2 granite hyperclovax vaultgemma",
    (
        NORM_MLP,
        True,
    ): "axk1 deepseek_v2 deepseek_v3 diffllama ernie4_5 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite helium "
    "hunyuan_v1_dense hunyuan_v1_moe hy_v3 laguna mimo_v2_flash ministral3 smollm3 youtu",
    (NORM_MLP, False): "afmoe bamba exaone4 gemma3_text granite_swa minicpm3 olmo2 olmo3 "
    "olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next",
    (NORM_ROTARY, True): "arcee mellum mixtral qwen3_moe",
    (NORM_ROTARY, False): "granitemoe granitemoeshared",
    (("norm",), True): "bitnet glm minimax_m2 olmoe seed_oss",
    (("norm",), False): "apertus falcon_h1 flex_olmo glm4 gpt_oss granitemoe_swa granitemoehybrid nemotron_h phi3",
    (("rotary",), False): "jais2 phimoe",
    (("mlp",), False): "cohere cohere2 gemma4_text olmo",
    ((), False): "cohere2_moe gemma3n_text gpt_neox llama4_text nanochat persimmon phi starcoder2",
}
# One family of each kind of norm, attention, layer and activation.
PROVEN = (
    "deepseek_v3",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "granite",
    "helium",
    "llama",
    "mistral",
    "mixtral",
    "nemotron_h",
    "qwen2",
    "qwen3",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def interpreter(interpreting):
    return partial(interpreting, "tests.models.test_fused")


def distance(model_type: str, recompute: bool) -> tuple[list[str], float]:
    """What was fused, and the worst relative error of loss and gradients against the plain model, fp32."""
    from ringflash import Loopback
    from ringflash.models import checkpoint_layers, ring_inputs
    from tests.models.cases import loss_and_gradients

    ids = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    inputs = ring_inputs(ids, ids, ring=Loopback(1), documents=[[9, 15], [24]], config=tiny(model_type).config)

    def results(fuse: bool):
        model = tiny(model_type).train()
        with torch.no_grad():  # norms start at 1 or 0, which would hide how their weights are used
            for name, p in model.named_parameters():
                if "norm" in name:
                    p += 0.3 * torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name)))
        found = fuse_layers(model, FusedConfig(), CPU) if fuse else []
        if recompute:
            checkpoint_layers(model)
        return found, loss_and_gradients(model, inputs | {"kernel": "blocked"})

    _, (loss, gradients) = results(fuse=False)
    found, (fused_loss, fused_gradients) = results(fuse=True)
    errors = [float((fused_gradients[n] - g).norm() / g.norm()) for n, g in gradients.items() if g.norm() > 0]
    return found, max(errors + [float((fused_loss - loss).abs() / loss)])


def cached_distance(model_type: str) -> tuple[float, int]:
    """The relative error of logits behind what a cache holds, fused against plain, fp32, and how often heads turned."""
    from ringflash.fused import rotary
    from ringflash.models import RingCache, prefill

    ids, logits = torch.randint(1, 97, (1, 9), generator=torch.Generator().manual_seed(0)), []
    with patch.object(rotary, "rotary", wraps=rotary.rotary) as turned:
        for config in (None, FusedConfig()):
            model = tiny(model_type).eval()
            if config is not None:
                fuse_layers(model, config, CPU)
            cache = RingCache(model, 9, kernel="blocked")
            prefill(model, ids[:, :6], cache)
            with torch.no_grad():
                steps = (ids[:, 6:8], ids[:, 8:])
                logits.append(torch.cat([model(x, past_key_values=cache, use_cache=True).logits for x in steps], dim=1))
    return float((logits[1] - logits[0]).norm() / logits[0].norm()), turned.call_count


def passes(families: list[str]) -> dict[str, tuple[tuple[str, ...], bool]]:
    """What is fused in each family, as PASSES has it."""
    found = {}
    for model_type in families:
        model = tiny(model_type)
        names = tuple(fuse_layers(model, FusedConfig(), CPU))
        forwards = [vars(module)["forward"].func for module in model.modules() if "forward" in vars(module)]
        found[model_type] = names, fused._pre_norm_layer in forwards
    return found


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("model_type", PROVEN)
def test_a_fused_model_trains_as_the_plain_one(interpreter, model_type):
    found, error = interpreter("distance", model_type, False)
    assert found
    assert error < 1e-5


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_fused_model_trains_as_the_plain_one_when_layers_are_recomputed(interpreter):
    found, error = interpreter("distance", "qwen3", True)
    assert found == list(ALL)
    assert error < 1e-5


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("model_type", ["qwen3", "gemma2"])
def test_a_fused_model_reads_with_a_cache_as_the_plain_one(interpreter, model_type):
    error, turned = interpreter("cached_distance", model_type)
    assert error < 1e-5
    assert turned == 2 * 2 * 3  # queries and keys, layers, forwards: none of them transformers' own


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("tile", "lora"), [(None, None), (128, None), (None, LoraConfig(rank=3))], ids=["whole", "tiles", "adapters"]
)
def test_an_mlp_with_its_kernel_is_exact(interpreter, tile, lora):
    assert interpreter("kernel_error", tile, lora) < 1e-5


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_what_is_fused_in_each_family_is_known(interpreter):
    expected = {name: key for key, names in PASSES.items() for name in names.split()}
    assert set(expected) == set(ARCHITECTURES)
    assert interpreter("passes", list(expected)) == expected


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
