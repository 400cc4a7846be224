"""Two ranks with their own network stacks, joined by one cable, compute what one rank does.

As on two machines, and unlike on one, neither can reach the other through the loopback device. Each rank is in a
network namespace; a veth pair is the cable. No root is needed where user namespaces are allowed; elsewhere: skipped.
"""

import functools
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ProcessRing
from tests.ring.cases import assert_exact, on_ring, oracle, whole_inputs

ROOT = Path(__file__).resolve().parents[2]
LENGTH, MASK = 97, IntervalMask.causal(97) & IntervalMask.documents([1, 36, 60])
ENTER = ["unshare", "--user", "--map-root-user", "--net", "bash", "-ec"]
# $1: the command of a rank, which takes its number. Rank 1's namespace is that of a process of ours until it has begun.
SCRIPT = """
ip link set lo up
unshare --net bash -ec '
    for i in $(seq 200); do ip link show cable1 2> /dev/null > /dev/null && break; sleep 0.05; done
    ip link set lo up; ip address add 10.77.0.2/24 dev cable1; ip link set cable1 up
    GLOO_SOCKET_IFNAME=cable1 exec $0 1' "$1" &
until [ $(readlink /proc/$!/ns/net) != $(readlink /proc/$$/ns/net) ]; do sleep 0.01; done
ip link add cable0 type veth peer name cable1
ip link set cable1 netns $!
ip address add 10.77.0.1/24 dev cable0; ip link set cable0 up
GLOO_SOCKET_IFNAME=cable0 $1 0
wait $!
"""


@functools.cache
def refusal():
    """None, or why this machine does not allow a virtual cable between two namespaces."""
    if missing := [tool for tool in ("unshare", "ip") if shutil.which(tool) is None]:
        return f"{missing[0]} is not installed"
    trial = "unshare --net true; ip link add cable0 type veth peer name cable1"
    result = subprocess.run([*ENTER, trial], capture_output=True, text=True)
    return result.stderr.strip() or None if result.returncode else None


def sent_through(device):
    """Bytes that this namespace has sent through a device."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[8]) for line in lines if line.strip().startswith(f"{device}:"))


def rank_in_a_namespace(rank, folder):
    """Ring attention as rank `rank` of 2; leaves its results, its namespace and what it sent through its cable."""
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    plan = AttentionPlan(MASK, Layout.zigzag(LENGTH, 2), ProcessRing())
    before = [sent_through(device) for device in (f"cable{rank}", "lo")]
    results = on_ring(whole_inputs(2, LENGTH), plan)
    dist.barrier()
    cable, loopback = (sent_through(x) - y for x, y in zip((f"cable{rank}", "lo"), before, strict=True))
    torch.save((results, os.readlink("/proc/self/ns/net"), cable, loopback), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_in_namespaces_of_their_own_compute_what_one_rank_does(tmp_path):
    if (reason := refusal()) is not None:
        pytest.skip(reason)
    environment = {**os.environ, "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "OMP_NUM_THREADS": "1"}
    (tmp_path / "rank").write_text(f"#!/bin/bash\nexec {sys.executable} -m {__name__} $1 {tmp_path}\n")
    (tmp_path / "rank").chmod(0o700)
    run = [*ENTER, SCRIPT, "bash", str(tmp_path / "rank")]
    result = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr

    by_rank, namespaces, cable, loopback = zip(*(torch.load(tmp_path / f"{r}.pt") for r in (0, 1)), strict=True)
    assert len({*namespaces, os.readlink("/proc/self/ns/net")}) == 3
    # k and v there and, for the backward, there again, and their gradients back; rank 0 sends one chunk of its two
    chunk = 2 * 2 * Layout.zigzag(LENGTH, 2).chunk * 2 * 16 * 4
    assert min(cable) > 3 * chunk
    assert max(loopback) < chunk  # rank 0 also keeps the store, and talks to it

    inputs, layout = whole_inputs(2, LENGTH), Layout.zigzag(LENGTH, 2)
    assert_exact([torch.cat(shards) for shards in zip(*by_rank, strict=True)], oracle(inputs, MASK.dense()), layout)
    alone = on_ring(inputs, AttentionPlan(MASK, Layout.contiguous(LENGTH, 1), Loopback(1)))
    for shards, one in zip(zip(*by_rank, strict=True), alone, strict=True):
        torch.testing.assert_close(layout.unshard(shards), one, rtol=1e-5, atol=1e-5)


if __name__ == "__main__":
    rank_in_a_namespace(int(sys.argv[1]), sys.argv[2])
