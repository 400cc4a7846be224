"""Any grid of Ulysses x ring gives the attention of one rank, with KV heads divided or replicated."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ProcessRing, Ulysses, ring_attention
from ringflash.ring.ulysses import heads_refusal
from ringflash.ring.watchdog import Watchdog
from tests import reference
from tests.ring.cases import assert_exact, error, on_ring, oracle, whole, whole_inputs

LENGTH = 75
MASK = IntervalMask.causal(LENGTH) & IntervalMask.documents([[1, 30, 44], [75]])

GRIDS = [(1, 1), (2, 2), (2, 1), (3, 3), (4, 2), (4, 4), (6, 3), (8, 1), (8, 2), (8, 4), (8, 8)]  # ranks, ulysses


def plan_of_grid(ulysses):
    """The plan of two packed rows on this world's grid."""
    ring_size = dist.get_world_size() // ulysses
    mesh = init_device_mesh("cpu", (ring_size, ulysses), mesh_dim_names=("ring", "ulysses"))
    layout = Layout.zigzag(LENGTH, ring_size, ulysses=ulysses)
    return AttentionPlan(MASK, layout, ProcessRing(mesh["ring"]), Ulysses(mesh["ulysses"]))


def side_by_side(results, ulysses):
    """The shards of all ranks of a grid, and the layout that they have."""
    layout = Layout.zigzag(LENGTH, len(results) // ulysses, ulysses=ulysses).split(ulysses)
    return [torch.cat(x) for x in zip(*results, strict=True)], layout


def on_grid(ulysses, heads, kv_heads, with_sink, dtype=torch.float32, value_dim=16):
    """This rank's shards of out, dq, dk, dv, and its share of the sink's gradient."""
    inputs = [x.to(dtype) for x in whole_inputs(2, LENGTH, heads, kv_heads, 16, value_dim)]
    return on_ring(inputs, plan_of_grid(ulysses), torch.linspace(-1, 1, heads) if with_sink else None)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks_of_run", "ulysses", "heads"),
    [
        (ranks, ulysses, heads)
        for ranks, ulysses in GRIDS
        for heads in [(4, 4), (4, 2), (4, 1), (8, 4), (6, 3), (6, 1), (8, 1)]
        if heads_refusal(ulysses, *heads) is None
    ],
    ids=str,
)
def test_any_grid_is_exact(ranks, ranks_of_run, ulysses, heads):
    results, layout = side_by_side(ranks.run(on_grid, ranks_of_run, ulysses, *heads, False), ulysses)
    assert_exact(results, oracle(whole_inputs(2, LENGTH, *heads), MASK.dense()), layout)


@pytest.mark.ranks
def test_values_of_another_head_size_are_exchanged_too(ranks):
    results, layout = side_by_side(ranks.run(on_grid, 4, 2, 4, 2, False, torch.float32, 24), 2)
    assert_exact(results, oracle(whole_inputs(2, LENGTH, 4, 2, 16, 24), MASK.dense()), layout)


def gathered(ulysses, dtype):
    """Whole sequences from every rank's shard of them, without a warning about torch's names."""
    plan = plan_of_grid(ulysses)
    x = torch.arange(2 * LENGTH * 3).view(2, LENGTH, 3).to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        return torch.equal(plan.unshard(plan.shard(x)), x)


@pytest.mark.ranks
@pytest.mark.parametrize(("ulysses", "dtype"), [(1, torch.int64), (2, torch.bfloat16), (4, torch.float32)], ids=str)
def test_unshard_gives_every_rank_the_whole_sequences(ranks, ulysses, dtype):
    assert ranks.run(gathered, 4, ulysses, dtype) == [True] * 4


