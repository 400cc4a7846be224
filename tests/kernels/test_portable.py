"""The portable Triton kernels are attention: in Triton's interpreter, against float64 with the whole score matrix.

Triton decides when it is imported whether kernels are compiled or interpreted, and other tests import it to compile.
The claims below therefore run in another process, which sets TRITON_INTERPRET before any import. With tiles of 32 x 16,
the few tokens that the interpreter can handle make many tiles of every kind.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch

from ringflash import IntervalMask, flash_attention
from ringflash.mask import rows_seen
from ringflash.partial import Partial
from tests.kernels.cases import MASKS
from tests.kernels.oracle import Problem, by_kernel, delta_of, dense, distance, poisoned, problem, strided, violations

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

TOKENS = 75


@pytest.fixture(scope="module")
def interpreter(interpreting):
    """Calls a function of this module in a process whose kernels are interpreted."""
    return lambda claim, *args: interpreting("tests.kernels.test_portable", claim.__name__, *args)


# -- what the interpreting process runs


def kernels(tma: bool = True, columns: int = 256, apart: bool = False):
    """(forward, backward, round_dq) with small tiles, loaded by descriptors or by pointers.

    columns: of a result that a program accumulates at a time. apart: dk and dv by separate programs.
    """
    from ringflash.kernels import portable_backward, portable_forward

    wide = portable_forward.Tuning(32, 16, warps=4, stages=2, tma=tma, columns=columns)
    tall = portable_forward.Tuning(16, 32, warps=4, stages=2, tma=tma, columns=columns)
    return (
        partial(portable_forward.forward, tuning=wide),
        partial(portable_backward.backward, dq_tuning=wide, dkdv_tuning=(tall, tall) if apart else (tall,)),
        portable_backward.round_dq,
    )


def checked(p: Problem, *tiles: Any) -> list[str]:
    """Violations of the bound by out and the gradients; dk and dv of fp16 are written, of fp32 added."""
    with mock.patch("torch.empty", poisoned):
        actual = by_kernel(p, *kernels(*tiles), written=p.k.dtype != torch.float32)
    return violations(p, actual)


def violations_of_mask(name: str, dtype: torch.dtype, tma: bool) -> list[str]:
    mask = MASKS[name](50)
    return checked(problem(mask, batch=len(mask.lo), head_dim=32, dtype=dtype), tma)


def violations_of_shape(heads: tuple[int, int], head_dim: int, softcap: float | None, dtype: torch.dtype) -> list[str]:
    mask = MASKS["packed"](50)
    return checked(problem(mask, heads=heads, head_dim=head_dim, softcap=softcap, dtype=dtype), head_dim != 80)


def violations_of_values(heads: tuple[int, int], head_dim: int, value_dim: int, tma: bool) -> list[str]:
    return checked(problem(MASKS["packed"](50), heads=heads, head_dim=head_dim, value_dim=value_dim), tma)


def violations_in_passes(name: str, dims: tuple[int, int], columns: int, dtype: torch.dtype, tma: bool) -> list[str]:
    sizes = {"batch": 1, "heads": (2, 1), "head_dim": dims[0], "value_dim": dims[1]}
    return checked(problem(MASKS[name](50), **sizes, dtype=dtype, softcap=20.0), tma, columns, True)


def chain_with_values_of_their_own(columns: int) -> float:
    """The distance of a carry over two runs of keys from one call, results written elsewhere."""
    forward, *_ = kernels(columns=columns)
    p = problem(MASKS["packed"](TOKENS), head_dim=64, value_dim=32)
    whole = forward(p.q, p.k, p.v, p.mask.intervals(), scale=p.scale)
    state, out = None, torch.empty_like(whole.out)
    for begin, end in ((0, 40), (40, TOKENS)):
        part = p.mask.restrict(torch.arange(TOKENS), torch.arange(begin, end)).intervals()
        into = out if begin else None
        state = forward(p.q, p.k[:, begin:end], p.v[:, begin:end], part, scale=p.scale, carry=state, out=into)
    return distance(out, whole.out)


def violations_of_default_tiles(dtype: torch.dtype) -> list[str]:
    from ringflash.kernels import portable_backward, portable_forward

    p = problem(MASKS["causal"](150), batch=1, dtype=dtype)
    return violations(p, by_kernel(p, portable_forward.forward, portable_backward.backward, portable_backward.round_dq))


def chain_against_one_call(out_dtype: torch.dtype | None, rounding: float) -> dict[str, bool | torch.dtype]:
    """A forward over three runs of keys, each carrying the last, the middle one seen by few rows."""
    forward, *_ = kernels()
    p = problem(MASKS["packed"](TOKENS), heads=(4, 2), head_dim=32)
    whole = forward(p.q, p.k, p.v, p.mask.intervals(), scale=p.scale)

    def hop(begin: int, end: int, carry: Partial | None, out: torch.Tensor | None = None) -> Partial:
        part = p.mask.restrict(torch.arange(TOKENS), torch.arange(begin, end)).intervals()
        return forward(p.q, p.k[:, begin:end], p.v[:, begin:end], part, scale=p.scale, carry=carry, out=out)

    before = hop(30, 35, hop(0, 30, None))
    state = hop(35, TOKENS, before, None if out_dtype is None else torch.empty_like(p.q, dtype=out_dtype))
    return {
        "close": distance(state.out, whole.out) < rounding and distance(state.lse, whole.lse) < 1e-6,
        "out in place": state.out is before.out,
        "lse in place": state.lse is before.lse,
        "dtype": state.out.dtype,
    }


def chain_that_writes_each_tile_once(chosen: str) -> list[bool]:
    """A forward over four runs of keys, of which tiles of queries see from none to three, in two batch rows."""
    from ringflash.kernels import blocked

    forward = kernels()[0] if chosen == "portable" else blocked.forward
    p, runs = (
        problem(MASKS["packed"](TOKENS), heads=(4, 2), head_dim=32),
        [slice(*x) for x in pairwise((0, 30, 50, 60, TOKENS))],
    )
    whole = forward(p.q, p.k, p.v, p.mask.intervals(), scale=p.scale)
    parts = [p.mask.restrict(torch.arange(TOKENS), torch.arange(run.start, run.stop)) for run in runs]
    state, out = None, torch.full_like(p.q, torch.nan)
    with mock.patch("torch.empty", poisoned):
        for run, part, seen in zip(runs, parts, rows_seen(parts), strict=True):
            given = p.q, p.k[:, run], p.v[:, run], part.intervals()
            state = forward(*given, scale=p.scale, carry=state, out=out, seen=seen)
            assert state.out.dtype == torch.float32
    return [distance(out, whole.out) < 1e-6, distance(state.lse, whole.lse) < 1e-6]


def rows_touched_by_a_hop_that_few_rows_see() -> list[int]:
    """Rows of the carry that a forward writes: those of query tiles that see a key, and no others."""
    forward, *_ = kernels()
    p = problem(MASKS["causal"](TOKENS).restrict(torch.arange(TOKENS), torch.arange(70, TOKENS)), batch=1, heads=(1, 1))
    carry = Partial.identity(p.q)
    carry.out.fill_(7)  # lse -inf: this out counts for nothing, and a row that is written loses it
    forward(p.q, p.k, p.v, p.mask.intervals(), scale=p.scale, carry=carry)
    return (carry.out[0, :, 0, 0] != 7).nonzero()[:, 0].tolist()


def strided_against_contiguous() -> dict[str, float]:
    """Inputs as transformers and head-parallel callers hold them, gradients into slices; 0 where equal bit for bit."""
    forward, backward, _ = kernels()
    p = problem(MASKS["window"](40), heads=(4, 2), head_dim=32)
    intervals = p.mask.intervals()
    results = []
    for view in (torch.clone, strided):
        q, k, v, dout = (view(x) for x in (p.q, p.k, p.v, p.dout))
        state = forward(q, k, v, intervals, scale=p.scale)
        carry = Partial(view(state.out), torch.cat([state.lse, state.lse], dim=1)[:, :4])
        state = forward(q, k, v, intervals, scale=p.scale, carry=carry)
        dq, dk, dv = (view(torch.ones_like(x)) for x in (p.q, p.k, p.v))
        rows = [torch.cat([x, x], dim=1)[:, 4:] for x in (state.lse, delta_of(p.dout, state))]
        backward(dout, q, k, v, *rows, intervals, scale=p.scale, dq=dq, dk=dk, dv=dv)
        results.append({"out": state.out, "lse": state.lse, "dq": dq, "dk": dk, "dv": dv})
    return {name: (x - results[1][name]).abs().max().item() for name, x in results[0].items()}


def what_differs_between_two_runs() -> list[str]:
    p = problem(MASKS["causal"](40), heads=(4, 2), head_dim=32, dtype=torch.float16)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)  # the noise that by_kernel adds gradients to
        runs.append(by_kernel(p, *kernels()))
    return [name for name in runs[0] if not torch.equal(runs[0][name], runs[1][name])]


def nothing_to_see() -> list[tuple]:
    """Shapes and values of a forward without keys, with and without a carry, and of a backward."""
    forward, backward, _ = kernels()
    p = problem(MASKS["causal"](8).restrict(torch.arange(8), torch.arange(0)), head_dim=32)
    intervals = p.mask.intervals()
    fresh = forward(p.q, p.k, p.v, intervals, scale=p.scale, out=torch.empty_like(p.q, dtype=torch.float16))
    carry = Partial(torch.ones_like(p.q), torch.zeros(2, 2, 8))
    kept = forward(p.q, p.k, p.v, intervals, scale=p.scale, carry=carry)
    dq, dk, dv = (torch.zeros_like(x) for x in (p.q, p.k, p.v))
    backward(p.dout, p.q, p.k, p.v, kept.lse, kept.lse, intervals, scale=p.scale, dq=dq, dk=dk, dv=dv)
    return [fresh.out.abs().max().item(), fresh.lse.max().item(), kept.out is carry.out, dq.abs().max().item()]


def refusal(change: str) -> str:
    """The kernels' errors for requests with a single fault."""
    forward, backward, _ = kernels()
    p = problem(MASKS["causal"](16), heads=(4, 2), head_dim=32)
    q, k, v, dout, mask, scale, softcap, out = p.q, p.k, p.v, p.dout, p.mask, p.scale, None, None
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    match change:
        case "bfloat16":
            q, k, v = (x.bfloat16() for x in (q, k, v))
        case "head_dim":
            q, k, v = (x[..., :20] for x in (q, k, v))
        case "heads":
            q = q[:, :, :3]
        case "dtypes":
            k = k.half()
        case "base":
            k = torch.zeros(k.numel() + 1)[1:].view_as(k)
        case "stride":
            k = torch.zeros(2, 16, 2 * 32 + 1)[..., :-1].unflatten(2, (2, 32))
        case "transposed":
            v = v.transpose(1, 3).contiguous().transpose(1, 3)
        case "scale":
            scale = 0.0
        case "softcap":
            softcap = -1.0
        case "dout":
            dout = torch.ones(()).expand(q.shape)
        case "dq":
            dq = dq.half()
        case "out":
            out = torch.zeros_like(q)[:, 1:]
        case "intervals":
            mask = MASKS["causal"](15)
    try:
        state = forward(q, k, v, mask.intervals(), scale=scale, softcap=softcap, out=out)
        delta = torch.zeros_like(state.lse)
        backward(dout, q, k, v, state.lse, delta, mask.intervals(), scale=scale, dq=dq, dk=dk, dv=dv)
    except ValueError as error:
        return str(error)
    return "accepted"


