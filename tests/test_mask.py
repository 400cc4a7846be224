"""An IntervalMask shows exactly the pairs that its definition says, through every operation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash import IntervalMask
from ringflash.intervals import ORDERED_TILES
from tests.strategies import masks

lengths = st.integers(1, 40)


@given(lengths.flatmap(masks))
def test_any_combination_of_masks_shows_what_its_ingredients_show(case):
    mask, dense = case
    assert torch.equal(mask.dense(), dense)


@given(st.data(), lengths, st.integers(0, 12), st.integers(0, 5))
def test_windows_and_leading_tokens_share_no_pair_and_show_their_own(data, length, left, first):
    mask, dense = data.draw(masks(length))
    i, j = torch.arange(length)[:, None], torch.arange(length)
    earliest = torch.where(dense.any(2), dense.int().argmax(2), length)[..., None]
    shown = dense & (j <= i) & ((j >= i - left) | (j < earliest + first))
    assert torch.equal(sum(part.dense().int() for part in mask.windowed(left, first)), shown.int())


@given(lengths.flatmap(masks))
def test_transpose_gives_the_queries_that_see_each_key(case):
    mask, dense = case
    assert torch.equal(mask.transpose().dense(), dense.transpose(1, 2))


@given(lengths.flatmap(masks))
def test_area_counts_the_visible_pairs(case):
    mask, dense = case
    assert mask.area() == dense.sum()


@given(st.data(), lengths)
def test_restriction_shows_the_same_pairs_renumbered(data, length):
    mask, dense = data.draw(masks(length))
    subset = st.sets(st.integers(0, length + 3), min_size=1).map(lambda held: torch.tensor(sorted(held)))
    queries, keys = data.draw(subset), data.draw(subset)
    padded = torch.zeros(len(dense), length + 4, length + 4, dtype=torch.bool)
    padded[:, :length, :length] = dense
    assert torch.equal(mask.restrict(queries, keys).dense(), padded[:, queries][:, :, keys])


@given(lengths.flatmap(masks))
def test_intervals_hold_the_mask_and_its_transpose_as_int32(case):
    mask, dense = case
    intervals = mask.intervals()
    i, j = torch.arange(mask.queries), torch.arange(mask.keys)
    by_query = (intervals.start[..., None] <= j) & (j < intervals.end[..., None])
    by_key = (intervals.query_start[..., None] <= i) & (i < intervals.query_end[..., None])
    assert intervals.start.dtype == torch.int32
    assert torch.equal(by_query, dense)
    assert torch.equal(by_key, dense.transpose(1, 2))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 12))
def test_chunks_count_within_each_document(lengths, size):
    length = sum(lengths) + 2  # padding, which sees nothing
    mask = (IntervalMask.causal(length) & IntervalMask.documents([lengths, [length]])).in_chunks(size)
    for row, documents in enumerate((lengths, [length])):
        seen, begin = [], 0
        for n in documents:
            seen += [(begin + i // size * size, begin + i + 1) for i in range(n)]
            begin += n
        assert [
            (lo, hi) for lo, hi in zip(mask.lo[row].tolist(), mask.hi[row].tolist(), strict=True) if lo < hi
        ] == seen


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntervalMask(torch.tensor([[0, 2, 1]]), torch.tensor([[3, 3, 3]]), 3), "lo must not decrease"),
        (lambda: IntervalMask(torch.tensor([[2]]), torch.tensor([[1]]), 3), "lo must not exceed hi"),
        (
            lambda: IntervalMask.causal(8).windowed(3, leading_tokens=-1),
            "leading_tokens must be 0 or more tokens, got leading_tokens=-1",
        ),
        (lambda: IntervalMask(torch.tensor([[0]]), torch.tensor([[4]]), 3), r"hi must lie in 0\.\.3, got 4"),
        (lambda: IntervalMask.documents([5, 4], length=8), "documents hold 9 tokens, more than the sequence's 8"),
        (lambda: IntervalMask.documents([0, 5, 8], length=8), r"8 \(if these are cu_seqlens, give .*cu_seqlens.diff"),
        (lambda: IntervalMask.documents([5, -1]), "must not be negative"),
        (lambda: IntervalMask.window(8, left=-1), "left=-1"),
        (lambda: IntervalMask.prefix(8, 9), "got 9"),
        (lambda: IntervalMask.chunked(8, 0), "chunk must be 1 or more tokens, got chunk=0"),
        (lambda: IntervalMask.causal(8).in_chunks(0), "size must be 1 or more tokens, got size=0"),
        (lambda: IntervalMask.prefix(8, -1), "prefix must be 0 or more tokens, got prefix=-1"),
        (lambda: IntervalMask.causal(-8), "length must be 0 or more tokens, got length=-8"),
        (lambda: IntervalMask.documents(np.array([5, -1])), "must not be negative"),
        (lambda: IntervalMask.documents([[1], [2]]) & IntervalMask.documents([[2]] * 3), "masks of 2 and 3 batch rows"),
        (lambda: IntervalMask.causal(8) & IntervalMask.causal(7), "8 x 8 and 7 x 7"),
        (lambda: IntervalMask.causal(4).restrict(torch.arange(4), torch.arange(3)).in_chunks(2), "itself, got 4 x 3"),
    ],
)
def test_what_is_not_an_interval_mask_is_refused_with_its_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@given(st.data(), st.integers(1, 900), st.sampled_from(ORDERED_TILES))
def test_orders_list_every_tile_once_and_the_longest_first(data, length, rows):
    mask, _ = data.draw(masks(length))
    x = mask.intervals()
    for order, starts, ends in (
        (x.query_order[rows], x.start, x.end),
        (x.key_order[rows], x.query_start, x.query_end),
    ):
        listed = order.tiles.tolist()
        walked = [
            [
                int(end[tile * rows :][:rows][-1] - start[tile * rows])
                if (end > start)[tile * rows :][:rows].any()
                else 0
                for tile in row
            ]
            for row, start, end in zip(listed, starts, ends, strict=True)
        ]
        assert all(sorted(row) == list(range(-(-length // rows))) for row in listed)
        assert all(row[0] == max(row) for row in walked)
        assert all(sorted(row, key=bool, reverse=True) == row for row in walked), "what walks nothing comes last"
        assert order.nonempty == max(sum(span > 0 for span in row) for row in walked)
        assert order.longest == max(max(row) for row in walked)
        assert order.total == pytest.approx(sum(map(sum, walked)) / len(walked))


def test_a_documents_tiles_follow_one_another_and_the_longest_document_comes_first():
    mask = IntervalMask.causal(128 * 9) & IntervalMask.documents([128 * 2, 128 * 4, 128 * 3])
    x = mask.intervals()
    assert x.query_order[128].tiles.tolist() == [[5, 4, 3, 2, 8, 7, 6, 1, 0]]
    assert x.key_order[128].tiles.tolist() == [[2, 3, 4, 5, 6, 7, 8, 0, 1]]


@pytest.mark.parametrize("huge", [2**63 - 1, 2**63, 2**70])
def test_a_reach_beyond_every_integer_of_the_machine_is_the_whole_sequence(huge):
    full, causal = IntervalMask.full(9).dense(), IntervalMask.causal(9)
    assert torch.equal(IntervalMask.window(9, huge, huge).dense(), full)
    assert torch.equal(IntervalMask.window(9, huge).dense(), causal.dense())
    assert torch.equal(IntervalMask.chunked(9, huge).dense(), full)
    assert torch.equal(causal.windowed(huge, leading_tokens=2)[0].dense(), causal.dense())
    near, before = causal.windowed(2, leading_tokens=huge)
    assert torch.equal(near.dense() | before.dense(), causal.dense())


@pytest.mark.parametrize("count", [2.0, True, "2", None, torch.tensor(2.0)])
@pytest.mark.parametrize(
    "make",
    [
        lambda n: IntervalMask.causal(n), lambda n: IntervalMask.window(8, n), lambda n: IntervalMask.window(8, 1, n),
        lambda n: IntervalMask.prefix(8, n), lambda n: IntervalMask.chunked(8, n), lambda n: IntervalMask.full(n),
        lambda n: IntervalMask.causal(8).windowed(n), lambda n: IntervalMask.causal(8).windowed(1, leading_tokens=n),
    ],
)  # fmt: skip
def test_what_is_no_number_of_tokens_is_refused_by_the_arguments_name(make, count):
    with pytest.raises(
        TypeError, match=r"(length|left|right|prefix|chunk|leading_tokens) must be a whole number of tokens, got"
    ):
        make(count)


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ([[0, 1]], "lo must be an int64 tensor on the CPU, got list"),
        (torch.zeros(1, 2), r"lo must be an int64 tensor on the CPU, got torch\.float32 on cpu"),
        (torch.zeros(1, 2, dtype=torch.int64, device="meta"), r"lo must be .*, got torch\.int64 on meta"),
    ],
)
def test_bounds_that_are_no_integers_on_the_cpu_are_refused(bound, message):
    with pytest.raises(TypeError, match=message):
        IntervalMask(bound, bound, 2)


def test_masks_of_two_lengths_do_not_intersect():
    with pytest.raises(ValueError, match=r"masks of 8 x 8 and 7 x 7 do not intersect: .*documents\(lengths, length\)"):
        IntervalMask.causal(8) & IntervalMask.documents([3, 4])


def test_a_mask_and_something_else_do_not_intersect():
    with pytest.raises(TypeError, match="intersects with another one, got Tensor"):
        IntervalMask.causal(3) & torch.ones(3, 3)


@pytest.mark.parametrize(
    "counts",
    [
        list(np.array([120, 200], np.uint8)),  # whose sum is 64
        np.array([120, 200], np.uint8), torch.tensor([120, 200]), [torch.tensor(120), 200], [np.array([120, 200])],
        torch.tensor([[120, 200]]), ((120, 200),), [120, 0, 200],
    ],
)  # fmt: skip
def test_document_lengths_may_be_numpys_or_tensors(counts):
    assert torch.equal(IntervalMask.documents(counts).dense(), IntervalMask.documents([120, 200]).dense())


@pytest.mark.parametrize(
    "counts",
    [3, None, "35", [3.0, 5.0], torch.tensor([3.0]), np.array([3.5]), [True], torch.tensor([True]), [3, [5]], [[3.0]],
     torch.tensor(3), [[[3]]], {3: 5}],
)  # fmt: skip
def test_document_lengths_that_are_no_integers_are_refused(counts):
    with pytest.raises(TypeError, match=r"documents must be a list of ints, or a list of such lists, .*, got "):
        IntervalMask.documents(counts)


@given(st.data(), st.integers(1, 40))
def test_no_pair_lies_across_the_beginning_of_a_document(data, length):
    mask, _ = data.draw(masks(length))
    dense = mask.dense()
    for row, starts in enumerate(mask.document_starts().tolist()):
        for place, begins in enumerate(starts):
            across = dense[row, place:, :place].any() or dense[row, :place, place:].any()
            assert not (begins and across)
    documents = IntervalMask.causal(length) & IntervalMask.documents([1] * (length // 2) + [length - length // 2])
    assert documents.document_starts()[0].nonzero().flatten().tolist() == [*range(length // 2 + 1)]
