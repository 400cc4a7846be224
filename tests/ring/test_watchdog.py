"""When a ring hangs, every rank reports where it is and for which rank it waits, and all end; else waits count."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from ringflash import ProcessRing
from ringflash.ring import watchdog
from ringflash.ring.message import Message
from ringflash.ring.watchdog import Label, Pending, Traffic, Watchdog
from tests.ring.hanging import LIMIT, attend, with_one_rank_that_never_comes


@pytest.mark.ranks
def test_every_rank_reports_where_it_is_and_which_rank_it_waits_for_and_then_exits(ranks):
    said = ranks.run(with_one_rank_that_never_comes, 3, 1)
    assert said[0].startswith(
        "ringflash: rank 0, step 12, layer 5, forward, hop 1: waits for rank 1 to receive what it sent since "
    )
    assert said[2].startswith("ringflash: rank 2, step 12, layer 5, forward, hop 1: waits for rank 1 since ")
    assert "rank 1, step 12: waits for no rank; its last wait was in layer 5, backward" in said[1]


def ranks_that_a_ring_of_some_waits_for():
    """In a ring of ranks 1 and 2: one message is to be received, and the other is to arrive."""
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    ring = ProcessRing(group)
    messages = Message(ring.rank, 1 - ring.rank, torch.zeros(8)), Message(1 - ring.rank, ring.rank, torch.zeros(8))
    sending, coming = (
        ring.exchange(messages[:1], [], Label("one", "forward")),
        ring.exchange([], messages[1:], Label("two", "forward")),
    )
    found = sending.pending(), coming.pending()
    sending.wait()
    coming.wait()
    return found


@pytest.mark.ranks
def test_ranks_are_named_by_their_number_in_the_run(ranks):
    found = ranks.run(ranks_that_a_ring_of_some_waits_for, 3)
    assert found == [None, (Pending((), (2,)), Pending((2,))), (Pending((), (1,)), Pending((1,)))]


def telemetry():
    guard = Watchdog(60.0)
    for _ in range(2):
        attend(ProcessRing(watchdog=guard))
    first, second = guard.drain(), guard.drain()
    guard.close()
    return first, second


@pytest.mark.ranks
def test_waits_bytes_and_hops_are_counted_and_handed_over_once(ranks):
    # Under zigzag, rank 1 sees 8 of rank 0's 16 tokens and rank 0 all of rank 1's: both come in the forward and in the
    # backward, and the gradients go back.
    tokens_received = (2 * 16 + 8, 2 * 8 + 16)
    of_a_token = 2 * 2 * 16 * 4  # keys and values, two KV heads of 16, fp32
    for (first, second), tokens in zip(ranks.run(telemetry, 2), tokens_received, strict=True):
        # two layers; forward and backward one hop of keys, backward also one of gradients in two halves
        assert first["ring"].exchanges == 2 * (1 + 1 + 2)
        assert first["ring"].bytes == 2 * tokens * of_a_token
        assert first["ring"].seconds > 0
        assert first["ulysses"] == second["ring"] == second["ulysses"] == Traffic()


class Passing:
    """A GPU event that completes when the test says so."""

    passed = False

    def __init__(self, enable_timing=True):
        pass

    def record(self, stream):
        pass

    def query(self):
        return Passing.passed

    def elapsed_time(self, end):
        return 5.0


def on_a_gpu(monkeypatch, event):
    """Have a GPU's waits recorded by such events."""
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(watchdog, "current_stream", lambda device: None)


def test_a_wait_of_the_host_leaves_those_of_a_gpu_where_they_are(monkeypatch):
    on_a_gpu(monkeypatch, Passing)
    monkeypatch.setattr(Passing, "passed", False)
    guard = Watchdog(60.0, end=lambda: pytest.fail("ended"))
    guard.wait([], "ring", Label("on the GPU", "forward"), lambda: Pending((1,), (3,)), 8, torch.device("cuda"))
    guard.wait([], "ring", Label("on the host", "forward"), lambda: Pending((2,)), 8, torch.device("cpu"))
    assert "on the GPU, forward: waits for rank 1, or for rank 3 to receive what it sent since " in guard.describe()
    Passing.passed = True
    assert guard.drain()["ring"].seconds == pytest.approx(5e-3, abs=1e-3)
    assert "waits for no rank; its last wait was in on the GPU" in guard.describe()
    guard.close()


