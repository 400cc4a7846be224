"""Packed whole, every document that fits is in an epoch once, uncut; sequences are full and the same on any ranks."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash.data import IGNORE, batch, pack
from ringflash.data.best_fit import best_fit
from ringflash.data.packing import check_labels, sequences_per_epoch, summary, truncated_labels
from ringflash.errors import ConfigError
from tests.data.cases import corpus, lengths


def whole(counts, packing="whole"):
    """A corpus of documents of these lengths; token 0 is padding, so theirs begin at 1."""
    made = corpus(counts)
    return dataclasses.replace(made, tokens=made.tokens + 1, vocabulary=made.vocabulary + 1, packing=packing)


def epoch_of(texts, seed, epoch, length):
    """All sequences of an epoch."""
    count = sequences_per_epoch(texts, length)
    return [pack(texts, seed, epoch * count + i, length) for i in range(count)]


def documents_of(packed):
    """The documents of a sequence, without padding."""
    return [x.tolist() for x in packed.tokens.split(packed.documents) if x[0] != 0]


@given(lengths, st.integers(20, 60), st.integers(0, 2), st.integers(0, 2))
def test_an_epoch_holds_every_document_once_and_uncut(counts, length, seed, epoch):
    texts = whole(counts)
    sequences = epoch_of(texts, seed, epoch, length)
    found = sorted(document for packed in sequences for document in documents_of(packed))
    assert found == sorted(texts.document(i).tolist() for i in range(len(texts)))
    assert {(len(s.tokens), len(s.labels), sum(s.documents)) for s in sequences} == {(length, length, length)}


@given(lengths, st.integers(1, 12), st.sampled_from(["whole", "truncate"]))
def test_longer_documents_are_dropped_or_keep_their_first_tokens(counts, length, packing):
    texts = whole(counts, packing)
    kept = [texts.document(i)[:length].tolist() for i, n in enumerate(counts) if n <= length or packing == "truncate"]
    if not kept:
        with pytest.raises(
            ConfigError, match=rf"has no document for training of at most data\.sequence_length={length} "
        ):
            pack(texts, 0, 0, length)
        return
    found = [document for packed in epoch_of(texts, 0, 0, length) for document in documents_of(packed)]
    assert sorted(found) == sorted(kept)


@given(lengths, st.integers(1, 12))
def test_longer_documents_are_split_into_pieces_of_a_sequence_and_a_rest(counts, length):
    texts = whole(counts, "split")
    documents = [texts.document(i).tolist() for i in range(len(counts))]
    pieces = [tokens[begin : begin + length] for tokens in documents for begin in range(0, len(tokens), length)]
    for epoch in (0, 1):
        packed = epoch_of(texts, 0, epoch, length)
        assert sorted(piece for sequence in packed for piece in documents_of(sequence)) == sorted(pieces)
    if max(counts) <= length:
        assert all(map(torch.equal, packed[0][:2], pack(whole(counts), 0, len(packed), length)[:2]))


@given(lengths, st.integers(20, 300))
def test_padding_predicts_nothing_and_no_document_sees_it(counts, length):
    texts = whole(counts)
    made = batch(texts, seed=0, step=0, batch_size=1, length=length)
    padding = made.tokens[0] == 0
    assert (made.labels[0][padding] == IGNORE).all()
    seen = made.mask().dense()[0]
    assert not seen[~padding][:, padding].any()
    assert not seen[padding][:, ~padding].any()
    pieces = zip(made.documents[0], made.tokens[0].split(made.documents[0]), strict=True)
    assert all(count <= 128 for count, tokens in pieces if tokens[0] == 0)


@given(lengths, st.integers(20, 60))
def test_labels_are_those_of_each_document(counts, length):
    texts = whole(counts)
    packed = pack(texts, 0, 0, length)
    for tokens, labels in zip(
        packed.tokens.split(packed.documents), packed.labels.split(packed.documents), strict=True
    ):
        expected = [IGNORE] * len(tokens) if tokens[0] == 0 else [*tokens[1:].tolist(), IGNORE]
        assert labels.tolist() == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_are_the_same_however_many_ranks_share_them(ranks):
    texts = whole([5, 1, 17, 3, 40, 8, 2, 9] * 9)
    settings = {"seed": 1, "batch_size": 4, "length": 41}
    for step in (0, 1, 9):
        rows = [range(i * 4 // ranks, (i + 1) * 4 // ranks) for i in range(ranks)]
        shared = [batch(texts, step=step, **settings, rows=part).tokens for part in rows]
        assert torch.equal(torch.cat(shared), batch(texts, step=step, **settings).tokens)


def test_epochs_and_seeds_differ_and_each_is_repeatable():
    texts = whole([3, 5, 7] * 20)
    orders = {
        (seed, epoch): torch.cat([s.tokens for s in epoch_of(texts, seed, epoch, 20)]).tolist()
        for seed in (0, 1)
        for epoch in (0, 1, 7)
    }
    assert len({tuple(order) for order in orders.values()}) == len(orders)
    again = torch.cat([s.tokens for s in epoch_of(whole([3, 5, 7] * 20), 1, 7, 20)]).tolist()
    assert again == orders[1, 7]


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_best_fit_fills_no_sequence_beyond_its_capacity_and_begins_none_without_need(counts, capacity):
    counts = sorted(counts, reverse=True)
    chosen, count = best_fit(counts, capacity)
    filled = [0] * count
    for length, sequence in zip(counts, chosen, strict=True):
        if not filled[sequence]:  # a sequence begins where no other one has room
            assert all(capacity - space < length for space in filled if space)
        else:  # and one with room is taken only where no other one would be fuller
            left = capacity - filled[sequence] - length
            assert all(capacity - space - length < 0 or capacity - space - length >= left for space in filled if space)
        filled[sequence] += length
    assert max(filled, default=0) <= capacity
    assert 0 not in filled


# Token counts of conversations are about log-normal: short chats, long ones, answers by models that think.
SHAPES = {"chat": (5.5, 1.0), "long chat": (7.0, 1.2), "thinking": (8.0, 0.9), "code": (6.0, 1.6)}


@pytest.mark.parametrize("length", [8192, 32768])
@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_are_98_percent_full_on_the_lengths_of_real_conversations(shape, length):
    mean, deviation = SHAPES[shape]
    drawn = np.random.default_rng(0).lognormal(mean, deviation, 20_000)
    counts = np.clip(drawn, 8, length).astype(int)
    chosen, count = best_fit(sorted(counts.tolist(), reverse=True), length)
    assert len(chosen) == len(counts)
    assert counts.sum() / (count * length) >= 0.98


def test_a_hundred_thousand_documents_are_packed_in_a_second_or_so():
    counts = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 100_000), 8, 32768).astype(int)
    begun = time.process_time()
    best_fit(sorted(counts.tolist(), reverse=True), 32768)
    assert time.process_time() - begun < 5


def test_the_summary_counts_documents_by_length_and_says_how_full_sequences_are():
    first, second = summary(whole([100, 60, 40, 300, 200]), 200)
    assert (
        "5 documents of 700 tokens, in 2 sequences per epoch, 100.0% full; 1 longer than 200 tokens are dropped"
        in first
    )
    assert second.split(": ", 1)[1] == "64: 2, 128: 3, 256: 4, 512: 5"
    assert (
        "2 sequences per epoch, 100.0% full; 1 longer than 200 tokens are split"
        in (summary(whole([100, 300], "split"), 200)[0])
    )
    assert "keep their first 200" in summary(whole([100, 300], "truncate"), 200)[0]
    assert "1 longer than 200 tokens are cut" in summary(whole([100, 300], "cut"), 200)[0]


def learning(counts, trained, packing="truncate"):
    """Documents of these lengths, of each of which this token alone is predicted."""
    labels = [np.where(np.arange(n) == i, 7, IGNORE) for n, i in zip(counts, trained, strict=True)]
    return dataclasses.replace(whole(counts, packing), labels=np.concatenate(labels).astype(np.int32))


def test_documents_whose_labels_are_all_cut_off_are_counted():
    texts = learning([30, 30, 8, 30], [10, 9, 3, 29])  # the first token of 10 predicts the second, and so on
    assert truncated_labels(texts, 10) == 2
    assert "3 longer than 10 tokens keep their first 10, which hold no label of 2" in summary(texts, 10)[0]
    assert "label" not in summary(texts, 30)[0]
    check_labels(texts, 10)


@pytest.mark.parametrize(
    ("counts", "trained", "packing"),
    [([30, 30], [10, 0], "truncate"), ([30, 8], [3, 0], "whole"), ([8, 8], [0, 0], "cut")],
    ids=["truncate", "whole", "cut"],
)
def test_a_split_without_a_label_that_is_kept_is_refused(counts, trained, packing):
    message = rf"no label among the tokens for training that data\.packing={packing} keeps at .*_length=10: .* longer"
    with pytest.raises(ConfigError, match=message):
        check_labels(learning(counts, trained, packing), 10)
