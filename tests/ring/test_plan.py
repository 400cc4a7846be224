"""A plan covers every visible (query, key) pair by exactly one hop, and computes no hop that sees nothing."""

import functools
import operator
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ProcessRing, Ulysses
from ringflash.layout import LAYOUT_NAMES, LAYOUTS
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
    for of_pass, key_hops in ((plan.forward_hops, plan.key_hops[0]), (plan.hops, plan.key_hops[1])):
        covered = torch.zeros(len(dense), layout.padded_length, layout.padded_length, dtype=torch.int64)
        for rank in range(ranks):
            for hops, keys in zip(of_pass, key_hops.positions(rank), strict=False):
                for intervals in hops[rank].intervals:
                    covered[:, layout.positions(rank)[:, None], keys] += shown(intervals)
        assert torch.equal(covered[:, :length, :length], dense.long())
        assert covered.sum() == dense.sum()
        assert sum(hop.pairs for hops in of_pass for hop in hops) == dense.sum()


def test_hops_that_see_nothing_are_not_computed():
    window = IntervalMask.window(64, left=7)
    plan = AttentionPlan(window, Layout.contiguous(64, 8), Loopback(8))
    assert [plan.computed(rank) for rank in range(8)] == [[0]] + [[0, 1]] * 7


def tokens(runs, length):
    """Which tokens are in runs."""
    found = torch.zeros(length, dtype=torch.bool)
    for begin, end in runs:
        found[begin:end] = True
    return found


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
        home = torch.zeros(layout.shard_length, dtype=torch.int64)
        for s in range(1, ranks):
            later, so_far = seen[s:].any(0), seen[1 : s + 1].any(0)
            assert later.sum() == sum(later[begin:end].sum() for begin, end in route.keys[s])
            assert s <= route.last_hop or not later.any()
            here, forwarded, returned = (
                tokens(runs[s], layout.shard_length) for runs in (route.gradients, route.forwarded, route.returned)
            )
            assert torch.equal(so_far | here | (home > 0), here | (home > 0))
            assert torch.equal(here.long(), forwarded.long() + returned.long())
            assert not (returned & seen[s + 1 :].any(0)).any()
            home += returned
            assert not (forwarded & (home > 0)).any()
        assert home.max() <= 1
        assert torch.equal(home > 0, tokens(route.all_returned, layout.shard_length))
        assert not (seen[1:].any(0) & (home == 0)).any()


def sent(plan):
    """Tokens of keys that are sent, one list per hop."""
    return [sum(route.keys[s].tokens for route in plan.routes) for s in range(1, plan.ring.size)]


def test_with_a_window_and_a_contiguous_layout_only_the_windows_tail_moves_to_one_neighbour():
    plan = AttentionPlan(IntervalMask.window(131072, left=4095), Layout.contiguous(131072, 8), Loopback(8))
    assert sent(plan) == [7 * 4095, 0, 0, 0, 0, 0, 0]
    assert [route.last_hop for route in plan.routes] == [1] * 7 + [0]


def needed(plan):
    """Tokens of keys that would be sent if each key stopped at the last rank that sees it."""
    ranks, total = plan.ring.size, 0
    for source in range(ranks):
        later = torch.zeros(plan.layout.shard_length, dtype=torch.bool)
        for s in reversed(range(1, ranks)):
            seen = torch.zeros(plan.layout.shard_length + 1, dtype=torch.int64)
            for intervals in plan.hops[s][(source + s) % ranks].intervals:
                some = intervals.start < intervals.end
                seen += torch.bincount(intervals.start[some], minlength=len(seen))
                seen -= torch.bincount(intervals.end[some], minlength=len(seen))
            later |= seen.cumsum(0)[:-1] > 0
            total += int(later.sum())
    return total


LENGTH = 32768
PACKED = IntervalMask.causal(LENGTH) & IntervalMask.documents([900, 9000, 3100, 14000, 700, 5068])


