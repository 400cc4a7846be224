"""benchmarks/attention.py counts, times and checks correctly, and gives the reason for what it does not time."""

import dataclasses
import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks import attention, checks, contenders, decode, timing
from benchmarks.cases import CPU_QUICK, GPU_CASES, Case
from ringflash import kernels

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def run(folder, *arguments):
    """A CPU run of one small case: exit code, and the JSON it wrote."""
    case = ["--cases", "1,4,2,160,32 packed", "--seconds", "0.02"]
    code = attention.main(["--device", "cpu", "--quick", "--out", str(folder), *case, *arguments])
    return code, json.loads((folder / "attention-cpu.json").read_text())


def row_of(contents, kernel, direction="both"):
    return next(r for r in contents["rows"] if r["kernel"] == kernel and r["direction"] == direction)


def test_another_checkout_is_timed_beside_this_one(tmp_path):
    code, contents = run(tmp_path, "--against", str(ROOT), "--only", "blocked")
    assert code == 0
    for name in ("ringflash blocked", "other blocked"):
        assert row_of(contents, name, "backward")["status"] == "timed"


@pytest.mark.parametrize("program", [attention, decode])
def test_a_contender_that_is_not_there_is_refused_with_those_that_are(program, tmp_path):
    with pytest.raises(SystemExit, match=r"^--only flsh is part of none of: ringflash"):
        program.main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path), "--only", "flsh"])


def test_a_quick_run_ends_with_a_table_a_plot_and_json(tmp_path, capsys):
    code = attention.main(["--device", "cpu", "--quick", "--seconds", "0.02", "--out", str(tmp_path)])
    contents = json.loads((tmp_path / "attention-cpu.json").read_text())
    printed = capsys.readouterr().out
    assert code == 0
    assert (tmp_path / "attention-cpu.png").stat().st_size > 10_000
    lines = printed.splitlines()
    for case in map(str, CPU_QUICK):
        for kernel in ("ringflash blocked", "torch flash", "torch math"):
            for direction in ("forward", "backward"):
                assert sum(line.startswith(f"{case:<28} {direction:<9} {kernel} ") for line in lines) == 1
    last = json.loads(lines[-1])
    assert last["wrong"] == []
    assert last["tflops"] == contents["summary"]
    assert {"device", "torch", "triton", "flash-attn-4", "date", "commit"} <= contents["card"].keys()


def test_a_timed_row_has_every_figure_and_they_agree(tmp_path):
    _, contents = run(tmp_path)
    case = Case.parse("1,4,2,160,32 packed")
    flash = row_of(contents, "torch flash", "backward")
    row = row_of(contents, "ringflash blocked", "backward")
    seconds = row["timing"]["ms"] / 1e3
    assert row["status"] == "timed"
    assert row["timing"]["p20"] <= row["timing"]["ms"] <= row["timing"]["p80"]
    assert row["timing"]["runs"] >= timing.ROUNDS[0]
    assert row["tflops"] == pytest.approx(2.5 * 4 * 32 * case.head_pairs() / seconds / 1e12)
    assert row["ns_per_million_pairs"] == pytest.approx(seconds * 1e9 / case.head_pairs() * 1e6)
    assert row["ratio"] == pytest.approx(flash["timing"]["ms"] / row["timing"]["ms"])
    assert 0 < row["error"] < checks.FP32_BOUND


@pytest.mark.parametrize(("direction", "extent"), [("forward", "both"), ("backward", "backward")])
def test_a_wrong_kernel_is_named_not_timed_and_fails_the_run(tmp_path, capsys, monkeypatch, direction, extent):
    good = kernels._load("blocked")

    def scaled(*args, **options):
        """A little off: the scale of the scores."""
        return getattr(good, direction)(*args, **options | {"scale": options["scale"] * 1.01})

    bad = dataclasses.replace(good, **{direction: scaled})
    monkeypatch.setattr(kernels, "_load", lambda name, *mode: bad)
    code, contents = run(tmp_path)
    row = row_of(contents, "ringflash blocked", extent)
    assert code == 1
    assert (row["status"], row["timing"]) == ("WRONG", None)
    assert row["error"] > checks.FP32_BOUND
    assert "WRONG: ringflash blocked" in capsys.readouterr().out
    assert row_of(contents, "torch flash", "forward")["status"] == "timed"


