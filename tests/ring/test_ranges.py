"""Runs are sets of local indices: unions, gaps and differences are those of the sets."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ringflash.ring.ranges import Range, Ranges

bounds = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=6)


def made(drawn, gap=1):
    return Ranges.covering((Range(begin, begin + n) for begin, n in drawn), gap)


def held(ranges):
    return {token for begin, end in ranges for token in range(begin, end)}


def drawn_tokens(drawn):
    return {begin + i for begin, n in drawn for i in range(n)}


@given(bounds, bounds)
def test_union_and_difference_are_those_of_sets(a, b):
    assert held(made(a)) == drawn_tokens(a)
    assert held(made(a).union(made(b))) == drawn_tokens(a) | drawn_tokens(b)
    assert held(made(a).without(made(b))) == drawn_tokens(a) - drawn_tokens(b)


@given(bounds, st.integers(0, 30), st.integers(0, 30))
def test_what_lies_within_is_counted_from_its_beginning(a, begin, length):
    expected = {token - begin for token in drawn_tokens(a) if begin <= token < begin + length}
    assert held(made(a).within(begin, begin + length)) == expected


@given(bounds, bounds, st.integers(1, 5))
def test_runs_ascend_with_gaps_between_and_short_gaps_are_filled(a, b, gap):
    for ranges in (made(a, gap), made(a).union(made(b), gap), made(a).without(made(b))):
        assert all(begin < end for begin, end in ranges)
        assert ranges.tokens == len(held(ranges))
    for ranges in (made(a, gap), made(a).union(made(b), gap)):
        gaps = [later.begin - r.end for r, later in pairwise(ranges)]
        assert all(length >= gap for length in gaps)
    exact, filled = drawn_tokens(a), held(made(a, gap))
    for token in filled - exact:
        after = min(t for t in exact if t > token)
        before = max(t for t in exact if t < token)
        assert after - before - 1 < gap


def test_nothing_is_no_run():
    assert not Ranges()
    assert not Ranges([Range(3, 5)]).without(Ranges([Range(0, 9)]))
    assert repr(Ranges()) == "none"
