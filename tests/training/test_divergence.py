"""Steps that are not finite are reported, change no weight, write no checkpoint, and end the run."""

import json
import math

import pytest
import torch

from ringflash.distributed import failure
from ringflash.errors import ConfigError, DivergedError
from ringflash.layout import Layout
from ringflash.training import loss_plot, metrics
from ringflash.training.checkpoints import checkpoint
from ringflash.training.compose import compose
from ringflash.training.divergence import LIMIT, Divergence
from ringflash.training.engine import build_engine
from ringflash.training.export import export
from ringflash.training.memory import MemoryConfig
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.step import prepare, train_step
from tests.training.engines import LENGTH, build, joined, sequences
from tests.training.fits import SETTINGS, fit_on_ranks, weights_of


def strict(path):
    """The records, read by JSON's own rules."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -- a step


def loss_of_one_rank(engine, world):
    """On rank 1 the loss is NaN and every gradient is finite."""
    hook = engine.module.register_forward_hook(lambda _, inputs, loss: loss + (math.nan if world.rank == 1 else 0))
    return hook.remove


def gradient_of_one_rank(engine, world):
    """On rank 1 the loss is finite, and one weight's gradient is not."""
    weight = next(p for name, p in engine.module.named_parameters() if "q_proj" in name)
    return weight.register_hook(lambda g: g * (math.inf if world.rank == 1 else 1)).remove


def steps_on_ranks(zero, dtype, accumulation):
    """Two steps, with two between them that are not finite or that are left out; losses, norms and weights of both."""
    world = joined(None)
    found = []
    for poisons in ((loss_of_one_rank, gradient_of_one_rank), ()):
        optim = OptimConfig(steps=4, batch=6, micro_batch=6 // accumulation, warmup=0, clip=float(zero % 2))
        engine = build_engine(build("llama").to(dtype), optim, MemoryConfig(zero=zero), world)
        layout = Layout.zigzag(LENGTH, world.size)

        def step(engine=engine, layout=layout):
            result = train_step(engine, prepare(engine, sequences("full"), world, lambda mask: layout), world)
            return result.loss.item(), float(result.gradient_norm), result.learning_rate

        records = [step()]
        for poison in poisons:
            cure = poison(engine, world)
            records.append(step())
            cure()
        if not poisons:
            engine.global_steps += 2
        records.append(step())
        found.append((records, weights_of(engine)))
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(ranks, zero, dtype):
    accumulation = 1 if zero == 0 and dtype == torch.bfloat16 else 2
    for (poisoned, weights), (clean, exact) in ranks.run(steps_on_ranks, 2, zero, dtype, accumulation):
        first, nan_loss, infinite_norm, last = poisoned
        assert math.isnan(nan_loss[0])
        assert not math.isfinite(nan_loss[1])
        assert math.isfinite(infinite_norm[0])
        assert not math.isfinite(infinite_norm[1])
        assert [first, last] == clean
        assert all(weights[name].equal(x) for name, x in exact.items())


def writing_on_ranks(folder, zero):
    """The errors of saving and exporting where a weight is not finite in its last row."""
    world, messages = joined(None), []
    engine = build_engine(build("llama"), OptimConfig(), MemoryConfig(zero=zero), world)
    checkpoint.save(engine, folder, 1, world, 1)
    broken = next(p for name, p in engine.module.named_parameters() if "down_proj" in name)
    held = getattr(broken, "ds_tensor", broken)
    if world.rank == world.size - 1 or held is broken:
        held.data.view(-1)[-1] = math.inf
    for write in (
        lambda: checkpoint.save(engine, folder, 1, world, 1),
        lambda: export(engine, folder / "model", None, world),
    ):
        try:
            write()
        except DivergedError as error:
            messages.append(str(error))
    return messages


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_weights_that_are_not_finite_are_neither_saved_nor_exported(ranks, tmp_path, zero):
    for messages in ranks.run(writing_on_ranks, 2, tmp_path, zero):
        assert len(messages) == 2
        for file, line in zip(("step-00000001", "model"), messages, strict=True):
            assert line.startswith(f"{tmp_path / file} is not written: the weights are not finite; ")
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert (tmp_path / "step-00000001" / "manifest.json").exists()


# -- a run


def diverging_on_ranks(config, resolved):
    """The line that ends a run on this rank."""
    with pytest.raises(DivergedError) as error:
        fit_on_ranks(config, resolved)
    return str(error.value)


def diverging(ranks, text, *settings):
    """The line that ends a run of two ranks, its records and its checkpoints."""
    paths = [f"data.path={text}", f"data.cache={text.parent}/cache", f"output_dir={text.parent}/runs", "name=diverging"]
    run = compose([*SETTINGS, *paths, "checkpoint.every=1", "optim.warmup=0", *settings])
    (line,) = set(ranks.run(diverging_on_ranks, 2, *run))
    folder = text.parent / "runs" / "diverging"
    assert not (folder / "model").exists()
    return line, strict(folder / "metrics.jsonl"), sorted(p.name for p in folder.glob("checkpoints/*"))


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 2])
def test_three_steps_in_a_row_end_the_run_with_the_last_checkpoint_before_them(ranks, text, zero):
    settings = ["optim.lr=1e15", "optim.steps=9", "data.held_out=0.3", "evaluation.every=3", f"memory.zero={zero}"]
    line, (before, *records), checkpoints = diverging(ranks, text, *settings)
    assert (before["step"], before["held_out_loss"] is None) == (0, False)
    assert line.startswith("step 4: loss nan, gradient norm ")
    assert "3 of 3 steps in a row that end the run; no checkpoint or model is written; " in line
    assert [(r["step"], r["loss"] is None, r["gradient_norm"] is None) for r in records] == [
        (1, False, False), (2, True, True), (3, True, True), (4, True, True),
    ]  # fmt: skip
    assert records[2]["held_out_loss"] is None
    assert checkpoints == ["step-00000001"]


