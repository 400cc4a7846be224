"""A run has its own folder, is the only one in it, and never starts again at step 0 where there are steps."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ringflash import files
from ringflash.errors import ConfigError, DiskError
from ringflash.training import run_folder
from ringflash.training.compose import compose
from ringflash.training.config import Config
from ringflash.training.metrics import LoggerConfig, Metrics, read


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "ENDING", 0.0)


def begun(path: Path, name: str | None, steps: int = 3) -> Path:
    """A run's folder with a record of 10 seconds per step and, unless it is None, a configuration with this name."""
    path.mkdir(parents=True)
    if name is not None:
        (path / "config.yaml").write_text(f"name: {name}\n")
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "seconds": 10}}\n' for step in range(1, steps + 1)))
    return path


def test_a_new_run_takes_the_first_name_that_nothing_has(tmp_path):
    (tmp_path / "demo-2").write_text("a file")
    taken = [run_folder.acquire(tmp_path, "demo", "never").path.name for _ in range(3)]
    assert taken == ["demo", "demo-3", "demo-4"]


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_runs_that_start_at_once_never_share_a_folder(tmp_path, resume):
    """Threads, since a lock belongs to the opened file; those of runs that were taken are kept open."""

    def take(runs, begin):
        begin.wait(60)
        try:
            return run_folder.acquire(runs, "demo", resume)
        except ConfigError as error:
            return error

    for number in range(10):
        runs, begin = tmp_path / str(number), threading.Barrier(4)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _, runs=runs, begin=begin: take(runs, begin), range(4)))
        taken = sorted(folder.path.name for folder in found if isinstance(folder, run_folder.RunFolder))
        assert taken == (["demo", "demo-2", "demo-3", "demo-4"] if resume == "never" else ["demo"])
        for error in found:
            if isinstance(error, ConfigError):
                assert re.search(r"demo is in use by (process \d+ on |another process)", str(error))


def test_the_lock_of_a_run_that_has_ended_is_free(tmp_path):
    first = run_folder.acquire(tmp_path, "demo", "auto")
    with pytest.raises(ConfigError, match=r"demo is in use by process \d+ on .*: wait until it ends"):
        run_folder.acquire(tmp_path, "demo", "auto")
    first.lock.close()
    assert run_folder.acquire(tmp_path, "demo", "auto").path == first.path


def test_a_disk_without_locks_is_reported_and_used(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "flock", refuse)
    assert run_folder.acquire(tmp_path, "demo", "never").path == tmp_path / "demo"
    assert "demo cannot be locked (Operation not supported): a second run could use it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [None, "", "name: [", "just text", "\x00"], ids=["missing", "empty", "cut", "text", "nul"]
)
def test_a_run_is_found_by_its_folders_name_whatever_its_configuration_is(tmp_path, damage):
    folder = begun(tmp_path / "demo", "demo")
    (folder / "config.yaml").unlink()
    if damage is not None:
        (folder / "config.yaml").write_text(damage)
    assert run_folder.acquire(tmp_path, "demo", "auto").path == folder


def test_of_several_runs_of_a_name_the_newest_that_has_steps_is_resumed(tmp_path):
    begun(tmp_path / "demo", "demo")
    begun(tmp_path / "demo-2", "demo")
    begun(tmp_path / "demo-10", "demo")
    (tmp_path / "demo-11").mkdir()  # ended before its first step
    begun(tmp_path / "demo-12", "demo-12")  # a run that was given this name
    begun(tmp_path / "demo-x", "demo")
    begun(tmp_path / "demos", "demo")
    begun(tmp_path / "demo-01", "demo")
    assert run_folder.acquire(tmp_path, "demo", "auto").path.name == "demo-10"
    assert run_folder.acquire(tmp_path, "demo-12", "auto").path.name == "demo-12"


def test_a_numbered_folder_that_may_be_another_runs_is_refused(tmp_path):
    begun(tmp_path / "demo", "demo")
    begun(tmp_path / "demo-2", None)
    with pytest.raises(ConfigError, match=r"demo-2/config\.yaml names no run, so this may be one of name=demo"):
        run_folder.acquire(tmp_path, "demo", "auto")


def test_a_folder_of_steps_without_a_checkpoint_is_refused(tmp_path):
    folder = begun(tmp_path / "demo", "demo", steps=7)
    with pytest.raises(ConfigError, match="demo has 7 steps and no checkpoint to resume from: resume=never"):
        run_folder.check_start(folder, 0, 9)
    run_folder.check_start(folder, 4, 9)
    assert len(read(folder / "metrics.jsonl")) == 7


@pytest.mark.parametrize(
    ("settings", "lost"),
    [
        ("every: 6", True),
        ("every: 7", False),
        ("every: 0", True),
        ("every: 0, every_minutes: 1.0", True),  # the six steps before the last took a minute
        ("every: 0, every_minutes: 1.1", False),
        ("every: 6, every_minutes: 1.1", True),
    ],
)
def test_a_run_that_ended_before_its_first_checkpoint_was_due_starts_again(tmp_path, capsys, settings, lost):
    """As a job that is preempted early and queued again."""
    folder = begun(tmp_path / "demo", "demo", steps=7)
    (folder / "wandb-id").write_text("abc")
    (folder / "config.yaml").write_text(f"name: demo\ncheckpoint: {{{settings}}}\n")
    if lost:
        with pytest.raises(ConfigError, match="demo has 7 steps and no checkpoint to resume from"):
            run_folder.check_start(folder, 0, 9)
    else:
        run_folder.check_start(folder, 0, 9)
        assert "demo has 7 steps and no checkpoint, since none was due before: starts" in capsys.readouterr().out
    assert (folder / "wandb-id").exists() == lost


