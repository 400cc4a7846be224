"""With checkpoint.keep_best, a run keeps the checkpoint of its lowest held-out loss and exports its weights."""

import dataclasses
import json
import shutil

import pytest
from safetensors.torch import load_file

from ringflash.errors import ConfigError
from ringflash.training.checkpoints import checkpoint
from ringflash.training.checkpoints.checkpoint import Best, find_best
from ringflash.training.compose import compose
from ringflash.training.evaluation import Evaluation, HeldOut
from ringflash.training.metrics import read
from tests.training.checkpoints.test_checkpoint import ALONE, changed, written
from tests.training.runs import fitted, settings
from tests.training.test_lora import base  # noqa: F401, a fixture

LOSSES = {0: 5.0, 1: 4.0, 2: 2.0, 3: 3.0, 4: 1.5, 5: 2.5, 6: 1.9}  # held-out, by step
KEPT = ["evaluation.every=1", "checkpoint.keep_best=true", "checkpoint.every=0", "checkpoint.keep=1"]


def scripted(overrides, losses=LOSSES):
    """A run with these held-out losses."""

    def loss(self, engine, sequences=None):
        return HeldOut(losses[engine.global_steps])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluation, "loss", loss)
        return fitted([*overrides, "optim.schedule=constant", "optim.warmup=0"])


def steps_of(folder):
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "others"),
    [
        (1, ["memory.zero=1", "model.dtype=bf16", "memory.optimizer_states=bf16", "optim.micro_batch=4"]),
        (1, ["memory.zero=2", "model.dtype=bf16", "memory.optimizer_states=host", "optim.micro_batch=4"]),
        (2, ["memory.zero=3", "model.lora.rank=2"]),
    ],
    ids=["bf16", "host", "zero-3-lora"],
)
def test_the_weights_of_the_lowest_held_out_loss_are_exported(ranks, text, base, size, others):  # noqa: F811
    model = {"model": ["model=pretrained", f"model.path={base}"]} if "model.lora.rank=2" in others else {}
    run, folder = settings(text, "name=best", *KEPT, *others, "optim.batch=4", **model), text.parent / "runs" / "best"
    error, printed = ranks.run(scripted, size, run)[0]
    assert error is None
    assert "lowest            1.5000 nats per token after step 4, whose weights are exported" in printed
    assert "held-out loss     1.9000 nats" in printed
    assert steps_of(folder) == [4, 6]

    shorter = settings(text, "name=shorter", *others, "optim.batch=4", "optim.steps=4", **model)
    assert ranks.run(scripted, size, shorter)[0][0] is None
    expected, found = (load_file(f / "model" / "model.safetensors") for f in (folder.with_name("shorter"), folder))
    assert all(found[name].equal(x) for name, x in expected.items())

    if size > 1:
        return
    shutil.rmtree(folder / "model")
    assert ranks.run(scripted, size, [*run, "resume=auto"])[0][0] is None  # it is complete, and exports them again
    assert all(load_file(folder / "model" / "model.safetensors")[name].equal(x) for name, x in expected.items())
    assert read(folder / "metrics.jsonl")[-1]["held_out_loss"] == LOSSES[6]


@pytest.mark.ranks
def test_a_run_ends_when_its_patience_does_and_a_resumed_one_counts_the_same_evaluations(ranks, text):
    run, folder = settings(text, "name=best", *KEPT, "checkpoint.every=1"), text.parent / "runs" / "best"
    for patience, end, best in ((1, 3, 2), (1, 3, 2), (2, 6, 4)):
        error, printed = ranks.run(scripted, 1, [*run, f"evaluation.patience={patience}", "resume=auto"])[0]
        assert error is None
        assert (f"ends after step {end}: {patience} evaluations did not" in printed) == (end < 6)
        assert f"after step {best}, whose weights are exported" in printed
        assert steps_of(folder) == [best, end]


