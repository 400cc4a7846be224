"""A checkpoint is whole or not there; a run resumes from the newest sound one, and says what it passed over."""

import json

import pytest
import torch

from ringflash.errors import ConfigError
from ringflash.training import checkpoint
from ringflash.training.step import MemoryConfig, OptimConfig, build_engine, train_step
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
        losses.append(train_step(engine, sequences("full"), world, lambda mask: layout).item())
        checkpoint.save(engine, folder, step, world, keep)
    return losses


def resume_and_step(folder, zero):
    """The step resumed from, the loss of the next one, and what was said."""
    world, said = joined(None), []
    engine = engine_on(world, zero)
    step = checkpoint.resume(engine, folder, world, said.append)
    loss = train_step(engine, sequences("full"), world, lambda mask: Layout.zigzag(LENGTH, world.size))
    return step, loss.item(), said


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_damage_of_any_kind_goes_back_to_the_checkpoint_before(ranks, tmp_path, zero):
    losses = ranks.run(write_three, 2, tmp_path, zero, 3)[0]
    newest, before = tmp_path / "step-00000003", tmp_path / "step-00000002"
    largest = max(newest.rglob("*.pt"), key=lambda p: p.stat().st_size)
    (tmp_path / "step-00000004.partial").mkdir()

    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    step, loss, said = ranks.run(resume_and_step, 2, tmp_path, zero)[0]
    assert (step, loss) == (2, losses[2])
    fault = f"{largest.relative_to(newest)} has other contents than were written"
    assert said[0] == f"{newest} is not sound ({fault}); going back to the one before"

    largest.write_bytes(data[:100])
    (before / "manifest.json").unlink()
    step, loss, said = ranks.run(resume_and_step, 2, tmp_path, zero)[0]
    assert (step, loss) == (1, losses[1])
    assert f"{largest.relative_to(newest)} has 100 of {len(data)} bytes" in said[0]
    assert "manifest.json: FileNotFoundError" in said[1]

    largest.unlink()
    assert f"{largest.relative_to(newest)} is missing" in ranks.run(resume_and_step, 2, tmp_path, zero)[0][2][0]


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
