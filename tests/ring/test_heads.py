"""The exchange of tokens for heads: whole sequences in order, of the right heads, and back, with its gradients."""

import pytest
import torch
import torch.distributed as dist

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ProcessRing, Ulysses
from ringflash.ring.heads import head_blocks, sequence_ranks, to_heads, to_tokens
from ringflash.ring.watchdog import Label

LENGTH, ROWS, HEADS = 21, 2, 4  # of two numbers each; no number of ranks divides the length
MASK = IntervalMask.causal(LENGTH) & IntervalMask.documents([[5, 16], [1, 20]])
LABEL = Label("layer 0", "forward")


def whole(heads=HEADS):
    """Numbers that tell row, token, head and feature."""
    return torch.arange(ROWS * LENGTH * heads * 2, dtype=torch.float64).view(ROWS, LENGTH, heads * 2)


def round_trip(plan):
    """What arrives of two parts, their way back, and the gradient of a weighted sum, for the ranks of this process."""
    parts = [plan.shard(x, padding=-1.0).requires_grad_() for x in (whole(), whole(2 * HEADS))]
    first, second = to_heads(parts, plan, LABEL)
    back = to_tokens(first, plan, LABEL)
    gradients = torch.autograd.grad((first * first.detach()).sum() + second.sum() + 2 * back.sum(), parts)
    return head_blocks(plan), first.detach(), back.detach(), gradients, plan.positions[0][: len(plan.ring.local) * ROWS]


def assert_exact(results, ranks):
    for blocks, first, back, gradients, positions in results:
        for i, block in enumerate(blocks):
            own = slice(block * 2 * HEADS // ranks, (block + 1) * 2 * HEADS // ranks)
            assert torch.equal(first[i], whole()[..., own].flatten(0, 1))
        row = torch.arange(ROWS).repeat(len(back) // ROWS)[:, None]
        inside = positions < LENGTH
        assert torch.equal(back[inside], whole()[row, positions.clamp(max=LENGTH - 1)][inside])
        assert torch.equal(gradients[0][inside], back[inside] + 2)
        assert (gradients[1][inside] == 1).all()
        assert not any(x[~inside].any() for x in (back, *gradients))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped", "balanced"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_has_whole_sequences_of_its_heads(ranks, layout):
    plan = AttentionPlan(MASK, Layout.of(layout, MASK, ranks), Loopback(ranks))
    assert plan.sequences(ROWS).lengths == (5, 16, 1, 20)
    assert plan.sequences(ROWS) is plan.sequences(ROWS)
    assert_exact([round_trip(plan)], ranks)


def on_processes(ulysses):
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = [dist.new_group([*range(i, i + ulysses)]) for i in range(0, size, ulysses)]
    columns = [dist.new_group([*range(i, size, ulysses)]) for i in range(ulysses)]
    ring = ProcessRing(columns[rank % ulysses])
    layout = Layout.zigzag(LENGTH, size // ulysses, ulysses)
    plan = AttentionPlan(MASK, layout, ring, Ulysses(rows[rank // ulysses]) if ulysses > 1 else None)
    assert sequence_ranks(plan) == size
    return round_trip(plan)


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "ulysses"), [(2, 1), (4, 2), (4, 4)])
def test_processes_on_a_grid_divide_the_heads_among_all_of_them(ranks, size, ulysses):
    results = ranks.run(on_processes, size, ulysses)
    assert sorted(block for blocks, *_ in results for block in blocks) == list(range(size))
    assert_exact(results, size)


def test_chunks_of_kernels_begin_again_in_each_document():
    mask = IntervalMask.causal(200) & IntervalMask.documents([130, 64, 6])
    sequences = AttentionPlan(mask, Layout.zigzag(200, 2), Loopback(2)).sequences(1)
    assert sequences.cu_seqlens.tolist() == [0, 130, 194, 200]
    assert sequences.chunk_indices.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0]]