@pytest.mark.ranks
def test_a_resumed_run_with_more_frequent_evaluations_counts_those_that_took_place(ranks, text):
    run = settings(text, "name=best", *KEPT, "evaluation.patience=2", "resume=auto")
    losses = {0: 5.0, 2: 1.0, 4: 2.0, 5: 2.0, 6: 2.0}
    for others, end in ((["evaluation.every=2", "optim.steps=4"], 4), (["evaluation.every=1"], 5)):
        error, printed = ranks.run(scripted, 1, [*run, *others], losses)[0]
        assert error is None
        assert ("ends after step 5: 2 evaluations did not" in printed) == (end == 5)
        assert steps_of(text.parent / "runs" / "best") == [2, end]


@pytest.mark.ranks
def test_a_resumed_run_counts_no_evaluations_before_keep_best_and_knows_that_the_last_was_the_lowest(ranks, text):
    run = settings(text, "name=best", "evaluation.every=2", "checkpoint.every=1", "checkpoint.keep=1")
    best = ["resume=auto", "checkpoint.keep_best=true", "evaluation.patience=2"]
    for end, others, kept in (("5", [], [5]), ("7", best, [7]), ("12", best, [7, 10])):
        losses = {0: 5.0, 2: 4.0, 4: 4.0, 5: 3.0, 6: 2.0, 7: 1.0, 8: 2.0, 10: 2.0}
        assert ranks.run(scripted, 1, [*run, *others, f"optim.steps={end}"], losses)[0][0] is None
        assert steps_of(text.parent / "runs" / "best") == kept


@pytest.mark.ranks
def test_the_best_of_another_number_of_ranks_is_exported(ranks, text):
    run, folder = settings(text, "name=best", *KEPT, "resume=auto", "optim.batch=4"), text.parent / "runs" / "best"
    assert ranks.run(scripted, 2, [*run, "optim.steps=3"])[0][0] is None
    expected = load_file(folder / "model" / "model.safetensors")
    error, printed = ranks.run(scripted, 1, [*run, "optim.steps=5"], LOSSES | {4: 2.2})[0]
    assert error is None
    assert "after step 2, whose weights are exported" in printed
    found = load_file(folder / "model" / "model.safetensors")
    assert all(found[name].equal(x) for name, x in expected.items())


def scored(folder, step, best):
    changed(best=dataclasses.asdict(best))(written(folder, step))


def test_the_lowest_is_found_again_in_the_newest_manifest_of_the_same_evaluation_whose_checkpoint_is_there(tmp_path):
    assert find_best(tmp_path, "a", ALONE) == Best("a")
    first, lower = Best("a", 1, 3.0), Best("a", 2, 2.0, evaluations=1)
    scored(tmp_path, 1, first)
    scored(tmp_path, 2, lower)
    written(tmp_path, 3)
    scored(tmp_path, 4, Best("b", 4, 1.0))
    scored(tmp_path, 5, Best("a", 9, 1.0))
    changed(best=[2.0])(written(tmp_path, 6))
    assert find_best(tmp_path, "a", ALONE) == lower
    assert find_best(tmp_path, "b", ALONE).step == 4
    (tmp_path / "step-00000002" / "state" / "model.pt").write_bytes(b"m")
    with pytest.raises(ConfigError, match=r"step-00000002, which has the lowest held-out loss, is corrupt \(state/mod"):
        checkpoint.load_best(None, tmp_path, lower, ALONE)
    shutil.rmtree(tmp_path / "step-00000002")
    assert find_best(tmp_path, "a", ALONE) == first


def test_a_loss_that_is_no_number_is_never_the_lowest():
    assert Best("a").after(1, float("nan")) == Best("a", evaluations=1)
    assert json.loads(json.dumps(Best("a").after(1, 2.0).loss)) == 2.0


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (["evaluation.patience=2"], r"evaluation\.patience=2 has no effect without checkpoint\.keep_best=true"),
        (["evaluation.patience=0"], r"evaluation\.patience=0 must be 1 or more, or null"),
        (
            ["checkpoint.keep_best=true", "evaluation.every=0"],
            r"checkpoint\.keep_best=true .* with evaluation\.every=0",
        ),
        (["checkpoint.keep_best=true", "data.held_out=0"], r"checkpoint\.keep_best=true needs held-out text"),
    ],
)
def test_settings_that_evaluate_nothing_are_refused(others, message):
    with pytest.raises(ConfigError, match=rf"^{message}"):
        compose(others)
