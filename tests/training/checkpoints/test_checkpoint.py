"""A checkpoint is complete or absent; a run resumes from the newest intact one, and reports the corrupt ones."""

import hashlib
import itertools
import json
import os
import re
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ringflash import Layout
from ringflash.distributed.world import World
from ringflash.errors import ConfigError, DiskError
from ringflash.training.checkpoints import checkpoint, compatibility, manifest
from ringflash.training.step import prepare, train_step
from tests.training.engines import LENGTH, SEQUENCES, engine_on, joined, sequences
from tests.training.runs import fitted, settings


def write_three(folder, zero, keep):
    """Checkpoints of steps 1, 2 and 3, and the loss of each step."""
    world = joined(None)
    engine = engine_on(world, zero)
    layout = Layout.zigzag(LENGTH, world.size)
    losses = []
    for step in (1, 2, 3):
        losses.append(
            train_step(engine, prepare(engine, sequences("full"), world, lambda mask: layout), world).loss.item()
        )
        checkpoint.save(engine, folder, step, world, keep)
    return losses


def resume_and_step(folder, zero, settings=None, ring=None):
    """The step resumed from, the loss of the next one, and the lines that were logged."""
    world, lines = joined(ring), []
    engine = engine_on(world, zero)
    step = checkpoint.resume(engine, folder, world, settings, lines.append)
    layout, mine = Layout.zigzag(LENGTH, world.ring.size), sequences("full").split(SEQUENCES // world.replicas)
    loss = train_step(engine, prepare(engine, mine[world.replica], world, lambda mask: layout), world).loss
    return step, loss.item(), lines


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "has another digest than was written": flip_a_bit,
    "has 100 of ": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_it_resumed(ranks, tmp_path, zero):
    losses = ranks.run(write_three, 2, tmp_path, zero, 3)[0]
    newest = tmp_path / "step-00000003"
    largest = max(newest.rglob("*.pt"), key=lambda p: p.stat().st_size)
    flip_a_bit(largest)
    step, loss, lines = ranks.run(resume_and_step, 2, tmp_path, zero)[0]
    assert (step, loss) == (2, losses[2])
    fault = f"{largest.relative_to(newest)} has another digest than was written"
    assert lines == [
        f"{newest} is corrupt ({fault}); trying the checkpoint before it",
        f"resumed from {tmp_path / 'step-00000002'}",
    ]
    assert newest.with_name("step-00000003.corrupt").is_dir()


ALONE = SimpleNamespace(
    rank=0, size=1, is_first=True, broadcast=lambda x: x, without_timeout=lambda what: nullcontext()
)


def written(folder, step):
    """A checkpoint as `save` leaves it, of two files."""
    path = folder / f"step-{step:08d}"
    (path / "state").mkdir(parents=True)
    files = {f"state/{name}.pt": f"{name} {step}".encode() * 9 for name in ("model", "optimizer")}
    for name, contents in files.items():
        (path / name).write_bytes(contents)
    digests = {name: (len(x), hashlib.sha256(x).hexdigest()) for name, x in files.items()}
    manifest = {"step": step, "ranks": 1, "ring": 1, "ulysses": 1, "settings": {}, "files": digests}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def changed(**entries):
    def change(path):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest |= {name: value for name, value in entries.items() if value is not None}
        kept = {name: value for name, value in manifest.items() if entries.get(name, 0) is not None}
        (path / "manifest.json").write_text(json.dumps(kept))

    return change


def replaced(text):
    return lambda path: (path / "manifest.json").write_bytes(text)


def forgotten(name):
    def forget(path):
        files = json.loads((path / "manifest.json").read_text())["files"]
        changed(files={other: entry for other, entry in files.items() if other != name})(path)

    return forget


def is_a_pipe(path):
    (path / "manifest.json").unlink()
    os.mkfifo(path / "manifest.json")


def is_a_folder(path):
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


def is_a_file(path):
    shutil.rmtree(path)
    path.write_text("")


def leads_nowhere(path):
    shutil.rmtree(path)
    path.symlink_to("nowhere")


DAMAGE = {
    "a bit": lambda path: flip_a_bit(path / "state/model.pt"),
    "cut": lambda path: (path / "state/model.pt").write_bytes(b"m"),
    "longer": lambda path: (path / "state/model.pt").write_bytes(b"m" * 200),
    "emptied": lambda path: (path / "state/model.pt").write_bytes(b""),
    "a file is missing": lambda path: (path / "state/optimizer.pt").unlink(),
    "all files are missing": lambda path: shutil.rmtree(path / "state"),
    "a file is a folder": lambda path: [(path / "state/model.pt").unlink(), (path / "state/model.pt").mkdir()],
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest a folder": is_a_folder,
    "manifest a pipe": is_a_pipe,
    "manifest empty": replaced(b""),
    "manifest cut": replaced(b'{"step": 2, "fil'),
    "manifest of bytes": replaced(b"\xff\x00\xfe"),
    "manifest deep": replaced(b"[" * 100000),
    "manifest a list": replaced(b"[]"),
    "manifest null": replaced(b"null"),
    "manifest a number": replaced(b"7"),
    "no step": changed(step=None),
    "another step": changed(step=1),
    "step a text": changed(step="2"),
    "step a fraction": changed(step=2.0),
    "no ranks": changed(ranks=None),
    "ring a text": changed(ring="1"),
    "no files": changed(files=None),
    "an empty list of files": changed(files={}),
    "files a list": changed(files=["state/model.pt"]),
    "no digest": changed(files={"state/model.pt": [9]}),
    "a size as text": changed(files={"state/model.pt": ["9", "0"]}),
    "a file outside": changed(files={"../step-00000001/state/model.pt": [9, "0"]}),
    "an absolute file": changed(files={"/etc/hostname": [9, "0"]}),
    "a file of no printable name": changed(files={"state/\ud800": [9, "0"]}),
    "a file that is not listed": forgotten("state/model.pt"),
    "a file more": lambda path: (path / "state/zero_pp_rank_1_optim_states.pt").write_bytes(b"m"),
    "no settings": changed(settings=None),
    "a file in its place": is_a_file,
    "a link to nowhere": leads_nowhere,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_whatever_is_wrong_with_the_newest_the_one_before_is_found_and_nothing_is_renamed(tmp_path, damage):
    older, newest = written(tmp_path, 1), written(tmp_path, 2)
    assert checkpoint._newest_intact(tmp_path, ALONE)[0][0] == newest
    damage(newest)
    (path, manifest), faults = checkpoint._newest_intact(tmp_path, ALONE)
    assert (path, manifest["step"], [*faults]) == (older, 1, [newest])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_notes_beside_the_state_leave_a_checkpoint_sound(tmp_path):
    (written(tmp_path, 1) / "notes.txt").write_text("the best so far")
    assert checkpoint._newest_intact(tmp_path, ALONE)[0][0].name == "step-00000001"


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    intact = written(tmp_path, 1)
    for name in ("step-00000009-best", "step-9", "best", "step-00000009.partial", "step-00000009.corrupt", "step-x"):
        shutil.copytree(intact, tmp_path / name)
    assert manifest.written(tmp_path) == [intact]
    assert manifest.written(tmp_path / "missing") == []


def test_steps_of_more_than_eight_digits_are_the_newest(tmp_path):
    assert manifest.written(written(tmp_path, 123456789).parent)[0].name == "step-123456789"
    written(tmp_path, 99999999)
    assert manifest.written(tmp_path)[0].name == "step-123456789"


def test_a_corrupt_checkpoint_is_moved_aside_beside_earlier_ones(tmp_path):
    path = written(tmp_path, 2)
    for name in ("step-00000002.corrupt", "step-00000002.corrupt-2"):
        assert manifest.corrupt_name(path).name == name
        manifest.corrupt_name(path).mkdir()


@pytest.mark.ranks
def test_with_no_sound_checkpoint_left_every_resume_is_refused_and_all_stays_as_it_is(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 2)
    for path in tmp_path.glob("step-*/manifest.json"):
        path.unlink()
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"none is intact \(manifest.json: FileNotFoundError\)"):
            ranks.run(resume_and_step, 1, tmp_path, 1)
    assert sorted(tmp_path.rglob("*")) == before
    for step in (2, 3):  # as an earlier release left them
        (tmp_path / f"step-0000000{step}").rename(tmp_path / f"step-0000000{step}.corrupt")
    with pytest.raises(AssertionError, match=r"none is intact \(moved aside before\)"):
        ranks.run(resume_and_step, 1, tmp_path, 1)


def save_on_a_full_disk(folder):
    """The error where torch cannot write."""
    world = joined(None)
    engine = engine_on(world, 1)
    checkpoint.save(engine, folder, 1, world, 1)

    def fail(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    engine.save_checkpoint = fail
    try:
        checkpoint.save(engine, folder, 2, world, 1)
    except DiskError as error:
        return str(error)


@pytest.mark.ranks
def test_a_checkpoint_that_cannot_be_written_is_named_with_the_space_left_and_the_one_before_stays(ranks, tmp_path):
    (line,) = ranks.run(save_on_a_full_disk, 1, tmp_path)
    assert re.match(r".*step-00000002\.partial was not written: .*inline_container.*; [0-9.e+]+ GiB are free", line)
    assert checkpoint._newest_intact(tmp_path, ALONE)[0][0].name == "step-00000001"


def write_after(folder):
    """Two more checkpoints, of steps before that of a corrupt one."""
    world = joined(None)
    engine = engine_on(world, 1)
    checkpoint.resume(engine, folder, world)
    for step in (2, 3):
        checkpoint.save(engine, folder, step, world, 2)


@pytest.mark.ranks
def test_a_new_checkpoint_outlives_corrupt_ones_of_later_steps(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 3)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}" / "manifest.json").unlink()
    ranks.run(write_after, 1, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith("corrupt")) == [
        "step-00000002",
        "step-00000003",
    ]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"optim": {"lr": 1.0, "clip": 2.0, "steps": 9}}, "optim.clip=2.0 differs from 1.0"),
        (
            {"optim": {"lr": 1.0, "clip": 1.0}, "data": {"digest": "b"}, "tokenizer": {"digest": "b"}},
            r"data.tokenizer is another one than when .* was written \(digest b, not a\): resume with the same",
        ),
        (
            {"optim": {"lr": 1.0, "clip": 1.0}, "data": {"digest": "b"}, "tokenizer": {"digest": "a"}},
            r"data.path or data.sources has other tokens than .* \(digest b, not null\)",
        ),
        (
            {"optim": {"lr": 1.0, "clip": 1.0}, "model": {"digest": "b"}},
            r"model.path has another model than .* \(digest b, not null\)",
        ),
        ({"optim": {"lr": 1.0, "clip": 1.0, "steps": 9}, "model": {"layers": 3}}, "model.layers=3 differs from null"),
        (
            {"optim": {"lr": 1.0, "clip": 1.0, "steps": 9}, "model": {"lora": {"dropout": 0.0, "rank": 2}}},
            "model.lora.rank=2 differs from null",
        ),
    ],
)
def test_a_changed_setting_is_refused_and_more_steps_are_not(ranks, tmp_path, now, message):
    before = {"optim": {"lr": 1.0, "clip": 1.0, "steps": 4}, "data": {"path": "here"}, "model": {"path": "here"}}
    before["tokenizer"] = {"digest": "a"}
    ranks.run(write_with, 1, tmp_path, before)
    same = {
        "optim": {"lr": 1.0, "clip": 1.0, "steps": 9},
        "parallel": {"ring": 1},  # what null comes to on one rank
        "data": {"path": "elsewhere/", "files": ["*.md"], "tokenizer": "moved"},
        "model": {"path": "moved"},
        "tokenizer": {"digest": "of one that gives the same tokens"},
    }
    assert ranks.run(resume_and_step, 1, tmp_path, 1, same)[0][0] == 1
    with pytest.raises(AssertionError, match=message):
        ranks.run(resume_and_step, 1, tmp_path, 1, now)


