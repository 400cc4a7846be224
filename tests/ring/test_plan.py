"""A plan covers every visible (query, key) pair by exactly one hop, and computes no hop that sees nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback
from ringflash.layout import LAYOUTS
from tests.strategies import masks


@given(st.data(), st.integers(1, 40), st.integers(1, 8), st.sampled_from(sorted(LAYOUTS)))
def test_every_visible_pair_is_covered_by_exactly_one_hop(data, length, ranks, name):
    mask, dense = data.draw(masks(length))
    layout = Layout.named(name, length, ranks)
    plan = AttentionPlan(mask, layout, Loopback(ranks))
    covered = torch.zeros(len(dense), layout.padded_length, layout.padded_length, dtype=torch.int64)
    for hops in plan.hops:
        for rank, hop in enumerate(hops):
            if hop.intervals is not None:
                start, end = hop.intervals.start, hop.intervals.end
                local = torch.arange(layout.shard_length)
                seen = (start[..., None] <= local) & (local < end[..., None])
                queries, keys = layout.positions(rank), layout.positions(hop.source)
                covered[:, queries[:, None], keys] += seen
    assert torch.equal(covered[:, :length, :length], dense.long())
    assert covered.sum() == dense.sum()
    assert sum(hop.pairs for hops in plan.hops for hop in hops) == dense.sum()


def test_hops_that_see_nothing_are_not_computed():
    window = IntervalMask.window(64, left=7)
    plan = AttentionPlan(window, Layout.contiguous(64, 8), Loopback(8))
    assert [plan.computed(rank) for rank in range(8)] == [[0]] + [[0, 1]] * 7


def test_a_windowed_plan_is_made_once_and_limits_every_query():
    plan = AttentionPlan(IntervalMask.causal(32), Layout.zigzag(32, 2), Loopback(2))
    narrow = plan.window(3)
    assert narrow is plan.window(3)
    assert torch.equal(narrow.mask.dense(), IntervalMask.window(32, 3).dense())


def test_position_ids_are_global_and_in_shard_order():
    plan = AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, 2), Loopback(2))
    assert plan.position_ids(batch=2).tolist() == [[0, 1, 6, 7]] * 2 + [[2, 3, 4, 5]] * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPlan(IntervalMask.causal(8), Layout.zigzag(9, 2), Loopback(2)), "8 x 8 does not fit"),
        (lambda: AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, 2), Loopback(3)), "2 ranks .* ring of 3"),
    ],
)
def test_mask_layout_and_ring_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
