"""The held-out loss by position in a document is that of plain transformers, whatever the ranks and the layout."""

import math

import pytest
import torch
from torch import nn

from ringflash.layout import Layout
from ringflash.training import evaluation, metrics
from ringflash.training.engine import MemoryConfig, build_engine
from ringflash.training.evaluation import HeldOut, evaluate
from ringflash.training.loss import tiled_cross_entropy
from ringflash.training.optimizer import OptimConfig
from tests.training.engines import DOCUMENTS, LENGTH, SEQUENCES, build, joined, sequences

BOUNDS = [0, 4, 8, 16, 32, 64]


def on_ranks(ring, ulysses, name):
    """Losses with a first bound of 4 tokens."""
    evaluation.FIRST_BOUND = 4
    world = joined(ring, ulysses)
    optim = OptimConfig(batch=SEQUENCES, micro_batch=SEQUENCES // world.replicas)
    engine = build_engine(build("qwen3"), optim, MemoryConfig(loss_tile=7), world)
    layout = Layout.named(name, LENGTH, world.ring.size, ulysses=ulysses)
    found = evaluate(engine, [sequences("uneven")], world, lambda mask: layout)
    evaluation.FIRST_BOUND = 4096
    return found


def by_plain_transformers():
    """Mean losses of all tokens, and by position, each document alone through the model's own attention."""
    model = build("qwen3")
    model.set_attn_implementation("eager")
    batch, losses, positions = sequences("uneven"), [], []
    for tokens, labels, lengths in zip(batch.tokens, batch.labels, DOCUMENTS, strict=True):
        for piece, target in zip(tokens.split(lengths), labels.split(lengths), strict=True):
            with torch.no_grad():
                each = nn.functional.cross_entropy(model(input_ids=piece[None]).logits[0], target, reduction="none")
            predicted = target != -100
            losses.append(each[predicted])
            positions.append(torch.arange(len(piece))[predicted])
    losses, positions = torch.cat(losses).double(), torch.cat(positions)
    of_range = {}
    for begin, end in zip(BOUNDS, [*BOUNDS[1:], 128], strict=True):
        here = (begin <= positions) & (positions < end)
        if here.any():
            of_range[f"{begin}-{end}"] = losses[here].mean().item()
    return losses.mean().item(), of_range


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "ring", "ulysses", "name"),
    [(1, 1, 1, "contiguous"), (2, 2, 1, "zigzag"), (3, 3, 1, "striped"), (4, 2, 2, "contiguous"), (4, 2, 1, "zigzag")],
)
def test_losses_by_position_are_those_of_plain_transformers(ranks, size, ring, ulysses, name):
    mean, of_range = by_plain_transformers()
    assert len(of_range) > 2
    for found in ranks.run(on_ranks, size, ring, ulysses, name):
        assert found.loss == pytest.approx(mean, rel=1e-5)
        assert found.by_position == pytest.approx(of_range, rel=1e-5)


def test_ranges_are_named_by_their_bounds():
    names = evaluation._names()
    assert names[:3] == ["0-4k", "4k-8k", "8k-16k"]
    assert names[8:10] == ["512k-1M", "1M-2M"]
    positions = torch.tensor([0, 4095, 4096, 8191, 2**20 - 1, 2**20, 2**40])
    assert [names[i] for i in evaluation._groups(positions)] == [
        "0-4k", "0-4k", "4k-8k", "4k-8k", "512k-1M", "1M-2M", "64M-",
    ]  # fmt: skip


def test_documents_within_the_first_range_have_no_losses_by_position():
    assert HeldOut(2.0).record() == {"held_out_loss": 2.0}


def test_a_record_has_a_value_per_range_and_the_plot_shows_the_first_and_the_last(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(metrics, "_draw_by_position", lambda axes, records: drawn.extend(records))
    (tmp_path / metrics.FILE).write_text("")
    log = metrics.Metrics(metrics.LoggerConfig(mode="disabled"), tmp_path, {}, 0, 3)
    for step in (1, 2, 3):
        held_out = HeldOut(2.0, {"0-4k": 2.5 - step / 10, "4k-8k": math.nan})
        log.log(step, {"loss": 3.0} | (held_out.record() if step > 1 else {}))
    log.close()
    metrics.plot(tmp_path, None)
    assert [r["step"] for r in drawn] == [2, 3]
    assert drawn[-1] == {
        "step": 3,
        "loss": 3.0,
        "held_out_loss": 2.0,
        "held_out_loss/0-4k": 2.2,
        "held_out_loss/4k-8k": None,
    }
    monkeypatch.undo()
    assert metrics.plot(tmp_path, None).stat().st_size > 10_000


@pytest.mark.parametrize("tile", [3, 64])
def test_losses_of_groups_are_their_sums_and_have_no_gradient(tile):
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels, groups = torch.randint(11, (20,)), torch.randint(3, (20,))
    labels[4] = -100
    found = tiled_cross_entropy(hidden, weight, labels, tile, None, groups=groups)
    each = nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    expected = torch.zeros(16).index_add_(0, groups, each.detach())
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
