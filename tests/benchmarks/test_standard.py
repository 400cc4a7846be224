"""benchmarks/standard.py: what it counts, what does not fit, and results that differ."""

import json

import pytest
import torch

from benchmarks import standard


def run(folder, *arguments):
    code = standard.main(["--device", "cpu", "--seconds", "0.001", "--commit", "abc", "--out", str(folder), *arguments])
    return code, json.loads((folder / "standard-cpu.json").read_text())["rows"]


def test_the_matrix_of_scores_is_counted_in_standard_attention_alone(tmp_path, capsys):
    code, rows = run(tmp_path, "--tokens", "512", "1k")
    assert code == 0
    assert (tmp_path / "standard-cpu.png").stat().st_size > 10_000
    by_kind = {(row["kind"], row["tokens"]): row for row in rows}
    for tokens in (512, 1024):
        row = by_kind["standard", tokens]
        assert row["matrix"] == 4 * tokens**2
        assert row["forward_bytes"] >= 2 * row["matrix"]  # scores and weights
        assert row["both_bytes"] >= 3 * row["matrix"]
        assert row["forward"]["ms"] > 0
        assert row["backward"]["ms"] > 0
    growth = {
        kind: by_kind[kind, 1024]["both_bytes"] / by_kind[kind, 512]["both_bytes"] for kind in ("standard", "flash")
    }
    assert growth["standard"] > 3.5
    assert growth["flash"] < 2.3
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["both_bytes"] for row in last["rows"]] == [row["both_bytes"] for row in rows]


def test_standard_attention_that_does_not_fit_says_what_it_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(standard, "free_bytes", lambda device: 2**20)
    _, (other, flash) = run(tmp_path, "--tokens", "512")
    assert other["reason"] == "3 matrices need 3.2 MiB, 1.0 MiB are free"
    assert other["both_bytes"] is None
    assert flash["both_bytes"] > 0


def test_memory_is_the_peak_of_what_lives():
    kept = torch.zeros(100)
    with standard.LiveTensors() as live:
        live.count_nothing_of(kept)
        x = kept + 1
        y = x.view(10, 10) + 1
        del x, y
        kept.add_(1)
        assert (live.now, live.peak) == (0, 800)


def test_other_results_are_refused(tmp_path, monkeypatch):
    attention = standard.ring_attention
    monkeypatch.setattr(standard, "ring_attention", lambda q, k, v, plan: attention(q, k, v, plan, scale=0.1))
    with pytest.raises(ValueError, match="flash attention's out differs from standard attention's by"):
        run(tmp_path, "--tokens", "256")
