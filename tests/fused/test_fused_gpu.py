"""The fused passes, compiled, on a GPU: the claims of test_fused.py in bf16 and fp32."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.fused import claims

pytestmark = pytest.mark.gpu

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", claims.NORMS)
def test_rms_norm_is_exact(case, dtype):
    assert claims.norm_excess(case, dtype, "cuda") <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", claims.GATED_NORMS)
def test_gated_norm_is_exact(case, dtype):
    assert claims.gated_norm_excess(case, dtype, "cuda") <= 1


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