@pytest.mark.parametrize(
    ("mask", "layout", "excess"),
    [
        (IntervalMask.window(LENGTH, 1023), Layout.contiguous(LENGTH, 8), 0.0),
        (IntervalMask.window(LENGTH, 1023), Layout.zigzag(LENGTH, 8), 0.0),
        (IntervalMask.causal(LENGTH).windowed(1023, leading_tokens=4), Layout.contiguous(LENGTH, 8), 0.0),
        (IntervalMask.causal(LENGTH).windowed(1023, leading_tokens=4), Layout.zigzag(LENGTH, 8), 0.0),
        (PACKED.windowed(1023, leading_tokens=4), Layout.contiguous(LENGTH, 8), 0.0),
        (PACKED.windowed(1023, leading_tokens=4), Layout.zigzag(LENGTH, 8), 0.01),
        (PACKED.windowed(1023, leading_tokens=4), Layout.balanced(PACKED, 8), 0.02),
        (IntervalMask.causal(LENGTH), Layout.zigzag(LENGTH, 8), 0.0),
        (PACKED, Layout.contiguous(LENGTH, 8), 0.0),
        (PACKED, Layout.zigzag(LENGTH, 8), 0.01),
        (PACKED, Layout.balanced(PACKED, 8), 0.02),
    ],
    ids=["window", "window zigzag", "first tokens", "first tokens zigzag", "packed first tokens",
         "packed first tokens zigzag", "packed first tokens balanced", "causal zigzag", "packed", "packed zigzag",
         "packed balanced"],
)  # fmt: skip
def test_no_more_keys_travel_than_ranks_further_on_see(mask, layout, excess):
    """Except gaps below 1/32 of a shard, which are not worth a message."""
    plan = AttentionPlan(mask, layout, Loopback(8))
    assert sum(sent(plan)) <= needed(plan) * (1 + excess)
    messages = [runs for route in plan.routes for runs in (*route.keys, *route.forwarded, *route.returned)]
    assert max(map(len, messages)) <= (7 if len(plan.masks) > 1 else 6)
    for runs in (runs for route in plan.routes for runs in route.keys):
        assert all(later.begin - run.end >= layout.shard_length // 32 for run, later in pairwise(runs))


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


def test_windows_also_show_leading_tokens_where_the_plan_has_them():
    mask, layout = IntervalMask.causal(32) & IntervalMask.documents([20, 12]), Layout.zigzag(32, 2)
    narrow = AttentionPlan(mask, layout, Loopback(2), leading_tokens=2).window(3)
    i, j = torch.arange(32)[:, None], torch.arange(32)
    shown = mask.dense()[0] & ((j >= i - 3) | (j < 2) | ((j >= 20) & (j < 22)))
    assert torch.equal(sum(mask.dense()[0].int() for mask in narrow.masks), shown.int())
    assert sum(hop.pairs for hops in narrow.hops for hop in hops) == shown.sum()


def test_masks_of_fewer_batch_rows_count_for_every_row():
    near = IntervalMask.window(32, left=3) & IntervalMask.documents([[8, 24], [32]])
    hi = torch.where(torch.arange(32) < 12, 0, 2)[None]
    far = IntervalMask(torch.zeros_like(hi), hi, 32)  # the first two keys, from query 12 on
    plan = AttentionPlan((near, far), Layout.zigzag(32, 2), Loopback(2))
    assert sum(hop.pairs for hops in plan.hops for hop in hops) == near.area() + 2 * far.area()


def test_a_tokens_place_in_its_document_counts_from_the_first_token_that_any_mask_shows():
    lengths = [12, 20]
    masks = (IntervalMask.causal(32) & IntervalMask.documents(lengths)).windowed(3, leading_tokens=2)
    layout = Layout.zigzag(32, 2)
    plan = AttentionPlan(masks, layout, Loopback(2))
    in_document = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([layout.shard(in_document, rank) for rank in range(2)])
    assert torch.equal(plan.positions[1], expected)


def test_a_plan_of_several_masks_is_not_limited_to_windows():
    """What one of them was given to show, as first tokens far back, would be hidden without an error."""
    plan = AttentionPlan(IntervalMask.causal(32).windowed(9, leading_tokens=4), Layout.zigzag(32, 2), Loopback(2))
    with pytest.raises(ValueError, match=r"a plan of 2 masks cannot be limited to windows of 4: .* leading_tokens=N"):
        plan.window(3)
    with pytest.raises(ValueError, match=r"a plan of 2 masks cannot be limited to chunks of 4"):
        plan.in_chunks(4)


def test_unshard_undoes_shard_where_one_process_has_all_ranks():
    plan = AttentionPlan(IntervalMask.causal(13), Layout.zigzag(13, 3), Loopback(3))
    x = torch.randn(2, 13, 4)
    assert torch.equal(plan.unshard(plan.shard(x)), x)
    with pytest.raises(ValueError, match=r"x must be \[3 local ranks \* B, 6, ...\], got \[6, 13, 4\]"):
        plan.unshard(torch.cat([x] * 3))


def test_position_ids_are_global_and_in_shard_order():
    plan = AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, 2), Loopback(2))
    assert plan.position_ids(batch=2).tolist() == [[0, 1, 6, 7]] * 2 + [[2, 3, 4, 5]] * 2


