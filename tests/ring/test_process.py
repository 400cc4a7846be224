"""A ring's collectives are refused by name in a process that did not join its group, such as a DataLoader's worker."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ProcessRing, Ulysses, ring_attention
from ringflash.models import ring_inputs
from ringflash.ring.watchdog import Label

TOKENS = torch.ones(1, 8, dtype=torch.int64)


@pytest.fixture(scope="module")
def alone():
    """A process group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def first_of(collate):
    """What a worker's collate function returns, or the error that it raises."""
    batches = iter(DataLoader([0], num_workers=1, collate_fn=collate, multiprocessing_context="fork", timeout=120))
    try:
        return next(batches)
    finally:
        batches._shutdown_workers()  # or garbage collection does, in another test, and waits 5 seconds for each


USES = {
    "ring_inputs": lambda ring, ulysses: ring_inputs(TOKENS, ring=ring),
    "ring_inputs with Ulysses": lambda ring, ulysses: ring_inputs(TOKENS, ring=Loopback(1), ulysses=ulysses),
    "a ring that the worker makes": lambda ring, ulysses: ProcessRing(),
    "an exchange": lambda ring, ulysses: ring.exchange([], [], Label("a layer", "forward")),
    "an exchange of Ulysses": lambda ring, ulysses: ulysses.queries(
        torch.ones(1, 2, 2, 4), Label("a layer", "forward")
    ),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_dataloaders_worker_is_refused(alone, use):
    ring, ulysses = ProcessRing(), Ulysses(dist.group.WORLD)
    use(ring, ulysses)
    with pytest.raises(RuntimeError, match=r"cannot exchange anything .* \(Trainer: dataloader_num_workers=0\)"):
        first_of(lambda samples: use(ring, ulysses))


def test_a_fork_is_refused(alone):
    ring, (read, write) = ProcessRing(), os.pipe()
    if (child := os.fork()) == 0:
        try:
            ring_inputs(TOKENS, ring=ring)
        except RuntimeError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        assert f"process {child} (a fork, or a DataLoader's worker) cannot exchange" in file.read()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_a_ring_is_not_sent_to_a_spawned_worker(alone, copied):
    for group in (ProcessRing(), Ulysses(dist.group.WORLD)):
        with pytest.raises(TypeError, match="a ring cannot be copied or sent to another process"):
            copied(group)


@pytest.mark.parametrize("make", [ProcessRing, Ulysses])
@pytest.mark.parametrize(
    ("group", "message"),
    [
        (lambda: init_device_mesh("cpu", (1, 1)), "a mesh of one dimension, such as mesh.'cp'., got DeviceMesh"),
        (lambda: dist.GroupMember.NON_GROUP_MEMBER, "rank 0 is not in the group"),
        (lambda: [0, 1], r"must be a ProcessGroup or a DeviceMesh, got \[0, 1\]"),
    ],
    ids=["mesh", "outside", "ranks"],
)
def test_what_is_not_one_group_of_this_rank_is_refused(alone, make, group, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(group())


class Block(torch.nn.Linear):
    """A layer whose attention takes a plan."""

    def forward(self, x, plan):
        q = super().forward(x)
        return ring_attention(q, q, q, plan)


def test_fsdp_with_mixed_precision_passes_a_plan_on(alone):
    plan = AttentionPlan(IntervalMask.causal(8), Layout.contiguous(8, 1), ProcessRing())
    block, x = Block(16, 16), torch.randn(1, 8, 2, 16)
    expected = copy.deepcopy(block).bfloat16()(x.bfloat16(), plan)
    fully_shard(block, mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    assert torch.equal(block(x, plan=plan), expected)


def test_a_worker_may_make_inputs_of_a_ring_in_one_process():
    assert first_of(lambda samples: ring_inputs(TOKENS, ring=Loopback(2))["input_ids"]).shape == (2, 4)