@pytest.mark.ranks
def test_a_changed_learning_rate_duration_micro_batch_or_skip_of_records_is_taken_and_reported(ranks, tmp_path):
    before = {"optim": {"lr": 1.0, "warmup": 2, "micro_batch": 1, "steps": 4}, "data": {"malformed": "refuse"}}
    ranks.run(write_with, 1, tmp_path, before)
    now = {"optim": {"lr": 0.5, "warmup": 2, "micro_batch": 6, "steps": 9}, "data": {"malformed": "skip"}}
    _, _, lines = ranks.run(resume_and_step, 1, tmp_path, 1, now)[0]
    assert lines == [
        f"resumed from {tmp_path}/step-00000001; data.malformed=skip replaces refuse; optim.lr=0.5 replaces 1.0; "
        f"optim.micro_batch=6 replaces 1; optim.steps=9 replaces 4",
    ]


def test_the_stage_and_the_place_of_states_may_change_where_they_can_be_resharded():
    def changes(before, now):
        names = ("memory.zero", "memory.optimizer_states")
        return compatibility._check_settings("path", *(dict(zip(names, x, strict=True)) for x in (before, now)))

    assert changes((1, "fp32"), (3, "host")) == [
        "memory.optimizer_states=host replaces fp32",
        "memory.zero=3 replaces 1",
    ]
    with pytest.raises(ConfigError, match=r"^memory\.zero=1 differs from 0, with which path was written: resume with"):
        changes((0, "fp32"), (1, "fp32"))
    with pytest.raises(ConfigError, match=r"^memory\.optimizer_states=bf16 differs from host"):
        changes((1, "host"), (1, "bf16"))


