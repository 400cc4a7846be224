"""A rank whose counter stops is reported by the rank before it, but not before it has begun or after it is done."""

import threading

import pytest
import torch.distributed as dist

from ringflash.ring import heartbeat, watchdog
from ringflash.ring.heartbeat import Heartbeat
from ringflash.ring.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


def three(clock):
    store = dist.HashStore()
    return [Heartbeat(store, rank, 3, interval=5.0) for rank in range(3)]


def test_only_the_rank_before_one_that_stops_misses_it(clock):
    hearts = three(clock)
    for _ in range(4):
        assert [heart.beat() for heart in hearts][1:] == [0.0, 0.0]
        clock[0] += 5.0
    for _ in range(3):
        silent = [hearts[0].beat(), hearts[2].beat()]  # rank 1 is stopped
        clock[0] += 5.0
    assert silent == [pytest.approx(10.0, abs=5.0), 0.0]
    assert silent[0] >= 10.0


def test_beats_closer_than_the_interval_do_not_ask_the_store(clock):
    class Counting:
        adds = 0

        def add(self, key, value):
            self.adds += 1
            return 0

    store = Counting()
    heart = Heartbeat(store, 0, 2, interval=5.0)
    for _ in range(10):
        heart.beat()
        clock[0] += 1.0
    assert store.adds == 2 * 2


def test_a_rank_that_has_not_begun_or_is_done_is_not_missed(clock):
    first, second, _ = three(clock)
    for _ in range(3):
        assert first.beat() == 0.0
        clock[0] += 100.0
    second.beat()
    first.beat()
    second.stop()
    for _ in range(3):
        clock[0] += 100.0
        assert first.beat() == 0.0


def test_a_rank_that_is_silent_ends_the_others_with_a_line(capfd, monkeypatch):
    for name, seconds in (("POLL", 0.02), ("EXIT_DELAY", 0.1), ("BEAT", 0.1), ("SILENCE", 0.4)):
        monkeypatch.setattr(watchdog, name, seconds)
    store, ended = dist.HashStore(), [threading.Event() for _ in range(2)]
    third = Heartbeat(store, 2, 3, interval=0.0)
    third.beat()  # once, and never again
    guards = [Watchdog(0.2, rank, store, end=ended[rank].set, ranks=3) for rank in range(2)]
    for guard in guards:
        guard.step = 7
    assert all(event.wait(10) for event in ended)
    for guard in guards:
        guard.close()
    said = capfd.readouterr().err
    assert "ringflash: rank 1, step 7: rank 2 has not answered since 0 s" in said
    assert "ringflash: rank 0, step 7: waits for no rank, and has waited for none yet" in said


def test_work_without_a_limit_ends_no_rank_that_waits_for_another(monkeypatch):
    class Barrier:
        def report(self):
            return None

        def failed(self):
            return False

    for name, seconds in (("POLL", 0.02), ("BEAT", 0.05), ("SILENCE", 0.1)):
        monkeypatch.setattr(watchdog, name, seconds)
    store = dist.HashStore()
    Heartbeat(store, 1, 2, interval=0.0).beat()
    guard = Watchdog(0.1, 0, store, end=lambda: pytest.fail("ended"), ranks=2)
    with guard.without_limit("tokenising", Barrier()):
        assert not guard._others_report.wait(0.5)
    guard.close()
