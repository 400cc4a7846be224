"""The same global batch gives the loss and every gradient of one rank: any ranks, ring, ZeRO stage, accumulation."""

import pytest
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn

from ringflash import Loopback
from ringflash.distributed.world import World
from ringflash.layout import Layout
from ringflash.models import AttentionConfig, attention, ring_inputs
from ringflash.training.engine import TrainedModel, build_engine
from ringflash.training.evaluation import evaluate
from ringflash.training.memory import MemoryConfig
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.step import prepare, train_step
from tests.training.engines import DOCUMENTS, LENGTH, SEQUENCES, build, joined, sequences


def gradients_on_ranks(model_type, zero, accumulation, ring, ulysses, case, recompute):
    """Loss and every gradient, as DeepSpeed has it when the optimizer steps."""
    world: World = joined(ring, ulysses)
    micro_batch = SEQUENCES // accumulation // world.replicas
    optim = OptimConfig(steps=2, batch=SEQUENCES, micro_batch=micro_batch, warmup=0, clip=0.0)
    memory = MemoryConfig(zero=zero, recompute=recompute, loss_tile=16, mlp_tile=50 if recompute else None)
    engine = build_engine(build(model_type), optim, memory, world)
    gradients, step = {}, engine.step

    def recording_step():
        if engine.is_gradient_accumulation_boundary():
            for name, p in engine.module.named_parameters():
                gradients[name.removeprefix("model.")] = safe_get_full_grad(p).clone()
        step()

    engine.step = recording_step
    share = SEQUENCES // world.replicas
    mine = sequences(case).split(share)[world.replica]
    layout = Layout.zigzag(LENGTH, world.ring.size, ulysses=ulysses)
    loss = train_step(engine, prepare(engine, mine, world, lambda mask: layout), world).loss
    held_out = evaluate(engine, [sequences(case)], world, lambda mask: layout).loss
    return loss.item(), gradients, held_out


def gradients_of_one(model_type, case):
    """The same without DeepSpeed, ring or tiles: each document alone through the model's own attention."""
    model = build(model_type)
    model.set_attn_implementation("eager")
    batch = sequences(case)
    total = torch.zeros(())
    for tokens, labels, lengths in zip(batch.tokens, batch.labels, DOCUMENTS, strict=True):
        for piece, target in zip(tokens.split(lengths), labels.split(lengths), strict=True):
            logits = model(input_ids=piece[None]).logits[0]
            total = total + nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    loss = total / (batch.labels != -100).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