def violations_of_flash_attention(softcap: float | None, compensated: bool) -> list[str]:
    """Through autograd, on keys and values whose mean is twice their deviation."""
    p = problem(MASKS["causal"](150), batch=1, head_dim=32, dtype=torch.float16, softcap=softcap, means=(4.0, 4.0))
    leaves = [x.requires_grad_() for x in (p.q, p.k, p.v)]
    with mock.patch("torch.empty", poisoned):
        out = flash_attention(*leaves, p.mask, softcap=softcap, kernel="portable", compensated=compensated)
        gradients = torch.autograd.grad(out, leaves, p.dout)
    lse = dense(p, torch.float64)["lse"]  # which flash_attention does not return
    return violations(p, dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse, *gradients), strict=True)))


# -- the claims


@pytest.mark.parametrize(("dtype", "tma"), [(torch.float32, True), (torch.float16, False)], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_within_the_bound_of_float64(interpreter, name, dtype, tma):
    assert interpreter(violations_of_mask, name, dtype, tma) == []


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (4, 1)], ids="{0[0]}q{0[1]}kv".format)
def test_query_heads_share_kv_heads(interpreter, heads):
    assert interpreter(violations_of_shape, heads, 32, None, torch.float16) == []


@pytest.mark.parametrize("head_dim", [40, 64, 80, 128, 256])
def test_head_sizes_that_are_and_are_not_powers_of_two(interpreter, head_dim):
    assert interpreter(violations_of_shape, (2, 1), head_dim, None, torch.float32) == []


