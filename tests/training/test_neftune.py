"""NEFTune's noise is uniform, independent, the same on any ranks, and only in training: that of a plain loop."""

import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback
from ringflash.data.batches import Batch
from ringflash.training import neftune
from ringflash.training.compose import compose
from ringflash.training.metrics import read
from ringflash.training.neftune import Neftune
from tests.training.pairs import preference_run
from tests.training.plain_loop import plain_steps
from tests.training.runs import fitted, settings, tiny_qwen3

U64 = np.uint64


def mixed(x):
    """SplitMix64's output function, in numpy's unsigned integers."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def plain_noise(seed, first, tokens, length, width, alpha):
    """The noise [tokens, width] of consecutive tokens of a document, float64. first: the first one's number."""
    gamma = U64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        numbers = np.arange(first + 1, first + tokens + 1, dtype=U64)
        keys = mixed(mixed(np.array(seed, U64) + gamma) + numbers * gamma)
        x = mixed(keys[:, None] + np.arange(1, width + 1, dtype=U64) * gamma)
    uniform = ((x >> U64(41)).astype(np.int64) + 2**22) % 2**23 - 2**22 + 0.5  # of signed integers, in -2^22 to 2^22
    return torch.from_numpy(uniform / 2**22) * alpha / math.sqrt(length * width)


def added(rows, documents, numbers, alpha, seed, width, ranks=1):
    """The noise of whole sequences [rows, length, width], from the shards of some ranks."""
    length = sum(documents[0])
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    mask = IntervalMask.causal(length) & IntervalMask.documents(documents)
    plan = AttentionPlan(mask, Layout.zigzag(length, ranks), Loopback(ranks))
    noise = Neftune(alpha, seed).noise(Batch(tokens, tokens, documents, numbers), plan)
    return plan.unshard(noise.added_to(torch.zeros(*noise.keys.shape, width)))


@pytest.mark.parametrize(("seed", "ranks"), [(0, 1), (7, 4), (2**64 - 1, 3)])
def test_noise_is_a_hash_of_seed_token_and_element_for_any_ranks_and_tiles(monkeypatch, seed, ranks):
    monkeypatch.setattr(neftune, "ELEMENTS", 100)
    documents, numbers = [[5, 19], [24]], [3, 10**6]
    found = added(2, documents, numbers, 5.0, seed, 16, ranks)
    for row, lengths, number in zip(found, documents, numbers, strict=True):
        begin = 0
        for length in lengths:
            expected = plain_noise(seed, number * 24 + begin, length, length, 16, 5.0)
            torch.testing.assert_close(row[begin : begin + length].double(), expected, rtol=1e-6, atol=0)
            begin += length


def test_noise_is_uniform_and_independent_between_elements_tokens_sequences_and_seeds():
    alpha, width, length = 2.0, 64, 512
    first = added(2, [[length]] * 2, [0, 1], alpha, 0, width).double() * math.sqrt(length * width) / alpha
    other = added(1, [[length]], [0], alpha, 1, width).double()[0] * math.sqrt(length * width) / alpha
    n = length * width
    counts = torch.histc(first, bins=16, min=-1, max=1)
    assert counts.sum() == 2 * n
    assert ((counts - 2 * n / 16).pow(2) / (2 * n / 16)).sum() < 38  # chi-square of 15 degrees, p = 0.001
    assert first[0].norm() == pytest.approx(math.sqrt(n / 3), rel=0.01)
    x = first[0]
    pairs = [(x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[1:, 1:], x[:-1, :-1]), (x, first[1]), (x, other)]
    assert all(abs(float((a * b).mean())) < 4 / 3 / math.sqrt(a.numel()) for a, b in pairs)


def noisy_run(text, *others):
    """The settings of a short run with noise, and the model that it starts from."""
    base = tiny_qwen3(text.parent / "base", 384)
    common = ["name=run", "optim.steps=4", "optim.batch=2", "optim.lr=3e-3", "optim.eps=1e-5", "checkpoint.every=2"]
    model = ["model=pretrained", f"model.path={base}", "model.dtype=fp32", "model.neftune_alpha=30"]
    return settings(text, *common, *others, model=model), base


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "others"),
    [(1, ["memory.zero=1", "optim.micro_batch=1"]), (2, ["memory.zero=3", "memory.recompute=true", "optim.batch=4"])],
    ids=["accumulation", "ring-zero-3"],
)
def test_a_run_is_that_of_a_plain_loop_with_noise_and_resumes_bit_for_bit(ranks, text, size, others):
    run, base = noisy_run(text, *others)
    error, printed = ranks.run(fitted, size, run)[0]
    assert error is None
    assert "; NEFTune with alpha 30\n" in printed
    folder, config = text.parent / "runs" / "run", compose(run)[0]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")

    def embedded(tokens, number, begin):
        first = number * config.data.sequence_length + begin
        noise = plain_noise(config.seed, first, len(tokens), len(tokens), 32, 30.0)
        return model.get_input_embeddings()(tokens) + noise.float()

    records = [record for record in read(folder / "metrics.jsonl") if "gradient_norm" in record]
    for record, figures in zip(records, plain_steps(model, config, embedded), strict=True):
        assert (record["loss"], record["gradient_norm"]) == pytest.approx(figures, rel=1e-5)
    trained = (folder / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert ranks.run(fitted, size, [*run, "resume=auto"])[0][0] is None
    assert (folder / "model" / "model.safetensors").read_bytes() == trained


@pytest.mark.ranks
def test_evaluation_has_no_noise(ranks, text):
    found = []
    for alpha in (30, 0):
        run, _ = noisy_run(text, f"name=alpha-{alpha}", f"model.neftune_alpha={alpha}", "optim.steps=1")
        assert ranks.run(fitted, 1, run)[0][0] is None
        found.append(read(text.parent / "runs" / f"alpha-{alpha}" / "metrics.jsonl"))
    (before, first, *_), (quiet_before, quiet, *_) = found
    assert before["held_out_loss"] == quiet_before["held_out_loss"]
    assert first["loss"] != pytest.approx(quiet["loss"], rel=1e-4)


@pytest.mark.ranks
def test_the_reference_of_preferences_has_no_noise(ranks, pair_folder):
    margins = []
    for name in ("false", "true"):
        run = preference_run(pair_folder, "model.neftune_alpha=30", f"name={name}", "optim.steps=1")
        assert ranks.run(fitted, 1, [*run, f"preference.precompute_ref_log_probs={name}"])[0][0] is None
        records = read(pair_folder / "runs" / name / "metrics.jsonl")
        assert records[0]["held_out_loss"] == pytest.approx(math.log(2), rel=1e-6)
        margins.append(records[1]["rewards/margins"])
    assert margins[0] == pytest.approx(margins[1], rel=1e-4)
    assert abs(margins[0]) > 1e-3
