"""A step's data depends on the step alone: not on ranks, not on how they share the rows, not on where a run resumed."""

import threading
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringflash.data import batch, batches, stream
from ringflash.errors import ConfigError
from tests.data.cases import corpus, lengths

TEXTS = corpus([5, 1, 17, 3, 40, 8, 2, 9])
SETTINGS = {"seed": 1, "batch_size": 4, "length": 12}


def same(a, b):
    """Whether two batches hold the same."""
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.documents == b.documents


def threads():
    """The prefetching threads that are alive."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("step", [0, 1, 9])
def test_rows_are_the_same_however_many_ranks_share_them(parts, step):
    whole = batch(TEXTS, step=step, **SETTINGS)
    rows = [range(i * 4 // parts, (i + 1) * 4 // parts) for i in range(parts)]
    shared = [batch(TEXTS, step=step, **SETTINGS, rows=part) for part in rows]
    assert torch.equal(torch.cat([part.tokens for part in shared]), whole.tokens)
    assert torch.equal(torch.cat([part.labels for part in shared]), whole.labels)
    assert [row for part in shared for row in part.documents] == whole.documents
    assert all(same(a, b) for a, b in zip(whole.split(4 // parts), shared, strict=True))


def test_steps_continue_where_the_last_one_ended_at_any_batch_size():
    small = [batch(TEXTS, seed=1, step=step, batch_size=2, length=12).tokens for step in range(6)]
    large = [batch(TEXTS, seed=1, step=step, batch_size=4, length=12).tokens for step in range(3)]
    assert torch.equal(torch.cat(small), torch.cat(large))


@given(lengths, st.integers(1, 3), st.integers(1, 30))
def test_the_mask_shows_each_token_its_own_documents_past(counts, rows, length):
    texts, length = corpus(counts), min(length, sum(counts))
    made = batch(texts, seed=0, step=0, batch_size=rows, length=length)
    owner = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])[made.tokens]
    i = torch.arange(length)
    expected = (owner[:, :, None] == owner[:, None, :]) & (i[:, None] >= i)
    assert torch.equal(made.mask().dense(), expected)


@pytest.mark.parametrize("stop", [0, 1, 5])
def test_a_stream_resumed_at_a_step_equals_an_uninterrupted_one(stop):
    whole = list(islice(stream(TEXTS, **SETTINGS), 9))
    resumed = stream(TEXTS, **SETTINGS, start_step=stop)
    assert all(same(a, b) for a, b in zip(whole[stop:], resumed, strict=False))


def test_a_stream_gives_the_steps_in_order_and_only_its_rows():
    for step, made in enumerate(islice(stream(TEXTS, **SETTINGS, rows=range(1, 3), start_step=4), 5), 4):
        assert same(made, batch(TEXTS, step=step, **SETTINGS, rows=range(1, 3)))


def test_a_stream_makes_no_more_than_it_may_ahead_and_closing_ends_its_thread(monkeypatch):
    steps, make = [], batches.batch
    monkeypatch.setattr(
        batches, "batch", lambda *args, step, **more: steps.append(step) or make(*args, step=step, **more)
    )
    running = stream(TEXTS, **SETTINGS)
    for _ in range(3):
        next(running)
    running.close()
    assert steps in ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert threads() == []


def test_batches_are_prepared_ahead_in_the_thread():
    prepared, ahead = [], threading.Event()

    def prepare(batch):
        prepared.append(threading.current_thread().name)
        if len(prepared) > 1:
            ahead.set()
        return batch.tokens.sum()

    plain, running = stream(TEXTS, **SETTINGS), stream(TEXTS, **SETTINGS, prepare=prepare)
    assert next(running) == next(plain).tokens.sum()
    assert ahead.wait(120)  # for a second batch, which was not asked for; close() would cancel it
    running.close()
    plain.close()
    assert all(name.startswith("batches") for name in prepared)


def test_an_error_in_the_thread_reaches_the_consumer_and_ends_the_thread(monkeypatch):
    running, make = stream(TEXTS, **SETTINGS), batches.batch

    def fails(*args, step, **more):
        if step == 3:
            raise OSError("the disk is gone")
        return make(*args, step=step, **more)

    monkeypatch.setattr(batches, "batch", fails)
    assert len(list(islice(running, 3))) == 3
    with pytest.raises(OSError, match="the disk is gone"):
        next(running)
    assert threads() == []


def test_a_stream_of_too_little_text_is_refused():
    with pytest.raises(ConfigError, match=r"data\.sequence_length=1000"):
        next(stream(TEXTS, **SETTINGS | {"length": 1000}))
