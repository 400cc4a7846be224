"""A ring between GPUs, by copy engines or NCCL, gives the same bits as all its ranks side by side on one GPU."""

import pytest
import torch
import torch.distributed as dist

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ProcessRing, Ulysses, ring_attention
from ringflash.ring.watchdog import Watchdog
from tests.pool import GPUS, Pool, needs_gpus, own_device
from tests.ring.cases import whole_inputs
from tests.ring.hanging import with_one_rank_that_never_comes

LENGTH = 4096
pytestmark = [pytest.mark.gpu, needs_gpus]


def causal():
    return IntervalMask.causal(LENGTH)


def documents():
    rows = [[1, 700, 95, 1900, 1400], [LENGTH]]
    return IntervalMask.causal(LENGTH) & IntervalMask.documents(rows)


def window():
    return IntervalMask.window(LENGTH, left=300)


def window_and_first():
    return causal().windowed(300, 4)


# mask, layout, (query heads, KV heads, head size), dtype, with a sink
CASES = {
    "one-kv-head": (causal, "zigzag", (8, 1, 128), torch.bfloat16, False),
    "causal": (causal, "zigzag", (8, 2, 128), torch.bfloat16, False),
    "documents": (documents, "balanced", (8, 4, 128), torch.bfloat16, False),
    "window": (window, "contiguous", (8, 4, 64), torch.bfloat16, False),
    "window-first-tokens-and-sink": (window_and_first, "zigzag", (8, 4, 64), torch.float16, True),
    "fp32": (causal, "striped", (8, 4, 32), torch.float32, False),
}


def layers(plan, heads, dtype, with_sink, count=3):
    """What this process's ranks find in layers queued one after another, none of them waited for."""
    shards = [plan.shard(x).to(dtype) for x in whole_inputs(2, plan.layout.length, *heads)]
    sink = torch.linspace(-1, 1, heads[0], device=plan.ring.device, requires_grad=True) if with_sink else None
    found = []
    for _ in range(count):
        leaves = [x.clone().requires_grad_() for x in shards[:3]] + ([sink] if with_sink else [])
        out = ring_attention(*leaves[:3], plan, sink=sink, deterministic=True)
        found += [out.detach(), *torch.autograd.grad(out, leaves, shards[3])]
    return found


def own_part(plan_here, plan_there, x):
    """The part of all ranks' results that the rank of plan_here has."""
    if x.dim() < 4:
        return None  # a sink's gradient, which is a sum over ranks
    whole = plan_there.token_layout.unshard(x.chunk(len(plan_there.local_ranks)))
    return plan_here.shard(whole)


def differences(mask, layout, heads, dtype, with_sink, ulysses=False, transport="auto"):
    """Which results differ in any bit from those of a Loopback on this rank's GPU, and whether any is not finite."""
    device = own_device()
    ring, row = ProcessRing(device=device, transport=transport), None
    ranks = dist.get_world_size()
    if ulysses:
        alone = [dist.new_group([rank]) for rank in range(ranks)][dist.get_rank()]
        ring, row, ranks = ProcessRing(alone, device), Ulysses(dist.distributed_c10d._get_default_group()), 1
    one = mask()
    first = one[0] if isinstance(one, tuple) else one
    layout = Layout.of(layout, first, ranks) if layout == "balanced" else Layout.named(layout, LENGTH, ranks)
    here = AttentionPlan(one, layout, ring, row)
    there = AttentionPlan(one, layout, Loopback(ranks, device))
    found, expected = layers(here, heads, dtype, with_sink), layers(there, heads, dtype, with_sink)
    wrong = []
    for i, (x, whole) in enumerate(zip(found, expected, strict=True)):
        part = own_part(here, there, whole)
        if not bool(x.isfinite().all()) or (part is not None and not torch.equal(x, part)):
            wrong.append(f"result {i}")
        elif part is None:
            total = x.clone()
            dist.all_reduce(total)
            if not torch.allclose(total, whole, rtol=1e-3, atol=1e-3):
                wrong.append(f"result {i}: {total.tolist()} for {whole.tolist()}")
    return wrong


@pytest.mark.parametrize("case", CASES)
def test_a_ring_of_gpus_equals_a_loopback_bit_for_bit(gpus, case):
    assert gpus.run(differences, GPUS, *CASES[case]) == [[]] * GPUS


@pytest.mark.parametrize("case", ["causal", "documents"])
def test_a_ring_of_gpus_by_nccl_equals_a_loopback_bit_for_bit(gpus, case):
    assert gpus.run(differences, GPUS, *CASES[case], False, "nccl") == [[]] * GPUS


@pytest.mark.parametrize("mask", [causal, documents])
def test_ulysses_between_gpus_equals_one_rank_bit_for_bit(gpus, mask):
    assert gpus.run(differences, GPUS, mask, "contiguous", (8, 8, 128), torch.bfloat16, False, True) == [[]] * GPUS


def growing():
    """Lengths with a wrong result, as a ring's sequences grow and shrink, and how many blocks are kept in the end."""
    ring, wrong = ProcessRing(device="cuda"), []
    for length in (512, 1024, 2560, 4096, 6144, 512):
        mask, layout = IntervalMask.causal(length), Layout.zigzag(length, ring.size)
        here, there = (AttentionPlan(mask, layout, r) for r in (ring, Loopback(ring.size, "cuda")))
        found, expected = (layers(plan, (8, 2, 128), torch.bfloat16, False) for plan in (here, there))
        if not all(torch.equal(x, own_part(here, there, whole)) for x, whole in zip(found, expected, strict=True)):
            wrong.append(length)
    return wrong, len(ring._copy_engine._blocks)


def test_sequences_of_any_length_find_room_in_as_many_blocks_as_a_pass_takes(gpus):
    for wrong, blocks in gpus.run(growing, GPUS):
        assert wrong == []
        assert blocks <= 8  # two of keys, two of values, and of gradients two for each half of the heads


def waits():
    """What a watchdog counts in a layer, and whether it reports no wait when the GPU is done."""
    guard = Watchdog(60.0)
    ring = ProcessRing(device="cuda", watchdog=guard)
    plan = AttentionPlan(causal(), Layout.zigzag(LENGTH, ring.size), ring)
    layers(plan, (8, 2, 128), torch.bfloat16, False, count=1)
    torch.cuda.synchronize()
    taken = guard.drain()["ring"]
    guard.close()
    return taken.exchanges, taken.bytes, taken.seconds


def test_the_watch_counts_exchanges_bytes_and_waits_of_gpus(gpus):
    for exchanges, received, seconds in gpus.run(waits, GPUS):
        assert exchanges == (GPUS - 1) * (1 + 1 + 2)
        assert received > 0
        assert 0 < seconds < 30


def test_gpus_whose_neighbour_hangs_report_where_they_are_and_which_rank_they_wait_for():
    pool = Pool("nccl")
    try:
        said = pool.run(with_one_rank_that_never_comes, 2, 1)
    finally:
        pool.close()
    assert said[0].startswith("ringflash: rank 0, step 12, layer 5, forward, hop 1: waits for rank 1 since ")
    assert "rank 1, step 12: waits for no rank; its last wait was in layer 5, backward" in said[1]
