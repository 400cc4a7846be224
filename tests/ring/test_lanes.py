"""Two lanes are two streams, ordered only by fork and join; on the CPU there is one order."""

from __future__ import annotations

import pytest
import torch

from ringflash.ring.lanes import Lanes

CYCLES = 50_000_000  # about 30 ms: long beside what is launched meanwhile


def test_on_the_cpu_lanes_are_one_after_the_other():
    lanes, order = Lanes(2, torch.device("cpu")), []
    lanes.fork()
    for lane in (0, 1):
        with lanes.on(lane):
            order.append(lane)
    lanes.join()
    assert order == [0, 1]
    assert lanes.last == 1


@pytest.mark.gpu
def test_lane_1_waits_at_the_fork_and_lane_0_at_the_join():
    device = torch.device("cuda")
    lanes, x = Lanes(2, device), torch.zeros(1, device=device)
    torch.cuda._sleep(CYCLES)
    x.fill_(1)
    lanes.fork()
    with lanes.on(1):
        seen = x.clone()
        torch.cuda._sleep(CYCLES)
        x.fill_(2)
    lanes.join()
    assert (seen.item(), x.clone().item()) == (1, 2)


@pytest.mark.gpu
def test_lanes_run_beside_each_other_and_one_lane_is_the_current_stream():
    device = torch.device("cuda")
    ends = [torch.cuda.Event() for _ in range(2)]
    lanes = Lanes(2, device)
    lanes.fork()
    torch.cuda._sleep(20 * CYCLES)
    ends[0].record()
    with lanes.on(1):
        ends[1].record(torch.cuda.current_stream())
    ends[1].synchronize()
    assert not ends[0].query()
    with Lanes(1, device).on(0):
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()
