"""A checkpoint is whole or not there; a run resumes from the newest sound one, and says what it passed over."""

import json
import shutil

import pytest
import torch

from ringflash.errors import ConfigError
from ringflash.training import checkpoint
from ringflash.training.step import MemoryConfig, OptimConfig, build_engine, prepare, train_step
from ringflash.training.world import World
from tests.training.test_step import LENGTH, SEQUENCES, Layout, build, joined, sequences


def engine_on(world: World, zero: int):
    optim = OptimConfig(steps=4, batch=SEQUENCES, micro_batch=SEQUENCES, warmup=0)
    return build_engine(build("llama"), optim, MemoryConfig(zero=zero), world)


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


def resume_and_step(folder, zero, settings=None):
    """The step resumed from, the loss of the next one, and what was said."""
    world, said = joined(None), []
    engine = engine_on(world, zero)
    step = checkpoint.resume(engine, folder, world, settings, said.append)
    layout = Layout.zigzag(LENGTH, world.size)
    loss = train_step(engine, prepare(engine, sequences("full"), world, lambda mask: layout), world).loss
    return step, loss.item(), said


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "has other contents than were written": flip_a_bit,
    "has 100 of ": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "is missing": lambda path: path.unlink(),
}


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_damage_of_any_kind_goes_back_to_the_checkpoint_before(ranks, tmp_path, zero):
    losses = ranks.run(write_three, 2, tmp_path / "whole", zero, 3)[0]
    for number, (fault, damage) in enumerate(DAMAGE.items()):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        (folder / "step-00000004.partial").mkdir()
        newest = folder / "step-00000003"
        largest = max(newest.rglob("*.pt"), key=lambda p: p.stat().st_size)
        damage(largest)
        step, loss, said = ranks.run(resume_and_step, 2, folder, zero)[0]
        assert (step, loss) == (2, losses[2])
        assert said[0].startswith(f"{newest} is not sound ({largest.relative_to(newest)} {fault}")
        assert newest.with_name("step-00000003.unsound").is_dir()
        (folder / "step-00000002" / "manifest.json").unlink()
        step, loss, said = ranks.run(resume_and_step, 2, folder, zero)[0]
        assert (step, loss) == (1, losses[1])
        assert "manifest.json: FileNotFoundError" in said[0]


@pytest.mark.ranks
def test_with_no_sound_checkpoint_left_the_run_ends_instead_of_starting_over(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 2)
    for path in tmp_path.glob("step-*/manifest.json"):
        path.unlink()
    with pytest.raises(AssertionError, match="holds 2 checkpoints and none is sound; resume=never starts anew"):
        ranks.run(resume_and_step, 1, tmp_path, 1)


def write_after(folder):
    """Two more checkpoints, of steps before that of an unsound one."""
    world = joined(None)
    engine = engine_on(world, 1)
    checkpoint.resume(engine, folder, world)
    for step in (2, 3):
        checkpoint.save(engine, folder, step, world, 2)


@pytest.mark.ranks
def test_a_new_checkpoint_outlives_unsound_ones_of_later_steps(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 3)
    for step in (2, 3):
        (tmp_path / f"step-0000000{step}" / "manifest.json").unlink()
    ranks.run(write_after, 1, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith("unsound")) == [
        "step-00000002",
        "step-00000003",
    ]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"optim": {"lr": 2.0, "steps": 9}}, "optim.lr=2.0 differs from 1.0"),
        ({"optim": {"lr": 1.0}, "data": {"digest": "b"}}, "the text of data.path, by its digest=b differs from None"),
        ({"optim": {"lr": 1.0, "steps": 9}, "model": {"layers": 3}}, "model.layers=3 differs from None"),
    ],
)
def test_a_changed_setting_is_refused_and_more_steps_are_not(ranks, tmp_path, now, message):
    ranks.run(write_with, 1, tmp_path, {"optim": {"lr": 1.0, "steps": 4}})
    same = {"optim": {"lr": 1.0, "steps": 9}, "parallel": {"ring": 1}}  # the ring that null comes to on one rank
    assert ranks.run(resume_and_step, 1, tmp_path, 1, same)[0][0] == 1
    with pytest.raises(AssertionError, match=message):
        ranks.run(resume_and_step, 1, tmp_path, 1, now)


def write_with(folder, settings):
    """One checkpoint of these settings."""
    world = joined(None)
    checkpoint.save(engine_on(world, 1), folder, 1, world, 1, settings)


@pytest.mark.ranks
def test_only_the_newest_are_kept_and_nothing_half_written_stays(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.ranks
def test_a_checkpoint_of_other_ranks_is_refused_with_both_numbers(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 1)
    with pytest.raises(AssertionError, match="was written with ranks=1, this run has ranks=2"):
        ranks.run(resume_and_step, 2, tmp_path, 1)


@pytest.mark.ranks
def test_a_checkpoint_of_a_release_that_counted_positions_through_the_sequence_is_refused(ranks, tmp_path):
    ranks.run(write_three, 1, tmp_path, 1, 1)
    manifest = tmp_path / "step-00000003" / checkpoint.MANIFEST
    written = json.loads(manifest.read_text())
    assert written.pop("positions") == "document"
    manifest.write_text(json.dumps(written))
    with pytest.raises(AssertionError, match=r"step-00000003 counts positions within each sequence, .* each document"):
        ranks.run(resume_and_step, 1, tmp_path, 1)


@pytest.mark.ranks
def test_without_a_checkpoint_a_run_starts_at_step_0(ranks, tmp_path):
    step, _, said = ranks.run(resume_and_step, 1, tmp_path / "none", 1)[0]
    assert step == 0
    assert said == []


def test_settings_that_keep_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"checkpoint\.keep=0"):
        checkpoint.CheckpointConfig(keep=0)


def test_a_manifest_lists_every_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.pt").write_bytes(b"123")
    world = World(0, 1, torch.device("cpu"), None, None, None, 0, 1)
    digests = checkpoint._digests(tmp_path, checkpoint._share(tmp_path, world))
    assert json.loads(json.dumps(digests))["a/b.pt"][0] == 3
