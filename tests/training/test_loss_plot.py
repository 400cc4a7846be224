"""The plot of a run's losses: what it shows by position, and a file in its way, which is named."""

import math

import pytest

from ringflash.errors import DiskError
from ringflash.training import loss_plot, metrics
from ringflash.training.evaluation import HeldOut


@pytest.mark.parametrize(
    "write", [loss_plot.check_plot, lambda folder: loss_plot.plot(folder, None)], ids=["check", "plot"]
)
def test_a_plot_that_cannot_be_written_is_named(tmp_path, write):
    (tmp_path / "loss.png").mkdir()
    with pytest.raises(DiskError, match=r"loss\.png was not written: .*Is a directory"):
        write(tmp_path)


def test_a_plot_is_replaced(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"of an earlier run")
    loss_plot.check_plot(tmp_path)
    assert loss_plot.plot(tmp_path, None).stat().st_size > 1000


def test_a_record_has_a_value_per_range_and_the_plot_shows_the_first_the_last_and_those_of_training(
    tmp_path, monkeypatch
):
    drawn = {}
    monkeypatch.setattr(loss_plot, "_draw_by_position", lambda axes, lines: drawn.update(lines))
    (tmp_path / metrics.FILE).write_text("")
    log = metrics.Metrics(metrics.LoggerConfig(mode="disabled"), tmp_path, {}, 0, 30)
    for step in range(1, 31):
        held_out = HeldOut(2.0, {"0-4k": 2.5 - step / 10, "4k-8k": math.nan})
        trained = {"loss": 3.0, "loss/0-4k": float(step)} | ({"loss/8k-16k": 7.0} if step == 25 else {})
        log.log(step, trained | (held_out.record() if step % 10 == 0 else {}))
    log.close()
    assert metrics.read(tmp_path / metrics.FILE)[-1] == {
        "step": 30, "loss": 3.0, "loss/0-4k": 30.0,
        "held_out_loss": 2.0, "held_out_loss/0-4k": -0.5, "held_out_loss/4k-8k": None,
    }  # fmt: skip
    loss_plot.plot(tmp_path, None)
    assert drawn == {
        "held-out, step 10": {"0-4k": 1.5, "4k-8k": pytest.approx(math.nan, nan_ok=True)},
        "held-out, step 30": {"0-4k": -0.5, "4k-8k": pytest.approx(math.nan, nan_ok=True)},
        "training, steps 11 to 30": {"0-4k": 20.5, "8k-16k": 7.0},
    }
    monkeypatch.undo()
    assert loss_plot.plot(tmp_path, None).stat().st_size > 10_000
