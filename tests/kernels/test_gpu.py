"""The compiled kernels compute attention on a GPU: every mask, sharing of heads, length and chain of carries.

    pytest -m gpu tests/kernels/test_gpu.py -n 8
    pytest -m gpu tests/kernels/test_gpu.py -k "not portable"

Each is compared with float64. Minutes on an H100, half of them compiling. Whatever the kernels allocate is filled with
NaN first. The last section tests what only the Hopper kernels guarantee. A launch that deadlocks
ends at the timeout.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, product
from unittest import mock

import pytest
import torch

from ringflash import IntervalMask, flash_attention
from ringflash.kernels.compensation import FEWEST
from ringflash.mask import rows_seen
from ringflash.partial import Partial
from tests.kernels.cases import MASKS
from tests.kernels.oracle import (
    Problem,
    by_kernel,
    delta_of,
    dense,
    distance,
    in_runs,
    poisoned,
    problem,
    strided,
    violations,
)


def no_hopper() -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0)


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
HOPPER = [
    pytest.mark.skipif(no_hopper(), reason="torch sees no CUDA device of compute capability 9.0"),
    pytest.mark.timeout(60),
]
MARKS: dict[str, list[pytest.MarkDecorator]] = {"hopper": HOPPER, "portable": []}

BF16, HALF = [torch.bfloat16], [torch.bfloat16, torch.float16]
ALL = [*HALF, torch.float32]
# One, and one less and one more than a multiple of each tile: 64 rows, of which two or three go together, 128 keys.
LENGTHS = [1, 2, 3, 63, 64, 65, 127, 128, 129, 191, 193, 255, 257, 1000, 2047, 5000]


def only_hopper(test: Callable) -> Callable:
    """Marks a test of the Hopper kernels that is not parametrised over kernels."""
    for mark in HOPPER:
        test = mark(test)
    return test


def over(**cases: Iterable[tuple[int, torch.dtype]]) -> pytest.MarkDecorator:
    """Parametrises a test over kernels, each with its own (head_dim, dtype) pairs."""
    values = [
        pytest.param(kernel, head_dim, dtype, id=f"{kernel}-{head_dim}-{dtype}", marks=MARKS[kernel])
        for kernel, pairs in cases.items()
        for head_dim, dtype in pairs
    ]
    return pytest.mark.parametrize(("kernel", "head_dim", "dtype"), values)


@pytest.fixture(autouse=True)
def no_tf32():
    """Plain torch attention in fp32 is a reference, so it must be fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False


def kernels(name: str) -> tuple[Callable, Callable, Callable]:
    """forward, backward and round_dq."""
    from ringflash.kernels import hopper_backward, hopper_forward, portable_backward, portable_forward

    forward, backward = {
        "hopper": (hopper_forward, hopper_backward),
        "portable": (portable_forward, portable_backward),
    }[name]
    return forward.forward, backward.backward, backward.round_dq


def center(*tensors: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    from ringflash.kernels import portable_compensation

    return portable_compensation.center(*tensors, scale=scale)


def found(p: Problem, *functions: Callable) -> list[str]:
    """Violations of the bound by out and the gradients, with dk and dv added and, in 16 bits, written."""
    ways = ["added"] if p.k.dtype == torch.float32 else ["added", "written"]
    with mock.patch("torch.empty", poisoned):
        results = {way: by_kernel(p, *functions, written=way == "written") for way in ways}
    return [f"{way}: {line}" for way, actual in results.items() for line in violations(p, actual)]


def checked(kernel: str, mask: IntervalMask, **options) -> list[str]:
    return found(problem(mask, device="cuda", **options), *kernels(kernel))


def checked_groups(kernel: str, mask: IntervalMask, kv_heads: int, head_dim: int, **options) -> list[str]:
    """Violations with three query heads per KV head.

    On Hopper, three heads have one backward program, which then writes dk and dv, if asked to. At head_dim 256, two
    kinds of clusters of forward programs follow: for query tiles of a head, and for heads.
    """
    from ringflash.kernels import hopper_forward

    found = []
    for group, least_keys in ((3, 8192), (3, 0), (2, 8192)) if head_dim == 256 else ((3, 8192),):
        with mock.patch.object(hopper_forward, "LEAST_KEYS", least_keys):
            lines = checked(kernel, mask, heads=(group * kv_heads, kv_heads), head_dim=head_dim, **options)
        found += [f"groups of {group}, clusters from {least_keys} keys: {line}" for line in lines]
    return found


@over(hopper=product([64, 128, 256], HALF), portable=product([64, 128], ALL))
@pytest.mark.parametrize("name", MASKS)
def test_every_mask_is_within_the_bound_of_float64(name, kernel, head_dim, dtype):
    assert checked_groups(kernel, MASKS[name](1111), kv_heads=2, head_dim=head_dim, dtype=dtype) == []


@over(portable=product([32, 40, 80, 96, 192, 256, 320, 512], ALL))
def test_other_head_sizes(kernel, head_dim, dtype):
    assert checked(kernel, MASKS["packed"](700), heads=(2, 1), head_dim=head_dim, dtype=dtype) == []


@over(hopper=product([64, 128, 256], BF16), portable=product([128], ALL))
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (8, 1), (16, 1), (32, 2)], ids="{0[0]}q{0[1]}kv".format)
def test_query_heads_share_kv_heads(heads, kernel, head_dim, dtype):
    assert checked(kernel, MASKS["packed, window"](700), heads=heads, head_dim=head_dim, dtype=dtype) == []


