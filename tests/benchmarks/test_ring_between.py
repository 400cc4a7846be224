"""benchmarks/ring.py --between: GPUs that emulate a larger ring send and wait as its ranks would."""

import dataclasses
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from benchmarks import ring, ring_between
from benchmarks.ring_between import ALONE, OURS, WHOLE, Between
from benchmarks.ring_cases import RingCase
from benchmarks.ring_timeline import rates, schedules
from ringflash.ring.simulation import Span

CPU = torch.device("cpu")
CASE = RingCase.of(256, 2, heads=(4, 2), dim=16)


class HostEvent:
    """An event of a GPU: each rank takes a second more than the one before, whatever it runs."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def elapsed_time(self, end):
        return 1000.0 * (1 + dist.get_rank())


def measured(case):
    """A rank's results for a case, on processes instead of GPUs, and how long it kept busy."""
    group, busy = dist.distributed_c10d._get_default_group(), []
    with (
        mock.patch.multiple(torch.cuda, Event=HostEvent, synchronize=lambda *_: None, _sleep=lambda *_: None),
        mock.patch.object(ring_between, "matrix_products", return_value=busy.append),
        mock.patch.object(ring_between, "_torch_passes", side_effect=RuntimeError("needs a GPU\nand more")),
        mock.patch.object(ring_between, "_ulysses_passes", side_effect=RuntimeError("needs a GPU\nand more")),
    ):
        found = ring_between.measure(case, "auto", torch.float32, CPU, group, 0.01)
    return dataclasses.asdict(found), busy


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    "case",
    [CASE, dataclasses.replace(CASE, ranks=8), dataclasses.replace(CASE, ranks=4, kind="packed", layout="balanced")],
    ids=str,
)
def test_every_variant_is_timed_and_bytes_are_those_of_the_larger_ring(ranks, case):
    found, busy = ranks.run(measured, 2, case)[0]
    assert found["ms"].keys() == found["host_ms"].keys() == {WHOLE, OURS, ALONE}
    assert found["ms"][WHOLE] == {"forward": 1500.0, "backward": 1500.0}  # the mean of two GPUs
    assert found["ms"][OURS] == found["ms"][ALONE] == {"forward": 2000.0, "backward": 2000.0}  # the slower one
    assert all(took > 0 for both in found["host_ms"].values() for took in both.values())
    assert len(set(busy)) == 6  # before each run the host's time of that variant and direction
    assert found["part"] == pytest.approx(case.head_pairs() / case.whole().head_pairs() / case.ranks)
    reasons = set(found["refused"].values())
    assert reasons == {"has no packed mask"} if case.kind == "packed" else len(reasons) == 1
    emulated = range(2) if case.ranks == 2 else [case.ranks // 2]
    received = max(bytes_received(case, rank) for rank in emulated)
    assert found["gib"] * 2**30 == received > 0


def bytes_received(case, rank):
    """By a rank in both passes, with keys in 4 bytes: schedules are of 16-bit inputs, and these are not."""
    return sum(
        (target.end - target.begin)
        * rates(case, schedule, 0, 1).row(target.buffer)
        * (2 if "keys" in target.buffer else 1)
        for schedule in schedules(case)
        for step in schedule.steps[rank]
        for _, target in getattr(step, "receives", ())
    )


def ulysses():
    """Relative errors of DeepSpeed's Ulysses on this rank, against one whole call."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for half a minute
    inputs = [x.double() for x in CASE.inputs(torch.float32, CPU)]
    group = dist.distributed_c10d._get_default_group()
    attend, gradients = ring_between._ulysses_passes(CASE, inputs, "MATH", group)
    whole = [x.detach().transpose(1, 2).requires_grad_() for x in inputs[:3]]
    out = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True).transpose(1, 2)
    expected = [out, *(x.transpose(1, 2) for x in torch.autograd.grad(out, whole, inputs[3]))]
    shards = [x.chunk(2, dim=1)[dist.get_rank()] for x in expected]
    return [float((a - b).norm() / b.norm()) for a, b in zip([attend(), *gradients()], shards, strict=True)]


@pytest.mark.ranks
def test_the_ulysses_peer_computes_causal_attention(ranks):
    assert all(error < 1e-12 for found in ranks.run(ulysses, 2) for error in found)


def test_speed_counts_visible_pairs_of_one_gpu():
    """Two of four ranks' share of causal attention, packed so that half of the pairs are left."""
    ms = {WHOLE: {"forward": 8.0, "backward": 20.0}, OURS: {"forward": 1.0, "backward": 2.5}}
    found = Between("case", "hopper", 4, 0.125, ms, ms, {}, 0.0, {"forward": 1e12, "backward": 2.5e12})
    assert found.efficiency(OURS, "forward") == 1.0
    assert found.tflops(OURS, "forward") == found.tflops(OURS, "backward") == 1000.0
    assert found.tflops(WHOLE, "forward") == 1000.0  # eight times the work of a rank, in eight times the time
    assert found.summary()[OURS]["tflops"] == [1000.0, 1000.0]


def test_many_gpus_run_lengths_per_gpu_and_the_published_shape():
    cases = ring.many(8)
    assert [(case.length, case.kind) for case in cases[:6]] == [
        (n * 8192, kind) for n in (8, 16, 64) for kind in ("causal", "packed")
    ]
    published = cases[-1]
    assert (published.length, published.heads, published.kv_heads) == (65536, 64, 8)
    assert max(published.documents()) <= 65536 / 4
    assert all(case.ranks == 8 for case in cases)


def wrong_ring():
    other = dict.fromkeys("abcd", torch.ones(1, 256, 4, 16))
    with mock.patch.object(ring_between, "whole_ring", return_value=other):
        measured(CASE)


@pytest.mark.ranks
def test_a_ring_that_finds_something_else_than_a_loopback_is_not_timed(ranks):
    with pytest.raises(AssertionError, match=r"ArithmeticError: .* of rank . differs from a Loopback's by"):
        ranks.run(wrong_ring, 2)


@dataclasses.dataclass
class Ran:
    """A kernel or copy that a GPU ran, as the profiler reports it."""

    what: str
    stream: int
    begin: int
    end: int

    def name(self):
        return self.what

    def device_type(self):
        return torch.autograd.DeviceType.CUDA

    def device_resource_id(self):
        return self.stream

    def start_ns(self):
        return self.begin

    def duration_ns(self):
        return self.end - self.begin


def test_time_begins_with_the_collective_and_lanes_are_streams_of_attention():
    events = [
        Ran("ncclDevKernel_AllReduce_Sum_f32", 20, 0, 1000),
        Ran("forward_kernel", 7, 1000, 5000),
        Ran("forward_kernel", 13, 4000, 9000),
        Ran("ncclDevKernel_SendRecv", 20, 2000, 3000),
        Ran("round_kernel", 13, 9000, 9500),
        Ran("fill", 7, 100, 200),
    ]
    assert ring_between._spans(events, 3) == [
        Span(3, "compute", 0.0, 4e-6, 0),
        Span(3, "compute", 3e-6, 8e-6, 1),
        Span(3, "transfer", 1e-6, 2e-6, -1),
        Span(3, "passes", 8e-6, 8.5e-6, 1),
    ]


def test_what_is_hidden_is_what_runs_under_the_same_gpus_kernels():
    spans = [
        Span(0, "compute", 0.0, 2.0, 0), Span(0, "compute", 1.0, 3.0, 1), Span(0, "transfer", 1.0, 4.0),
        Span(1, "compute", 0.0, 9.0, 0), Span(1, "transfer", 1.0, 2.0),
    ]  # fmt: skip
    assert ring_between.hidden(spans[:3]) == pytest.approx(2 / 3)
    assert ring_between.hidden(spans[3:]) == 1.0
    assert ring_between.hidden(spans) == pytest.approx(2 / 3)
    assert ring_between.hidden(spans[:2]) == 1.0


def test_the_table_holds_each_variant_against_its_share_of_the_whole():
    ms = {WHOLE: {"forward": 8.0, "backward": 16.0}, OURS: {"forward": 4.0, "backward": 10.0}}
    flops = {"forward": 4e12, "backward": 1e13}
    found = Between("256/2", "blocked", 2, 0.5, ms, ms, {"another": "needs a GPU"}, 0.25, flops)
    assert found.efficiency(OURS, "forward") == 1.0
    assert found.efficiency(OURS, "both") == pytest.approx(12 / 14)
    lines = ring_between.table(found, header=True).splitlines()
    assert lines[3].split()[2:6] == ["1.000", "0.800", "0.857", "1000"]
    assert lines[4].endswith("not timed: needs a GPU")
    assert "0.250 GiB" in lines[5]


def test_what_gpus_ran_is_drawn(tmp_path):
    ran = {d: [Span(rank, "compute", 0.0, 1e-3, 0) for rank in range(2)] for d in ("forward", "backward")}
    ring_between.draw(tmp_path / "ran.png", ran, "two GPUs")
    assert (tmp_path / "ran.png").stat().st_size > 5_000


def test_without_several_gpus_it_is_refused_with_the_command(capsys):
    with pytest.raises(SystemExit):
        ring.main(["--between", "--device", "cpu"])
    assert "torchrun --nproc-per-node 2 benchmarks/ring.py --between" in capsys.readouterr().err
