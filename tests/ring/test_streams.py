"""Two streams are ordered only by fork and join; on the CPU there is one order."""

from __future__ import annotations

import pytest
import torch

from ringflash.ring.message import Message
from ringflash.ring.streams import Streams, current_stream
from ringflash.ring.transport import Loopback
from ringflash.ring.watchdog import Label

CYCLES = 50_000_000  # about 30 ms: long beside what is launched meanwhile


def test_on_the_cpu_streams_are_one_after_the_other():
    order = []
    with Streams(2, torch.device("cpu")) as streams:
        streams.fork()
        for stream in (0, 1):
            streams.switch(stream)
            order.append(stream)
        streams.join()
    assert order == [0, 1]


@pytest.mark.gpu
def test_stream_1_waits_at_the_fork_and_stream_0_at_the_join():
    device = torch.device("cuda")
    x = torch.zeros(1, device=device)
    with Streams(2, device) as streams:
        torch.cuda._sleep(CYCLES)
        x.fill_(1)
        streams.fork()
        streams.switch(1)
        seen = x.clone()
        torch.cuda._sleep(CYCLES)
        x.fill_(2)
        streams.join()
    assert (seen.item(), x.clone().item()) == (1, 2)


@pytest.mark.gpu
def test_streams_run_beside_each_other_and_a_single_one_is_the_current_stream():
    device = torch.device("cuda")
    ends = [torch.cuda.Event() for _ in range(2)]
    with Streams(2, device) as streams:
        streams.fork()
        torch.cuda._sleep(20 * CYCLES)
        ends[0].record()
        streams.switch(1)
        ends[1].record(torch.cuda.current_stream())
        ends[1].synchronize()
        assert not ends[0].query()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    with Streams(1, device) as single:
        single.switch(1)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_after_an_error_stream_0_is_current_and_waits_for_stream_1():
    device, x = torch.device("cuda"), torch.zeros(1, device="cuda")

    def fail():
        with Streams(2, device) as streams:
            streams.fork()
            streams.switch(1)
            torch.cuda._sleep(CYCLES)
            x.fill_(1)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert x.clone().item() == 1


@pytest.mark.gpu
def test_the_current_stream_is_torchs():
    device, other = torch.device("cuda"), torch.cuda.Stream()
    for _ in range(2):  # then it is known
        assert current_stream(device) == torch.cuda.current_stream()
        with torch.cuda.stream(other):
            assert current_stream(device) == other


@pytest.mark.gpu
def test_a_loopback_copy_is_waited_for_by_whatever_stream_waits():
    device = torch.device("cuda")
    source, target = torch.ones(1, device=device), torch.zeros(1, device=device)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(CYCLES)
        transfer = Loopback(2, device).exchange(
            [Message(0, 1, source)], [Message(0, 1, target)], Label("a layer", "forward")
        )
    transfer.wait()
    assert target.clone().item() == 1
