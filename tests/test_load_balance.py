"""All ranks get equally many chunks, no work is lost, and exchanging chunks keeps the work table exact."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback
from ringflash.layout import _tiles, _visits
from ringflash.load_balance import Visits, _divided, _exchanged, assign, assign_long, by_hop
from tests.strategies import masks

NO_VISITS = [Visits(*np.zeros((4, 0), np.int64))] * 2


def drawn(seed, chunks):
    """Whole numbers of pairs [chunks, chunks], later chunks with earlier ones."""
    return np.tril(np.random.default_rng(seed).integers(0, 1000, (chunks, chunks))).astype(float)


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 3000, 1e9]))
def test_every_rank_gets_equally_many_chunks(seed, ranks, each, short):
    for how in (assign, assign_long):
        owner = how(drawn(seed, ranks * each), NO_VISITS, ranks, short)
        assert np.bincount(owner, minlength=ranks).tolist() == [each] * ranks


@given(st.integers(0, 2**16), st.integers(1, 9))
def test_hop_s_is_with_the_keys_of_the_rank_s_places_back(seed, ranks):
    pairs = drawn(seed, ranks)
    table = by_hop(pairs)
    for s in range(ranks):
        assert table[s].tolist() == [int(pairs[rank, (rank - s) % ranks]) for rank in range(ranks)]


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 5), st.data())
def test_an_exchange_changes_the_table_as_a_recount_would(seed, ranks, each, data):
    chunks = ranks * each
    chunk = data.draw(st.integers(0, chunks - 1))
    work, owner = drawn(seed, chunks), np.arange(chunks) % ranks
    owned = np.eye(ranks)[owner]
    table = by_hop(owned.T @ work @ owned)
    whole, after = _exchanged(table.sum(0), table, owned, work, work @ owned, work.T @ owned, chunk, np.arange(chunks))
    for other in range(chunks):
        moved = owner.copy()
        moved[[chunk, other]] = owner[[other, chunk]]
        counted = np.eye(ranks)[moved]
        assert np.array_equal(after[..., other], by_hop(counted.T @ work @ counted))
        assert np.array_equal(whole[:, other], after[..., other].sum(0))


@given(st.data(), st.integers(1, 600), st.integers(1, 4), st.sampled_from([Layout.zigzag, Layout.contiguous]))
def test_work_is_the_plans_pairs_and_the_tiles_with_any(data, length, ranks, make):
    mask, _ = data.draw(masks(length))
    layout = make(length, ranks)
    work = layout.work(mask)
    for s, hops in enumerate(AttentionPlan(mask, layout, Loopback(ranks)).hops):
        for rank, hop in enumerate(hops):
            orders = [order for x in hop.intervals for order in (x.query_order[128], x.key_order[128])]
            least = hop.pairs + (128**2 * sum(order.nonempty for order in orders) if hop.pairs else 0)
            counted = work[rank, (rank - s) % ranks]
            # Tiles whose first row's first key is before the last row's end, though no row sees a key, count too.
            assert least <= counted <= hop.pairs + 128**2 * mask.batch * 2 * -(-layout.shard_length // 128)


@pytest.mark.parametrize("documents", [[8192], [300, 5000, 129, 763, 2000], [700] * 11])
def test_visits_divided_among_chunks_add_up_to_those_of_the_layout(documents):
    mask = IntervalMask.causal(8192) & IntervalMask.documents(documents, 8192)
    owner = np.random.default_rng(0).permutation(np.arange(32) % 4)
    layout = Layout(8192, 256, torch.from_numpy(owner).argsort(stable=True).view(4, 8))
    owned, tiles = np.eye(4)[owner], _tiles(256, 32, 8192)
    seen = (of(*tiles[1:]) for of in (mask.keys_of, mask.queries_of))
    queries, keys = (_divided(_visits(tiles, 256, *bounds), owned) for bounds in seen)
    visits = layout.work(mask) - layout.pairs(mask).numpy()
    assert np.abs(owned.T @ (queries + keys.T) @ owned - visits).max() <= 64  # shares are rounded down
