"""benchmarks/ring.py: a share is a rank's whole work, rounding shows, and keys arrive before they are used."""

import dataclasses
import itertools
import json
from collections import Counter
from unittest import mock

import pytest
import torch

from benchmarks import ring, ring_error, ring_share, ring_timeline, timing
from benchmarks.ring_cases import RingCase, kernels_wrapped, lognormal_lengths
from benchmarks.ring_share import COPIED, CopiedRank, OneRank
from benchmarks.ring_timeline import Speed
from ringflash import Loopback, kernels
from ringflash.ring import execution

CPU = torch.device("cpu")
TINY = {"heads": (4, 2), "dim": 16}
# Causal balanced, documents with hops that no rank computes, documents of which a hop of the forward has three ranks'
# keys, a window whose gradients turn back early.
CASES = [
    RingCase.of(96, 4, **TINY),
    RingCase.of(96, 3, "packed", packed=7, layout="balanced", **TINY),
    RingCase.of(96, 4, "packed", packed=3, layout="striped", **TINY),
    RingCase.of(128, 8, "window", window=9, layout="contiguous", **TINY),
]
SPEED = Speed(forward=1e-9, backward=2.5e-9, link=1e9)


def run(folder, *arguments):
    """Exit code and what the run wrote as JSON."""
    code = ring.main(["--device", "cpu", "--quick", "--seconds", "0.01", "--out", str(folder), *arguments])
    (file,) = folder.glob("*.json")
    return code, json.loads(file.read_text())


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# -- one rank's share


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_rank_alone_launches_what_its_plan_says_and_never_on_zeros(case):
    launches = Counter()

    def counting(kernel):
        def forward(q, k, v, intervals, **options):
            check("forward", k, v, intervals)
            return kernel.forward(q, k, v, intervals, **options)

        def backward(dout, q, k, v, lse, delta, intervals, **options):
            check("backward", k, v, intervals)
            kernel.backward(dout, q, k, v, lse, delta, intervals, **options)

        return dataclasses.replace(kernel, forward=forward, backward=backward)

    def check(direction, k, v, intervals):
        launches[direction] += 1
        read = (intervals.query_start < intervals.query_end)[0]
        smallest = min(float(x[:, read].abs().amax(-1).min()) for x in (k, v))
        assert 0.1 < smallest < 10

    inputs = case.inputs(torch.float32, CPU)
    for rank in range(case.ranks):
        alone = OneRank(case.ranks, rank)
        plan = case.plan(alone)
        with kernels_wrapped(counting):
            launches.clear()
            forward, backward = ring_share.passes(plan, inputs, "blocked")
            backward()
            filled = [x.clone() for x in alone.buffers]
            with mock.patch.object(torch, "randn", None):  # buffers are there, and full
                forward(), backward()
        computed = [sum(bool(hops[0].intervals) for hops in of_pass) for of_pass in (plan.forward_hops, plan.hops)]
        # Halves of the heads; the forward runs once more, for the graph of the backward.
        assert launches == dict(zip(("forward", "backward"), (2 * 2 * some for some in computed), strict=True))
        assert sum(hops[0].pairs for hops in plan.hops) == ring_share.pairs_by_rank(plan)[rank]
        of_keys = [torch.equal(x, before) for x, before in zip(alone.buffers, filled, strict=True) if x.dim() == 4]
        assert len(of_keys) >= 2
        assert all(of_keys)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_absent_ranks_grow_by_the_same_small_amount_in_every_pass(case):
    inputs = case.inputs(torch.float32, CPU)
    for rank in range(case.ranks):
        alone, after = OneRank(case.ranks, rank), []
        _, backward = ring_share.passes(case.plan(alone), inputs, "blocked")
        for _ in range(3):
            backward()
            after.append([x.clone() for x in alone.buffers])
        for first, second, third in zip(*after, strict=True):
            torch.testing.assert_close(third - second, second - first, atol=1e-4, rtol=1e-4)
            assert float((second - first).abs().max()) < 1e3  # fp32 has room for 1e35 passes
        alone.check_finite()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_rank_with_copies_reads_only_what_was_copied_or_cleared(case):
    inputs = case.inputs(torch.float32, CPU)
    for rank in range(case.ranks):
        copied = CopiedRank(case.ranks, rank)
        forward, backward = ring_share.passes(case.plan(copied), inputs, "blocked")
        for run in (forward, backward):
            run()
            for x in copied.buffers:
                x.fill_(torch.nan)
            results = run()
            assert all(x.isfinite().all() for x in (results if run is backward else [results]))


class Overflown(CopiedRank):
    """A rank in which a pass has left NaN."""

    def check_finite(self):
        self.buffers[-1][-1, -1] = torch.nan
        super().check_finite()


