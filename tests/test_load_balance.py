"""Chunks are assigned evenly, no pair is lost, and an exchange of chunks changes the table as its formula says."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash.load_balance import _exchanged, assign, by_hop


def drawn(seed, chunks):
    """Whole numbers of pairs [chunks, chunks], later chunks with earlier ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (chunks, chunks), generator=generator).tril()


@given(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 9))
def test_every_rank_gets_equally_many_chunks(seed, ranks, each):
    owner = assign(drawn(seed, ranks * each), ranks)
    assert owner.bincount(minlength=ranks).tolist() == [each] * ranks


@given(st.integers(0, 2**16), st.integers(1, 9))
def test_hop_s_is_with_the_keys_of_the_rank_s_places_back(seed, ranks):
    pairs = drawn(seed, ranks)
    table = by_hop(pairs)
    for s in range(ranks):
        assert table[s].tolist() == [int(pairs[rank, (rank - s) % ranks]) for rank in range(ranks)]


@given(st.integers(0, 2**16), st.integers(1, 6), st.integers(1, 5), st.data())
def test_an_exchange_changes_the_table_as_if_it_were_counted_again(seed, ranks, each, data):
    chunks = ranks * each
    chunk = data.draw(st.integers(0, chunks - 1))
    pairs, owner = drawn(seed, chunks).double(), torch.arange(chunks) % ranks
    owned = torch.eye(ranks, dtype=torch.float64)[owner]
    table = by_hop(owned.T @ pairs @ owned)
    shared = torch.stack([pairs, pairs.T]) @ owned
    for other, after in enumerate(_exchanged(table, owned, pairs, shared, chunk, torch.arange(chunks))):
        moved = owner.clone()
        moved[[chunk, other]] = owner[[other, chunk]]
        counted = torch.eye(ranks, dtype=torch.float64)[moved]
        assert torch.equal(after, by_hop(counted.T @ pairs @ counted))
