"""A run continues on another number of ranks and with its states sharded in another way: same data, losses, weights."""

import contextlib
import io
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ringflash import Layout
from ringflash.training import engine
from ringflash.training.checkpoints import checkpoint, reshard
from ringflash.training.checkpoints.reshard import MASTER, Flat, Fragment, fill
from ringflash.training.engine import build_engine
from ringflash.training.memory import MemoryConfig
from ringflash.training.metrics import read
from ringflash.training.optimizers import host_adamw
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.step import prepare, train_step
from tests.training.engines import LENGTH, SEQUENCES, build, joined, sequences
from tests.training.runs import fitted, settings

NUMELS = {"one": 1, "seven": 7, "none-on-some": 2, "large": 30}


def parts_of_all(ranks):
    """Each rank's fragments and the size of its flat tensor, with padding inside and at the end."""
    paddings, size = [3, 0, 5, 0], -(-(sum(NUMELS.values()) + 8) // ranks)
    return [([*reshard._fragments_of_group(NUMELS, paddings, rank, size)], size) for rank in range(ranks)]


def parts_of_each(ranks):
    size = sum(-(-numel // ranks) for numel in NUMELS.values())
    return [([*reshard._fragments_of_each(NUMELS, rank, ranks)], size) for rank in range(ranks)]


def flat_of(fragments, size, chunk, values=None):
    """A flat tensor in chunks, of zeros or of the parameters' values."""
    whole = torch.zeros(size, dtype=torch.int64)
    for f in fragments if values else ():
        whole[f.at : f.at + f.end - f.begin] = values[f.parameter][f.begin : f.end]
    return Flat(fragments, {MASTER: [*whole.split(chunk)]})


@pytest.mark.parametrize("before", [parts_of_all, parts_of_each])
@pytest.mark.parametrize("now", [parts_of_all, parts_of_each])
@pytest.mark.parametrize(("earlier", "ranks"), [(1, 3), (4, 2), (2, 5), (64, 1)])
def test_every_element_arrives_where_the_new_ranks_have_it(before, now, earlier, ranks):
    values = {name: torch.arange(1, numel + 1) * 100 + number for number, (name, numel) in enumerate(NUMELS.items())}
    saved = [flat_of(*each, 4, values) for each in before(earlier)]
    for fragments, size in now(ranks):
        flat = flat_of(fragments, size, 3)
        fill([flat], saved)
        expected = flat_of(fragments, size, 3, values)
        assert torch.cat(flat.states[MASTER]).tolist() == torch.cat(expected.states[MASTER]).tolist()


def test_elements_that_no_file_holds_are_named():
    whole = flat_of([Fragment("weight", 0, 6, 0)], 6, 6)
    half = flat_of([Fragment("weight", 0, 4, 0)], 4, 4)
    with pytest.raises(ValueError, match=r"^elements 0 to 6 of weight: 2 are in no file$"):
        fill([whole], [half])


def losses_of(folder, zero, states, dtype, resumed):
    """Losses of four steps, with a checkpoint after the second one; resumed: of those after it."""
    world, own = joined(None), engine._deepspeed_settings
    optim = OptimConfig(steps=4, batch=SEQUENCES, micro_batch=SEQUENCES, warmup=0, lr=1e-2)
    memory = MemoryConfig(zero=zero, optimizer_states=states)
    settings = {"memory": {"zero": zero, "optimizer_states": states}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_adamw, "CHUNK", 1000)
        groups = {"sub_group_size": 10**9 if resumed else 3000}  # ZeRO 3 ends a flat tensor there
        patch.setattr(engine, "_deepspeed_settings", lambda *a: (s := own(*a))["zero_optimization"].update(groups) or s)
        trained = build_engine(build("llama").to(dtype), optim, memory, world)
        trained.module.reserve_host_memory(LENGTH)
        data = prepare(trained, sequences("uneven"), world, lambda mask: Layout.zigzag(LENGTH, world.size))
        if resumed:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                assert checkpoint.resume(trained, folder, world, settings, lambda line: None) == 2
            assert printed.getvalue() == ""
        losses = []
        while trained.global_steps < 4:
            losses.append(train_step(trained, data, world).loss.item())
            if trained.global_steps == 2:
                checkpoint.save(trained, folder, 2, world, 1, settings)
    return losses


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("dtype", "before", "now", "size"),
    [
        (torch.float32, (0, "fp32"), (0, "fp32"), 3),
        (torch.bfloat16, (1, "fp32"), (1, "fp32"), 3),
        (torch.float32, (2, "fp32"), (2, "fp32"), 3),
        (torch.float32, (3, "fp32"), (3, "fp32"), 3),
        (torch.bfloat16, (3, "bf16"), (1, "bf16"), 1),
        (torch.bfloat16, (1, "host"), (1, "host"), 3),
        (torch.bfloat16, (1, "fp32"), (3, "host"), 2),
        (torch.bfloat16, (3, "host"), (2, "fp32"), 1),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_steps_after_a_checkpoint_of_two_ranks_have_the_same_losses(ranks, tmp_path, dtype, before, now, size):
    expected = ranks.run(losses_of, 2, tmp_path, *before, dtype, False)[0]
    found = ranks.run(losses_of, size, tmp_path, *now, dtype, True)[0]
    assert found == pytest.approx(expected[2:], rel=1e-6 if dtype == torch.float32 else 1e-4)


def check_continued(pool, text, before, now, changes, rel):
    """A run, by its ranks and settings, that ends in the middle and continues with others, has the same results.

    rel: the relative error that losses may have.
    """
    folder = text.parent / "runs" / "run"
    assert pool.run(fitted, *before)[0][0] is None
    expected, weights = read(folder / "metrics.jsonl"), load_file(folder / "model" / "model.safetensors")
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    shutil.rmtree(folder / "model")

    size, run = now
    error, printed = pool.run(fitted, size, [*run, "resume=auto"])[0]
    assert error is None
    assert f"step-00000003{changes}\n" in printed
    records = read(folder / "metrics.jsonl")
    assert len(records) == len(expected)
    for name in ("step", "learning_rate", "pairs"):  # the pairs are those of the same documents
        assert [r.get(name) for r in records] == [r.get(name) for r in expected]
    for name in ("loss", "held_out_loss"):
        assert [r.get(name, 0) for r in records] == pytest.approx([r.get(name, 0) for r in expected], rel=rel)
    found = load_file(folder / "model" / "model.safetensors")
    assert all(torch.allclose(found[name], x, rtol=0, atol=rel) for name, x in weights.items())


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("zero", "earlier", "now", "optim", "changes"),
    [
        ((1, 1), 2, 1, [], "; ranks=1 replaces 2"),
        ((3, 3), 1, 2, ["optim.optimizer=sgd", "optim.beta1=0"], "; ranks=2 replaces 1"),  # which has no states
        ((1, 3), 2, 2, [], "; memory.zero=3 replaces 1"),
    ],
    ids=["shrinks", "grows-without-momentum", "at-another-stage"],
)
def test_a_run_of_replicas_continues_with_its_states_sharded_in_another_way(
    ranks, text, zero, earlier, now, optim, changes
):
    run = settings(text, "name=run", "parallel.ring=1", "optim.batch=2", "optim.lr=1e-2", *optim)
    before, after = ([*run, f"memory.zero={stage}"] for stage in zero)
    check_continued(ranks, text, (earlier, before), (now, after), changes, rel=1e-6)


@pytest.mark.ranks
def test_a_batch_that_does_not_divide_among_the_new_replicas_is_refused(ranks, text):
    run = settings(text, "name=run", "parallel.ring=1", "optim.batch=2", "optim.steps=1", "checkpoint.every=1")
    assert ranks.run(fitted, 1, run)[0][0] is None
    for error, _ in ranks.run(fitted, 3, [*run, "resume=auto", "optim.steps=2"]):
        assert error == (
            "optim.batch=2 is not a multiple of 3 replicas x optim.micro_batch=1: a larger parallel.ring makes fewer "
            "replicas"
        )