def test_a_receive_buffer_with_nan_fails_its_case(monkeypatch):
    monkeypatch.setattr(timing, "interleaved", lambda runs, *_: dict.fromkeys(runs, timing.Timing(1.0, 1.0, 1.0, 1)))
    assert ring_share.measure(CASES[0], "auto", torch.float32, CPU, 0.01).status == "timed"
    monkeypatch.setattr(ring_share, "CopiedRank", Overflown)
    share = ring_share.measure(CASES[0], "auto", torch.float32, CPU, 0.01)
    assert share.status == "failed"
    assert share.reason == "ArithmeticError: rank 0 of 4: a receive buffer holds inf or NaN"


def test_times_are_compared_with_the_right_share(monkeypatch):
    case = RingCase.of(128, 4, "packed", packed=5, **TINY)
    share = ring_share.measure(case, "auto", torch.float32, CPU, 0.01)
    part = case.mask().area() / (128 * 129 / 2) / 4
    both = sum(took.ms for took in share.whole.values()) * part
    assert share.status == "timed"
    assert share.share_ms["forward"] == pytest.approx(share.whole["forward"].ms * part)
    assert share.efficiency("both")["slowest"] == pytest.approx(both / share.milliseconds("both")["slowest"])
    assert share.efficiency("both")["slowest"] <= share.efficiency("both")["mean"]
    assert share.ranks.keys() == share.copied.keys() == set(range(4))
    assert share.which_ranks()["mean"] == "mean of 0-3"
    slowest = max(took["backward"].ms for took in share.copied.values())
    assert share.efficiency("backward")[COPIED] == pytest.approx(share.share_ms["backward"] / slowest)


def test_a_quick_run_ends_with_a_table_a_plot_and_json(tmp_path, capsys):
    code, contents = run(tmp_path)
    printed = capsys.readouterr().out
    last = json.loads(printed.splitlines()[-1])
    assert code == 0
    assert (tmp_path / "ring-cpu.png").stat().st_size > 10_000
    for case, row in zip(ring.CPU_QUICK, contents["rows"], strict=True):
        assert sum(line.startswith(f"{case} ") for line in printed.splitlines()) == 3
        assert last["efficiency"][str(case)] == row["efficiency"]
        assert max(row["errors"].values()) < 1e-5
    assert {"device", "torch", "triton", "date", "commit"} <= contents["card"].keys()


def test_a_wrong_ring_is_named_not_timed_and_fails_the_run(tmp_path, capsys, monkeypatch):
    good = kernels._load("blocked")

    def forgetful(*args, carry, **options):
        """Drops what was seen on the hops before."""
        return good.forward(*args, carry=None, **options)

    monkeypatch.setattr(kernels, "_load", lambda name, *mode: dataclasses.replace(good, forward=forgetful))
    code, contents = run(tmp_path)
    assert code == 1
    assert [row["status"] for row in contents["rows"]] == ["WRONG", "WRONG"]
    assert contents["rows"][0]["ranks"] == {}
    assert "WRONG: 512/4 causal, zigzag, 4/2 heads of 64: out " in capsys.readouterr().out


def test_a_backward_that_adds_to_memory_that_was_not_cleared_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "Clear", type("Nothing", (), {}))
    code, contents = run(tmp_path)
    assert code == 1
    assert all("dk inf" in row["reason"] for row in contents["rows"]), contents["rows"]


def test_documents_are_as_many_as_asked_and_fill_the_sequence():
    lengths = lognormal_lengths(64, 131072)
    assert (len(lengths), sum(lengths)) == (64, 131072)
    assert lengths == lognormal_lengths(64, 131072)
    assert min(lengths) >= 1
    assert max(lengths) > 4 * 131072 / 64
    assert lognormal_lengths(5, 5) == [1] * 5


# -- error


def test_our_error_is_flat_and_that_of_sixteen_bits_grows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ring_error, "SIZES", (1, 4, 16))
    code, contents = run(tmp_path, "--error", "--length", "512", "--dim", "16")
    growth = contents["growth"]
    assert code == 0
    assert max(growth["ringflash"].values()) < 1.05 < ring_error.GROWTH
    assert min(growth["16-bit gradients"][name] for name in ("dk", "dv")) > 2
    assert growth["16-bit merging"]["out"] > 1.5
    assert growth["16-bit blocks"]["out"] > 1.1
    assert max(growth["16-bit gradients"][name] for name in ("out", "dq")) < 1.05
    assert last_line(capsys)["growth"].keys() == ring_error.RINGS.keys()
    assert (tmp_path / "ring-error-cpu.png").stat().st_size > 10_000


def test_a_ring_of_ours_whose_error_grows_fails_the_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ring_error, "SIZES", (1, 8))
    monkeypatch.setitem(ring_error.RINGS, "ringflash", ring_error.RINGS["16-bit gradients"])
    code, _ = run(tmp_path, "--error", "--length", "256", "--dim", "16")
    assert code == 1
    assert any("with the ring" in line for line in last_line(capsys)["wrong"])


