"""A run that is asked to stop leaves a checkpoint of its last step, from which it can be resumed."""

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
    assert stdout.splitlines()[-1] == "stopped by SIGUSR1 after step 2 of 6; resume=auto continues there"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (folder / "model").exists()
    assert [r["step"] for r in read(folder / "metrics.jsonl")] == [1, 2]
