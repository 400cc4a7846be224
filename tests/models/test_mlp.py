"""An MLP in tiles has the outputs and gradients of transformers' own, and never all of its activations at once."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ringflash.models import FusedConfig, fuse_layers, mlp, tile_mlps
from ringflash.models.lora import LoraConfig, add_lora
from ringflash.models.mlp import SPECS, leaf_modules, spec_of, tiles_of
from tests.models.cases import TINY, tiny

# One family of each spec, and one whose linear layers have biases.
FAMILIES = {"llama": {}, "phi3": {}, "granitemoeshared": {}, "arcee": {"mlp_bias": True}, "gpt_neox": {}, "phi": {}}
TOKENS, WIDTH = 300, TINY["intermediate_size"]
RECOMPUTED = {"use_reentrant": False}


class Sizes(TorchDispatchMode):
    """Records the largest number of elements that any operation returns, and how many products run."""

    largest = products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().size() > x.element_size():  # an expanded scalar
                self.largest = max(self.largest, x.numel())
        return out


def results(model_type, dtype, tile=None, kernel=False, recompute=False, watched=None, lora=None):
    """Output and gradients of a layer's MLP, by name; tile: None leaves it as transformers has it."""
    model = tiny(model_type, **FAMILIES.get(model_type, {})).to(dtype)
    if lora is not None:
        add_lora(model, lora)
    if kernel:
        fuse_layers(model, FusedConfig(), torch.device("cpu"))
    module = next(m for m in model.modules() if spec_of(m) is not None)
    generator = torch.Generator().manual_seed(1)

    def drawn(shape):  # the same in every dtype
        return torch.randn(shape, generator=generator).bfloat16().to(dtype)

    for p in module.parameters():
        p.data.copy_(drawn(p.shape) * 0.25)
    if tile is not None:
        tile_mlps(model, tile)
    x, dy = (drawn((2, TOKENS // 2, TINY["hidden_size"])) for _ in range(2))
    x.requires_grad_()
    with watched or nullcontext():
        y = checkpoint(module, x, **RECOMPUTED) if recompute else module(x)
        y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def worst(found, exact):
    """The largest relative error of any of them."""
    assert found.keys() == exact.keys()
    return max(float((found[name].double() - x.double()).norm() / x.double().norm()) for name, x in exact.items())


def kernel_error(tile, lora=None):
    """The worst error with the Triton kernel in fp32, for test_fused.py; tile: None keeps gate and up."""
    exact = results("llama", torch.float64, lora=lora)
    return worst(results("llama", torch.float32, tile, kernel=True, lora=lora), exact)


@pytest.mark.parametrize("tile", [1, 128, 299, 1000])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_tile_gives_the_output_and_gradients_of_the_whole(model_type, tile):
    exact = results(model_type, torch.float64)
    assert worst(results(model_type, torch.float32, tile), exact) < 1e-6
    assert worst(results(model_type, torch.float32, tile, recompute=True), exact) < 1e-6


@pytest.mark.parametrize("tile", [None, 128])
def test_no_tokens_give_gradients_of_0(tile):
    module = next(m for m in tiny("phi").modules() if spec_of(m) is not None)
    mlp.replace_forward(module, None, tile)
    x = torch.zeros(1, 0, TINY["hidden_size"], requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == x.shape
    assert [p.grad.count_nonzero().item() for p in module.parameters()] == [0] * 4


@pytest.mark.parametrize("lora", [LoraConfig(rank=3, alpha=5), LoraConfig(rank=3, targets=["down_proj"])], ids=str)
def test_adapters_in_tiles_have_the_gradients_of_peft_and_frozen_weights_none(lora):
    exact = results("llama", torch.float64, lora=lora)
    assert "gate_proj.base_layer.weight" not in exact
    for tile in (100, 1000):
        assert worst(results("llama", torch.float32, tile, recompute=True, lora=lora), exact) < 1e-6
    tiled = Sizes()
    results("llama", torch.float32, 128, recompute=True, watched=tiled, lora=lora)
    assert tiled.largest <= max(128 * WIDTH, TOKENS * TINY["hidden_size"])


def test_adapters_with_dropout_are_left_alone_and_merged_ones_refused():
    model = tiny("llama")
    add_lora(model, LoraConfig(rank=3, dropout=0.1, targets=["up_proj"]))
    assert tiles_of(model) == set()
    model = tiny("llama")
    add_lora(model, LoraConfig(rank=3))
    tile_mlps(model, 5)
    layer = leaf_modules(model)[0]
    layer.up_proj.merge()
    with pytest.raises(RuntimeError, match="had its adapters merged or changed"):
        layer(torch.zeros(1, 2, TINY["hidden_size"]))


def test_gradients_of_16_bit_weights_lose_nothing_over_tiles():
    exact = results("llama", torch.float64)
    whole, tiled = (worst(results("llama", torch.bfloat16, tile), exact) for tile in (None, 10))
    assert tiled < 1.1 * whole


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox"])
def test_activations_of_more_than_a_tile_never_exist(model_type):
    whole, tiled = Sizes(), Sizes()
    results(model_type, torch.float32, None, recompute=True, watched=whole)
    results(model_type, torch.float32, 128, recompute=True, watched=tiled)
    width = WIDTH * (2 if model_type == "phi3" else 1)
    assert whole.largest >= TOKENS * width
    assert tiled.largest <= max(128 * width, TOKENS * TINY["hidden_size"])


def test_recomputation_costs_no_product_more_than_without_tiles():
    whole, tiled = Sizes(), Sizes()
    results("llama", torch.float32, None, recompute=True, watched=whole)
    results("llama", torch.float32, TOKENS, recompute=True, watched=tiled)
    assert tiled.products == whole.products == 11  # 3 forward, 2 again, 6 backward


def test_experts_and_mlps_with_more_in_them_are_left_alone():
    for model_type in ("mixtral", "gpt_oss", "bitnet", "apertus"):
        model = tiny(model_type)
        tile_mlps(model)
        assert (tiles_of(model), leaf_modules(model)) == (set(), [])
    model = tiny("deepseek_v3")  # one layer of two is dense, the other has a shared expert
    tile_mlps(model, 5)
    assert tiles_of(model, 5) == {5}
    assert len(leaf_modules(model)) == 2


def test_by_default_a_tile_holds_a_fixed_number_of_activations():
    assert {spec_of(m).inputs for m in tiny("llama").modules() if spec_of(m)} == {SPECS[mlp.GATED].inputs}
    assert tiles_of(tiny("llama")) == {mlp.ELEMENTS // WIDTH}
    assert tiles_of(tiny("phi3")) == {mlp.ELEMENTS // (2 * WIDTH)}
