"""A Layout gives every token to exactly one rank, in ascending order, and shards and unshards without loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash import Layout
from ringflash.layout import LAYOUTS

layouts = st.builds(Layout.named, st.sampled_from(sorted(LAYOUTS)), st.integers(1, 100), st.integers(1, 8))


@given(layouts)
def test_every_token_has_one_owner_and_shards_are_ascending_and_equal(layout):
    held = [layout.positions(rank) for rank in range(layout.ranks)]
    assert torch.equal(torch.cat(held).sort().values, torch.arange(layout.padded_length))
    assert all((positions.diff() > 0).all() for positions in held)
    assert {len(positions) for positions in held} == {layout.shard_length}


@given(layouts)
def test_padding_is_less_than_one_chunk_for_each_chunk_a_rank_could_hold(layout):
    assert 0 <= layout.padded_length - layout.length < layout.chunks.numel()


@given(layouts, st.sampled_from([0, 1, -1]))
def test_unshard_inverts_shard(layout, dim):
    shape = [2, 3, 4]
    shape[dim] = layout.length
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = [layout.shard(x, rank, dim, padding=-100) for rank in range(layout.ranks)]
    assert torch.equal(layout.unshard(shards, dim), x)
    padding = (layout.padded_length - layout.length) * x.numel() // layout.length
    assert sum(int((shard == -100).sum()) for shard in shards) == padding


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 100), st.integers(1, 8), st.integers(1, 4))
def test_split_divides_each_ranks_tokens_in_order(name, length, ranks, ulysses):
    layout = Layout.named(name, length, ranks, ulysses)
    split = layout.split(ulysses)
    for rank in range(ranks):
        held = [split.positions(rank * ulysses + part) for part in range(ulysses)]
        assert torch.equal(torch.cat(held), layout.positions(rank))
        assert len({len(positions) for positions in held}) == 1


def test_zigzag_and_striped_balance_causal_work():
    position = torch.arange(64)
    for name, spread in (("zigzag", 0.0), ("striped", 0.24)):
        layout = Layout.named(name, 64, 8)
        work = torch.stack([(position[layout.positions(rank)] + 1).sum() for rank in range(8)]).double()
        assert (work.max() - work.min()) / work.mean() <= spread, name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout.named("diagonal", 8, 2), "layout=diagonal is not one of contiguous, zigzag, striped"),
        (lambda: Layout.zigzag(-3, 2), "1 or more tokens, got length=-3"),
        (lambda: Layout.striped(0, 2), "1 or more tokens, got length=0"),
        (lambda: Layout(8, 2, torch.tensor([[0, 1], [1, 2]])), "exactly one owner"),
        (lambda: Layout(8, 2, torch.tensor([[1, 0], [2, 3]])), "ascending"),
        (lambda: Layout(9, 2, torch.tensor([[0, 1], [2, 3]])), "do not hold 9 tokens"),
        (lambda: Layout.zigzag(8, 2).shard(torch.zeros(1, 7), 0), "8 tokens"),
        (lambda: Layout.zigzag(12, 2).split(4), "6 tokens of a rank do not divide among ulysses=4 ranks"),
        (lambda: Layout.zigzag(8, 2).unshard([torch.zeros(1, 4)]), "got 1"),
        (
            lambda: Layout.zigzag(8, 2).unshard([torch.zeros(1, 3), torch.zeros(1, 5)]),
            r"4 tokens of a shard, got \[1, 3",
        ),
        (lambda: Layout.zigzag(8, 2).positions(-1), "ranks 0 to 1, got rank=-1"),
        (lambda: Layout(8, 0, torch.tensor([[0], [1]])), "1 or more tokens, got chunk=0"),
        (lambda: Layout(8, 4, torch.arange(2)), r"chunks must be \[ranks, chunks of a rank\], got \[2\]"),
        (lambda: Layout(8, 4, [[0], [1]]), "chunks must be an int64 tensor on the CPU, got list"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_its_value(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("make", [Layout.balanced, Layout.document_local])
def test_a_layout_for_a_mask_refuses_a_length(make):
    with pytest.raises(TypeError, match=r"mask must be an IntervalMask, .* got 8"):
        make(8, 2)


@pytest.mark.parametrize("make", [Layout.contiguous, Layout.zigzag, Layout.striped])
@pytest.mark.parametrize("asked", [(8.0, 2), (8, 2.0), ("8", 2)])
def test_a_length_or_number_of_ranks_that_is_not_whole_is_refused(make, asked):
    with pytest.raises(TypeError, match="length, ranks and ulysses must be whole numbers, got"):
        make(*asked)