def test_a_setting_that_an_earlier_version_lacked_had_its_value():
    now = {"optim.eps": 1e-8, "optim.steps": 9, "data.train_on": "all_turns"}
    assert compatibility._check_settings("path", {}, now) == []
    with pytest.raises(ConfigError, match=r"^optim\.eps=1e-06 differs from 1e-08, with which path was written"):
        compatibility._check_settings("path", {}, {"optim.eps": 1e-6})


def write_with(folder, settings):
    """One checkpoint of these settings."""
    world = joined(None)
    checkpoint.save(engine_on(world, 1), folder, 1, world, 1, settings)


@pytest.mark.ranks
def test_only_the_newest_are_kept_and_nothing_half_written_stays(ranks, tmp_path):
    for left in ("step-00000002.partial", "step-00000005.partial", "mine.partial"):
        (tmp_path / left / "state").mkdir(parents=True)
    ranks.run(write_three, 1, tmp_path, 1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.partial", "step-00000002", "step-00000003"]


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [1, 3])
def test_a_ring_resumes_as_replicas_with_the_loss_that_it_would_have(ranks, tmp_path, zero):
    ranks.run(write_three, 2, tmp_path, zero, 1)
    (_, expected, _), _ = ranks.run(resume_and_step, 2, tmp_path, zero)
    (step, loss, lines), _ = ranks.run(resume_and_step, 2, tmp_path, zero, None, 1)
    assert (step, lines) == (3, [f"resumed from {tmp_path}/step-00000003; ring=1 replaces 2"])
    assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.ranks
