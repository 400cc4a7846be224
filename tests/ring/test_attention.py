"""Ring attention equals dense float64 attention: output and gradients, any layout, any number of ranks."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from ringflash import (
    AttentionPlan,
    IntervalMask,
    Layout,
    Loopback,
    Partial,
    ProcessRing,
    flash_attention,
    merge,
    ring_attention,
)
from ringflash.layout import LAYOUTS
from tests import reference
from tests.ring.cases import assert_exact, beyond_the_rule, note_calls, on_ring, oracle, whole, whole_inputs
from tests.strategies import masks


@settings(max_examples=30)
@given(st.data(), st.integers(1, 40), st.integers(1, 8), st.sampled_from(sorted(LAYOUTS)))
def test_any_mask_layout_and_ring_size_is_exact(data, length, ranks, name):
    mask, dense = data.draw(masks(length))
    layout = Layout.named(name, length, ranks)
    inputs = whole_inputs(batch=2, length=length)
    results = on_ring(inputs, AttentionPlan(mask, layout, Loopback(ranks)))
    assert_exact(results, oracle(inputs, dense), layout)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 3)], ids=lambda h: f"{h[0]}-query-{h[1]}-kv-heads")
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["uncapped", "softcap"])
def test_head_groups_and_softcap_are_exact(heads, softcap):
    layout = Layout.zigzag(50, 4)
    inputs = whole_inputs(1, 50, *heads)
    plan = AttentionPlan(IntervalMask.causal(50), layout, Loopback(4))
    assert_exact(on_ring(inputs, plan, softcap=softcap), oracle(inputs, plan.mask.dense(), softcap), layout)


VALUES = {"larger": (12, 18), "smaller": (24, 16)}  # head_dim of keys, of values


@pytest.mark.parametrize("dims", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize(("ranks", "kv_heads", "layout"), [(1, 2, "contiguous"), (3, 1, "zigzag"), (4, 4, "balanced")])
def test_values_may_have_a_head_size_of_their_own(ranks, kv_heads, layout, dims):
    mask = IntervalMask.causal(60) & IntervalMask.documents([[7, 53], [40, 20]])
    layout = Layout.of(layout, mask, ranks)
    inputs = whole_inputs(2, 60, 4, kv_heads, *dims)
    results = on_ring(inputs, AttentionPlan(mask, layout, Loopback(ranks)))
    assert_exact(results, oracle(inputs, mask.dense()), layout)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["centered keys", "residue"])
def test_16_bit_values_of_another_head_size_are_as_exact_as_plain_attention(softcap):
    mask, layout = IntervalMask.causal(60), Layout.zigzag(60, 3)
    inputs = [x.bfloat16() for x in whole_inputs(1, 60, 4, 2, 24, 16)]
    exact, plain = (oracle(inputs, mask.dense(), softcap, dtype=kind) for kind in (torch.float64, torch.bfloat16))
    found = on_ring(inputs, AttentionPlan(mask, layout, Loopback(3)), softcap=softcap)
    assert beyond_the_rule(whole(found, layout), exact, plain) == []


def test_values_of_another_number_of_heads_are_refused():
    q, k, v, _ = whole_inputs(1, 8, dim=64, value_dim=32)
    v = torch.cat([v, v], dim=2)
    with pytest.raises(ValueError, match=r"k \[B, S, Hkv, D\] and v \[B, S, Hkv, Dv\], got .*v \[1, 8, 4, 32\]"):
        flash_attention(q, k, v, IntervalMask.causal(8))


def test_striped_layouts_of_many_chunks_per_rank_are_exact():
    layout, inputs = Layout.striped(400, 2), whole_inputs(1, 400)
    plan = AttentionPlan(IntervalMask.causal(400), layout, Loopback(2))
    assert_exact(on_ring(inputs, plan), oracle(inputs, plan.mask.dense()), layout)


def test_a_result_with_a_sink_is_rounded_once():
    plan = AttentionPlan(IntervalMask.causal(96), Layout.zigzag(96, 3), Loopback(3))
    q, k, v = (plan.shard(x).half() for x in whole_inputs(1, 96)[:3])
    sink = torch.linspace(-1, 1, 4)
    exact = ring_attention(q.float(), k.float(), v.float(), plan, sink=sink)
    assert torch.equal(ring_attention(q, k, v, plan, sink=sink), exact.half())


def on_processes(length, documents, name):
    """One rank's share of a packed causal sequence, through gloo."""
    mask = IntervalMask.causal(length) & IntervalMask.documents(documents)
    layout = Layout.named(name, length, dist.get_world_size())
    return on_ring(whole_inputs(2, length), AttentionPlan(mask, layout, ProcessRing()))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "name"), [(size, name) for size in (1, 2, 3, 4) for name in sorted(LAYOUTS)] + [(8, "zigzag")]
)
def test_processes_compute_what_float64_does(ranks, size, name):
    documents = [[1, 36, 60], [97]]
    results = ranks.run(on_processes, size, 97, documents, name)
    inputs = whole_inputs(2, 97)
    mask = IntervalMask.causal(97) & IntervalMask.documents(documents)
    side_by_side = [torch.cat(shards) for shards in zip(*results, strict=True)]
    assert_exact(side_by_side, oracle(inputs, mask.dense()), Layout.named(name, 97, size), name)


