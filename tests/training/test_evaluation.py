"""Losses by position in a document are those of plain transformers, held-out and of training, on any ranks."""

import pytest
import torch
from torch import nn

from ringflash.layout import Layout
from ringflash.training import positions
from ringflash.training.engine import build_engine
from ringflash.training.evaluation import HeldOut, evaluate
from ringflash.training.loss import LossOptions, tiled_cross_entropy
from ringflash.training.memory import MemoryConfig
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.positions import by_position, means, no_totals
from ringflash.training.step import prepare, train_step
from tests.training.engines import DOCUMENTS, LENGTH, SEQUENCES, build, joined, sequences

BOUNDS = [0, 4, 8, 16, 32, 64]


def on_ranks(ring, ulysses, name):
    """Losses, held-out and of a step of training, with a first bound of 4 tokens."""
    positions.FIRST_BOUND = 4
    world = joined(ring, ulysses)
    optim = OptimConfig(batch=SEQUENCES, micro_batch=SEQUENCES // world.replicas)
    engine = build_engine(build("qwen3"), optim, MemoryConfig(loss_tile=7), world)
    layout = Layout.named(name, LENGTH, world.ring.size, ulysses=ulysses)
    found = evaluate(engine, [sequences("uneven")], world, lambda mask: layout)
    share = SEQUENCES // world.replicas
    mine = sequences("uneven").split(share)[world.replica]
    step = train_step(engine, prepare(engine, mine, world, lambda mask: layout), world)
    trained = HeldOut(step.loss.item(), means(step.by_position), predicted=int(step.by_position[1].sum()))
    positions.FIRST_BOUND = 4096
    return found, trained


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


def of_two_sources():
    """Losses of three batches of two sources together, and of each case alone."""
    world = joined(2)
    engine = build_engine(build("qwen3"), OptimConfig(batch=SEQUENCES, micro_batch=SEQUENCES), MemoryConfig(), world)
    cases = ("uneven", "even", "uneven")

    def losses(cases, *sources):
        layout = Layout.named("zigzag", LENGTH, world.ring.size)
        return evaluate(engine, map(sequences, cases), world, lambda mask: layout, *sources)

    return losses(cases, "aba"), losses(cases), losses(["uneven"]), losses(["even"])


@pytest.mark.ranks
def test_losses_by_source_are_those_of_each_source_alone(ranks):
    for found, mixed, uneven, even in ranks.run(of_two_sources, 2):
        assert found.by_source == pytest.approx({"a": uneven.loss, "b": even.loss}, rel=1e-6)
        assert uneven.loss != pytest.approx(even.loss, rel=1e-4)
        assert found.loss == pytest.approx(mixed.loss, rel=1e-6)
        assert mixed.by_source == {}
        assert found.record()["held_out_loss_of/b"] == found.by_source["b"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "ring", "ulysses", "name"),
    [(1, 1, 1, "contiguous"), (2, 2, 1, "zigzag"), (3, 3, 1, "striped"), (4, 2, 2, "contiguous"), (4, 2, 1, "zigzag")],
)
def test_losses_by_position_are_those_of_plain_transformers(ranks, size, ring, ulysses, name):
    mean, of_range = by_plain_transformers()
    assert len(of_range) > 2
    for found in sum(ranks.run(on_ranks, size, ring, ulysses, name), ()):
        assert found.loss == pytest.approx(mean, rel=1e-5)
        assert found.by_position == pytest.approx(of_range, rel=1e-5)


def test_ranges_are_named_by_their_bounds():
    names = positions.names()
    assert names[:3] == ["0-4k", "4k-8k", "8k-16k"]
    assert names[8:10] == ["512k-1M", "1M-2M"]
    found = positions.ranges_of(torch.tensor([0, 4095, 4096, 8191, 2**20 - 1, 2**20, 2**40]))
    assert [names[i] for i in found] == [
        "0-4k", "0-4k", "4k-8k", "4k-8k", "512k-1M", "1M-2M", "64M-",
    ]  # fmt: skip


def test_documents_within_the_first_range_have_no_losses_by_position():
    assert HeldOut(2.0).record() == {"held_out_loss": 2.0}


@pytest.mark.parametrize("tile", [3, 64])
def test_losses_by_position_are_sums_that_leave_the_loss_and_its_gradient_as_they_are(tile):
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (20,))
    labels[4] = -100
    inputs = {"position_ids": 1000 * torch.arange(20), "shift_labels": labels}
    found, totals = [], no_totals(torch.device("cpu"))
    for sums in (None, by_position(inputs, totals)):
        loss = tiled_cross_entropy(hidden, weight, labels, LossOptions(tile), sums=sums)
        found.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(map(torch.equal, *found))
    each = nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none").detach().double()
    assert totals[1, :4].tolist() == [4, 4, 8, 3]  # the bounds are 4096, 8192 and 16384
    assert totals[0, :3].tolist() == pytest.approx([x.sum().item() for x in each[:17].split([5, 4, 8])])
    with torch.no_grad():
        assert not tiled_cross_entropy(hidden, weight, labels, LossOptions(tile)).requires_grad
