"""The portable Triton kernels, compiled, are attention on a GPU: every mask kind against float64.

    pytest -m gpu tests/kernels

A few minutes on an H100, half of them compiling. Whatever the kernels allocate is filled with NaN first.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from ringflash import IntervalMask
from ringflash.partial import Partial
from tests.kernels.cases import MASKS
from tests.kernels.oracle import Problem, by_kernel, delta_of, dense, distance, problem, violations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def no_tf32():
    """Plain torch attention in fp32 is a reference, so it must be fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False


def kernels():
    from ringflash.kernels import portable_backward, portable_forward

    return portable_forward.forward, portable_backward.backward


def poisoned(*shape: Any, **options: Any) -> torch.Tensor:
    """torch.empty, but what is not written over is seen."""
    return torch.full(shape[0] if len(shape) == 1 else shape, float("nan"), **options)


def checked(mask: IntervalMask, **options) -> list[str]:
    p = problem(mask, device="cuda", **options)
    with mock.patch("torch.empty", poisoned):
        actual = by_kernel(p, *kernels())
    return violations(p, actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_within_the_bound_of_float64(name, head_dim, dtype):
    assert checked(MASKS[name](1111), heads=(4, 2), head_dim=head_dim, dtype=dtype) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 40, 80, 96, 192, 256])
def test_other_head_sizes(head_dim, dtype):
    assert checked(MASKS["packed"](700), heads=(2, 1), head_dim=head_dim, dtype=dtype) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (8, 1), (6, 2)], ids="{0[0]}q{0[1]}kv".format)
def test_query_heads_share_kv_heads(heads, dtype):
    assert checked(MASKS["packed, window"](700), heads=heads, head_dim=128, dtype=dtype) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("softcap", [1.0, 30.0, 1000.0, 10000.0])
def test_softcap_and_its_derivative(softcap, head_dim, dtype):
    assert checked(MASKS["causal"](600), heads=(2, 1), head_dim=head_dim, dtype=dtype, softcap=softcap) == []