@pytest.mark.parametrize(
    ("heads", "head_dim", "value_dim", "tma"),
    [((2, 1), 96, 64, True), ((2, 2), 192, 128, True), ((2, 2), 192, 128, False), ((2, 1), 32, 80, False)],
)
def test_values_may_have_a_head_size_of_their_own(interpreter, heads, head_dim, value_dim, tma):
    assert interpreter(violations_of_values, heads, head_dim, value_dim, tma) == []


@pytest.mark.parametrize(
    ("name", "dims", "columns", "dtype", "tma"),
    [
        ("packed, window", (512, 512), 256, torch.float32, True),
        ("packed, window", (512, 512), 256, torch.float16, False),
        ("window", (80, 40), 32, torch.float32, False),
        ("rows that see nothing among others", (96, 96), 32, torch.float16, True),
        ("full", (32, 128), 32, torch.float16, True),
    ],
    ids=str,
)
def test_large_heads_are_computed_in_passes_over_columns(interpreter, name, dims, columns, dtype, tma):
    assert interpreter(violations_in_passes, name, dims, columns, dtype, tma) == []


@pytest.mark.parametrize("columns", [256, 16])
def test_a_carry_has_the_values_head_size_and_joins_in_each_pass(interpreter, columns):
    assert interpreter(chain_with_values_of_their_own, columns) < 1e-6