# -- timeline


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_timeline_sends_the_plans_bytes(case):
    plan = case.plan(Loopback(case.ranks))
    width = 2 * case.kv_heads * case.head_dim  # k and v
    keys = sum(2 * width * run.tokens for route in plan.routes for run in route.keys[1:])
    gradients = sum(4 * width * run.tokens for route in plan.routes for run in (*route.forwarded, *route.returned))
    timeline = ring_timeline.predict(case, SPEED, ring_timeline.schedules(case))
    assert (sum(timeline.forward.sent), sum(timeline.backward.sent)) == (keys, keys + gradients)


@pytest.mark.parametrize("link", [1e7, 1e9, float("inf")], ids=["slow", "fast", "infinite"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_computed_before_its_keys_arrive_and_no_span_overlaps_another(case, link):
    timeline = ring_timeline.predict(case, dataclasses.replace(SPEED, link=link), ring_timeline.schedules(case))
    for name, simulated in timeline.passes.items():
        seconds_a_pair = getattr(SPEED, name)
        plan = case.plan(Loopback(case.ranks))
        for rank in range(case.ranks):
            own = [span for span in simulated.spans if span.rank == rank]
            computing = sorted((s for s in own if s.kind not in ("keys", "gradients")), key=lambda span: span.begin)
            assert all(a.end <= b.begin + 1e-15 for a, b in itertools.pairwise(computing))
            arrivals = sorted(span.end for span in own if span.kind == "keys")
            received = [s for s in range(1, case.ranks) if plan.routes[(rank - s) % case.ranks].keys[s].tokens]
            for span in computing:
                if span.kind == "compute" and span.hop > 0 and link < float("inf"):
                    assert span.begin >= arrivals[received.index(span.hop)]
            pairs = sum(hops[rank].pairs for hops in plan.hops) * case.heads
            assert simulated.total("compute", rank) == pytest.approx(pairs * seconds_a_pair)
            assert simulated.finished[rank] >= pairs * seconds_a_pair * (1 - 1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_slower_link_never_ends_earlier_and_an_infinite_one_is_never_waited_for(case):
    passes = ring_timeline.schedules(case)
    links = [float("inf"), 1e11, 3e9, 1e9, 1e8, 1e6]
    timelines = [ring_timeline.predict(case, dataclasses.replace(SPEED, link=link), passes) for link in links]
    assert timelines[0].percent("wait for the link") == 0
    assert timelines[-1].percent("wait for the link") > 10
    for faster, slower in itertools.pairwise(timelines):
        assert slower.seconds >= faster.seconds
    enough = ring_timeline.sufficient_link(case, SPEED, passes)
    at_enough, below = (
        ring_timeline.predict(case, dataclasses.replace(SPEED, link=link), passes) for link in (enough, enough / 1.1)
    )
    assert at_enough.seconds <= 1.01 * timelines[0].seconds < below.seconds


def test_a_timeline_prints_draws_and_writes(tmp_path, capsys):
    arguments = ["--timeline", "--tflops", "600/500", "--length", "4k", "--ranks", "4", "--gbps", "50"]
    code, contents = run(tmp_path, *arguments, "--mask", "window", "512", "--layout", "contiguous")
    printed = capsys.readouterr().out
    assert code == 0
    assert "4k/4 window 512, contiguous, 32/8 heads of 128: predicted " in printed
    assert "GB moved at 50 GB/s" in printed
    assert json.loads(printed.splitlines()[-1])["predicted"]["tflops"] == [600, 500]
    assert {span[1] for span in contents["spans"]["backward"]} >= {"compute", "keys", "gradients"}
    assert (tmp_path / "ring-timeline-cpu.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeline"], "needs the speed of a GPU's kernel"),
        (["--timeline", "--tflops", "fast"], "--tflops fast is not a number, or two"),
        (["--timeline", "--tflops", "500", "--gbps", "0"], "--gbps must be above 0"),
        (["--timeline", "--tflops", "nan"], "--tflops must be above 0, got nan"),
        (["--timeline", "--tflops", ""], "--tflops  is not a number"),
        (["--seconds", "nan"], "--seconds must be above 0, got nan"),
        (["--mask", "packed", "0"], "--mask packed 0 is not causal, full"),
        (["--ranks", "0"], "--ranks must be 1 or more, got 0"),
        (["--dim", "-2"], "--dim must be 1 or more, got -2"),
        (["--length", "0"], "--length 0 is not a number of tokens"),
        (["--length", "abc"], "--length abc is not a number of tokens"),
        (["--mask", "causal", "7"], "--mask causal 7 is not causal, full"),
        (["--mask", "window"], "a window case, and no other, has a size"),
        (["--heads", "6/4"], "6 query heads do not divide among 4 KV heads"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_is_refused_with_its_value(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        ring.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
