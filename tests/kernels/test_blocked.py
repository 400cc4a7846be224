"""The plain-torch block kernel is attention: against float64 with the whole score matrix, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash.kernels import blocked
from ringflash.partial import Partial
from tests.kernels.cases import MASKS
from tests.kernels.oracle import by_kernel, problem, violations
from tests.strategies import masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_mask_is_within_the_bound_of_float64(mask, dtype):
    p = problem(mask(300), heads=(4, 2), head_dim=32, dtype=dtype)  # 300 tokens are two tiles of queries
    written = dtype != torch.float32
    assert violations(p, by_kernel(p, blocked.forward, blocked.backward, blocked.round_dq, written)) == []


@pytest.mark.parametrize("softcap", [0.5, 20.0, 10000.0])
def test_results_and_gradients_under_a_softcap_are_within_the_bound(softcap):
    p = problem(MASKS["packed"](90), heads=(4, 1), head_dim=40, softcap=softcap)
    assert violations(p, by_kernel(p, blocked.forward, blocked.backward, blocked.round_dq)) == []


@pytest.mark.parametrize("dims", [(12, 8), (8, 12), (192, 128)], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=str)
def test_values_may_have_a_head_size_of_their_own(heads, dims):
    p = problem(MASKS["packed"](90), heads=heads, head_dim=dims[0], value_dim=dims[1])
    assert violations(p, by_kernel(p, blocked.forward, blocked.backward, blocked.round_dq)) == []


@given(data=st.data(), length=st.integers(1, 40), heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]))
def test_any_mask_is_within_the_bound_of_float64(data, length, heads):
    mask, _ = data.draw(masks(length))
    p = problem(mask, heads=heads, head_dim=8)
    assert violations(p, by_kernel(p, blocked.forward, blocked.backward, blocked.round_dq)) == []


def test_a_carry_is_updated_in_place_and_equals_one_call():
    p = problem(MASKS["packed"](120), heads=(4, 2), head_dim=16)
    whole = blocked.forward(p.q, p.k, p.v, p.mask.intervals(), scale=p.scale)
    carry = Partial.identity(p.q)
    for keys in torch.arange(120).split([50, 1, 69]):
        part = p.mask.restrict(torch.arange(120), keys)
        state = blocked.forward(p.q, p.k[:, keys], p.v[:, keys], part.intervals(), scale=p.scale, carry=carry)
        assert state.out is carry.out
    torch.testing.assert_close((carry.out, carry.lse), (whole.out, whole.lse))


def test_the_softcaps_derivative_does_not_cancel_near_the_cap():
    q, k = torch.full((1, 1, 1, 1), 8.0), torch.ones(1, 1, 1, 1)
    _, slope = blocked._scores(q, k, scale=1.0, softcap=1.0)
    assert abs(float(slope.double() * torch.tensor(8.0).double().cosh() ** 2) - 1) < 1e-5