def test_position_ids_count_from_the_beginning_of_each_document():
    mask = IntervalMask.causal(8) & IntervalMask.documents([[3, 5], [8]])
    plan = AttentionPlan(mask, Layout.zigzag(8, 2), Loopback(2))
    assert plan.position_ids().tolist() == [[0, 1, 3, 4], [0, 1, 6, 7], [2, 0, 1, 2], [2, 3, 4, 5]]
    one = AttentionPlan(IntervalMask.causal(8) & IntervalMask.documents([3, 5]), Layout.zigzag(8, 2), Loopback(2))
    assert one.position_ids(batch=2).tolist() == [[0, 1, 3, 4]] * 2 + [[2, 0, 1, 2]] * 2


def test_each_token_knows_the_length_of_its_document():
    mask = IntervalMask.causal(8) & IntervalMask.documents([[3, 5], [8]])
    plan = AttentionPlan(mask, Layout.zigzag(8, 2), Loopback(2))
    assert plan.document_lengths(2).tolist() == [[3, 3, 5, 5], [8] * 4, [3, 5, 5, 5], [8] * 4]
    one = AttentionPlan(IntervalMask.causal(8) & IntervalMask.documents([3, 5]), Layout.zigzag(8, 2), Loopback(2))
    assert one.document_lengths(batch=2).tolist() == [[3, 3, 5, 5]] * 2 + [[3, 5, 5, 5]] * 2


def test_a_window_in_the_mask_does_not_shorten_positions():
    mask = IntervalMask.causal(8) & IntervalMask.documents([3, 5]) & IntervalMask.window(8, left=1)
    plan = AttentionPlan(mask, Layout.contiguous(8, 1), Loopback(1))
    assert plan.position_ids().tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda plan: plan.position_ids(batch=3), "masks have 2 batch rows does not fit a batch of 3"),
        (lambda plan: plan.position_ids(batch=0), "does not fit a batch of 0"),
        (lambda plan: plan.shard(torch.ones(3, 8)), r"plan of 2 batch rows and 8 tokens got \[3, 8\]"),
        (lambda plan: plan.shard(torch.ones(8)), r"plan of 2 batch rows and 8 tokens got \[8\]"),
        (lambda plan: plan.shard(torch.ones(2, 9)), r"must hold the sequence's 8 tokens, got \[2, 9\]"),
        (lambda plan: plan.window(-1), "left must be 0 or more tokens, got left=-1"),
        (lambda plan: plan.window(1.0), r"left must be a whole number of tokens, got left=1\.0"),
    ],
)
def test_a_plan_for_another_batch_length_or_window_is_refused(use, message):
    mask = IntervalMask.causal(8) & IntervalMask.documents([[3, 5], [8]])
    with pytest.raises((ValueError, TypeError), match=message):
        use(AttentionPlan(mask, Layout.zigzag(8, 2), Loopback(2)))