@over(hopper=product([64, 128, 256], BF16), portable=product([128], BF16))
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length(length, kernel, head_dim, dtype):
    assert checked_groups(kernel, MASKS["causal"](length), kv_heads=1, head_dim=head_dim, dtype=dtype) == []


@over(hopper=product([64, 128], BF16), portable=product([64, 128], BF16))
@pytest.mark.parametrize("name", ["causal", "packed", "window", "zigzag shard of the past"])
def test_long_sequences(name, kernel, head_dim, dtype):
    mask = MASKS[name](5000 if name != "zigzag shard of the past" else 2500)
    assert checked(kernel, mask, heads=(2, 1), head_dim=head_dim, dtype=dtype) == []


@over(hopper=product([64, 128, 256], HALF), portable=product([64, 128, 256, 512], ALL))
@pytest.mark.parametrize("softcap", [1.0, 30.0, 1000.0, 10000.0])
def test_results_and_gradients_under_a_softcap_are_within_the_bound(softcap, kernel, head_dim, dtype):
    mask = MASKS["causal"](600)
    assert checked_groups(kernel, mask, kv_heads=1, head_dim=head_dim, dtype=dtype, softcap=softcap) == []


@over(hopper=product([64, 128, 256], HALF), portable=product([64, 128, 512], HALF))
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["centered keys", "residue"])
def test_gradients_do_not_suffer_from_the_results_rounding(softcap, kernel, head_dim, dtype):
    p = problem(MASKS["causal"](1500), head_dim=head_dim, dtype=dtype, device="cuda", softcap=softcap, means=(2.0, 1.0))
    leaves = [x.requires_grad_() for x in (p.q, p.k, p.v)]
    out = flash_attention(*leaves, p.mask, softcap=softcap, kernel=kernel)
    gradients = torch.autograd.grad(out, leaves, p.dout)
    lse = dense(p, torch.float64)["lse"]  # which flash_attention does not return
    actual = dict(zip(("out", "lse", "dq", "dk", "dv"), (out.detach(), lse, *gradients), strict=True))
    assert violations(p, actual) == []


