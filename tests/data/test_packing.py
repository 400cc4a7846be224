"""An epoch's sequences hold every token once, up to its tail, and no label looks past its document."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash.data import IGNORE, pack
from ringflash.data.packing import sequences_per_epoch
from ringflash.errors import ConfigError
from tests.data.cases import corpus, lengths


def epoch_of(texts, seed, epoch, length):
    """All sequences of an epoch."""
    count = sequences_per_epoch(texts, length)
    return [pack(texts, seed, epoch * count + i, length) for i in range(count)]


@given(lengths, st.integers(1, 30), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_token_once_up_to_its_tail(counts, length, seed, epoch):
    texts, length = corpus(counts), min(length, sum(counts))
    sequences = epoch_of(texts, seed, epoch, length)
    tokens = torch.cat([sequence.tokens for sequence in sequences])
    assert len(tokens) == sum(counts) // length * length
    assert len(tokens.unique()) == len(tokens)
    assert {(len(s.tokens), len(s.labels), sum(s.documents)) for s in sequences} == {(length, length, length)}
    assert all(min(s.documents) > 0 for s in sequences)


@given(lengths, st.integers(1, 30), st.integers(0, 3))
def test_a_label_is_the_next_token_of_the_same_document_and_the_last_has_none(counts, length, index):
    texts = corpus(counts)
    packed = pack(texts, 0, index, min(length, sum(counts)))
    owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    for tokens, labels in zip(
        packed.tokens.split(packed.documents), packed.labels.split(packed.documents), strict=True
    ):
        assert torch.equal(labels[:-1], tokens[1:])
        assert torch.equal(labels[:-1], tokens[:-1] + 1)  # tokens are numbered along the corpus
        assert labels[-1] == IGNORE
        assert len(owner[tokens].unique()) == 1


@given(lengths, st.data())
def test_a_split_packs_its_own_documents_only(counts, data):
    chosen = sorted(data.draw(st.sets(st.integers(0, len(counts) - 1), min_size=1)))
    texts = corpus(counts, chosen)
    [sequence] = epoch_of(texts, 0, 0, texts.total)
    expected = torch.cat([torch.from_numpy(texts.document(i).astype("int64")) for i in range(len(chosen))])
    assert torch.equal(sequence.tokens.sort().values, expected)
    assert sorted(sequence.documents) == sorted(counts[i] for i in chosen)


def test_epochs_and_seeds_differ_and_each_is_repeatable():
    texts = corpus([3] * 20)
    orders = {
        (seed, epoch): torch.cat([s.tokens for s in epoch_of(texts, seed, epoch, 20)]).tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 7)
    }
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    again = torch.cat([s.tokens for s in epoch_of(corpus([3] * 20), 1, 7, 20)]).tolist()
    assert again == orders[1, 7]


def test_a_document_longer_than_the_sequence_is_cut():
    sequences = epoch_of(corpus([10]), 0, 0, 4)
    assert [s.tokens.tolist() for s in sequences] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [s.labels.tolist() for s in sequences] == [[1, 2, 3, IGNORE], [5, 6, 7, IGNORE]]
    assert [s.documents for s in sequences] == [(4,), (4,)]


@given(lengths, st.integers(1, 30), st.integers(0, 3), st.data())
def test_a_label_of_its_own_is_predicted_one_place_before_its_token(counts, length, index, data):
    own = data.draw(st.lists(st.sampled_from([IGNORE, 5, 9]), min_size=sum(counts), max_size=sum(counts)))
    texts = dataclasses.replace(corpus(counts), labels=np.array(own, np.int32))
    packed = pack(texts, 0, index, min(length, sum(counts)))
    for tokens, labels in zip(
        packed.tokens.split(packed.documents), packed.labels.split(packed.documents), strict=True
    ):
        assert labels.tolist() == [own[token + 1] for token in tokens[:-1]] + [IGNORE]


def test_too_little_text_is_refused_with_the_keys_to_change():
    with pytest.raises(ConfigError, match=r"data.path=memory has 10 tokens for training, fewer than data.sequence_len"):
        pack(corpus([3, 7]), 0, 0, 11)
