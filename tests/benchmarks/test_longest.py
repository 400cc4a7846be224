"""benchmarks/longest.py: the step, the loss of its first tokens, what counts as wrong."""

import json
import sys

import pytest
import torch
from torch import nn

from benchmarks import longest
from tests import forked

SOUND = {"loss": 2.0, "gradient_norm": 1.0, "first": 4, "first_loss_alone": 3.0, "first_loss_in_step": 3.0001}


def test_the_first_tokens_have_the_same_loss_alone_and_in_the_whole_step(tmp_path):
    out = tmp_path / "longest.json"
    tiny = ["model=tiny-llama", "model.dtype=bf16", "model.architecture.vocab_size=384"]
    tiny += ["memory.attention_results=host:1", "memory.layer_inputs=host:1"]
    sizes = ["--tokens", "512", "--first", "128", "--warm", "64", "--out", str(out)]
    command = [sys.executable, "benchmarks/longest.py", *sizes, *tiny]
    done = forked.run(command)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["run"]
    assert found["first_loss_in_step"] == pytest.approx(found["first_loss_alone"], rel=1e-6)
    assert found["loss"] != pytest.approx(found["first_loss_alone"], rel=1e-6)
    assert found["gradient_norm"] > 0


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ([], "--tokens 1048576 needs a GPU, and here is none"),
        (["--tokens", "512", "--first", "8", "--warm", "8", "optim.lrr=3"], "optim.lrr is not a setting; did you mean"),
    ],
)
def test_what_cannot_run_here_is_named_before_anything_is_built(asked, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longest.py", *asked])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        longest.main()
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"loss": float("nan")}, ["loss is nan"]),
        ({"gradient_norm": float("inf")}, ["gradient_norm is inf"]),
        ({"first_loss_in_step": 3.001}, ["the first 4 tokens: loss 3.0 alone, 3.001 in the step"]),
        ({"first_loss_in_step": float("nan")}, ["the first 4 tokens: loss 3.0 alone, nan in the step"]),
    ],
)
def test_a_run_is_wrong_where_it_is_not_finite_or_the_first_tokens_disagree(change, wrong):
    assert longest.failures(SOUND | change) == wrong


def test_progress_counts_layers_forward_and_back():
    class Model(nn.Module):
        def modules(self):
            return [longest.GradientCheckpointingLayer() for _ in range(3)]

    progress = longest.Progress(Model(), torch.device("cpu"))
    assert progress.line() == "forward of layer 0 of 3"
    progress.begun = [None] * 3
    assert progress.line() == "forward of layer 3 of 3"
    progress.begun = [None] * 4
    assert progress.line() == "backward of layer 3"
    progress.begun = [None] * 6
    assert progress.line() == "backward of layer 1"