@pytest.mark.parametrize("heads_first", [(), (2,), (1, 2)], ids=["none", "v", "k and v"])
def test_keys_with_any_strides_travel_and_are_left_as_they_were(heads_first):
    layout, mask = Layout.zigzag(48, 3), IntervalMask.causal(48)
    inputs = whole_inputs(1, 48)
    shards = [torch.cat([layout.shard(x, rank) for rank in range(3)]) for x in inputs]
    for i in heads_first:  # in memory [B, H, S, D]
        shards[i] = shards[i].transpose(1, 2).contiguous().transpose(1, 2)
    q, k, v = (x.requires_grad_() for x in shards[:3])
    kept = [x.detach().clone() for x in (q, k, v)]
    out = ring_attention(q, k, v, AttentionPlan(mask, layout, Loopback(3)))
    results = [out.detach(), *torch.autograd.grad(out, (q, k, v), shards[3])]
    assert_exact(results, oracle(inputs, mask.dense()), layout)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), kept, strict=True))


def test_the_error_does_not_grow_with_the_ring():
    inputs = whole_inputs(1, 256)
    expected = oracle(inputs, IntervalMask.causal(256).dense())
    for size in (1, 32):
        layout = Layout.zigzag(256, size)
        plan = AttentionPlan(IntervalMask.causal(256), layout, Loopback(size))
        assert_exact(on_ring(inputs, plan), expected, layout, f"{size} ranks")


class Counting(Loopback):
    """A Loopback that counts what travels, by dtype."""

    def __init__(self, size):
        super().__init__(size)
        self.elements, self.messages = Counter(), Counter()

    def exchange(self, outgoing, incoming, label):
        for message in outgoing:
            assert message.tensor.is_contiguous()
            self.elements[message.tensor.dtype] += message.tensor.numel()
            self.messages[message.tensor.dtype] += 1
        return super().exchange(outgoing, incoming, label)


def test_with_a_window_one_neighbour_hop_moves_in_both_passes():
    length, ranks, left = 256, 8, 7
    ring = Counting(ranks)
    inputs = [x.half() for x in whole_inputs(1, length)]
    plan = AttentionPlan(IntervalMask.window(length, left), Layout.contiguous(length, ranks), ring)
    on_ring(inputs, plan)
    tail = (ranks - 1) * left * 2 * 2 * 16  # all ranks but the last send 7 tokens' k and v, 2 heads of 16
    assert ring.elements == {torch.float16: 2 * tail, torch.float32: tail}
    # In both passes k and v; gradients in halves.
    assert ring.messages == {torch.float16: 4 * (ranks - 1), torch.float32: 2 * (ranks - 1)}


def test_with_a_window_only_leading_tokens_go_round_the_whole_ring():
    """The first rank's tail goes to its neighbour, its first four tokens to all."""
    length, ranks, left, first = 256, 8, 7, 4
    ring = Counting(ranks)
    plan = AttentionPlan(IntervalMask.causal(length).windowed(left, first), Layout.contiguous(length, ranks), ring)
    on_ring([x.half() for x in whole_inputs(1, length)], plan)
    tail, head = (ranks - 1) * left, (ranks - 1) * first
    assert ring.elements[torch.float16] == 2 * (tail + head) * 2 * 2 * 16
    # The tail's gradients return after the first hop, the first tokens' from the last rank.
    assert ring.elements[torch.float32] == (tail + head) * 2 * 2 * 16