@over(hopper=product([64, 128, 256], HALF), portable=product([64, 128, 256, 512], ALL))
@pytest.mark.parametrize("name", ["causal", "packed", "many queries, two keys", "rows that see nothing among others"])
def test_gradients_of_centered_keys_are_those_of_the_keys(name, kernel, head_dim, dtype):
    p = problem(MASKS[name](1111), heads=(12, 4), head_dim=head_dim, dtype=dtype, device="cuda", means=(2.0, 0.5))
    p.k[1, :, 0] -= 2  # a head whose keys have no mean
    forward, backward, round_dq = kernels(kernel)

    def centered(dout, q, k, v, lse, delta, intervals, *, scale, softcap, dq, dk, dv) -> None:
        c, shifted = center(q, k, lse, scale=scale)
        assert c[1, 0].any(1).tolist() == [False, *[k.shape[1] >= FEWEST] * 3]
        for kv in (slice(0, 1), slice(1, 4)):  # heads come in parts
            of_q = slice(3 * kv.start, 3 * kv.stop)
            backward(
                dout[:, :, of_q], q[:, :, of_q], k[:, :, kv], v[:, :, kv], shifted[:, of_q], delta[:, of_q], intervals,
                scale=scale, softcap=softcap, dq=dq[:, :, of_q], dk=dk[:, :, kv], dv=dv[:, :, kv], center=c[:, :, kv],
            )  # fmt: skip

    assert found(p, forward, centered, round_dq) == []


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "tokens"), [(6, 64, 1000), (2, 80, 3000), (1, 256, 70), (3, 128, 1), (2, 512, 300)]
)
def test_keys_are_centered_as_the_definition_says(kv_heads, head_dim, tokens, dtype):
    from ringflash.kernels import compensation

    mean = torch.tensor([2.0, -0.4], device="cuda").repeat(head_dim // 2)
    q = (torch.randn(2, tokens, 12, head_dim, device="cuda") / 4).to(dtype)[:, :, ::2]
    k = (torch.randn(2, 2 * tokens, kv_heads, head_dim, device="cuda") + mean).to(dtype)
    lse = torch.randn(6, 2, tokens + 3, device="cuda").transpose(0, 1)[:, :, 3:]
    with mock.patch("torch.empty", poisoned):
        c, shifted = center(q, k, lse, scale=0.2)
    defined, wanted = compensation.center(q, k, lse, scale=0.2)
    # Sums are taken in another order: a mean close to a limit may be rounded to the other side of it.
    assert (c != defined).float().mean() < 0.02
    product = (q.float() * (c - defined).float().repeat_interleave(6 // kv_heads, 2)).sum(-1).transpose(1, 2)
    torch.testing.assert_close(shifted, wanted - 0.2 * product, rtol=0, atol=1e-4)


@over(hopper=product([64, 128, 256], BF16), portable=product([128], BF16))
def test_scores_far_below_zero_leave_no_nan(kernel, head_dim, dtype):
    """lse far below the score 0 of keys past the end, whose weight would be infinite."""
    p = problem(MASKS["causal"](200), heads=(2, 1), head_dim=head_dim, dtype=dtype, device="cuda")
    one_way = torch.ones_like(p.k[:1, :1, :1])
    p = Problem(p.q / 8 + 3 * one_way, p.k / 8 - 3 * one_way, p.v, p.dout, p.mask, 1.0, None)
    actual = by_kernel(p, *kernels(kernel))
    assert actual["lse"].max() < -200
    assert violations(p, actual) == []


def rising(rise: float, head_dim: int, dtype: torch.dtype) -> Problem:
    """A causal problem of 1500 tokens, in which the score of each key is `rise` above that of the key before."""
    p = problem(MASKS["causal"](1500), heads=(2, 1), head_dim=head_dim, dtype=torch.float32, device="cuda")
    p.q[..., 0], p.k[..., 0] = 2.0, rise / (2 * p.scale) * torch.arange(1500, device="cuda")[:, None]
    return Problem(*(x.to(dtype) for x in (p.q, p.k, p.v, p.dout)), p.mask, p.scale, None)


@over(hopper=product([64, 128, 256], HALF), portable=product([128], BF16))
@pytest.mark.parametrize("rise", [-0.2, 0.02, 0.04, 0.06, 0.1, 3.0])
def test_scores_that_rise_from_key_to_key_are_within_the_bound(rise, kernel, head_dim, dtype):
    """Hopper takes a new maximum when a weight exceeds 2^8: never, every few tiles of 128 keys, or in each tile."""
    p = rising(rise, head_dim, dtype)
    assert violations(p, by_kernel(p, *kernels(kernel))) == []


@over(hopper=product([64, 128, 256], HALF), portable=product([128], BF16))
@pytest.mark.parametrize("rise", [-0.2, 0.02, 0.06, 3.0])
def test_a_carry_far_from_the_scores_is_within_the_bound(rise, kernel, head_dim, dtype):
    forward, *_ = kernels(kernel)
    p = rising(rise, head_dim, dtype)
    state = in_runs(p, forward, pairwise([0, 500, 503, 1500]))
    exact, plain = dense(p, torch.float64), dense(p, dtype)
    assert distance(state.out, exact["out"]) <= 2 * distance(plain["out"], exact["out"]) + 1e-4
    assert distance(state.lse, exact["lse"]) <= 1e-5


@over(hopper=product([64, 128, 256], HALF), portable=product([64, 128], BF16))
@pytest.mark.parametrize("how", ["in place", "16 bits at the end", "16 bits at once"])
@pytest.mark.parametrize("ends", [[0, 500, 503, 1111], [1111 * i // 32 for i in range(33)]], ids=["3 hops", "32 hops"])
def test_a_chain_of_carries_is_within_the_bound_of_float64(ends, how, kernel, head_dim, dtype):
    forward, *_ = kernels(kernel)
    p = problem(MASKS["packed"](1111), heads=(4, 2), head_dim=head_dim, dtype=dtype, device="cuda")
    state, out = None, torch.full_like(p.q, float("nan"))
    parts = [p.mask.restrict(torch.arange(1111), torch.arange(*run)) for run in pairwise(ends)]
    calls = zip(pairwise(ends), parts, rows_seen(parts, "cuda"), strict=True)
    with mock.patch("torch.empty", poisoned):
        for (begin, end), part, seen in calls:
            into = how == "16 bits at once" or (how == "16 bits at the end" and end == 1111)
            state = forward(
                p.q, p.k[:, begin:end], p.v[:, begin:end], part.intervals("cuda"), scale=p.scale, carry=state,
                out=out if into else None, seen=seen if how == "16 bits at once" else None,
            )  # fmt: skip
    found = state.out if how == "in place" else out
    exact, plain = dense(p, torch.float64), dense(p, dtype)
    bound = 2 * distance(plain["out"], exact["out"])
    assert [distance(found, exact["out"]) <= bound, distance(state.lse, exact["lse"]) <= 1e-5] == [True, True]


@over(hopper=product([64, 256], HALF), portable=product([64], ALL))
def test_strided_views_give_the_same_bits(kernel, head_dim, dtype):
    """On Hopper all but dq, which the copy engine sums in any order, as it does dk and dv of a group of query heads."""
    forward, backward, _ = kernels(kernel)
    heads = (2, 2) if kernel == "hopper" else (4, 2)
    p = problem(MASKS["window"](700), heads=heads, head_dim=head_dim, dtype=dtype, device="cuda")
    intervals = p.mask.intervals("cuda")
    results = []
    for view in (torch.clone, strided):
        q, k, v, dout = (view(x) for x in (p.q, p.k, p.v, p.dout))
        state = forward(q, k, v, intervals, scale=p.scale)
        carry = Partial(view(state.out), state.lse.clone())
        state = forward(q, k, v, intervals, scale=p.scale, carry=carry)
        dq, dk, dv = (view(torch.ones_like(x, dtype=torch.float32)) for x in (p.q, p.k, p.v))
        rows = [torch.cat([x, x], dim=1)[:, x.shape[1] :] for x in (state.lse, delta_of(p.dout, state))]
        backward(dout, q, k, v, *rows, intervals, scale=p.scale, dq=dq, dk=dk, dv=dv)
        results.append({"out": state.out, "lse": state.lse, "dk": dk, "dv": dv, "dq": dq})
    contiguous, other = results
    differing = {name for name in contiguous if not torch.equal(contiguous[name], other[name])}
    assert differing <= ({"dq"} if kernel == "hopper" else set())
    assert distance(other["dq"], contiguous["dq"]) < 1e-6


@over(hopper=product([64, 128, 256], BF16), portable=product([64, 128], BF16))
@pytest.mark.parametrize("written", [False, True], ids=["added", "written"])
def test_deterministic_runs_are_bit_equal(written, kernel, head_dim, dtype):
    forward, backward, _ = kernels(kernel)
    options = {"deterministic": True} if kernel == "hopper" else {}  # portable always is
    round_dq = kernels("portable")[2]
    p = problem(MASKS["packed"](3000), heads=(8, 2), head_dim=head_dim, dtype=dtype, device="cuda")
    runs = []
    for _ in range(3):
        torch.manual_seed(1)  # the noise that by_kernel adds gradients to
        runs.append(
            by_kernel(p, forward, lambda *args, **named: backward(*args, **named, **options), round_dq, written)
        )
    assert [name for run in runs for name in run if not torch.equal(run[name], runs[0][name])] == []


@over(hopper=product([128], BF16), portable=product([128], BF16))
def test_tensors_of_more_than_2_to_the_31_elements(kernel, head_dim, dtype):
    """The last rows of 2^19 tokens x 33 heads x 128, under a window, against float64 of those rows alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("takes 35 GiB of GPU memory")
    forward, backward, round_dq = kernels(kernel)
    length, heads, left, checked_rows = 2**19, 33, 200, 300

    def draw(count: int) -> torch.Tensor:
        return torch.randn(1, length, count, head_dim, device="cuda", dtype=dtype)

    q, k, v, dout = draw(heads), draw(1), draw(1), draw(heads)
    assert q.numel() > 2**31
    scale, intervals = head_dim**-0.5, IntervalMask.window(length, left).intervals("cuda")
    state = forward(q, k, v, intervals, scale=scale, out=torch.empty_like(q))
    delta = torch.stack([(dout[:, :, h].float() * state.out[:, :, h].float()).sum(-1) for h in range(heads)], dim=1)
    dq = torch.zeros(q.shape, device="cuda")
    dk, dv = torch.zeros(k.shape, device="cuda"), torch.zeros(v.shape, device="cuda")
    backward(dout, q, k, v, state.lse, delta, intervals, scale=scale, dq=dq, dk=dk, dv=dv)
    gradient = torch.empty_like(q)
    round_dq(gradient, dq, scale=scale)

    # The last rows see nothing before the window; keys in the last rows are seen by the last rows only.
    rows = slice(length - checked_rows - left, length)
    mask = IntervalMask.window(checked_rows + left, left)
    p = Problem(q[:, rows], k[:, rows], v[:, rows], dout[:, rows], mask, scale, None)
    exact, plain = dense(p, torch.float64), dense(p, dtype)
    late = {
        name: [x[:, -checked_rows:] for x in (whole[:, rows], exact[name], plain[name])]
        for name, whole in {"out": state.out, "dq": gradient, "dk": dk, "dv": dv}.items()
    }
    inside = {name: distance(x, truth) <= 2 * distance(rounded, truth) for name, (x, truth, rounded) in late.items()}
    assert inside == dict.fromkeys(late, True)


@pytest.fixture
def neighbour() -> Iterator[None]:
    """Another process that keeps the GPU busy, so that the GPU switches processes in the middle of a long kernel."""
    busy = "import torch\nx = torch.ones(8192, 8192, device='cuda')\nprint(flush=True)\nwhile True: (x @ x)[0].cpu()"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


@over(hopper=product([64, 128, 256], BF16), portable=product([128], BF16))
def test_a_long_forward_on_a_shared_gpu(neighbour, kernel, head_dim, dtype):
    """Every row of out is written, with the same bits each time. At fault: (row, head), and how many there are."""
    forward, *_ = kernels(kernel)
    length = 131072
    q, k, v = (torch.randn(1, length, heads, head_dim, device="cuda", dtype=dtype) for heads in (16, 8, 8))
    intervals = IntervalMask.causal(length).intervals("cuda")
    first: Partial | None = None
    for _ in range(10):
        found = forward(q, k, v, intervals, scale=head_dim**-0.5, out=torch.full_like(q, float("nan")))
        first = first or found
        fault = ((found.out != first.out) | ~found.out.isfinite()).any(-1)[0].nonzero()
        assert (fault[:4].tolist(), len(fault)) == ([], 0)
        assert torch.equal(found.lse, first.lse)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("head_dim", [40, 128])
def test_sums_are_rounded_as_torch_does_into_their_heads_alone(head_dim, dtype):
    """round_into is one kernel, the portable one's and Hopper's."""
    from ringflash.kernels.portable_backward import round_into

    x = torch.randn(1111, 2, 2, 3, head_dim, device="cuda").transpose(0, 2)[:, 0]  # as gradients lie on their way
    whole = torch.full((2, 1111, 6, head_dim), 7.0, dtype=dtype, device="cuda")
    round_into(whole[:, :, 3:], x)
    assert torch.equal(whole[:, :, 3:], x.to(dtype))
    assert bool((whole[:, :, :3] == 7).all())


# -- what only the Hopper kernels promise: persistent programs, skipped tiles, no allocation, graphs


@only_hopper
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_carry_over_many_tiles_of_which_half_are_skipped(head_dim, dtype):
    """Each program takes several tiles, so that the carry's shared memory is used again, also over skipped ones."""
    forward, *_ = kernels("hopper")
    p = problem(MASKS["causal"](3000), batch=1, heads=(32, 4), head_dim=head_dim, dtype=dtype, device="cuda")
    state = in_runs(p, forward, [(0, 1500), (1500, 3000)])
    exact, plain = dense(p, torch.float64), dense(p, dtype)
    assert distance(state.out, exact["out"]) <= 2 * distance(plain["out"], exact["out"])
    assert distance(state.lse, exact["lse"]) <= 1e-5


@only_hopper
@pytest.mark.parametrize("longest_last", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_carry_in_batch_rows_of_which_one_has_many_tiles_more(head_dim, longest_last):
    """There are more tiles than programs. Most tiles of one row see none of the first half; no other may be skipped."""
    forward, *_ = kernels("hopper")
    length = 6000
    rows = [[length], [length // 16] * 16]
    mask = IntervalMask.causal(length) & IntervalMask.documents(rows[::-1] if longest_last else rows)
    p = problem(mask, heads=(16, 4), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    whole = forward(p.q, p.k, p.v, mask.intervals("cuda"), scale=p.scale)
    state = in_runs(p, forward, [(length // 2, length), (0, length // 2)])
    assert distance(state.out, whole.out) <= 1e-2
    assert distance(state.lse, whole.lse) <= 1e-5


@only_hopper
@pytest.mark.parametrize(("head_dim", "begin"), [(64, 192), (128, 256), (256, 256)])
def test_query_tiles_that_see_nothing_are_not_written(head_dim, begin):
    forward, *_ = kernels("hopper")
    mask = MASKS["causal"](300).restrict(torch.arange(300), torch.arange(290, 300))
    p = problem(mask, batch=1, heads=(1, 1), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    carry = Partial.identity(p.q)
    carry.out.fill_(7)  # lse -inf: this out counts for nothing, and a row that is written loses it
    forward(p.q, p.k, p.v, p.mask.intervals("cuda"), scale=p.scale, carry=carry)
    assert (carry.out[0, :, 0, 0] != 7).nonzero()[:, 0].tolist() == list(range(begin, 300))


def carried(length: int = 3000, head_dim: int = 64) -> tuple[Problem, Partial]:
    """A problem of more query tiles than an H100 has processors, and a carry for it."""
    p = problem(MASKS["packed"](length), heads=(16, 4), head_dim=head_dim, dtype=torch.bfloat16, device="cuda")
    forward, *_ = kernels("hopper")
    return p, forward(p.q, p.k, p.v, p.mask.intervals("cuda"), scale=p.scale)


@only_hopper
def test_a_forward_in_place_allocates_nothing():
    forward, *_ = kernels("hopper")
    p, carry = carried()
    intervals, counts = p.mask.intervals("cuda"), []
    for _ in range(3):
        forward(p.q, p.k, p.v, intervals, scale=p.scale, carry=carry)
        counts.append(torch.cuda.memory_stats()["allocation.all.allocated"])
    assert counts == counts[:1] * 3


@only_hopper
@pytest.mark.parametrize("head_dim", [64, 256])
def test_a_graph_of_forwards_gives_the_same_bits_each_time(head_dim):
    forward, *_ = kernels("hopper")
    p, carry = carried(head_dim=head_dim)
    intervals, out = p.mask.intervals("cuda"), torch.empty_like(p.q)

    def twice() -> None:
        for _ in range(2):
            forward(p.q, p.k, p.v, intervals, scale=p.scale, carry=state, out=out)

    state = Partial(carry.out.clone(), carry.lse.clone())
    twice()
    expected = out.clone(), state.lse.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice()
    for _ in range(3):
        out.fill_(float("nan"))
        state.lse.copy_(carry.lse)
        graph.replay()
        assert torch.equal(out, expected[0])
        assert torch.equal(state.lse, expected[1])


@only_hopper
def test_what_cannot_be_done_is_refused_with_its_values():
    from ringflash.kernels import hopper_forward

    def told(dtype: torch.dtype, head_dim: int) -> str | None:
        q = torch.zeros(1, 8, 2, head_dim, dtype=dtype, device="cuda")
        return hopper_forward.supports(q, q, None)

    assert told(torch.bfloat16, 128) is None
    assert told(torch.float32, 128) == "takes float16 and bfloat16, got torch.float32; kernel=portable takes float32"
    assert told(torch.float16, 96) == "takes head_dim 64, 128, 256, got 96; kernel=portable takes others"