def test_memory_that_a_kernel_leaves_unwritten_is_wrong(tmp_path, monkeypatch):
    good = kernels._load("blocked")

    def lazy(q, *args, out, **options):
        unwritten = out[:, -1:].clone()
        partial = good.forward(q, *args, out=out, **options)
        out[:, -1:] = unwritten
        return partial

    monkeypatch.setattr(kernels, "_load", lambda name, *mode: dataclasses.replace(good, forward=lazy))
    code, contents = run(tmp_path)
    assert code == 1
    assert "out inf" in row_of(contents, "ringflash blocked")["reason"]


def test_a_kernel_that_raises_has_its_error_in_the_table_and_fails_the_run(tmp_path, capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("out of shared memory\nand more lines")

    bad = dataclasses.replace(kernels._load("blocked"), backward=broken)
    monkeypatch.setattr(kernels, "_load", lambda name, *mode: bad)
    code, contents = run(tmp_path)
    assert code == 1
    assert row_of(contents, "ringflash blocked", "backward")["reason"] == "RuntimeError: out of shared memory"
    assert row_of(contents, "ringflash blocked", "forward")["status"] == "timed"
    assert "failed: RuntimeError: out of shared memory" in capsys.readouterr().out


def test_every_absent_contender_is_in_the_table_with_its_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "FASTEST_FIRST", ("imaginary", *kernels.FASTEST_FIRST))
    _, contents = run(tmp_path, "--only", "ringflash", "torch flash", "torch FA2")
    printed = capsys.readouterr().out
    assert "No module named 'ringflash.kernels.imaginary_forward'" in row_of(contents, "ringflash imaginary")["reason"]
    assert row_of(contents, "torch FA2")["reason"] == "needs an NVIDIA GPU"
    assert row_of(contents, "torch math")["reason"] == "not asked for (--only)"
    assert "FA4-CuTe             absent: not asked for (--only)" in printed


def test_a_peer_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    case = GPU_CASES[0].shrunk(64)
    q, k, *_ = case.inputs(torch.float32, CPU)
    with pytest.raises(contenders.Absent, match=r"flash_attn.cute.interface cannot be imported: ModuleNotFoundError"):
        contenders._fa4(case, q, k)


@pytest.mark.parametrize("case", [GPU_CASES[i].shrunk(700) for i in (0, 6, 7)], ids=str)
def test_the_block_mask_is_what_flex_attention_would_make_itself(case):
    ours = contenders.block_mask(case, CPU)
    theirs = create_block_mask(contenders._mask_mod(case, CPU), 1, 1, case.length, case.length, CPU)
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_pairs_are_counted_exactly(case):
    small = case.shrunk(300)
    assert small.head_pairs() == int(small.mask().dense().sum()) * small.batch * small.heads
    assert Case.parse(str(case)) == case


def test_packed_documents_fill_128k_tokens_and_never_change():
    lengths = GPU_CASES[6].documents()
    assert sum(lengths) == 131072
    assert all(1024 <= length <= 32768 for length in lengths[:-1])
    assert lengths[:3] == GPU_CASES[6].documents()[:3]
    assert len(lengths) > 8


def test_a_case_that_is_none_is_refused_with_the_form(capsys):
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", "cpu", "--cases", "1,32,8 causal"])
    assert stop.value.code == 2
    assert "is not B,Hq,Hkv,S,D mask" in capsys.readouterr().err


def test_times_come_from_turns_and_a_variant_that_raises_leaves_the_others():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"} | {"c": lambda: 1 / 0}
    found = timing.interleaved(variants, CPU, seconds=0.001)
    assert isinstance(found["c"], ZeroDivisionError)
    assert {name: found[name].runs for name in "ab"} == Counter(calls[4:])  # after a warm-up and an estimate of each


def test_variants_take_turns_of_equal_length():
    turns = timing.in_turns({"long": 1.0, "half": 0.5, "short": 0.001}, seconds=4.0)
    a_round = Counter({"long": 1, "half": 2, "short": timing.REPEATS})
    size = a_round.total()
    rounds = [turns[i : i + size] for i in range(0, len(turns), size)]
    assert len(rounds) == 5  # of 2.016 s each, for three variants of 4 s
    assert all(Counter(turn) == a_round for turn in rounds)
    assert len({tuple(turn) for turn in rounds}) > 1
    assert all(len(list(run)) == a_round[name] for turn in rounds for name, run in itertools.groupby(turn))
