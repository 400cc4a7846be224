"""Simulated passes follow from the steps: one GPU per rank, its link, and what either waits for."""

import pytest

from ringflash.ring.schedule import Attend, Fork, Join, Post, Receive, Rows, Send, Wait
from ringflash.ring.simulation import Rates, simulate

A_SECOND_PER_PAIR_AND_BYTE = Rates(kernel=lambda step: step.pairs, row=lambda buffer: 1.0, link=1.0)


def attend(hop, pairs, stream=0):
    return Attend(stream, f"hop {hop}", hop, stream, pairs, "own")


def post(rank, rows, stream=0):
    """To the other of two ranks, which sends as much."""
    sent = Rows("own", 0, rows), Rows("keys 1", 0, rows)
    return Post(stream, "hop 1", (Send(1 - rank, *sent),), (Receive(1 - rank, sent[1]),))


def spans(simulated, rank):
    return [(span.kind, span.begin, span.end) for span in simulated.spans if span.rank == rank]


def test_two_ranks_by_hand():
    """3 s of own keys, 10 bytes at 1 per second meanwhile, 2 s of the other's: 3 + 7 s of waiting + 2."""
    steps = [[post(r, 10), attend(0, 3), Wait(0, "hop 1"), attend(1, 2)] for r in range(2)]
    simulated = simulate(steps, A_SECOND_PER_PAIR_AND_BYTE)
    assert (simulated.finished, simulated.sent, simulated.seconds) == ([12.0, 12.0], [10, 10], 12.0)
    assert spans(simulated, 0) == [
        ("keys", 0.0, 10.0), ("compute", 0.0, 3.0), ("wait for the link", 3.0, 10.0), ("compute", 10.0, 12.0),
    ]  # fmt: skip


def test_a_message_waits_for_the_rank_that_posts_it_last():
    steps = [[attend(0, 4 * (1 - r)), post(r, 10), attend(0, 3), Wait(0, "hop 1"), attend(1, 2)] for r in range(2)]
    waits = [span for span in spans(simulate(steps, A_SECOND_PER_PAIR_AND_BYTE), 1) if span[0].startswith("wait")]
    assert waits == [("wait for a rank", 3.0, 4.0), ("wait for the link", 4.0, 14.0)]


def test_a_gpu_computes_on_one_stream_while_the_other_waits():
    """Stream 1 has 5 s of work while stream 0 waits 10 s for its message; join waits for both."""
    steps = [
        [Fork(), post(r, 10), Wait(0, "hop 1"), attend(0, 5, stream=1), attend(1, 2), Join(), attend(1, 1)]
        for r in range(2)
    ]
    simulated = simulate(steps, A_SECOND_PER_PAIR_AND_BYTE)
    assert simulated.finished == [13.0, 13.0]
    assert [span for span in spans(simulated, 0) if span[0] == "compute"] == [
        ("compute", 0.0, 5.0), ("compute", 10.0, 12.0), ("compute", 12.0, 13.0),
    ]  # fmt: skip


def test_one_gpu_runs_one_kernel_at_a_time_whatever_its_stream():
    steps = [[Fork(), attend(0, 3), attend(0, 4, stream=1), Join()]]
    assert spans(simulate(steps, A_SECOND_PER_PAIR_AND_BYTE), 0) == [("compute", 0.0, 3.0), ("compute", 3.0, 7.0)]


def test_an_exchange_without_messages_touches_no_link():
    steps = [[post(r, 10), Post(0, "nothing"), Wait(0, "nothing"), attend(0, 1), Wait(0, "hop 1")] for r in range(2)]
    simulated = simulate(steps, A_SECOND_PER_PAIR_AND_BYTE)
    assert spans(simulated, 0)[:2] == [("keys", 0.0, 10.0), ("compute", 0.0, 1.0)]


def test_ranks_with_different_numbers_of_steps_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        simulate([[attend(0, 1)], []], A_SECOND_PER_PAIR_AND_BYTE)
