"""A ring in which one rank hangs."""

import contextlib
import io
import threading
from datetime import timedelta

import torch.distributed as dist

from ringflash import AttentionPlan, IntervalMask, Layout, ProcessRing, ring_attention
from ringflash.ring import watchdog
from ringflash.ring.watchdog import Watchdog
from tests.ring.cases import whole_inputs

LIMIT = 60.0  # seconds for what takes less than one: the machine may do other work


def attend(ring):
    plan = AttentionPlan(IntervalMask.causal(32), Layout.zigzag(32, ring.size), ring)
    q, k, v = (plan.shard(x).requires_grad_() for x in whole_inputs(1, 32)[:3])
    ring_attention(q, k, v, plan, layer=5).sum().backward()


def attend_in_vain(ring):
    with contextlib.suppress(RuntimeError):  # the connection breaks when the test is over
        attend(ring)


def with_one_rank_that_never_comes(hanging):
    """This rank's report; the hanging rank sleeps instead of running its second layer."""
    watchdog.EXIT_DELAY, said, ended = 0.1, io.StringIO(), threading.Event()
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    guard = Watchdog.of_world(60.0, end=ended.set)
    guard.step = 12
    ring = ProcessRing(watchdog=guard)
    with contextlib.redirect_stderr(said):
        attend(ring)
        guard.limit = 1.0
        if rank != hanging:
            threading.Thread(target=attend_in_vain, args=(ring,), daemon=True).start()
        assert ended.wait(LIMIT)
    store.set(f"reported-{rank}", "")  # no connection breaks before all have
    store.wait([f"reported-{other}" for other in range(dist.get_world_size())], timedelta(seconds=LIMIT))
    return said.getvalue().strip()