@pytest.mark.ranks
def test_a_run_that_ends_on_such_a_step_or_after_it_writes_no_model(ranks, text):
    line, records, _ = diverging(ranks, text, "optim.lr=1e15", "optim.steps=2")
    assert line.startswith("step 2, the last: its loss or gradient norm is not finite; no checkpoint or model is ")
    assert [r["loss"] is None for r in records] == [False, True]


@pytest.mark.ranks
def test_a_run_whose_last_update_breaks_the_held_out_loss_writes_no_model(ranks, text):
    line, records, _ = diverging(ranks, text, "optim.lr=1e15", "optim.steps=1", "data.held_out=0.3")
    assert line.startswith("step 1, the last: held-out loss nan; ")
    assert records[-1]["held_out_loss"] is None


# -- its parts


def test_a_finite_step_in_between_starts_the_count_again():
    divergence = Divergence(None, None)
    good, bad = {"loss": 1.0, "gradient_norm": 2.0}, {"loss": 1.0, "gradient_norm": math.inf, "held_out_loss": 3.0}
    for step in range(20):
        record = good if step % LIMIT == 0 else bad
        assert divergence.finite(step, record) == (record is good)


def test_metrics_are_json_for_strict_readers_and_wandb_has_them_too(tmp_path, monkeypatch):
    class Recorded(list):
        def log(self, record, step):
            self.append((step, record))

        def finish(self, exit_code):
            self.append(exit_code)

    wandb = Recorded()
    monkeypatch.setattr(metrics, "_wandb_run", lambda *_: wandb)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')  # of an earlier release
    log = metrics.Metrics(metrics.LoggerConfig(), tmp_path, {}, 1, 3)
    log.log(2, {"loss": -math.inf, "lr": 1e-3, "ring_hops": 4})
    log.log(3, {"loss": 2.0, "held_out_loss": math.nan})
    log.close(exit_code=1)
    assert strict(log.path) == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "lr": 1e-3, "ring_hops": 4},
        {"step": 3, "loss": 2.0, "held_out_loss": None},
    ]
    assert wandb[0] == (2, {"loss": -math.inf, "lr": 1e-3, "ring_hops": 4})
    assert math.isnan(wandb[1][1]["held_out_loss"])
    assert wandb[2] == 1
    assert loss_plot.plot(tmp_path, 3.0).stat().st_size > 1000


def printed_for(error, monkeypatch, capsys):
    """stderr of a process of two ranks that raises an error."""
    codes = []
    monkeypatch.setattr(failure, "_end", codes.append)
    monkeypatch.setattr(failure, "PATIENCE", 0.0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():  # as a launcher that this process need not watch
        monkeypatch.setenv(name, value)
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
    with failure.one_line(0):
        raise error
    assert codes == [1]
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("kind", [ConfigError, DivergedError])
def test_an_error_of_all_ranks_is_one_line_and_exit_code_1(monkeypatch, capsys, kind):
    assert printed_for(kind("step 4: loss nan"), monkeypatch, capsys) == "ringflash: step 4: loss nan"


def test_a_rank_whose_neighbour_was_killed_does_not_report_itself_as_failed(monkeypatch, capsys):
    line = printed_for(RuntimeError("[pair.cc:553] Connection closed by peer"), monkeypatch, capsys)
    assert line.startswith("ringflash: rank 0 lost the connection to a rank whose process has ended: ")
    own = printed_for(RuntimeError("a shape is wrong"), monkeypatch, capsys)
    assert own.splitlines()[0].startswith("Traceback")
    assert own.splitlines()[-1] == "ringflash: rank 0 failed: RuntimeError: a shape is wrong"