def test_a_causal_ring_sends_keys_once_per_pass_and_gradients_once():
    length, ranks = 64, 4
    ring = Counting(ranks)
    plan = AttentionPlan(IntervalMask.full(length), Layout.zigzag(length, ranks), ring)
    on_ring([x.half() for x in whole_inputs(1, length)], plan)
    shard = length // ranks * 2 * 2 * 16
    assert ring.elements[torch.float16] == 2 * ranks * (ranks - 1) * shard
    assert ring.elements[torch.float32] == ranks * (ranks - 1) * shard


def shuffled(length, ranks, per_rank):
    """A layout of randomly assigned chunks, so that the needed part of a shard consists of several runs."""
    dealt = torch.randperm(ranks * per_rank, generator=torch.Generator().manual_seed(ranks)).view(ranks, per_rank)
    return Layout(length, -(-length // dealt.numel()), dealt.sort(1).values)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize(
    "masks",
    [
        IntervalMask.window(128, 5),
        IntervalMask.causal(128) & IntervalMask.documents([3, 72, 10, 43]),
        IntervalMask.causal(128) & IntervalMask.documents([[3, 72, 10, 43], [3, 60, 22, 43]]),
        IntervalMask.causal(128).windowed(9, leading_tokens=4),
    ],
    ids=["window", "documents", "rows", "first tokens"],
)
def test_nothing_that_was_never_written_is_read(monkeypatch, masks, kv_heads):
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)
        nan = lambda *a, real=real, **k: torch.Tensor.fill_(real(*a, **k), float("nan"))  # noqa: E731
        monkeypatch.setattr(torch, name, nan)
    several = 0
    for layout in (*(Layout.named(name, 128, 4) for name in sorted(LAYOUTS)), shuffled(128, 4, 8), shuffled(128, 5, 6)):
        plan = AttentionPlan(masks, layout, Loopback(layout.ranks))
        several += any(len(runs) > 1 for route in plan.routes for runs in route.keys)
        inputs = whole_inputs(2, 128, 4, kv_heads)
        visible = sum(mask.dense() for mask in plan.masks).bool()
        assert_exact(on_ring(inputs, plan), oracle(inputs, visible), layout, str(layout.chunks.shape))
    assert several


def test_the_union_of_disjoint_masks_is_one_attention():
    length = 60
    masks = IntervalMask.causal(length).windowed(9, leading_tokens=4)
    for ranks, name in ((1, "contiguous"), (4, "zigzag"), (5, "contiguous")):
        layout = Layout.named(name, length, ranks)
        inputs = whole_inputs(2, length)
        results = on_ring(inputs, AttentionPlan(masks, layout, Loopback(ranks)))
        assert_exact(results, oracle(inputs, masks[0].dense() | masks[1].dense()), layout, name)


def gradients_with_lse(inputs, of_lse, attend):
    """out, lse and the gradients of q, k and v, if lse has a gradient too."""
    leaves = [x.requires_grad_() for x in inputs[:3]]
    out, lse = attend(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (inputs[3].to(out.dtype), of_lse))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["merged", "capped", "sink"])
def test_out_and_lse_merge_and_are_differentiable(name, dtype):
    """Merged, they are the results of two disjoint masks. The layout has padding, which sees nothing."""
    length, layout = 50, Layout.zigzag(50, 4)
    inputs = [x.to(dtype) for x in whole_inputs(2, length)]
    options = {"capped": {"softcap": 2.0}, "sink": {"sink": torch.linspace(-1, 1, 4)}}.get(name, {})
    causal = IntervalMask.causal(length)
    plans = [
        AttentionPlan(mask, layout, Loopback(4))
        for mask in (causal.windowed(9, leading_tokens=60) if name == "merged" else (causal,))
    ]

    def attend(q, k, v):
        parts = [Partial(*ring_attention(q, k, v, plan, return_lse=True, **options)) for plan in plans]
        merged = merge(*parts) if len(parts) > 1 else parts[0]
        return merged.out, merged.lse

    of_lse = torch.randn(2, 4, length)
    own = [layout.shard(of_lse, rank, dim=2) for rank in range(4)]
    found = gradients_with_lse([plans[0].shard(x) for x in inputs], torch.cat(own), attend)
    assert all(x.isfinite().all() for x in (found[0], *found[2:]))
    exact, plain = (
        gradients_with_lse(
            [x.detach().to(kind) for x in inputs],
            of_lse.to(kind),
            lambda q, k, v: reference.attention(
                q, k, v, causal.dense(), **{name: torch.as_tensor(x).to(q.dtype) for name, x in options.items()}
            ),
        )
        for kind in (torch.float64, dtype)
    )
    for i, (x, rounded, truth) in enumerate(zip(found, plain, exact, strict=True)):
        error = (layout.unshard(x.chunk(4), dim=2 if i == 1 else 1).double() - truth).norm()
        assert error <= max(1e-5 * truth.norm(), 2 * (rounded.double() - truth).norm() * (dtype != torch.float32)), i