def test_masks_of_other_batch_rows_are_refused():
    masks = (IntervalMask.documents([[4], [4]]), IntervalMask.documents([[4]] * 3))
    with pytest.raises(ValueError, match="masks of 2 and 3 batch rows do not intersect"):
        AttentionPlan(masks, Layout.contiguous(4, 1), Loopback(1))


def test_a_window_longer_than_any_sequence_is_one_plan_of_the_whole():
    plan = AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, 2), Loopback(2))
    assert plan.window(2**63 - 1) is plan.window(2**70)
    assert torch.equal(plan.window(2**63 - 1).masks[0].dense(), plan.masks[0].dense())


def test_masks_layouts_and_plans_are_made_on_the_cpu_under_any_default_device():
    """As after torch.set_default_device("cuda"); here on a device where their tensors would have no values."""

    def made():
        kinds = (IntervalMask.window(32, 9), IntervalMask.chunked(32, 16), IntervalMask.prefix(32, 3))
        mask = functools.reduce(operator.and_, kinds, IntervalMask.documents([[5, 27], [32]]))
        layouts = [Layout.of(name, mask, 2) for name in LAYOUT_NAMES]
        plans = [AttentionPlan(mask, layout, Loopback(2), leading_tokens=1) for layout in layouts]
        plans += [narrow for plan in plans for narrow in (plan.window(4), plan.in_chunks(8))]
        dense = [mask.dense(), mask.transpose().dense()]
        costs = [(x.imbalance(mask), x.received(mask).tolist(), x.work(mask).tolist(), str(x)) for x in layouts]
        return [x.tolist() for x in dense], costs, [(str(x), x.positions.tolist()) for x in plans]

    expected = made()
    with torch.device("meta"):
        assert made() == expected


def compared(ulysses, change):
    """The error of comparing plans, if rank 3 made another one."""
    mask, layout, leading_tokens = IntervalMask.documents([9, 7]), Layout.zigzag(16, 4 // ulysses, ulysses), 0
    if change and dist.get_rank() == 3:
        mask, layout, leading_tokens = {
            "mask": (IntervalMask.documents([8, 8]), layout, 0),
            "layout": (mask, Layout.contiguous(16, 4 // ulysses, ulysses), 0),
            "leading tokens": (mask, layout, 1),
        }[change]
    mesh = init_device_mesh("cpu", (4 // ulysses, ulysses), mesh_dim_names=("ring", "ulysses"))
    row = Ulysses(mesh["ulysses"]) if ulysses > 1 else None
    try:
        AttentionPlan(mask, layout, ProcessRing(mesh["ring"]), row, leading_tokens).compare_ranks()
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.ranks
@pytest.mark.parametrize("ulysses", [1, 2])
@pytest.mark.parametrize("change", [None, "mask", "layout", "leading tokens"])
def test_every_rank_refuses_plans_that_differ(ranks, ulysses, change):
    message = "mask, layout and leading_tokens must be the same on every rank of a ring: each takes its shard of them"
    assert ranks.run(compared, 4, ulysses, change) == [message if change else None] * 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionPlan(IntervalMask.causal(8), Layout.zigzag(9, 2), Loopback(2)), "8 x 8 does not fit"),
        (lambda: AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, 2), Loopback(3)), "2 ranks .* ring of 3"),
        (
            lambda: AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, 2), Loopback(2), leading_tokens=-1),
            "leading_tokens must .*=-1",
        ),
        (
            lambda: AttentionPlan(IntervalMask.causal(8), Layout.zigzag(8, 2), Loopback(2), leading_tokens=0.5),
            "leading_tokens must .*=0.5",
        ),
        (lambda: AttentionPlan("causal", Layout.zigzag(8, 2), Loopback(2)), "mask must be an .* got 'causal'"),
        (lambda: AttentionPlan((), Layout.zigzag(8, 2), Loopback(2)), r"mask must be an .* got \(\)"),
        (lambda: AttentionPlan(IntervalMask.causal(8), "zigzag", Loopback(2)), "layout must be a .* got 'zigzag'"),
    ],
)
def test_mask_layout_and_ring_that_do_not_fit_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