def test_a_checkpoint_of_a_release_that_counted_positions_through_the_sequence_is_refused(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 1)
    file = tmp_path / "step-00000003" / manifest.MANIFEST
    written = json.loads(file.read_text())
    assert written.pop("positions") == "document"
    file.write_text(json.dumps(written))
    with pytest.raises(AssertionError, match=r"step-00000003 counts positions within each sequence, .* each document"):
        ranks.run(resume_and_step, 1, tmp_path, 1)


@pytest.mark.ranks
def test_without_a_checkpoint_a_run_starts_at_step_0(ranks, tmp_path):
    step, _, lines = ranks.run(resume_and_step, 1, tmp_path / "none", 1)[0]
    assert step == 0
    assert lines == []


def saved_by_time(overrides):
    """A run in which rank 0's clock has advanced a minute after two steps, and the clocks of others do not advance."""
    times = itertools.count(step=30.0) if dist.get_rank() == 0 else itertools.repeat(0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: next(times)))
        return fitted(overrides)


@pytest.mark.ranks
def test_checkpoints_are_due_by_the_clock_of_rank_0(ranks, text):
    minutes = ["checkpoint.every=0", "checkpoint.every_minutes=1", "checkpoint.keep=9", "optim.steps=5"]
    for error, _ in ranks.run(saved_by_time, 2, settings(text, "name=timed", "data.held_out=0", *minutes)):
        assert error is None
    steps = sorted(path.name for path in (text.parent / "runs" / "timed" / "checkpoints").iterdir())
    assert steps == ["step-00000002", "step-00000004", "step-00000005"]


def test_settings_that_keep_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"checkpoint\.keep=0"):
        checkpoint.CheckpointConfig(keep=0)
    with pytest.raises(ConfigError, match=r"checkpoint\.every_minutes=-1 must be 0 or more and finite"):
        checkpoint.CheckpointConfig(every_minutes=-1)


def test_a_manifest_lists_every_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.pt").write_bytes(b"123")
    world = World(0, 1, torch.device("cpu"), None, None, None, 0, 1)
    digests = manifest.digests_of(tmp_path, world)
    assert json.loads(json.dumps(digests))["a/b.pt"][0] == 3