@pytest.mark.parametrize("name", ["causal", "packed", "window", "zigzag shard of the past"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_sequences(name, head_dim):
    mask = MASKS[name](5000 if name != "zigzag shard of the past" else 2500)
    assert checked(mask, heads=(2, 1), head_dim=head_dim, dtype=torch.bfloat16) == []


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "16 bits"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_chain_of_carries_is_within_the_bound_of_float64(head_dim, in_place):
    forward, _ = kernels()
    p = problem(MASKS["packed"](1111), heads=(4, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")

    def hop(begin: int, end: int, carry: Partial | None, out: torch.Tensor | None = None) -> Partial:
        part = p.mask.restrict(torch.arange(1111), torch.arange(begin, end)).intervals("cuda")
        return forward(p.q, p.k[:, begin:end], p.v[:, begin:end], part, scale=p.scale, carry=carry, out=out)

    with mock.patch("torch.empty", poisoned):
        state = hop(503, 1111, hop(500, 503, hop(0, 500, None)), None if in_place else torch.empty_like(p.q))
    exact, plain = dense(p, torch.float64), dense(p, torch.bfloat16)
    bound = 2 * distance(plain["out"], exact["out"])
    assert [distance(state.out, exact["out"]) <= bound, distance(state.lse, exact["lse"]) <= 1e-5] == [True, True]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_views_give_the_same_bits(dtype):
    forward, backward = kernels()
    p = problem(MASKS["window"](700), heads=(4, 2), head_dim=64, dtype=dtype, device="cuda")
    intervals = p.mask.intervals("cuda")

    def strided(x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, D] that is a slice of heads of a [B, H, S, D] tensor."""
        held = torch.full((len(x), x.shape[2] + 3, *x.shape[1::2]), float("nan"), dtype=x.dtype, device=x.device)
        held[:, 2:-1] = x.transpose(1, 2)
        return held[:, 2:-1].transpose(1, 2)

    results = []
    for view in (torch.clone, strided):
        q, k, v, dout = (view(x) for x in (p.q, p.k, p.v, p.dout))
        state = forward(q, k, v, intervals, scale=p.scale)
        carry = Partial(view(state.out), state.lse.clone())
        state = forward(q, k, v, intervals, scale=p.scale, carry=carry)
        gradients = [view(torch.ones_like(x, dtype=torch.float32)) for x in (p.q, p.k, p.v)]
        dq, dk, dv = gradients
        rows = [torch.cat([x, x], dim=1)[:, 4:] for x in (state.lse, delta_of(p.dout, state))]
        backward(dout, q, k, v, *rows, intervals, scale=p.scale, dq=dq, dk=dk, dv=dv)
        results.append([state.out, state.lse, *gradients])
    assert [torch.equal(a, b) for a, b in zip(*results, strict=True)] == [True] * 5


@pytest.mark.parametrize("head_dim", [64, 128])
def test_runs_are_bit_equal(head_dim):
    p = problem(MASKS["packed"](3000), heads=(8, 2), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    runs = []
    for _ in range(3):
        torch.manual_seed(1)  # the noise that by_kernel adds gradients to
        runs.append(by_kernel(p, *kernels()))
    assert [name for run in runs for name in run if not torch.equal(run[name], runs[0][name])] == []


def test_tensors_of_more_than_2_to_the_31_elements():
    """The last rows of 2^19 tokens x 33 heads x 128, under a window, against float64 of those rows alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("takes 35 GiB of GPU memory")
    forward, backward = kernels()
    tokens, heads, head_dim, left, checked_rows = 2**19, 33, 128, 200, 300

    def draw(count: int) -> torch.Tensor:
        return torch.randn(1, tokens, count, head_dim, device="cuda", dtype=torch.bfloat16)

    q, k, v, dout = draw(heads), draw(1), draw(1), draw(heads)
    assert q.numel() > 2**31
    scale, intervals = head_dim**-0.5, IntervalMask.window(tokens, left).intervals("cuda")
    state = forward(q, k, v, intervals, scale=scale, out=torch.empty_like(q))
    delta = torch.stack([(dout[:, :, h].float() * state.out[:, :, h].float()).sum(-1) for h in range(heads)], dim=1)
    dq = torch.zeros(q.shape, device="cuda")
    dk, dv = torch.zeros(k.shape, device="cuda"), torch.zeros(v.shape, device="cuda")
    backward(dout, q, k, v, state.lse, delta, intervals, scale=scale, dq=dq, dk=dk, dv=dv)

    # The last rows see nothing before the window; keys in the last rows are seen by the last rows only.
    rows = slice(tokens - checked_rows - left, tokens)
    mask = IntervalMask.window(checked_rows + left, left)
    p = Problem(q[:, rows], k[:, rows], v[:, rows], dout[:, rows], mask, scale, None)
    exact, plain = dense(p, torch.float64), dense(p, torch.bfloat16)
    actual = {"out": state.out, "dq": dq, "dk": dk, "dv": dv}
    late = {
        name: [x[:, -checked_rows:] for x in (whole[:, rows], exact[name], plain[name])]
        for name, whole in actual.items()
    }
    assert [
        name for name, (x, truth, rounded) in late.items() if not distance(x, truth) <= 2 * distance(rounded, truth)
    ] == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [40, 128])
def test_sums_are_rounded_as_torch_does_into_their_heads_alone(head_dim, dtype):
    from ringflash.kernels.portable_backward import round_into

    x = torch.randn(1111, 2, 2, 3, head_dim, device="cuda").transpose(0, 2)[:, 0]  # as gradients lie on their way
    whole = torch.full((2, 1111, 6, head_dim), 7.0, dtype=dtype, device="cuda")
    round_into(whole[:, :, 3:], x)
    assert torch.equal(whole[:, :, 3:], x.to(dtype))
    assert bool((whole[:, :, :3] == 7).all())
