"""Weights larger than ZeRO's bucket of gradients train as smaller ones do."""

import pytest

from ringflash import Layout
from ringflash.training import engine
from ringflash.training.engine import build_engine
from ringflash.training.memory import MemoryConfig
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.step import prepare, train_step
from tests.training.engines import LENGTH, SEQUENCES, build, joined, sequences


def losses(zero, states, bucket):
    """Three steps with bf16 weights, which reduce `bucket` gradients at once."""
    engine.REDUCE_BUCKET, before = bucket, engine.REDUCE_BUCKET
    world = joined(None)
    optim = OptimConfig(steps=3, batch=SEQUENCES, micro_batch=SEQUENCES, warmup=0, lr=1e-2)
    memory = MemoryConfig(zero=zero, optimizer_states=states)
    trained = build_engine(build("llama").bfloat16(), optim, memory, world)
    engine.REDUCE_BUCKET = before
    layout = Layout.zigzag(LENGTH, world.size)
    data = [prepare(trained, sequences("uneven"), world, lambda mask: layout) for _ in range(3)]
    return [train_step(trained, batches, world).loss.item() for batches in data]


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "states"), [(1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_a_small_bucket_changes_no_loss(ranks, zero, states):
    whole = ranks.run(losses, 2, zero, states, 10**8)
    assert ranks.run(losses, 2, zero, states, 1000) == whole
    assert whole[0][2] < whole[0][0]
