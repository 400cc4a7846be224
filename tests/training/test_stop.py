"""A run that is asked to stop writes a checkpoint, can be resumed from it, and has its own exit code."""

import faulthandler
import signal

import pytest
import torch.distributed as dist

from ringflash.training import loop, stop
from ringflash.training.metrics import read
from tests.training.runs import fitted, settings


def signalled_in_step_2(overrides):
    """A run whose rank 1 gets SIGUSR1 in its second step."""
    calls = 0

    def step(*args):
        nonlocal calls
        calls += 1
        if calls == 2 and dist.get_rank() == 1:
            signal.raise_signal(stop.SIGNAL)
        return train_step(*args)

    train_step = loop.train_step
    stop.install_handler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        try:
            return fitted(overrides)
        finally:
            stop._requested.clear()
            faulthandler.register(signal.SIGUSR1)  # as the pool does


@pytest.mark.ranks
def test_a_rank_that_is_asked_to_stop_ends_the_run_with_a_checkpoint(ranks, text):
    arguments, folder = settings(text, "name=stopped", "data.held_out=0"), text.parent / "runs" / "stopped"
    (error, stdout), other = ranks.run(signalled_in_step_2, 2, arguments)
    assert (error, other) == (None, (None, ""))
    assert stdout.splitlines()[-1] == (
        "stopped by SIGUSR1 after step 2 of 6; resume=auto continues there, and resume=auto optim.steps=2 exports the "
        "model as it is"
    )
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (folder / "model").exists()
    assert [r["step"] for r in read(folder / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("launcher", "code"), [("TORCHELASTIC_RUN_ID", 0), ("CROSS_SIZE", 0), ("SLURM_JOB_ID", 75)], ids=lambda x: str(x)
)
def test_a_stopped_rank_leaves_the_file_and_its_launcher_sees_no_failure(monkeypatch, tmp_path, launcher, code):
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(launcher, "1")
    assert stop.exit_code() == code
    monkeypatch.setenv("RINGFLASH_STOPPED", str(tmp_path / "stopped"))
    assert stop.exit_code() == code
    assert (tmp_path / "stopped").exists()


def test_a_signal_that_came_before_the_rank_listened_is_not_lost():
    signal.pthread_sigmask(signal.SIG_BLOCK, {stop.SIGNAL})  # as launchers start ranks
    signal.raise_signal(stop.SIGNAL)
    before = signal.getsignal(stop.SIGNAL)
    try:
        stop.install_handler()
        assert stop._requested.is_set()
    finally:
        stop._requested.clear()
        signal.signal(stop.SIGNAL, before)