@pytest.mark.parametrize("runs", ["a[b", "a*/runs", "a?"])
def test_folders_that_deepspeed_takes_for_patterns_are_refused_before_anything_is_done(runs):
    config, _ = compose([])
    with pytest.raises(ConfigError, match=r"^output_dir=a[\S]+ holds '.': DeepSpeed would take it for a pattern"):
        Config(**{**vars(config), "output_dir": runs})


@pytest.mark.parametrize("name", ["checkpoints", ".lock", "metrics.jsonl"])
def test_a_run_folder_in_which_a_name_is_taken_by_another_kind_of_file_is_refused(tmp_path, name):
    if name == "checkpoints":
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / name).symlink_to("nowhere")
    else:
        (tmp_path / "demo" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"cannot be used: .*/demo/{name}: "):
        run_folder.acquire(tmp_path, "demo", "auto")


def test_a_link_to_nowhere_is_named_with_its_target(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "checkpoints").symlink_to("/nowhere")
    with pytest.raises(ConfigError, match=r"demo/checkpoints: links to /nowhere, which does not exist$"):
        run_folder.acquire(tmp_path, "demo", "auto")


def test_a_run_that_is_a_link_to_nowhere_is_not_passed_over_for_another(tmp_path):
    (tmp_path / "demo").symlink_to("/nowhere")
    begun(tmp_path / "demo-2", "demo")
    with pytest.raises(ConfigError, match=r"^resume=auto: .*/demo links to /nowhere, which does not exist"):
        run_folder.acquire(tmp_path, "demo", "auto")


def test_an_error_that_names_no_file_is_reported_with_the_runs_folder(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "_locked", full)
    message = rf"^output_dir={tmp_path} cannot be used: {tmp_path}/demo: No space left on device$"
    with pytest.raises(ConfigError, match=message):
        run_folder.acquire(tmp_path, "demo", "never")


def test_a_record_whose_step_is_no_number_is_no_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": true}\n{"step": "1"}\n{"step": 1.0}\n{"step": 2}\n')
    assert read(tmp_path / "metrics.jsonl") == [{"step": 2}]


def test_a_run_that_has_done_more_steps_than_it_is_asked_for_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^optim\.steps=3 is less than the 4 steps that .* has done$"):
        run_folder.check_start(tmp_path, 4, 3)


def test_a_damaged_line_of_metrics_is_skipped_alone(tmp_path):
    folder = begun(tmp_path / "demo", "demo", steps=2)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step\xff\xfe": 3}\n' + b"[" * 100000 + b'\n{"step": 4}\n')
    assert run_folder.acquire(tmp_path, "demo", "auto").path == folder
    assert [record["step"] for record in read(folder / "metrics.jsonl")] == [1, 2, 4]


@pytest.mark.parametrize(
    "error",
    [ConnectionResetError(104, "Connection reset by peer"), RuntimeError("CUDA out of memory")],
    ids=["network", "memory"],
)
def test_an_error_that_no_disk_caused_is_not_reported_as_one(tmp_path, error):
    with pytest.raises(type(error), match=str(error).split("] ")[-1]), files.writing(tmp_path):
        raise error


def test_folders_that_cannot_be_made_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for runs in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/runs")):
        with pytest.raises(ConfigError, match=rf"output_dir={runs} cannot be used: .*: \w"):
            run_folder.acquire(runs, "demo", "never")
    with pytest.raises(ConfigError, match="file is not a folder, but name=file would be trained there"):
        run_folder.acquire(tmp_path, "file", "auto")


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "", "x" * 300, "é" * 150])
def test_names_that_no_folder_can_have_are_refused(name):
    config, _ = compose([])
    settings = {**vars(config), "name": name}
    with pytest.raises(ConfigError, match=r"^name="):
        Config(**settings)


def test_records_after_the_checkpoint_are_dropped_and_others_stay(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\nnull\n7\n{"step": 3}\n{"st')
    Metrics(LoggerConfig("disabled"), tmp_path, {}, start=2, steps=4).close()
    assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_that_cannot_be_written_keeps_its_contents(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    files.write_atomically(path, "old")
    monkeypatch.setattr(files.os, "fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(
        DiskError, match=r"config\.yaml was not written: .*No space left on device; .* GiB are free on its"
    ):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_model_is_the_same_at_another_path_and_another_with_other_weights(tmp_path):
    for name, weights, config in (
        ("a", b"1" * 9, {}),
        ("b", b"1" * 9, {}),
        ("c", b"2" * 9, {}),
        ("d", b"1" * 9, {"x": 1}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    digests = [files.model_digest(tmp_path / name) for name in "abcd"]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_folder_that_another_machine_does_not_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "VISIBLE", 0.0)
    taken = run_folder.acquire(tmp_path, "demo", "never")
    run_folder.check_shared(taken.path, "here")
    with pytest.raises(ConfigError, match=r"output_dir=there must be on a disk that all machines share: .* see .*lock"):
        run_folder.check_shared(tmp_path / "demo-2", "there")