def test_a_wait_that_is_not_queued_yet_has_not_passed(monkeypatch):
    """An event counts as passed until it is recorded, and the thread may query it at any time."""

    class Unrecorded(Passing):
        recorded = False

        def record(self, stream):
            self.recorded = True

        def query(self):
            return not self.recorded or Passing.passed

        def elapsed_time(self, end):
            assert self.recorded
            assert end.recorded
            return 5.0

    class Work:
        def wait(self):
            looked.append(guard.drain()["ring"].seconds)
            looked.append(guard.describe())

    on_a_gpu(monkeypatch, Unrecorded)
    monkeypatch.setattr(Passing, "passed", False)
    guard, looked = Watchdog(60.0, end=lambda: pytest.fail("ended")), []
    guard.wait([Work()], "ring", Label("hop 1", "forward"), lambda: Pending((1,)), 8, torch.device("cuda"))
    assert looked[0] == 0
    assert "hop 1, forward: waits for rank 1 since " in looked[1]
    guard.close()


def test_a_host_that_waits_is_reported_and_not_counted():
    guard = Watchdog(60.0, end=lambda: pytest.fail("ended"))
    with guard.host_wait(Label("layer 1", "forward", "memory for messages"), lambda: Pending((1, 2))):
        assert "memory for messages: waits for rank 1 and rank 2 since " in guard.describe()
    assert "waits for no rank" in guard.describe()
    assert guard.drain()["ring"] == Traffic()
    guard.close()


class Breaking:
    """A work whose connection is gone."""

    def wait(self):
        raise RuntimeError("connection reset")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_wait_that_raised_is_over(monkeypatch, device):
    """A caller that catches the error continues, and no wait is left that would end the process later."""
    on_a_gpu(monkeypatch, Passing)
    guard = Watchdog(60.0, end=lambda: pytest.fail("ended"))
    with pytest.raises(RuntimeError, match="connection reset"):
        guard.wait([Breaking()], "ring", Label("hop 1", "forward"), lambda: Pending((1,)), 8, torch.device(device))
    with pytest.raises(ArithmeticError), guard.host_wait(Label("memory", "forward"), lambda: Pending((1,))):
        raise ArithmeticError
    assert "waits for no rank" in guard.describe()
    guard.close()


def test_a_gpu_in_error_does_not_silence_the_watchdog(monkeypatch, capsys):
    class Failing(Passing):
        def query(self):
            raise RuntimeError("an illegal memory access was encountered")

    on_a_gpu(monkeypatch, Failing)
    monkeypatch.setattr(watchdog, "EXIT_DELAY", 0.1)
    ended = threading.Event()
    guard = Watchdog(60.0, end=ended.set)
    guard.wait([], "ring", Label("hop 1", "forward"), lambda: Pending((1,)), 8, torch.device("cuda"))
    assert ended.wait(LIMIT)
    assert "ringflash: rank 0, step 0, hop 1, forward: waits for rank 1 since " in capsys.readouterr().err


def test_a_watch_with_nothing_to_wait_for_stays_silent(capsys):
    guard = Watchdog(0.1, end=lambda: pytest.fail("ended"))
    time.sleep(3 * watchdog.POLL)
    guard.close()
    assert capsys.readouterr().err == ""


class FrozenStore:
    """A store on a machine that no longer answers."""

    def check(self, keys):
        time.sleep(60)

    def set(self, key, value):
        time.sleep(60)


class Never:
    """A work that completes when the test says so."""

    def __init__(self):
        self.done = threading.Event()

    def wait(self):
        self.done.wait()


def waiting(guard, work):
    arguments = ([work], "ring", Label("layer 5", "forward", "hop 1"), lambda: Pending((1,)), 8, torch.device("cpu"))
    threading.Thread(target=guard.wait, args=arguments, daemon=True).start()


