"""The wandb run and the TensorBoard events of a folder are continued, or the file in the way is named."""

import importlib.util

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ringflash.errors import ConfigError
from ringflash.evaluation.haystack import Cell, heat_map
from ringflash.training import metrics


def test_a_wandb_id_is_drawn_once_and_read_again(tmp_path):
    drawn = metrics._wandb_id(tmp_path / "wandb-id")
    (tmp_path / "wandb-id").write_text(drawn + "\n")  # as an editor leaves it
    assert metrics._wandb_id(tmp_path / "wandb-id") == drawn


@pytest.mark.parametrize("contents", [b"", b" \n", b"a/b", b"a" * 200, b"\xff\xfe", b"two\nlines"])
def test_a_file_that_holds_no_wandb_id_is_named_with_its_remedy(tmp_path, contents):
    (tmp_path / "wandb-id").write_bytes(contents)
    with pytest.raises(ConfigError, match=r"wandb-id holds .*, not the id of a wandb run: delete it to start a new"):
        metrics._wandb_id(tmp_path / "wandb-id")


def test_a_wandb_id_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "wandb-id").mkdir()
    with pytest.raises(ConfigError, match=r"wandb-id cannot be read: Is a directory; delete it"):
        metrics._wandb_id(tmp_path / "wandb-id")


def test_a_run_is_also_written_to_tensorboard_and_begins_again_where_it_is_resumed(tmp_path):
    config = metrics.LoggerConfig(mode="disabled", tensorboard=True)
    for start in (0, 2):
        run = metrics.Metrics(config, tmp_path, {}, start, 3)
        if not start:
            run.log(0, {"held_out_loss": 9.0})
        for step in range(start + 1, 4):
            run.log(step, {"loss": float(10 * start + step)})
        run.draw(3, "needle", heat_map([Cell(100, 50, True, 0.5), Cell(200, 50, False, 1.5)]))
        run.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1), (2, 2), (3, 23)]
    assert [(event.step, event.value) for event in events.Scalars("held_out_loss")] == [(0, 9)]
    assert [(event.step, event.height > 100) for event in events.Images("needle")] == [(3, True)]
    assert [record["step"] for record in metrics.read(tmp_path / metrics.FILE)] == [0, 1, 2, 3]


def test_tensorboard_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logger\.tensorboard=true needs the package tensorboard, which is not inst"):
        metrics.LoggerConfig(tensorboard=True)


def test_a_job_log_gets_lines_at_intervals_instead_of_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics.time, "monotonic", iter([100.0, 100.0, 109.0, 111.0, 111.0, 112.0]).__next__)
    written = metrics.Metrics(metrics.LoggerConfig(mode="disabled"), tmp_path, {}, start=0, steps=4)
    for step in (1, 2, 3, 4):
        written.show(step, {"loss": 2.5, "gradient_norm": 0.123, "tokens_per_second": 1e4, "memory_gib": 1.0})
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in out.splitlines()] == ["step 1 of 4", "step 3 of 4", "step 4 of 4"]
    assert "loss 2.500, gradient norm 0.123, 10,000 tok/s" in out
    assert err == ""