def test_hops_that_see_nothing_launch_no_kernel(monkeypatch):
    launches = Counter()
    note_calls(monkeypatch, lambda name, options: launches.update([name]))
    plan = AttentionPlan(IntervalMask.window(64, left=7), Layout.contiguous(64, 8), Loopback(8))
    on_ring(whole_inputs(1, 64), plan)
    assert launches == dict.fromkeys(("forward", "backward"), 2 * (8 + 7))  # halves of the heads


@pytest.mark.parametrize("size", [1, 4])
def test_a_sink_is_one_more_key_without_a_value_and_has_a_gradient(size):
    mask, layout = IntervalMask.causal(50) & IntervalMask.documents([20, 30]), Layout.zigzag(50, size)
    inputs, sink = whole_inputs(2, 50), torch.randn(4)
    results = on_ring(inputs, AttentionPlan(mask, layout, Loopback(size)), sink)
    expected = oracle(inputs, mask.dense(), sink=sink)
    assert_exact(results[:4], expected[:4], layout)
    torch.testing.assert_close(results[4].double(), expected[4], rtol=1e-5, atol=1e-5)


def test_a_sink_of_minus_infinity_is_none_also_for_queries_that_see_nothing():
    mask = IntervalMask.causal(50) & IntervalMask.documents([20, 13], 50)
    q, k, v, dout = whole_inputs(1, 50)
    arguments = [x.requires_grad_() for x in (q, k, v)]
    sink = torch.tensor([-torch.inf, 0.5, -torch.inf, -1.0], requires_grad=True)
    with_sink = flash_attention(*arguments, mask, sink=sink)
    without = flash_attention(*arguments, mask)
    torch.testing.assert_close(with_sink[:, :, ::2], without[:, :, ::2])
    gradient = torch.autograd.grad(with_sink, sink, dout)[0]
    assert gradient.isfinite().all()
    assert (gradient != 0).tolist() == [False, True, False, True]


def test_flash_attention_is_a_ring_of_one():
    mask = IntervalMask.causal(40) & IntervalMask.documents([7, 33])
    inputs = whole_inputs(1, 40)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    out = flash_attention(q, k, v, mask)
    results = [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]
    assert_exact(results, oracle(inputs, mask.dense()), Layout.contiguous(40, 1))


