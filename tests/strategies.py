"""Hypothesis strategies: any mask of a given length, and its dense meaning written down independently."""

import torch
from hypothesis import strategies as st

from ringflash import IntervalMask


@st.composite
def splits(draw, length: int) -> list[int]:
    """Document lengths, zero-length ones among them, that sum to at most `length`."""
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=6)))
    ends = [*cuts, draw(st.integers(cuts[-1] if cuts else 0, length))]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


@st.composite
def masks(draw, length: int) -> tuple[IntervalMask, torch.Tensor]:
    """A mask, and the same as booleans [B, length, length] from the definition of each ingredient."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    mask, dense = IntervalMask.full(length), torch.ones(1, length, length, dtype=torch.bool)
    kinds = draw(st.sets(st.sampled_from(["causal", "window", "documents", "prefix", "chunked"]), max_size=3))
    if "causal" in kinds:
        mask, dense = mask & IntervalMask.causal(length), dense & (j <= i)
    if "window" in kinds:
        left, right = draw(st.integers(0, length)), draw(st.integers(0, length))
        mask, dense = mask & IntervalMask.window(length, left, right), dense & (j >= i - left) & (j <= i + right)
    if "prefix" in kinds:
        prefix = draw(st.integers(0, length))
        mask, dense = mask & IntervalMask.prefix(length, prefix), dense & ((j <= i) | (j < prefix))
    if "chunked" in kinds:
        chunk = draw(st.integers(1, length))
        mask, dense = mask & IntervalMask.chunked(length, chunk), dense & (i // chunk == j // chunk)
    if "documents" in kinds:
        rows = draw(st.lists(splits(length), min_size=1, max_size=2))
        mask = mask & IntervalMask.documents(rows, length)
        ids = torch.full((len(rows), length), -1)
        for row, lengths in enumerate(rows):
            begin = 0
            for document, count in enumerate(lengths):
                ids[row, begin : begin + count] = document
                begin += count
        dense = dense & (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] >= 0)
    return mask, dense
