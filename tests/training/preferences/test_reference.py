"""The reference's log-probabilities are computed once, found again by any run of the same model, and never stale."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ringflash.data.config import DataConfig, WeightedSource
from ringflash.data.mixture import first_epoch, load_corpora
from ringflash.data.pairs import digests
from ringflash.models import ModelConfig
from ringflash.training import stop
from ringflash.training.metrics import read
from ringflash.training.preferences import reference
from tests.training.pairs import LENGTH, PRECOMPUTED, preference_run
from tests.training.runs import fitted


def stored(folder):
    (path,) = (folder / "cache").glob("*.reference.npz")
    return path


def weights(folder):
    return load_file(folder / "runs" / "run" / "model" / "model.safetensors")


def forget(folder):
    """Undo the last step of the run."""
    shutil.rmtree(folder / "runs" / "run" / "model")
    shutil.rmtree(folder / "runs" / "run" / "checkpoints" / "step-00000002")


def counted(printed):
    """What the pass reports: how many pairs it computes, and of how many."""
    (line,) = (line for line in printed.splitlines() if line.startswith("reference "))
    return [int(x) for x in line.split()[1:4:2]]


def stopped_in_the_pass(overrides):
    """A run that gets the signal to stop during its first group of sequences."""
    stop._requested.set()
    result = fitted(overrides)
    stop._requested.clear()
    return result


@pytest.mark.ranks
def test_a_resumed_run_finds_the_numbers_or_computes_them_with_the_first_weights(ranks, pair_folder):
    run = preference_run(pair_folder, *PRECOMPUTED, "checkpoint.every=1", "memory.zero=1", "parallel.ring=2")
    error, printed = ranks.run(stopped_in_the_pass, 2, run)[0]
    assert error is None
    assert "stopped by SIGUSR1 before the first step" in printed
    partial = len(reference.read(stored(pair_folder)))
    assert 0 < partial < counted(printed)[1]
    assert not (pair_folder / "runs" / "run").exists()

    error, printed = ranks.run(fitted, 2, run)[0]
    assert error is None
    lacked, pairs = counted(printed)
    assert lacked == pairs - partial
    numbers, expected = reference.read(stored(pair_folder)), weights(pair_folder)

    forget(pair_folder)
    stored(pair_folder).unlink()
    error, printed = ranks.run(fitted, 2, [*run, "resume=auto"])[0]
    assert error is None
    assert counted(printed) == [pairs, pairs]
    assert reference.read(stored(pair_folder)) == numbers
    assert all(torch.equal(weights(pair_folder)[name], x) for name, x in expected.items())

    forget(pair_folder)
    written = stored(pair_folder).stat().st_mtime_ns
    error, printed = ranks.run(fitted, 1, [*run, "parallel.ring=1", "resume=auto", "optim.steps=6"])[0]
    assert "of 40 pairs" in printed  # one epoch and a part of the next
    assert error is None
    assert counted(printed)[0] == counted(printed)[1] - pairs > 0
    assert reference.read(stored(pair_folder)).items() > numbers.items()
    assert stored(pair_folder).stat().st_mtime_ns > written
    records = read(pair_folder / "runs" / "run" / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]


@pytest.mark.ranks
def test_weights_that_give_no_finite_number_are_refused_and_others_are_never_mixed_up(ranks, pair_folder):
    run = preference_run(pair_folder, *PRECOMPUTED, "optim.steps=1", "evaluation.sequences=1")
    assert ranks.run(fitted, 1, run)[0][0] is None
    first = stored(pair_folder)
    file = pair_folder / "base" / "model.safetensors"
    changed = load_file(file)
    changed["model.norm.weight"] *= 1e38
    save_file(changed, file, {"format": "pt"})
    error, printed = ranks.run(fitted, 1, run)[0]
    assert counted(printed)[0] == counted(printed)[1]
    assert error.startswith(f"model.path={pair_folder}/base gives an answer a log-probability that is not finite")
    assert stored(pair_folder) == first


@pytest.mark.ranks
def test_the_reference_of_an_adapter_is_the_model_with_the_adapter_that_training_starts_from(ranks, pair_folder):
    lora = ["preference.precompute_ref_log_probs=true", "optim.lr=0.03", "optim.schedule=constant"]
    assert ranks.run(fitted, 1, preference_run(pair_folder, *lora))[0][0] is None
    adapter = pair_folder / "runs" / "run" / "adapter"
    further = ["model.lora.rank=null", f"model.lora.path={adapter}", "name=further"]
    assert ranks.run(fitted, 1, preference_run(pair_folder, *lora, *further))[0][0] is None
    for name in ("run", "further"):
        first, second = (x["loss"] for x in read(pair_folder / "runs" / name / "metrics.jsonl") if "loss" in x)
        assert first == pytest.approx(math.log(2), abs=1e-6)
        assert abs(second - first) > 1e-2
    assert len([*(pair_folder / "cache").glob("*.reference.npz")]) == 2


def test_the_file_depends_on_all_bytes_of_the_weights_and_not_on_their_place(tmp_path):
    base, moved = tmp_path / "base", tmp_path / "moved"
    base.mkdir()
    (base / "config.json").write_text("{}")
    content = bytearray(4 << 20)
    (base / "model.safetensors").write_bytes(content)
    shutil.copytree(base, moved)

    def path(folder=base, **others):
        return reference.reference_path("cache", ModelConfig(**{"path": str(folder), "dtype": "fp32"} | others))

    first, others = path(), {path(dtype="bf16"), path(rope_length=64)}
    assert path(moved) == first
    content[len(content) // 2] ^= 1
    (base / "model.safetensors").write_bytes(content)
    assert len({first, *others, path()}) == 4


def test_a_pair_is_known_by_its_tokens_labels_and_lengths_wherever_it_is_packed():
    def digest(tokens, labels, lengths, number=0):
        return digests(torch.tensor(tokens), torch.tensor(labels), lengths)[number]

    no = -100
    alone = digest([5, 6, 5, 7, 0], [6, no, 7, no, no], [2, 2, 1])
    assert digest([9, 8, 9, 7, 5, 6, 5, 7], [8, no, 7, no, 6, no, 7, no], [2, 2, 2, 2], number=1) == alone
    others = [
        digest([4, 6, 5, 7], [6, no, 7, no], [2, 2]),
        digest([5, 6, 5, 7], [6, 6, 7, no], [2, 2]),
        digest([5, 6, 5, 7], [6, no, 7, no], [1, 3]),
    ]
    assert len({alone, *others}) == 4


def test_a_damaged_file_is_reported_and_not_used(tmp_path, capsys):
    path, known = tmp_path / "a.reference.npz", {bytes(range(16)): [-1.5, -2.25], bytes(16): [-3.0, -0.5]}
    assert reference.read(path) == {}
    reference.write(path, known)
    assert reference.read(path) == known
    assert capsys.readouterr().out == ""
    content = bytearray(path.read_bytes())
    content[content.index(np.array([-1.5]).tobytes())] ^= 1
    path.write_bytes(content)
    assert reference.read(path) == {}
    assert capsys.readouterr().out.startswith(f"{path} cannot be read (")


@pytest.mark.parametrize("weights", [(None, None), (3.0, 1.0)], ids=["by size", "weighted"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_the_first_epochs_hold_all_pairs_that_a_mixture_trains_on(pair_folder, weights, count):
    part = pair_folder / "part.jsonl"
    part.write_text("".join((pair_folder / "pairs" / "a.jsonl").read_text().splitlines(keepends=True)[:7]))
    config = DataConfig(
        sources={
            name: WeightedSource(path=str(path), weight=weight)
            for (name, path), weight in zip({"a": pair_folder / "pairs", "b": part}.items(), weights, strict=True)
        },
        cache=str(pair_folder / "cache"), tokenizer=str(pair_folder / "base"), chat=True, preferences=True,
        packing="whole", sequence_length=LENGTH, held_out=0.1,
    )  # fmt: skip
    corpus, _ = load_corpora(config)

    def pairs(numbers):
        return {digest for i in numbers for digest in digests(*corpus.packed(1, i, LENGTH))}

    first = [*first_epoch(corpus, count, LENGTH)]
    assert pairs(first) == pairs(range(count))
    assert len(first) <= corpus.epoch_length(LENGTH)
