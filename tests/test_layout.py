"""A Layout gives every token to exactly one rank, in ascending order, and shards and unshards without loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.ring_cases import lognormal_lengths
from ringflash import IntervalMask, Layout
from ringflash.layout import LAYOUTS
from tests.strategies import masks, splits

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
def test_split_divides_each_ranks_tokens_in_order(name, length, ranks, parts):
    layout = Layout.named(name, length, ranks, parts)
    split = layout.split(parts)
    for rank in range(ranks):
        held = [split.positions(rank * parts + part) for part in range(parts)]
        assert torch.equal(torch.cat(held), layout.positions(rank))
        assert len({len(positions) for positions in held}) == 1


def test_zigzag_and_striped_balance_causal_work():
    position = torch.arange(64)
    for name, spread in (("zigzag", 0.0), ("striped", 0.24)):
        layout = Layout.named(name, 64, 8)
        work = torch.stack([(position[layout.positions(rank)] + 1).sum() for rank in range(8)]).double()
        assert (work.max() - work.min()) / work.mean() <= spread, name


def packed(lengths):
    """Causal inside documents of these lengths."""
    return IntervalMask.causal(sum(lengths)) & IntervalMask.documents(lengths)


def local(layout, mask):
    """The share of (query, key) pairs that lie inside one rank."""
    pairs = layout.pairs(mask)
    return float(pairs.diagonal().sum() / pairs.sum())


def dealt(length, ranks, per_rank):
    """Chunks dealt out at random."""
    order = torch.randperm(ranks * per_rank, generator=torch.Generator().manual_seed(0))
    return Layout(length, -(-length // len(order)), order.view(ranks, per_rank).sort(1).values)


@given(st.data(), st.integers(1, 40), st.integers(1, 8), st.sampled_from(sorted(LAYOUTS)))
def test_pairs_are_those_of_the_dense_mask(data, length, ranks, name):
    mask, dense = data.draw(masks(length))
    layout = Layout.named(name, length, ranks)
    holds = torch.stack([(layout.positions(r)[:, None] == torch.arange(length)).any(0) for r in range(ranks)]).long()
    assert torch.equal(layout.pairs(mask), holds @ dense.long().sum(0) @ holds.T)


@given(st.data(), st.integers(2, 4), st.integers(1, 2))
def test_a_balanced_layout_is_whole_repeatable_and_no_worse_than_zigzag(data, ranks, parts):
    mask = packed([2048, *(64 * n for n in data.draw(splits(128)))])  # long enough for chunks to be swapped
    layout = Layout.balanced(mask, ranks, parts)
    assert layout.shard_length % parts == 0
    assert layout.chunk % parts == 0
    assert torch.equal(layout.chunks.flatten().sort().values, torch.arange(layout.chunks.numel()))
    assert layout.imbalance(mask) <= max(0.03, Layout.zigzag(mask.queries, ranks, parts).imbalance(mask))
    assert torch.equal(layout.chunks, Layout.balanced(mask, ranks, parts).chunks)


def test_a_balanced_layout_keeps_most_pairs_that_can_be_inside_a_rank():
    # 72 percent of all pairs are those of one document, which takes six ranks: about 46 percent can be local.
    mask = packed(lognormal_lengths(64, 131072))
    layout = Layout.balanced(mask, 8)
    assert layout.imbalance(mask) <= 0.03
    assert local(layout, mask) >= 0.41
    assert local(layout, mask) >= 1.5 * local(dealt(131072, 8, 8), mask)


def test_documents_that_fit_a_rank_stay_on_one():
    mask = packed([4096, 1024, 1024, 2048] * 16)
    layout = Layout.balanced(mask, 8)
    assert layout.imbalance(mask) <= 0.03
    assert local(layout, mask) == 1


def test_a_balanced_layout_is_zigzag_for_one_document_and_contiguous_for_windows():
    for ranks in (2, 8, 32):
        causal = Layout.balanced(IntervalMask.causal(131072), ranks)
        assert torch.equal(causal.chunks, Layout.zigzag(131072, ranks).chunks)
        narrow = Layout.balanced(IntervalMask.window(131072, left=511), ranks)
        assert torch.equal(narrow.chunks, Layout.contiguous(131072, ranks).chunks)


def test_a_mask_that_shows_nothing_has_a_balanced_layout():
    assert Layout.balanced(IntervalMask.documents([], 8192), 4).shard_length == 2048


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout.named("diagonal", 8, 2), "layout=diagonal is not one of contiguous, zigzag, striped"),
        (lambda: Layout(8, 2, torch.tensor([[0, 1], [1, 2]])), "exactly one owner"),
        (lambda: Layout(8, 2, torch.tensor([[1, 0], [2, 3]])), "ascending"),
        (lambda: Layout(9, 2, torch.tensor([[0, 1], [2, 3]])), "do not hold 9 tokens"),
        (lambda: Layout.zigzag(8, 2).shard(torch.zeros(1, 7), 0), "8 tokens"),
        (lambda: Layout.zigzag(12, 2).split(4), "6 tokens of a rank do not divide into 4 parts"),
        (lambda: Layout.zigzag(8, 2).unshard([torch.zeros(1, 4)]), "got 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_its_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()