CASES = [
    # model, ranks, ring, ulysses, zero, accumulation, labels, recompute
    *(("qwen3", ranks, None, 1, zero, 1, "full", False) for ranks in (1, 2, 4) for zero in (0, 1, 2, 3)),
    *(("qwen3", ranks, None, 1, zero, 3, "uneven", False) for ranks in (1, 2, 4) for zero in (0, 1, 2, 3)),
    *(("llama", 4, None, 1, zero, 1, "shard-without-labels", False) for zero in (0, 1, 2, 3)),
    *(("mistral", 4, 2, 1, zero, 3, "uneven", False) for zero in (0, 1, 2, 3)),
    *(("gemma2", 2, None, 1, zero, 1, "uneven", True) for zero in (0, 1, 2, 3)),
    *(("gpt_oss", 4, 2, 2, zero, 1, "uneven", True) for zero in (0, 3)),
    ("qwen3_5_text", 2, None, 1, 1, 1, "uneven", True),
    ("nemotron_h", 2, None, 1, 3, 1, "uneven", True),
    ("qwen3_5_text", 4, 2, 2, 3, 3, "uneven", True),
    ("nemotron_h", 4, 2, 2, 1, 1, "full", False),
    ("qwen3", 4, 1, 4, 1, 1, "full", False),
    ("qwen3", 4, 1, 2, 2, 3, "uneven", False),
    ("qwen3", 8, 4, 2, 1, 1, "uneven", True),
]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("model_type", "size", "ring", "ulysses", "zero", "accumulation", "case", "recompute"),
    CASES,
    ids=lambda x: str(x),
)
def test_loss_and_every_gradient_equal_one_rank(
    ranks, model_type, size, ring, ulysses, zero, accumulation, case, recompute
):
    loss, gradients = gradients_of_one(model_type, case)
    for rank, (on_ranks, theirs, held_out) in enumerate(
        ranks.run(gradients_on_ranks, size, model_type, zero, accumulation, ring, ulysses, case, recompute)
    ):
        assert on_ranks == pytest.approx(loss, rel=2e-6), f"rank {rank}"
        assert held_out != pytest.approx(loss, rel=1e-6), "the step changed nothing"
        assert theirs.keys() == gradients.keys()
        for name, gradient in gradients.items():
            error = (theirs[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
            assert error < 2e-5, f"rank {rank} {name}: relative error {error:.1e}"


def telemetry_on_ranks(model_type, ring, ulysses, accumulation):
    """Pairs, their operations and imbalance of a step."""
    world = joined(ring, ulysses)
    micro_batch = SEQUENCES // accumulation // world.replicas
    optim = OptimConfig(batch=SEQUENCES, micro_batch=micro_batch)
    engine = build_engine(build(model_type), optim, MemoryConfig(), world)
    mine = sequences("full").split(SEQUENCES // world.replicas)[world.replica]
    layout = Layout.contiguous(LENGTH, world.ring.size, ulysses=ulysses)
    result = train_step(engine, prepare(engine, mine, world, lambda mask: layout), world)
    return result.pairs.item(), result.attention_flops.item(), result.imbalance


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("model_type", "size", "ring", "ulysses", "accumulation"),
    [("qwen3", 1, 1, 1, 1), ("mistral", 2, 2, 1, 3), ("gemma2", 4, 2, 1, 1), ("gpt_oss", 4, 2, 2, 2)],
)
def test_pairs_are_those_of_all_sequences_and_each_layers_window(ranks, model_type, size, ring, ulysses, accumulation):
    windows = {"qwen3": [None, None], "mistral": [7, 7], "gemma2": [5, None], "gpt_oss": [6, None]}[model_type]
    seen = torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64)  # keys that each query sees, over both layers
    for row, lengths in enumerate(DOCUMENTS):
        places = torch.cat([torch.arange(n) for n in lengths]) + 1
        seen[row] = sum(places.clamp(max=window) if window else places for window in windows)
    results = ranks.run(telemetry_on_ranks, size, model_type, ring, ulysses, accumulation)
    pairs = float(seen.sum())
    assert {found[:2] for found in results} == {(pairs, 6 * pairs * 4 * (8 + 8))}
    replicas = size // ring // ulysses
    for rank, (_, _, imbalance) in enumerate(results):
        rows = seen.chunk(replicas)[rank // (ring * ulysses)].chunk(accumulation)
        work = [micro.unflatten(1, (ring, -1)).sum((0, 2)).double() for micro in rows]
        assert imbalance == pytest.approx(max(float(w.max() / w.mean()) for w in work) - 1)


def bf16_losses(zero, accumulation):
    """Losses of three steps with bf16 weights."""
    world = joined(None)
    optim = OptimConfig(steps=3, batch=SEQUENCES, micro_batch=SEQUENCES // accumulation, warmup=0)
    engine = build_engine(build("qwen3").bfloat16(), optim, MemoryConfig(zero=zero, loss_tile=16), world)
    layout = Layout.zigzag(LENGTH, world.size)
    return [
        train_step(engine, prepare(engine, sequences("uneven"), world, lambda mask: layout), world).loss.item()
        for _ in range(3)
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_bf16_trains_at_every_zero_stage(ranks, zero):
    exact, _ = gradients_of_one("qwen3", "uneven")
    first, second = ranks.run(bf16_losses, 2, zero, 3 if zero else 1)
    assert first == second
    assert first[0] == pytest.approx(exact, rel=2e-3)
    assert first[2] < first[1] < first[0]


def test_the_attention_settings_of_the_model_reach_every_layer(monkeypatch):
    asked = []
    real = attention.ring_attention
    monkeypatch.setattr(
        attention, "ring_attention", lambda *args, **options: asked.append(options) or real(*args, **options)
    )
    settings = AttentionConfig("blocked", deterministic=True, compensated=False)
    trained = TrainedModel(build("qwen3").eval(), MemoryConfig(loss_tile=16), settings)
    assert trained.model.training, "a loaded model, which is in evaluation mode, would not recompute its layers"
    trained(**ring_inputs(torch.arange(32)[None], torch.arange(32)[None], ring=Loopback(1)))
    wanted = {"kernel": "blocked", "deterministic": True, "compensated": False}
    assert [{name: options[name] for name in wanted} for options in asked] == [wanted] * len(asked)
    assert len(asked) == trained.model.config.num_hidden_layers