def tensors(q=(1, 8, 4, 16), k=(1, 8, 2, 16), dtype=torch.float32):
    return torch.zeros(q, dtype=dtype), torch.zeros(k, dtype=dtype), torch.zeros(k, dtype=dtype)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (tensors(q=(8, 4, 16)), {}, r"q must be \[B, S, Hq, D\].*\[8, 4, 16\]"),
        (tensors(k=(1, 8, 3, 16)), {}, "4 query heads do not divide among 3 KV heads"),
        (tensors(k=(1, 8, 2, 32)), {}, "agree on batch, length and head size"),
        (tensors(q=(1, 9, 4, 16), k=(1, 9, 2, 16)), {}, "shards hold 8 tokens"),
        (tensors(k=(2, 8, 2, 16)), {}, "agree on batch, length and head size"),
        (
            tensors(k=(1, 8, 0, 16)),
            {},
            r"query heads, KV heads and head size must be 1 or more, got .*k \[1, 8, 0, 16\]",
        ),
        (tensors(q=(1, 8, 0, 16)), {}, "query heads, KV heads and head size must be 1 or more"),
        (tensors((1, 8, 4, 0), (1, 8, 2, 0)), {}, "query heads, KV heads and head size must be 1 or more"),
        (tensors(q=(1, 0, 4, 16), k=(1, 0, 2, 16)), {}, "shards hold 8 tokens, got q .1, 0, 4, 16"),
        (tensors(dtype=torch.float64), {}, "got torch.float64"),
        (tensors(dtype=torch.int32), {}, "must be float16, bfloat16 or float32, got torch.int32"),
        (tensors(dtype=torch.complex64), {}, "must be float16, bfloat16 or float32, got torch.complex64"),
        ((*tensors()[:2], tensors()[2].half()), {}, "one dtype, got torch.float32, torch.float32, torch.float16"),
        (([[0.0]], *tensors()[1:]), {}, "q must be a tensor, got list"),
        ((*tensors()[:2], None), {}, "v must be a tensor, got NoneType"),
        ((tensors()[0].to_sparse(), *tensors()[1:]), {}, "q must be a dense tensor, got layout torch.sparse_coo"),
        (
            (torch.nested.as_nested_tensor([*tensors()[0]], layout=torch.jagged), *tensors()[1:]),
            {},
            "q .* a nested one",
        ),
        ((AsyncCollectiveTensor(tensors()[0]), *tensors()[1:]), {}, "q must be a plain tensor, got AsyncCollective"),
        ([x.to("meta") for x in tensors()], {}, "q must have values, got a tensor on the meta device"),
        *(
            (
                tensors(),
                {name: value},
                f"{name} must be None for .*, or a number above 0, finite in fp32 .*, got {shown}",
            )
            for name in ("scale", "softcap")
            for value, shown in [
                (0.0, "0.0"),
                (-1, "-1"),
                (torch.inf, "inf"),
                (torch.nan, "nan"),
                (1e39, "1e\\+39"),
                (1e-40, "1e-40"),
                (True, "True"),
                ("0.1", "'0.1'"),
                (torch.tensor(0.1), "tensor"),
                ([0.1], r"\[0.1\]"),
                (10**400, "1000"),
                (1j, "1j"),
            ]
        ),
        (tensors(), {"sink": torch.zeros(2)}, r"sink must hold a logit for each of 4 heads, got \[2\]"),
        (tensors(), {"sink": torch.zeros(4, 1)}, r"sink must hold a logit for each of 4 heads, got \[4, 1\]"),
        (tensors(), {"sink": torch.zeros(4, dtype=torch.int64)}, "sink must be a floating-point tensor .* torch.int64"),
        (tensors(), {"sink": torch.zeros(4, dtype=torch.cfloat)}, "sink must be a floating-point .* torch.complex64"),
        (tensors(), {"sink": [0.0] * 4}, "sink must be a floating-point tensor of a logit for each .*, got list"),
        (tensors(), {"sink": torch.zeros(4, device="meta")}, "sink must be on cpu, as q is, got meta"),
        (tensors(), {"deterministic": 1}, "deterministic must be True or False, got 1"),
        (tensors(), {"compensated": "no"}, "compensated must be True or False, got 'no'"),
        (tensors(), {"return_lse": 1}, "return_lse must be True or False, got 1"),
        (tensors(), {"kernel": "fastest"}, "kernel=fastest is not one of auto, "),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(inputs, options, message):
    plan = AttentionPlan(IntervalMask.causal(8), Layout.contiguous(8, 1), Loopback(1))
    with pytest.raises((ValueError, TypeError), match=message):
        ring_attention(*inputs, plan, **options)