def with_lse(ulysses):
    """This rank's shards of lse, dq, dk and dv, where lse has a gradient and out has none."""
    plan = plan_of_grid(ulysses)
    q, k, v = (plan.shard(x).requires_grad_() for x in whole_inputs(2, LENGTH)[:3])
    lse = ring_attention(q, k, v, plan, return_lse=True)[1]
    lse = lse.transpose(1, 2).masked_fill((plan.positions[0] >= LENGTH)[..., None], 0.0)
    return [lse.detach(), *torch.autograd.grad(lse.square().sum(), (q, k, v))]


@pytest.mark.ranks
def test_lse_and_its_gradient_are_exchanged_too(ranks):
    results, layout = side_by_side(ranks.run(with_lse, 4, 2), 2)
    q, k, v = (x.double().requires_grad_() for x in whole_inputs(2, LENGTH)[:3])
    lse = reference.attention(q, k, v, MASK.dense())[1].transpose(1, 2)
    expected = [lse.detach(), *torch.autograd.grad(lse.square().sum(), (q, k), materialize_grads=True), 0 * v.detach()]
    assert_exact(results, expected, layout)


@pytest.mark.ranks
def test_gradients_of_a_replicated_kv_head_are_rounded_once(ranks):
    """Each rank of a row found a part of them: they are added in fp32, not in the 16 bits that they end in."""
    errors = {}
    *_, dk, dv = oracle([x.bfloat16() for x in whole_inputs(2, LENGTH, 4, 1)], MASK.dense())
    for ulysses in (1, 4):
        results = whole(*side_by_side(ranks.run(on_grid, 4, ulysses, 4, 1, False, torch.bfloat16), ulysses))
        errors[ulysses] = [error(x, truth) for x, truth in zip(results[2:], (dk, dv), strict=True)]
    for of_row, of_one in zip(errors[4], errors[1], strict=True):
        assert of_row <= 1.05 * of_one, errors


@pytest.mark.ranks
def test_sinks_gradients_add_up_over_any_grid(ranks):
    alone = ranks.run(on_grid, 1, 1, 4, 2, True)[0][4]
    for ulysses in (1, 2, 4):
        shares = [result[4] for result in ranks.run(on_grid, 4, ulysses, 4, 2, True)]
        torch.testing.assert_close(sum(shares), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads", "reason"),
    [
        (3, 4, 4, "4 query heads do not divide among ulysses=3 ranks"),
        (6, 12, 4, "4 KV heads neither divide among ulysses=6 ranks nor are a divisor of them"),
        (8, 32, 8, None),
        (8, 32, 2, None),
        (2, 32, 8, None),
    ],
)
def test_heads_that_ranks_cannot_share_are_refused_with_the_numbers(size, heads, kv_heads, reason):
    assert heads_refusal(size, heads, kv_heads) == reason


@pytest.fixture
def nccl_of_one():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield dist.distributed_c10d._get_default_group()
    dist.destroy_process_group()


@pytest.mark.gpu
def test_on_a_gpu_the_stream_waits_for_an_exchange_and_the_watchdog_records_it(nccl_of_one):
    guard = Watchdog(60.0, end=lambda: pytest.fail("ended"))
    mask, length = IntervalMask.causal(512), 512
    rings = [ProcessRing(nccl_of_one, "cuda"), Loopback(1, "cuda")]
    rows = [Ulysses(nccl_of_one, guard), None]
    inputs = [x.cuda().bfloat16() for x in whole_inputs(1, length)]
    results = []
    for ring, row in zip(rings, rows, strict=True):
        q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
        out = ring_attention(q, k, v, AttentionPlan(mask, Layout.contiguous(length, 1), ring, row))
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])])
    for exchanged, direct in zip(*results, strict=True):
        torch.testing.assert_close(exchanged, direct)
    torch.cuda.synchronize()
    taken = guard.drain()["ulysses"]
    assert (taken.exchanges, taken.bytes) == (4 + 5, 0)  # q, k, v, out; dout, delta, dq, dk, dv: nothing from others
    assert taken.seconds > 0
    guard.close()