@pytest.mark.parametrize("softcap", [1.0, 30.0, 1000.0, 10000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_results_and_gradients_under_a_softcap_are_within_the_bound(interpreter, softcap, dtype):
    assert interpreter(violations_of_shape, (2, 1), 32, softcap, dtype) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_tiles_that_gpus_run(interpreter, dtype):
    assert interpreter(violations_of_default_tiles, dtype) == []


@pytest.mark.parametrize("softcap", [None, 20.0], ids=["centered keys", "residue"])
def test_gradients_do_not_suffer_from_the_results_rounding(interpreter, softcap):
    assert interpreter(violations_of_flash_attention, softcap, True) == []
    assert [line.split(":")[0] for line in interpreter(violations_of_flash_attention, softcap, False)] == ["dq"]


def test_a_chain_of_carries_equals_one_call_and_is_updated_in_place(interpreter):
    found = interpreter(chain_against_one_call, None, 1e-6)
    assert found == {"close": True, "out in place": True, "lse in place": True, "dtype": torch.float32}


def test_a_chain_of_carries_can_end_in_another_dtype(interpreter):
    found = interpreter(chain_against_one_call, torch.float16, 2**-11)
    assert found == {"close": True, "out in place": False, "lse in place": True, "dtype": torch.float16}


@pytest.mark.parametrize("kernel", ["portable", "blocked"])
def test_the_last_call_that_sees_a_tile_writes_its_result(interpreter, kernel):
    assert interpreter(chain_that_writes_each_tile_once, kernel) == [True, True]


def test_query_tiles_that_see_nothing_are_not_written(interpreter):
    assert interpreter(rows_touched_by_a_hop_that_few_rows_see) == list(range(64, TOKENS))


def test_strided_views_give_the_same_bits(interpreter):
    assert set(interpreter(strided_against_contiguous).values()) == {0.0}


def test_runs_are_bit_equal(interpreter):
    assert interpreter(what_differs_between_two_runs) == []


def test_no_keys_at_all(interpreter):
    assert interpreter(nothing_to_see) == [0.0, float("-inf"), True, 0.0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("bfloat16", "cannot do bfloat16 in Triton's interpreter"),
        ("head_dim", "got 20 and 20"),
        ("heads", "got 3 and 2"),
        ("dtypes", "got torch.float32 and torch.float16"),
        ("base", "takes tensors that begin at a multiple of 16 bytes, got k at 4 past one"),
        ("stride", "takes strides that are multiples of 16 bytes, got k with stride(1) of 260 bytes"),
        ("transposed", "takes v as [2, 16, 2, 32], torch.float32, last dimension contiguous"),
        ("scale", "takes as scale a number above 0, finite in fp32 (1e-15 to 1e+15), got 0.0"),
        ("softcap", "takes as softcap a number above 0, finite in fp32 (1e-15 to 1e+15), got -1.0"),
        ("dout", "takes dout as [2, 16, 4, 32]"),
        ("intervals", "takes intervals.start as [1 or 2, 16], torch.int32, contiguous, got [1, 15]"),
        (
            "out",
            "takes out as [2, 16, 4, 32], float16, bfloat16 or float32, last dimension contiguous, got [2, 15, 4, 32]",
        ),
        ("dq", "takes dq as [2, 16, 4, 32], torch.float32"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_values(interpreter, change, told):
    message = interpreter(refusal, change)
    assert message.startswith("kernel=portable ")
    assert told in message


def delta_against_float64(head_dim: int) -> float:
    from ringflash.kernels import portable_backward

    out, dout = (torch.randn(2, TOKENS, 6, head_dim, dtype=torch.float16)[:, :, ::2] for _ in range(2))
    with mock.patch("torch.empty", poisoned):
        delta = portable_backward.delta(out, dout)
    return float((delta.double() - (out.double() * dout.double()).sum(-1).transpose(1, 2)).abs().max())


@pytest.mark.parametrize("head_dim", [64, 80])
def test_delta_is_the_rows_dot_product(interpreter, head_dim):
    assert interpreter(delta_against_float64, head_dim) < 1e-5 * head_dim


def centered_by_kernel_and_by_torch(
    kv_heads: int, head_dim: int, dtype: torch.dtype, tokens: int
) -> list[torch.Tensor]:
    from ringflash.kernels import compensation, portable_compensation

    mean = torch.tensor([2.0, -0.3, 0.0, 60.0]).repeat(head_dim // 4)
    mean[head_dim // 2 :] = 0.0
    q = (torch.randn(2, tokens, 12, head_dim) / 4).to(dtype)[:, :, ::2]
    k = (torch.randn(2, 2 * tokens, kv_heads, head_dim) * 2 ** torch.arange(kv_heads)[:, None] + mean).to(dtype)
    k[1, :, 0] = torch.randn(2 * tokens, head_dim)  # has no mean
    k[1, :, kv_heads - 1] *= 20  # has large scores
    lse = torch.randn(6, 2, tokens + 3).transpose(0, 1)[:, :, 3:]
    lse[:, :, 5:6] = float("-inf")
    with mock.patch("torch.empty", poisoned):
        found = portable_compensation.center(q, k, lse, scale=0.2)
    return [*found, *compensation.center(q, k, lse, scale=0.2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "tokens"), [(6, 64, TOKENS), (2, 80, TOKENS), (3, 32, 300), (1, 64, 1)]
)
def test_keys_are_centered_as_the_definition_says(interpreter, kv_heads, head_dim, tokens, dtype):
    c, lse, c_defined, lse_defined = interpreter(centered_by_kernel_and_by_torch, kv_heads, head_dim, dtype, tokens)
    torch.testing.assert_close(c, c_defined, rtol=0, atol=0)
    torch.testing.assert_close(
        lse, lse_defined, rtol=0, atol=1e-5 * float(lse_defined[lse_defined.isfinite()].abs().max())
    )
    if tokens > 1:
        assert c[0].any()
        assert not c[1, 0, 0].any()
        assert not c[1, 0, -1].any()


def subtracted(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Centered keys, in NaN where nothing was written, and k - c."""
    from ringflash.kernels import portable_compensation

    lengths = [[480, 40, 480], [10, 700, 290]]  # of which each query sees its own document's last 20 tokens
    mask = IntervalMask.documents(lengths) & IntervalMask.window(1000, left=20)
    intervals = mask.restrict(torch.arange(500, 530), torch.arange(1000)).intervals()
    k = torch.randn(1000, 2, 6, 80, dtype=dtype).transpose(0, 1)[:, :, ::2]
    c = torch.randn(2, 1, 5, 80, dtype=dtype)[:, :, 1:4]
    with mock.patch("torch.empty", poisoned):
        return portable_compensation.subtract(k, c, intervals), k - c


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_keys_are_centered_as_far_as_tiles_reach_beyond_those_that_are_seen(interpreter, dtype):
    found, wanted = interpreter(subtracted, dtype)
    for row, seen in enumerate([(480, 530), (480, 530)]):
        written = found[row].isfinite().flatten(1).all(1)
        assert written[seen[0] - 127 : seen[1] + 127].all()
        assert found[row, : seen[0] - 3 * 128].isnan().all()
        assert found[row, seen[1] + 3 * 128 :].isnan().all()
        assert torch.equal(found[row, written], wanted[row, written])


def violations_of_centered_keys(tma: bool) -> list[str]:
    from ringflash.kernels import portable_compensation

    mask = IntervalMask.causal(100).restrict(torch.arange(50, 100), torch.arange(100))
    p = problem(mask, batch=1, heads=(4, 2), dtype=torch.float16, means=(2.0, 0.5))
    forward, backward, round_dq = kernels(tma)

    def centered(dout, q, k, v, lse, delta, intervals, **options) -> None:
        center, shifted = portable_compensation.center(q, k, lse, scale=options["scale"])
        assert center.any()
        backward(dout, q, k, v, shifted, delta, intervals, center=center, **options)

    with mock.patch("torch.empty", poisoned):
        return violations(p, by_kernel(p, forward, centered, round_dq))


@pytest.mark.parametrize("tma", [True, False], ids=["descriptors", "pointers"])
def test_gradients_of_centered_keys_are_those_of_the_keys(interpreter, tma):
    assert interpreter(violations_of_centered_keys, tma) == []


def rounded_by_kernel_and_by_torch(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, bool]:
    from ringflash.kernels import portable_backward

    x = torch.randn(TOKENS, 2, 2, 3, head_dim).transpose(0, 2)[:, 0]  # as gradients lie on their way
    whole = torch.full((2, TOKENS, 6, head_dim), 7.0, dtype=dtype)
    portable_backward.round_into(whole[:, :, 3:], x)
    return whole[:, :, 3:], x.to(dtype), bool((whole[:, :, :3] == 7).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
def test_sums_are_rounded_as_torch_does_into_their_heads_alone(interpreter, head_dim, dtype):
    found, expected, others_left = interpreter(rounded_by_kernel_and_by_torch, head_dim, dtype)
    assert torch.equal(found, expected)
    assert others_left


def dq_of_hopper_and_as_it_was(head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    from ringflash.kernels import hopper_backward
    from ringflash.kernels.hopper_backward_parts import permuted

    # The columns of memory, by the bits of their place, as `stage_dq` writes them.
    bits = [column for row, column in permuted(64, 64).offset_bases if row == 0]
    places = torch.arange(head_dim) % 64
    columns = torch.arange(head_dim) // 64 * 64 + sum((places >> i & 1) * bit for i, bit in enumerate(bits))
    x = torch.randn(2, TOKENS, 3, head_dim)
    staged = x if head_dim == 64 else x[..., columns].contiguous()
    out = torch.full((2, TOKENS, 5, head_dim), torch.nan, dtype=torch.float16)[:, :, 1:4]
    with mock.patch("torch.cuda.device_of", nullcontext):
        hopper_backward.round_dq(out, staged, scale=0.25)
    return out, (x * (0.25 if head_dim == 128 else 1)).half()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_hopper_orders_scales_and_rounds_dq(interpreter, head_dim):
    found, expected = interpreter(dq_of_hopper_and_as_it_was, head_dim)
    assert torch.equal(found, expected)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="this process interprets kernels too")
def test_cpu_tensors_need_the_interpreter():
    from ringflash.kernels.portable_forward import supports

    q = torch.zeros(1, 8, 2, 32)
    assert supports(q, q, None) == (
        "needs a GPU of compute capability 8.0 or newer, or TRITON_INTERPRET=1 on the CPU, got device cpu"
    )


def softcap_against_float64() -> dict[str, float]:
    """The largest relative errors of tanh and its derivative, of small arguments and of those that saturate."""
    from tests.kernels.softcap import CAP_SCALE, cap_kernel

    x = torch.logspace(-6, 1, 2048)
    x = torch.cat([-x, x])
    tanh, slope = torch.empty_like(x), torch.empty_like(x)
    cap_kernel[(1,)](x, tanh, slope, CAP_SCALE, BLOCK=len(x))
    exact = x.double()
    return {
        "tanh": float((tanh / exact.tanh() - 1).abs().max()),
        "derivative": float((slope * exact.cosh() ** 2 - 1).abs().max()),
    }


def test_the_softcap_cancels_neither_for_small_scores_nor_near_the_cap(interpreter):
    found = interpreter(softcap_against_float64)
    assert found["tanh"] < 1e-6, found
    assert found["derivative"] < 5e-6, found
