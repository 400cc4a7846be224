"""Ranks wait for work beyond the group's timeout, report which rank and work that is, and end when it fails."""

import contextlib
import io
import re
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ringflash.distributed.without_timeout import NO_LIMIT, OtherRankError
from ringflash.errors import ConfigError
from ringflash.ring import watchdog
from ringflash.ring.watchdog import Watchdog
from ringflash.training import run
from ringflash.training.checkpoints import checkpoint
from ringflash.training.compose import compose
from ringflash.training.export import export
from tests.training.engines import engine_on, joined

TIMEOUT, LONG = timedelta(seconds=2), 4.0  # of the group's collectives, and seconds of work beyond it


def timeouts():
    """Those of all groups of this process."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def tokenised_by_a_slow_rank(settings):
    """The documents that each rank has, what it reported meanwhile, and the groups' timeouts after that."""
    world, reported, load = joined(None), io.StringIO(), run.load_corpora
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)

    def load_slowly(*args, **options):
        if world.is_first:
            time.sleep(LONG)
        return load(*args, **options)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(reported):
        patch.setattr(run, "load_corpora", load_slowly)
        patch.setattr(watchdog, "REPORT", 0.5)
        training, _ = run.read_corpora(compose(settings)[0], world)
    return len(training), reported.getvalue(), timeouts()


@pytest.mark.ranks
def test_tokenising_beyond_the_timeout_is_waited_for_and_reported(ranks, text):
    settings = ["data=text", f"data.path={text}", f"data.cache={text.parent}/cache", "data.held_out=0.3"]
    settings.append("data.sequence_length=64")
    (mine, _, _), (other, reported, left) = ranks.run(tokenised_by_a_slow_rank, 2, settings)
    assert mine == other == 7
    line = rf"\nringflash: rank 1, step 0: waits for rank 0 since \d+ s: tokenising data\.path={re.escape(str(text))}\n"
    assert re.search(line, reported)
    assert left == {TIMEOUT}


def limits_of_saving_exporting_and_resuming(folder):
    """Each thing that takes long, and the timeouts of collectives meanwhile."""
    world, seen = joined(None), []
    engine = engine_on(world, 3)
    model = engine.module.model

    def recorded(function):
        def work(*args, **options):
            seen.append((function.__name__, timeouts()))
            return function(*args, **options)

        return work

    long = [
        (checkpoint, "digests_of"), (checkpoint, "write_atomically"), (checkpoint, "files_fault"),
        (engine, "save_checkpoint"), (engine, "load_checkpoint"), (model, "save_pretrained"),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for place, name in long:
            patch.setattr(place, name, recorded(getattr(place, name)))
        checkpoint.save(engine, folder / "checkpoints", 3, world, 1)
        export(engine, folder / "model", Tokenizer(), world)
        checkpoint.resume(engine, folder / "checkpoints", world)
    return [name for _, name in long], seen


@pytest.mark.ranks
def test_saving_exporting_and_resuming_have_no_limit(ranks, tmp_path):
    long, seen = ranks.run(limits_of_saving_exporting_and_resuming, 2, tmp_path)[0]
    assert {name for name, _ in seen} >= set(long)
    assert [(name, limits) for name, limits in seen if limits != {NO_LIMIT}] == []


class Tokenizer:
    """One that has no files."""

    def save_pretrained(self, folder):
        pass


def work_of_which_rank_1_fails(error):
    """What each rank raises."""
    world = joined(None)
    try:
        with world.without_timeout("digests"):
            if world.rank == 1:
                raise error
    except Exception as raised:
        return type(raised), str(raised)


@pytest.mark.ranks
@pytest.mark.parametrize("error", [ConfigError("data.path=/x is empty"), OSError("no space left")], ids=repr)
def test_a_rank_that_fails_in_work_without_a_timeout_ends_those_that_wait(ranks, error):
    message = "data.path=/x is empty" if isinstance(error, ConfigError) else "rank 1 failed: OSError: no space left"
    others = (OtherRankError, message)
    assert ranks.run(work_of_which_rank_1_fails, 3, error) == [others, (type(error), str(error)), others]


class Abandoned:
    """A barrier that one rank never reaches."""

    def report(self):
        return "waits for rank 1"

    def failed(self):
        return True


def test_a_rank_in_a_collective_with_one_that_failed_is_ended(monkeypatch):
    """Collectives inside work without a limit have none, either."""
    monkeypatch.setattr(watchdog, "GRACE", 0.1)
    ended = threading.Event()
    guard = Watchdog(60.0, 0, dist.HashStore(), end=ended.set)
    with guard.without_limit("saving", Abandoned()):
        assert ended.wait(60)
    guard.close()


class Gone:
    """A store that went with the process that held it."""

    def check(self, keys):
        raise dist.DistNetworkError("gone")


@pytest.mark.parametrize("closes", [False, True], ids=["launcher", "end-of-run"])
def test_a_rank_whose_store_is_gone_ends_unless_its_run_is_complete(monkeypatch, capsys, closes):
    monkeypatch.setattr(watchdog, "EXIT_DELAY", 1e6 if closes else 0.1)
    ended = threading.Event()
    guard = Watchdog(60.0, 2, Gone(), end=ended.set, ends_with_store=True)
    if closes:
        guard.close()
        guard._listener.join(60)
    else:
        assert ended.wait(60)
    assert ended.is_set() != closes
    line = "ringflash: rank 2, step 0: ends: the run's store is gone: its launcher, or the rank that held it, has ended"
    assert (line in capsys.readouterr().err) != closes
