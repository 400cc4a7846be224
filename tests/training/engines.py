"""DeepSpeed engines on tiny models, and the sequences that they train on."""

import torch
import torch.distributed as dist

from ringflash.data import Batch
from ringflash.distributed.parallel import ParallelConfig
from ringflash.distributed.world import World, join
from ringflash.layout import Layout
from ringflash.models import ModelConfig, build_model
from ringflash.training.engine import build_engine
from ringflash.training.memory import MemoryConfig
from ringflash.training.optimizers.config import OptimConfig
from tests.models.cases import SPECIFIC, TINY

LENGTH = 40

SEQUENCES = 6

DOCUMENTS = [[40], [1, 39], [13, 27], [5, 5, 5, 25], [39, 1], [20, 20]]


def build(model_type):
    torch.manual_seed(0)
    architecture = {"model_type": model_type, **TINY, **SPECIFIC[model_type]}
    return build_model(ModelConfig(architecture=architecture, dtype="fp32"))


def sequences(case):
    """The global batch; labels fall unevenly, or on no token of the second of four zigzag shards."""
    tokens = torch.randint(1, 97, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, dims=1)
    for row, lengths in enumerate(DOCUMENTS):
        labels[row, torch.tensor(lengths).cumsum(0) - 1] = -100
    if case == "uneven":
        labels[:, 25:] = -100
        labels[2] = -100
    if case == "shard-without-labels":
        labels[:, Layout.zigzag(LENGTH, 4).positions(1)] = -100
    return Batch(tokens, labels, DOCUMENTS)


def joined(ring, ulysses=1):
    """The pool's group is there already; the rest of a World as `join` makes it."""
    made = dist.init_process_group
    dist.init_process_group = lambda *args, **options: None
    try:
        return join(ParallelConfig(ring=ring, ulysses=ulysses))
    finally:
        dist.init_process_group = made


def engine_on(world: World, zero: int):
    optim = OptimConfig(steps=4, batch=SEQUENCES, micro_batch=SEQUENCES // world.replicas, warmup=0)
    return build_engine(build("llama"), optim, MemoryConfig(zero=zero), world)
