"""Linear layers in 8 bits have the products of their definition, in MLPs and tiles, too, and only some layers are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ringflash.errors import ConfigError
from ringflash.models import ModelConfig, build_model, checkpoint_layers, ring_inputs, tile_mlps
from ringflash.models.float8 import in_float8, set_float8
from ringflash.models.linear_dtype import use_float8
from ringflash.models.mlp import replace_forward
from ringflash.ring.transport import Loopback
from tests.models.cases import TINY, architecture, loss_and_gradients, tiny


def drawn(*shape, seed=1):
    """Random numbers in bf16, with a row and a column of zeros, of numbers 1000 times as large, and a tiny row."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[0], x[:, 1], x[1], x[:, 2], x[3] = 0, 0, x[1] * 1000, x[:, 2] * 1000, x[3] * 1e-37
    return x.bfloat16()


def cast(row):
    """A row as its 8-bit values times its scale, in float64."""
    largest = row.abs().max().float().clamp(min=1e-30)
    return (row.float() * (448 / largest)).to(torch.float8_e4m3fn).double() * (largest / 448)


def product(a, b):
    """a b^T of 16-bit matrices, one number at a time."""
    return torch.stack([torch.stack([cast(x) @ cast(y) for y in b]) for x in a])


@pytest.mark.parametrize("tokens", [16, 37])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_has_the_output_and_gradients_of_a_plain_loop(tokens, bias):
    layer = nn.Linear(32, 16, bias=bias, dtype=torch.bfloat16)
    set_float8(layer)
    x, dy = drawn(tokens, 32).requires_grad_(), drawn(tokens, 16, seed=2)
    layer.weight.data.copy_(drawn(16, 32, seed=3))
    y = layer(x[None])
    y.backward(dy[None])
    w = layer.weight.detach()
    expected = [product(x.detach(), w), product(dy, w.T), product(dy.T, x.detach().T)]
    if bias:
        expected[0] = expected[0].bfloat16() + layer.bias.detach().double()
        assert torch.allclose(layer.bias.grad.double(), dy.double().sum(0), rtol=2**-7)
    for found, exact in zip((y[0], x.grad, layer.weight.grad), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert torch.allclose(found.double(), exact, rtol=2**-7, atol=1e-5 * float(exact.abs().max()))


def test_a_row_that_is_not_finite_makes_its_results_nan_and_no_tokens_have_gradients_of_0():
    layer = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
    set_float8(layer)
    x = torch.ones(3, 16, dtype=torch.bfloat16)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    assert layer(x).isfinite().any(1).tolist() == [False, False, True]
    layer(x[:0]).sum().backward()
    assert layer.weight.grad.count_nonzero() == 0


def mlp_results(rows, dy, tile=None, whole=True):
    """Output and gradients of an MLP on rows; whole: as one function, else as transformers calls its layers."""
    model = tiny("llama").bfloat16()
    use_float8(model)
    mlp = model.model.layers[0].mlp
    if whole:
        replace_forward(mlp, None, tile)
    x = rows.clone().requires_grad_()
    y = mlp(x)
    y.backward(dy)
    return [y.detach(), x.grad], [p.grad for p in mlp.parameters()]


def test_an_mlp_as_one_function_has_the_bits_of_its_layers_and_each_tile_has_its_own_scales():
    rows, dy = drawn(300, TINY["hidden_size"]), drawn(300, TINY["hidden_size"], seed=2)
    of_tokens, of_weights = mlp_results(rows, dy, whole=False)
    for tile in (None, 512):
        found, gradients = mlp_results(rows, dy, tile)
        assert all(torch.equal(x, y) for x, y in zip(found + gradients, of_tokens + of_weights, strict=True))
    parts = [mlp_results(rows[at], dy[at], whole=False) for at in (slice(128), slice(128, 256), slice(256, 300))]
    of_tokens, of_weights = mlp_results(rows, dy, tile=128)
    assert all(torch.equal(x, torch.cat(y)) for x, *y in zip(of_tokens, *(tokens for tokens, _ in parts), strict=True))
    for found, *of_tiles in zip(of_weights, *(weights for _, weights in parts), strict=True):
        total = torch.stack(of_tiles).double().sum(0)
        assert (found.double() - total).norm() < 2**-7 * total.norm()


def test_a_recomputed_layer_has_the_bits_of_a_layer_that_is_not():
    inputs = ring_inputs(torch.arange(40)[None], torch.arange(40)[None], documents=[25, 15], ring=Loopback(1))
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = build_model(ModelConfig(architecture=architecture("llama"), dtype="bf16", linear_dtype="fp8")).train()
        if recompute:
            checkpoint_layers(model)
            tile_mlps(model)
        found.append(loss_and_gradients(model, inputs))
    (loss, gradients), (again, others) = found
    assert torch.equal(loss, again)
    assert all(torch.equal(x, others[name]) for name, x in gradients.items())


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
        ("mixtral", "q_proj k_proj v_proj o_proj"),  # its experts are no linear layers, nor is its router
        ("qwen2_moe", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),  # not shared_expert_gate
        ("gpt_neox", "query_key_value dense dense_h_to_4h dense_4h_to_h"),
        ("starcoder2", "q_proj k_proj v_proj o_proj"),  # its MLP is not known
    ],
)
def test_the_linear_layers_of_attention_and_of_known_mlps_are_in_8_bits(model_type, names):
    model = tiny(model_type)
    use_float8(model)
    found = {name.rpartition(".")[-1] for name, module in model.named_modules() if in_float8(module)}
    assert found == {*names.split()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear_dtype": "fp4"}, "model.linear_dtype=fp4 is not one of null, fp8"),
        ({"dtype": "fp32"}, "model.linear_dtype=fp8 needs model.dtype=bf16: with model.dtype=fp32"),
        ({"architecture": architecture("laguna")}, r"32768, and model.layers.0.self_attn.g_proj.weight has \[4, "),
        ({"architecture": architecture("llama", head_dim=10)}, r"q_proj.weight has \[40, 32\]"),
        ({"architecture": architecture("llama", intermediate_size=32784)}, r"gate_proj.weight has \[32784, 32\]"),
    ],
    ids=["name", "fp32", "heads", "size", "wide"],
)  # fmt: skip
def test_what_cannot_be_in_8_bits_is_refused(fields, message):
    given = {"architecture": architecture("llama"), "dtype": "bf16", "linear_dtype": "fp8"}
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(**given | fields))


def test_frozen_weights_and_inputs_have_no_gradient():
    for frozen in ("x", "weight"):
        layer = nn.Linear(16, 16, bias=False, dtype=torch.bfloat16)
        set_float8(layer)
        x = torch.ones(16, 16, dtype=torch.bfloat16, requires_grad=frozen == "weight")
        layer.weight.requires_grad_(frozen == "x")
        layer(x).sum().backward()
        assert [x.grad is None, layer.weight.grad is None] == [frozen == "x", frozen == "weight"]
