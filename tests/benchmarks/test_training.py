"""benchmarks/training.py: batches, rows and where a run continues."""

import gc
import json
import sys
import weakref
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from benchmarks import training, training_peers
from ringflash.training.compose import compose
from tests import forked
from tests.training.engines import joined

TINY = ["--tokens", "256", "--vocabulary", "384", "--warm", "64", "--batches", "2", "model=tiny-llama"]


def test_a_packed_batch_is_filled_and_is_the_same_every_time():
    one, again, other = (training.batch("packed", 70_000, 384, seed) for seed in (3, 3, 4))
    assert sum(one.documents[0]) == 70_000
    assert len(one.documents[0]) > 1
    assert one.documents == again.documents
    assert bool((one.tokens == again.tokens).all())
    assert one.documents != other.documents
    last = [sum(one.documents[0][: i + 1]) - 1 for i in range(len(one.documents[0]))]
    assert one.labels[0, last].tolist() == [-100] * len(last)
    assert int((one.labels == -100).sum()) == len(last)


def test_every_variant_has_a_row_per_mask_and_sees_the_same_weights_and_tokens(tmp_path):
    out = tmp_path / "training.json"
    variants = ["--variant", "plain:", "--variant", "host:memory=host", "--variant", "bad:memory.zero=7"]
    command = [sys.executable, "benchmarks/training.py", "--out", str(out), *TINY, *variants]
    ran = forked.run(command)
    assert ran.returncode == 1, ran.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["variant"], row["mask"]) for row in rows] == [
        ("plain", "causal"), ("plain", "packed"), ("host", "causal"), ("host", "packed"),
    ]  # fmt: skip
    assert rows[0]["losses"] == rows[2]["losses"]
    assert rows[1]["losses"] == rows[3]["losses"]
    assert all(row["tokens_per_second"] == pytest.approx(512 / sum(row["all_seconds"])) for row in rows)
    assert "bad                      failed: ConfigError: memory.zero=7 is not one of 0, 1, 2, 3" in ran.stdout


def left_over(*settings):
    """How many of a variant's objects, optimizer and weights, survive after it was freed."""
    config, _ = compose([*training.EXPERIMENT, "model=tiny-llama", "model.dtype=bf16", "data.path=text", *settings])
    variant = training.ringflash(config, joined(None), 64)
    variant.step(variant.plan(training.batch("causal", 64, 97, 0)))
    engine = variant.step.__closure__[0].cell_contents
    watched = [weakref.ref(engine.optimizer), *(weakref.ref(weight) for weight in variant.model.parameters())]
    variant.free()
    del engine, variant
    gc.collect()
    return sum(reference() is not None for reference in watched)


@pytest.mark.ranks
@pytest.mark.parametrize("settings", [[], ["memory.zero=2"], ["memory.optimizer_states=bf16"]], ids=str)
def test_a_variant_leaves_no_memory_to_the_next(ranks, settings):
    assert ranks.run(left_over, 1, *settings) == [0]


def exposed_and_predicted():
    """Seconds of waits of a step on this rank's ring, and of its attention if the device's speed were known."""
    config, _ = compose([*training.EXPERIMENT, "model=tiny-llama", "data.path=text", "memory=host"])
    variant = training.ringflash(config, joined(None), 64)
    planned = variant.plan(training.batch("packed", 64, 97, 0))
    unknown = variant.predicted(planned)
    variant.step(planned)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "peak_flops", lambda device: 1e15)
        return variant.waits(), unknown, variant.predicted(planned)


@pytest.mark.ranks
def test_a_ring_has_exposed_waits_and_a_prediction_of_its_attention(ranks):
    (waits, unknown, predicted), other = ranks.run(exposed_and_predicted, 2)
    assert waits == other[0] > 0
    assert unknown is None
    assert predicted == other[2] > 0


def test_a_run_measures_only_what_has_no_row_yet(monkeypatch, tmp_path):
    out, measured = tmp_path / "training.json", []
    row = {"variant": "a", "mask": "causal", "tokens": 256, "tokens_per_second": 2.0, "memory_gib": 1.0}
    out.write_text(json.dumps({"rows": [row]}))
    world = SimpleNamespace(device=torch.device("cpu"), watchdog=Mock(), is_first=True)
    monkeypatch.setattr(training, "join", lambda config: world)
    monkeypatch.setattr(training, "measure", lambda name, settings, masks, *_: measured.append((name, settings, masks)))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    argv = [
        "training.py",
        "--out",
        str(out),
        *TINY,
        "--variant",
        "a:seed=1",
        "--variant",
        "b:",
        "--variant",
        "deepspeed",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    training.main()
    assert measured == [
        ("a", ["seed=1"], ["packed"]), ("b", [], ["causal", "packed"]), ("deepspeed", [], ["causal"]),
    ]  # fmt: skip
    assert out.with_suffix(".png").stat().st_size > 10_000  # a picture of the row that was there


def test_the_peers_compute_the_same_step_as_each_other(monkeypatch):
    """DeepSpeed's tiles change no loss; its offloading of inputs needs a GPU, and Liger's loss too."""
    dense = lambda model, hidden, labels: torch.nn.functional.cross_entropy(  # noqa: E731
        model.lm_head(hidden).float().flatten(0, 1), labels.flatten()
    )
    monkeypatch.setattr(training_peers, "_liger_loss", dense)
    monkeypatch.setattr(training_peers, "_offload_inputs", lambda model, device: None)
    monkeypatch.setattr(training_peers, "TILE_BYTES", 4 * 100 * 384)  # three tiles of 256 tokens
    config, _ = compose(
        [*training.EXPERIMENT, "model=tiny-llama", "model.dtype=fp32", "data.path=text", "optim.lr=0.1"]
    )
    losses = []
    for name in ("transformers", "deepspeed"):
        model, step = training_peers.build(name, config, torch.device("cpu"))
        losses.append([step(training.batch("causal", 256, model.config.vocab_size, seed)) for seed in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][2] != losses[0][0]
    with pytest.raises(ValueError, match="sdpa takes no packed documents"):
        step(training.batch("packed", 70_000, 384, 3))
