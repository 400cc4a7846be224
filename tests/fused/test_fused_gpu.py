"""The fused passes, compiled, on a GPU: the claims of test_fused.py in bf16 and fp32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ringflash.models.float8 import Operand, refusal, set_float8
from tests.fused import claims

pytestmark = pytest.mark.gpu

HOPPER = pytest.mark.skipif(
    torch.cuda.is_available() and refusal(torch.device("cuda")) is not None, reason="products in 8 bits need sm_90"
)
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", claims.NORMS)
def test_rms_norm_is_exact(case, dtype):
    assert claims.norm_excess(case, dtype, "cuda") <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", claims.GATED_NORMS)
def test_gated_norm_is_exact(case, dtype):
    assert claims.gated_norm_excess(case, dtype, "cuda") <= 1


@HOPPER
@pytest.mark.parametrize("case", claims.CASTS)
def test_casts_of_what_8_bits_hold_are_exact(case):
    assert claims.casts_are_exact(case, "cuda")


@HOPPER
def test_casts_have_the_bits_of_plain_torch():
    x = torch.randn(1000, 14336, device="cuda", dtype=torch.bfloat16)
    x[:, ::3] *= 1000
    on_gpu, on_cpu = Operand(x), Operand(x.cpu())
    for found, expected in ((on_gpu.rows, on_cpu.rows), (on_gpu.columns, on_cpu.columns)):
        assert torch.equal(found.scales.cpu(), expected.scales)
        assert torch.equal(found.values.cpu().float(), expected.values.float())


@HOPPER
@pytest.mark.parametrize("tokens", [16, 4099])
def test_a_layer_in_8_bits_has_the_results_of_plain_torch(tokens):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = torch.nn.Linear(512, 768, dtype=torch.bfloat16)
        x, dy = torch.randn(tokens, 512).bfloat16(), torch.randn(tokens, 768).bfloat16()
        layer, x, dy = layer.to(device), x.to(device).requires_grad_(), dy.to(device)
        set_float8(layer)
        y = layer(x)
        y.backward(dy)
        results.append([z.detach().cpu().double() for z in (y, x.grad, layer.weight.grad, layer.bias.grad)])
    for exact, found in zip(*results, strict=True):
        assert (found - exact).norm() < 5e-3 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", claims.ROTARIES)
def test_rotary_is_exact(case, dtype):
    assert claims.rotary_excess(case, dtype, "cuda") <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_is_exact(activation, dtype):
    assert claims.gated_excess(activation, dtype, "cuda") <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("vocabulary", [7, 9000, 151936])
def test_cross_entropy_is_exact(vocabulary, softcap, dtype):
    of_losses, of_gradient = claims.losses(vocabulary, softcap, dtype, "cuda")
    assert (of_losses <= 1, of_gradient <= 1) == (True, True), (of_losses, of_gradient)


def test_ignored_tokens_have_no_loss_and_no_gradient():
    assert claims.ignored_rows_are_zero("cuda")


def test_a_second_backward_through_overwritten_inputs_is_refused():
    assert "a second backward through a fused MLP" in claims.second_backward_error("cuda")


def test_a_step_in_parts_has_the_bits_of_the_whole():
    assert claims.adamw_in_parts_is_equal("cuda")


def test_a_fused_step_of_split_weights_is_the_plain_one():
    found = claims.adamw_distances("cuda")
    assert found["moved"] < 1e-5
    assert max(found["mean"], found["square"]) < 2**-7
