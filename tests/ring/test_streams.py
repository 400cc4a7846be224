"""Two streams are two streams, ordered only by the fork and the end; on the CPU there is one order."""

from __future__ import annotations

import pytest
import torch

from ringflash.ring.streams import Streams
from ringflash.ring.transport import Loopback, Message

CYCLES = 50_000_000  # about 30 ms: long beside what is launched meanwhile


def test_on_the_cpu_lanes_are_one_after_the_other():
    order = []
    with Streams(2, torch.device("cpu")) as streams:
        streams.fork()
        for stream in (0, 1):
            with streams.on(stream):
                order.append(stream)
    assert order == [0, 1]
    assert streams.last == 1


@pytest.mark.gpu
def test_lane_1_waits_at_the_fork_and_lane_0_at_the_end():
    device = torch.device("cuda")
    x = torch.zeros(1, device=device)
    with Streams(2, device) as streams:
        torch.cuda._sleep(CYCLES)
        x.fill_(1)
        streams.fork()
        with streams.on(1):
            seen = x.clone()
            torch.cuda._sleep(CYCLES)
            x.fill_(2)
    assert (seen.item(), x.clone().item()) == (1, 2)


@pytest.mark.gpu
def test_lanes_run_beside_each_other_and_one_lane_is_the_current_stream():
    device = torch.device("cuda")
    ends = [torch.cuda.Event() for _ in range(2)]
    streams = Streams(2, device)
    streams.fork()
    torch.cuda._sleep(20 * CYCLES)
    ends[0].record()
    with streams.on(1):
        ends[1].record(torch.cuda.current_stream())
    ends[1].synchronize()
    assert not ends[0].query()
    with Streams(1, device).on(0):
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_loopback_copy_is_waited_for_by_whatever_stream_waits():
    device = torch.device("cuda")
    source, target = torch.ones(1, device=device), torch.zeros(1, device=device)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(CYCLES)
        transfer = Loopback(2, device).exchange([Message(0, 1, source)], [Message(0, 1, target)], "test")
    transfer.wait()
    assert target.clone().item() == 1
