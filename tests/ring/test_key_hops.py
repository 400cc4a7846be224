"""Keys that travel with a stride reach every rank that sees them, in the order of their positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback
from ringflash.ring.key_hops import KeyHops
from ringflash.ring.routes import routes
from tests.strategies import masks

PACK = IntervalMask.causal(4096) & IntervalMask.documents([1300, 40, 1900, 800, 56])


@st.composite
def layouts(draw):
    """Layouts whose chunks belong to any ranks."""
    ranks, each, size = draw(st.integers(1, 9)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    owners = draw(st.permutations(list(range(ranks)) * each))
    chunks = torch.tensor(owners).argsort(stable=True).view(ranks, each)
    return Layout(draw(st.integers(max(1, ranks * each * size - 2), ranks * each * size)), size, chunks)


@settings(max_examples=80)
@given(st.data(), layouts(), st.sampled_from(["of_forward", "of_backward"]))
def test_a_rank_has_all_keys_that_it_sees_on_exactly_one_hop_and_knows_their_positions(data, layout, of_pass):
    mask, _ = data.draw(masks(layout.length))
    hops = getattr(KeyHops, of_pass)(layout, routes((mask,), layout))
    buffers = [layout.positions(rank) for rank in range(layout.ranks)]
    seen = [[] for _ in range(layout.ranks)]
    for s in range(hops.number):
        if s > 0:
            arrived = [torch.full((hops.rows(rank, s),), -1) for rank in range(layout.ranks)]
            for rank, buffer in enumerate(arrived):
                for sender, source, target in hops.moves(rank, s):
                    assert rank in hops.receivers(sender, s)
                    buffer[slice(*target)] = buffers[sender][slice(*source)]
            buffers = arrived
        for rank, buffer in enumerate(buffers):
            positions = hops.positions(rank)[s]
            visible = mask.restrict(layout.positions(rank), positions)
            for lo, hi in zip(visible.lo.flatten().tolist(), visible.hi.flatten().tolist(), strict=True):
                assert torch.equal(buffer[lo:hi], positions[lo:hi])
            seen[rank].append(visible.area())
    assert torch.equal(torch.tensor([sum(row) for row in seen]), layout.pairs(mask).sum(1))


def test_layouts_of_a_few_chunks_bring_four_ranks_keys_at_once_and_send_fewer_of_them():
    chunks = (3 * torch.arange(32) % 32).view(8, 4).sort(1).values
    plan = AttentionPlan(PACK, Layout(4096, 128, chunks), Loopback(8))
    forward, backward = plan.key_hops
    assert forward.distances == ((0,), (1, 2, 3, 4), (5, 6, 7))
    assert backward.distances == tuple((d,) for d in range(8))

    def sent(hops):
        moves = (move for rank in range(8) for s in range(1, hops.number) for move in hops.moves(rank, s))
        return sum(target.end - target.begin for _, _, target in moves)

    assert sent(forward) < 0.9 * sent(backward)


@pytest.mark.parametrize("name", ["contiguous", "zigzag"])
def test_long_runs_of_keys_go_from_neighbour_to_neighbour(name):
    plan = AttentionPlan(PACK, Layout.named(name, PACK.queries, 8), Loopback(8))
    assert [hops.stride for hops in plan.key_hops] == [1, 1]
    assert plan.forward_hops is plan.hops
