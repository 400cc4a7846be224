"""Merging Partials is exact attention over the union of their keys: associative, commutative, with an identity."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash import Partial, merge
from ringflash.partial import merge_sink


def attend(scores, values):
    """Partial [1, 1, 1, D] of one query with these scores; no scores at all give the identity."""
    if not len(scores):
        return Partial.identity(torch.zeros(1, 1, 1, values.shape[1]))
    weights = torch.softmax(scores, 0)
    return Partial((weights @ values).view(1, 1, 1, -1), torch.logsumexp(scores, 0).view(1, 1, 1))


def close(a, b):
    torch.testing.assert_close(a.out, b.out, rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(a.lse, b.lse, rtol=2e-6, atol=2e-6)


scores = st.lists(st.floats(-200, 200, width=32), max_size=6).map(lambda x: torch.tensor(x, dtype=torch.float32))


@given(scores, scores, scores)
def test_any_grouping_equals_attention_over_all_keys(a, b, c):
    values = torch.randn(len(a) + len(b) + len(c), 4)
    parts = [attend(s, v) for s, v in zip((a, b, c), values.split([len(a), len(b), len(c)]), strict=True)]
    whole = attend(torch.cat([a, b, c]), values)
    close(merge(merge(parts[0], parts[1]), parts[2]), whole)
    close(merge(parts[2], merge(parts[1], parts[0])), whole)


def test_nothing_merged_with_nothing_is_nothing_and_not_nan():
    nothing = attend(torch.empty(0), torch.empty(0, 4))
    both = merge(nothing, nothing)
    assert torch.equal(both.out, nothing.out)
    assert torch.equal(both.lse, nothing.lse)


def test_extreme_lse_does_not_overflow():
    values = torch.randn(2, 4)
    low, high = (attend(torch.tensor([s]), values[i : i + 1]) for i, s in enumerate((-1e30, 1e30)))
    close(merge(low, high), high)


@given(scores, st.floats(-200, 200, width=32) | st.just(float("-inf")))
def test_a_sink_is_a_key_without_a_value(a, sink):
    values = torch.randn(len(a), 4)
    state = attend(a, values)
    expected = merge(state, Partial(torch.zeros_like(state.out), torch.full_like(state.lse, sink)))
    merge_sink(state, torch.tensor([sink]))
    close(state, expected)
