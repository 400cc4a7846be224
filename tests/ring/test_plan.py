"""A plan covers every visible (query, key) pair by exactly one hop, and computes no hop that sees nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback
from ringflash.layout import LAYOUTS
from tests.strategies import masks


def shown(intervals):
    """Intervals as booleans [B|1, Sq, Skv]."""
    keys = torch.arange(intervals.query_start.shape[1])
    return (intervals.start[..., None] <= keys) & (keys < intervals.end[..., None])


@given(st.data(), st.integers(1, 40), st.integers(1, 8), st.sampled_from(sorted(LAYOUTS)))
def test_every_visible_pair_is_covered_by_exactly_one_hop(data, length, ranks, name):
    mask, dense = data.draw(masks(length))
    layout = Layout.named(name, length, ranks)
    plan = AttentionPlan(mask, layout, Loopback(ranks))
    covered = torch.zeros(len(dense), layout.padded_length, layout.padded_length, dtype=torch.int64)
    for hops in plan.hops:
        for rank, hop in enumerate(hops):
            for intervals in hop.intervals:
                covered[:, layout.positions(rank)[:, None], layout.positions(hop.source)] += shown(intervals)
    assert torch.equal(covered[:, :length, :length], dense.long())
    assert covered.sum() == dense.sum()
    assert sum(hop.pairs for hops in plan.hops for hop in hops) == dense.sum()


def test_hops_that_see_nothing_are_not_computed():
    window = IntervalMask.window(64, left=7)
    plan = AttentionPlan(window, Layout.contiguous(64, 8), Loopback(8))
    assert [plan.computed(rank) for rank in range(8)] == [[0]] + [[0, 1]] * 7


@given(st.data(), st.integers(1, 40), st.integers(2, 8), st.sampled_from(sorted(LAYOUTS)))
def test_routes_carry_all_that_ranks_further_on_see(data, length, ranks, name):
    mask, _ = data.draw(masks(length))
    layout = Layout.named(name, length, ranks)
    plan = AttentionPlan(mask, layout, Loopback(ranks))
    for source, route in enumerate(plan.routes):
        seen = torch.zeros(ranks, layout.shard_length, dtype=torch.bool)  # by hop, source's keys that are seen on it
        for s in range(1, ranks):
            for intervals in plan.hops[s][(source + s) % ranks].intervals:
                seen[s] |= shown(intervals).any(0).any(0)
        for s in range(1, ranks):
            later, so_far = seen[s:].any(0), seen[1 : s + 1].any(0)
            assert later.sum() == later[route.keys[s].begin : route.keys[s].end].sum()
            assert so_far.sum() == so_far[route.gradients[s].begin : route.gradients[s].end].sum()
            assert s <= route.reach or not later.any()


def sent(plan):
    """Tokens of keys that travel, a list a hop."""
    return [sum(route.keys[s].tokens for route in plan.routes) for s in range(1, plan.ring.size)]


def test_with_a_window_and_a_contiguous_layout_only_the_windows_tail_moves_to_one_neighbour():
    plan = AttentionPlan(IntervalMask.window(131072, left=4095), Layout.contiguous(131072, 8), Loopback(8))
    assert sent(plan) == [7 * 4095, 0, 0, 0, 0, 0, 0]
    assert [route.reach for route in plan.routes] == [1] * 7 + [0]


def test_documents_that_end_with_a_shard_send_nothing():
    mask = IntervalMask.causal(64) & IntervalMask.documents([16] * 4)
    assert sent(AttentionPlan(mask, Layout.contiguous(64, 4), Loopback(4))) == [0, 0, 0]


def test_causal_zigzag_sends_all_but_the_half_that_only_the_first_rank_sees():
    plan = AttentionPlan(IntervalMask.causal(64), Layout.zigzag(64, 4), Loopback(4))
    assert [route.keys[1].tokens for route in plan.routes] == [8, 16, 16, 16]


def test_masks_of_one_plan_must_share_no_pair():
    with pytest.raises(ValueError, match="two of them share 36"):
        AttentionPlan((IntervalMask.causal(8), IntervalMask.full(8)), Layout.contiguous(8, 1), Loopback(1))


def test_a_windowed_plan_is_made_once_and_limits_every_query():
    plan = AttentionPlan(IntervalMask.causal(32), Layout.zigzag(32, 2), Loopback(2))
    narrow = plan.window(3)
    assert narrow is plan.window(3)
    assert torch.equal(narrow.masks[0].dense(), IntervalMask.window(32, 3).dense())


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
