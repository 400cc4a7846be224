"""The fused passes give what the layers give that they replace, against float64, in Triton's interpreter.

The interpreter runs in a separate process, since Triton chooses it when it is imported. It truncates to bfloat16
instead of rounding, so 16 bits are fp16 here; test_fused_gpu.py has bf16.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.float16, id="fp16")]


@pytest.fixture(scope="module")
def claim(interpreting):
    """Calls a function of tests.fused.claims in a process whose kernels are interpreted."""
    return partial(interpreting, "tests.fused.claims")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one-row", "odd-width", "gemma", "narrow", "wide"])
def test_rms_norm_is_exact(claim, case, dtype):
    assert claim("norm_excess", case, dtype) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one-row", "odd-groups", "narrow"])
def test_gated_norm_is_exact(claim, case, dtype):
    assert claim("gated_norm_excess", case, dtype) <= 1


@pytest.mark.parametrize("case", ["one-row", "odd", "tiles", "wide", "narrow"])
def test_casts_of_what_8_bits_hold_are_exact(claim, case):
    assert claim("casts_are_exact", case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one-token", "rows-share-positions", "rows-differ", "no-norm", "odd-half"])
def test_rotary_is_exact(claim, case, dtype):
    assert claim("rotary_excess", case, dtype) <= 1


def test_a_frozen_weight_leaves_the_gradient_of_the_input_as_it_is(claim):
    assert claim("frozen_weight_differences") == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_is_exact(claim, activation, dtype):
    assert claim("gated_excess", activation, dtype) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("vocabulary", [7, 9000])
def test_cross_entropy_is_exact(claim, vocabulary, softcap, dtype):
    of_losses, of_gradient = claim("losses", vocabulary, softcap, dtype)
    assert (of_losses <= 1, of_gradient <= 1) == (True, True), (of_losses, of_gradient)


def test_ignored_tokens_have_no_loss_and_no_gradient(claim):
    assert claim("ignored_rows_are_zero")


def test_a_second_backward_through_overwritten_inputs_is_refused(claim):
    assert "a second backward through a fused MLP" in claim("second_backward_error")


def test_a_fused_step_of_split_weights_is_the_plain_one(claim):
    found = claim("adamw_distances")
    assert found["moved"] < 1e-5
    assert max(found["mean"], found["square"]) < 2**-7  # each rounded at random, to one of two neighbours


def test_a_step_in_parts_has_the_bits_of_the_whole(claim):
    assert claim("adamw_in_parts_is_equal")