@pytest.mark.parametrize("value", [0.25, 1, np.float32(0.25), Fraction(1, 4)], ids=lambda value: type(value).__name__)
def test_a_scale_and_a_softcap_may_be_any_real_number(value):
    q, k, v, _ = whole_inputs(1, 8)
    expected = flash_attention(q, k, v, IntervalMask.causal(8), scale=float(value), softcap=float(value))
    assert torch.equal(flash_attention(q, k, v, IntervalMask.causal(8), scale=value, softcap=value), expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_empty_batch_has_an_empty_result_and_gradients(ranks, dtype):
    plan = AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, ranks), Loopback(ranks))
    shapes = [(0, 8 // ranks, heads, dim) for heads, dim in ((4, 16), (2, 16), (2, 12))]
    leaves = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes] + [
        torch.ones(4, requires_grad=True)
    ]
    out = ring_attention(*leaves[:3], plan, sink=leaves[3], softcap=2.0)
    assert (out.shape, out.dtype) == ((0, 8 // ranks, 4, 12), dtype)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]
    assert not gradients[3].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: flash_attention(x, x, x, None), "mask must be an IntervalMask, .* got None"),
        (lambda x: flash_attention(x, x, x, torch.ones(8, 8)), "mask must be an IntervalMask"),
        (lambda x: flash_attention([], x, x, IntervalMask.causal(8)), "q must be a tensor, got list"),
        (lambda x: ring_attention(x, x, x, None), "plan must be an AttentionPlan of mask, layout and ring, got None"),
        (
            lambda x: ring_attention(x, x, x, IntervalMask.causal(8)),
            r"plan must be an AttentionPlan .* got IntervalMask\(8 queries, 8 keys, 1 batch rows\)",
        ),
        (
            lambda x: AttentionPlan(IntervalMask.causal(8), Layout.contiguous(8, 1), None),
            "ring must be a ProcessRing, .* got None",
        ),
        (
            lambda x: AttentionPlan(IntervalMask.causal(8), Layout.contiguous(8, 1), Loopback(1), ulysses=2),
            "ulysses must be a Ulysses .* got 2",
        ),
        (
            lambda x: AttentionPlan(IntervalMask.causal(8), Layout.contiguous(8, 1), Loopback(1)).shard([1] * 8),
            "x must be a tensor .*, got list",
        ),
        (lambda x: Loopback("2"), "size must be a whole number of ranks, got size='2'"),
        (lambda x: Loopback(2.0), "size must be a whole number of ranks, got size=2.0"),
        (lambda x: Loopback(True), "size must be a whole number of ranks, got size=True"),
    ],
)
def test_what_is_of_the_wrong_kind_is_refused_by_its_name(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.zeros(1, 8, 2, 16))


@pytest.mark.gpu
@pytest.mark.parametrize(("head_dim", "kv_heads"), [(64, 8), (128, 8), (128, 1), (256, 8)])
def test_two_streams_on_a_gpu_are_exact_again_and_again(head_dim, kv_heads):
    """Five layers are queued without waiting, so that memory is reused while streams still run."""
    plan = AttentionPlan(IntervalMask.causal(2048), Layout.zigzag(2048, 4), Loopback(4, "cuda"))
    inputs = [x.cuda().bfloat16() for x in whole_inputs(1, 2048, 32, kv_heads, head_dim)]
    runs = [on_ring(inputs, plan) for _ in range(5)]
    expected = oracle(inputs, plan.mask.dense().cuda())
    assert all(torch.equal(out, runs[0][0]) for out, *_ in runs)
    for run in runs:
        for shards, truth in zip(run, expected, strict=True):
            found = plan.layout.unshard(shards.chunk(4)).double()
            assert (found - truth).norm() <= 1e-2 * truth.norm()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, q: torch.vmap(f)(q[None]),
        lambda f, q: torch.func.grad(lambda x: f(x).sum())(q),
        lambda f, q: torch.func.jacrev(f)(q),
        lambda f, q: torch.func.jvp(f, (q,), (q,)),
    ],
    ids=["vmap", "grad", "jacrev", "jvp"],
)
def test_transforms_of_torch_func_are_refused_with_what_to_use(transform):
    q, k, v = tensors()
    mask = IntervalMask.causal(q.shape[1])
    with pytest.raises(NotImplementedError, match=r"cannot be transformed by torch\.func .* more batch rows"):
        transform(lambda x: flash_attention(x, k, v, mask), q)


def test_a_second_derivative_is_refused_also_where_the_incoming_gradient_has_none():
    q, k, v = tensors()
    out = flash_attention(q.requires_grad_(), k, v, IntervalMask.causal(q.shape[1]))
    for loss in (out.sum(), out.square().sum()):
        with pytest.raises(NotImplementedError, match="no second derivative: create_graph=True"):
            torch.autograd.grad(loss, q, create_graph=True, retain_graph=True)


def test_compiled_code_calls_attention_between_its_graphs(recwarn):
    q, mask = torch.randn(1, 32, 2, 16), IntervalMask.causal(32)
    compiled = torch.compile(lambda q: flash_attention(2 * q, q, q, mask) + 1, backend="eager")
    torch.testing.assert_close(compiled(q), flash_attention(2 * q, q, q, mask) + 1)
    assert not list(recwarn)


def test_a_mask_of_another_length_is_refused_in_the_terms_of_flash_attention():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="a mask of 7 x 7 does not fit 8 queries and 8 keys"):
        flash_attention(q, k, v, IntervalMask.causal(7))


def test_a_ring_of_no_ranks_is_refused():
    with pytest.raises(ValueError, match="got size=0"):
        Loopback(0)