def test_a_rank_reports_and_exits_though_the_store_does_not_answer(monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "EXIT_DELAY", 0.1)
    ended, work = threading.Event(), Never()
    guard = Watchdog(0.5, 0, FrozenStore(), end=ended.set)
    waiting(guard, work)
    assert ended.wait(LIMIT)
    assert "rank 0, step 0, layer 5, forward, hop 1: waits for rank 1 since " in capsys.readouterr().err
    work.done.set()


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def monotonic(self):
        return self.now

    perf_counter = monotonic


def test_time_without_a_wait_is_not_counted_as_one(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    guard, begun = Watchdog(1e6, end=lambda: pytest.fail("ended")), []
    clock.now = 1000.0
    with guard.host_wait(Label("memory", "forward"), lambda: Pending((1,))):
        begun.append(guard.describe())
        clock.now = 1002.0
        begun.append(guard.describe())
    guard.close()
    assert [said.split(" since ")[1] for said in begun] == ["0 s", "2 s"]


def test_a_rank_that_does_not_know_where_it_hangs_ends_too(monkeypatch, capsys):
    monkeypatch.setattr(watchdog, "EXIT_DELAY", 0.1)
    ended, work = threading.Event(), Never()
    guard = Watchdog(0.3, 7, end=ended.set)
    arguments = ([work], "ring", Label("layer 5", "forward"), lambda: 1 / 0, 8, torch.device("cpu"))
    threading.Thread(target=guard.wait, args=arguments, daemon=True).start()
    assert ended.wait(LIMIT)
    assert "rank 7, step 0: hangs, and where is not known (division by zero)" in capsys.readouterr().err
    work.done.set()


def test_a_run_that_ends_during_its_last_report_is_not_killed(monkeypatch):
    monkeypatch.setattr(watchdog, "EXIT_DELAY", 1e6)
    reported, ended, work = threading.Event(), threading.Event(), Never()
    monkeypatch.setattr(Watchdog, "_report", lambda self: reported.set())
    guard = Watchdog(0.3, end=ended.set)
    waiting(guard, work)
    assert reported.wait(LIMIT)
    work.done.set()
    guard.close()
    guard._watcher.join(LIMIT)
    assert not guard._watcher.is_alive()
    assert not ended.is_set()


class Failing:
    """A store whose first answers are errors, of a kind."""

    def __init__(self, error):
        self.error, self.asked = error, 0

    def check(self, keys):
        self.asked += 1
        if self.asked < 3:
            raise self.error
        return True

    def set(self, key, value):
        pass


@pytest.mark.parametrize(
    ("error", "hears"), [(RuntimeError("once"), True), (dist.DistNetworkError("gone"), False)], ids=["error", "gone"]
)
def test_a_store_is_asked_again_until_it_is_gone(monkeypatch, error, hears):
    monkeypatch.setattr(watchdog, "EXIT_DELAY", 0.1)
    ended = threading.Event()
    guard = Watchdog(60.0, 0, Failing(error), end=ended.set)
    guard._listener.join(LIMIT)
    assert not guard._listener.is_alive()
    assert not hears or ended.wait(LIMIT)
    guard.close()
    assert ended.is_set() == hears


class Slow(FrozenStore):
    """A store that takes a while to answer."""

    def __init__(self):
        self.asked = threading.Event()

    def check(self, keys):
        self.asked.set()
        time.sleep(0.3)
        return False


def test_a_closed_watchdog_has_left_the_store_which_python_may_then_end():
    store = Slow()
    guard = Watchdog(60.0, 0, store)
    assert store.asked.wait(LIMIT)
    guard.close()
    assert not guard._listener.is_alive()


def test_both_kinds_of_neighbours_are_named():
    assert str(Pending((1, 2))) == "rank 1 and rank 2"
    assert str(Pending((), (3,))) == "rank 3 to receive what it sent"
    assert str(Pending((1,), (1,))) == "rank 1"
    assert str(Pending((1,), (3,))) == "rank 1, or for rank 3 to receive what it sent"
