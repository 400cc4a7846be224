"""A run on preferences minimises the DPO loss of its pairs, as a plain loop of transformers and peft does."""

import copy
import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM

from ringflash.data import batch, load_corpus
from ringflash.errors import ConfigError
from ringflash.models import read_config
from ringflash.models.lora import WEIGHTS
from ringflash.training.compose import compose
from ringflash.training.metrics import read
from ringflash.training.preferences.formulas import PreferenceConfig, pair_losses
from ringflash.training.preflight import planned
from tests.models.cases import architecture
from tests.training.pairs import ALL_WEIGHTS, LENGTH, PRECOMPUTED, ROWS, STEPS, preference_run
from tests.training.runs import fitted, tiny_model

ON_EXPERTS = "model.lora.experts=[gate_up_proj,down_proj]"
REWARDS = ["rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]


def pairs_of(rows):
    """The pairs of a batch: tokens and labels of the chosen and of the rejected document."""
    for tokens, labels, lengths in zip(rows.tokens, rows.labels, rows.documents, strict=True):
        pieces = [*zip(tokens.split(lengths), labels.split(lengths), strict=True)]
        yield from ((c, r) for c, r in zip(pieces[::2], pieces[1::2], strict=False) if (c[1] != -100).any())


def log_probability(model, tokens, labels):
    found = log_softmax(model(input_ids=tokens[None]).logits[0].double(), -1)
    return found.gather(1, labels.clamp(min=0)[:, None])[labels != -100].sum()


def loss_of(config, found, reference, tokens):
    """A pair's loss by the formulas of the papers, and its rewards, from log p of both answers and their lengths."""
    beta, eps = config.beta, config.label_smoothing
    if config.loss_type in ("sigmoid", "ipo"):
        c, r = (p - q for p, q in zip(found, reference, strict=True))
    else:
        c, r = (p / n for p, n in zip(found, tokens, strict=True))
    if config.loss_type == "ipo":
        loss = (c / tokens[0] - r / tokens[1] - 0.5 / beta) ** 2
    elif config.loss_type == "orpo":
        odds = c.exp() / (1 - c.exp()), r.exp() / (1 - r.exp())
        loss = -found[0] / tokens[0] + beta * torch.log(1 + odds[1] / odds[0])
    else:
        margin = beta * (c - r) - config.simpo_gamma * (config.loss_type == "simpo")
        loss = -logsigmoid(margin) * (1 - eps) - logsigmoid(-margin) * eps
    return loss - config.sft_weight * found[0] / tokens[0], beta * c, beta * r


def compare(model, reference, pair, config):
    """A pair's loss and its figures."""
    found = [log_probability(model, *document) for document in pair]
    with torch.no_grad():
        at_start = [log_probability(reference, *document) for document in pair]
    tokens = [(labels != -100).sum() for _, labels in pair]
    loss, chosen, rejected = loss_of(config, found, at_start, tokens)
    margin = chosen - rejected
    return loss, torch.stack([(margin > 0).double(), margin, chosen, rejected]).detach()


def plain(config, folder):
    """Losses, rewards and gradient norms of a loop without ringflash, each document alone; and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    start = copy.deepcopy(model)  # the reference, a second model
    if config.model.lora.enabled:
        torch.manual_seed(config.seed)
        on = {"target_modules": "all-linear", "target_parameters": config.model.lora.experts}
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, **on))
    trained = [p for p in model.parameters() if p.requires_grad]
    optim, figures = config.optim, []
    if optim.optimizer == "adamw":
        optimizer = torch.optim.AdamW(trained, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    else:
        optimizer = torch.optim.SGD(trained, momentum=optim.beta1, weight_decay=optim.weight_decay)

    def compared(pairs):
        losses, rewards = zip(*(compare(model, start, pair, config.preference) for pair in pairs), strict=True)
        return torch.stack(losses).mean(), torch.stack(rewards).mean(0).tolist()

    corpus, held_out = load_corpus(config.data)
    for step in range(STEPS):
        loss, rewards = compared(
            pairs_of(batch(corpus, seed=config.data.seed, step=step, batch_size=ROWS, length=LENGTH))
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, optim.clip)
        optimizer.param_groups[0]["lr"] = optim.learning_rate(step + 1)
        optimizer.step()
        optimizer.zero_grad()
        figures.append([loss.item(), norm.item(), *rewards])
    rows = batch(held_out, seed=0, step=0, batch_size=config.evaluation.sequences, length=LENGTH)
    loss, rewards = compared(pairs_of(rows))
    return figures, [loss.item(), *rewards], model


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "others"),
    [
        (1, ["memory.zero=0", "optim.micro_batch=4"]),
        (
            4,
            ["memory.zero=1", "parallel.ring=2", "parallel.ulysses=1", "model.lora.dropout=1e-9",
             "preference.label_smoothing=0.1", "preference.sft_weight=0.2"],
        ),
        (
            4,
            ["memory.zero=3", "parallel.ring=2", "parallel.ulysses=2", "optim.micro_batch=2", "memory.recompute=true",
             "memory.layer_inputs=host", "preference.loss_type=ipo", "preference.sft_weight=0.2", ON_EXPERTS],
        ),
        (2, [*PRECOMPUTED, "memory.zero=3", "parallel.ring=2", "preference.label_smoothing=0.1"]),
        (4, [*PRECOMPUTED, "memory.zero=1", "parallel.ring=2", "preference.loss_type=ipo"]),
        (
            2,
            [*ALL_WEIGHTS, "memory.zero=1", "parallel.ring=2", "preference.loss_type=simpo", "preference.beta=2",
             "preference.simpo_gamma=1", "preference.label_smoothing=0.1", "preference.sft_weight=0.2"],
        ),
        (2, [*ALL_WEIGHTS, "memory.zero=3", "parallel.ring=1", "preference.loss_type=orpo"]),
    ],
    ids=["lora", "lora-replicas-smooth-sft", "lora-on-experts-ipo-sft-zero-3-ulysses", "dpo-zero-3", "ipo-replicas",
         "simpo", "orpo-zero-3-replicas"],
)  # fmt: skip
def test_losses_rewards_and_weights_are_those_of_a_plain_loop(ranks, pair_folder, size, others):
    if ON_EXPERTS in others:
        tiny_model(pair_folder / "base", **architecture("qwen2_moe", vocab_size=320))
    run = preference_run(pair_folder, *others)
    error, _ = ranks.run(fitted, size, run)[0]
    assert error is None
    config = compose(run)[0]
    figures, held_out, model = plain(config, pair_folder)
    records = read(pair_folder / "runs" / "run" / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    for record, expected in zip(steps, figures, strict=True):
        assert [record[x] for x in ("loss", "gradient_norm", *REWARDS)] == pytest.approx(expected, rel=2e-5, abs=2e-6)
    assert abs(steps[-1]["loss"] - steps[0]["loss"]) > 1e-3
    names = ["held_out_loss", *(f"held_out_{x}" for x in REWARDS)]
    assert [records[-1][x] for x in names] == pytest.approx(held_out, rel=1e-4, abs=1e-5)
    made = pair_folder / "runs" / "run"
    if config.model.lora.enabled:
        expected, found = peft.get_peft_model_state_dict(model), load_file(made / "adapter" / WEIGHTS)
    else:
        expected, found = dict(model.named_parameters()), load_file(made / "model" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert max((found[name] - x).abs().max().item() for name, x in expected.items()) < 1e-5


@pytest.mark.ranks
def test_a_resumed_run_is_the_same_bit_for_bit_and_one_of_another_loss_is_refused(ranks, pair_folder):
    run = preference_run(
        pair_folder, "memory.zero=3", "model.lora.dropout=0.2", "model.lora.merge=false", "checkpoint.every=1"
    )
    assert ranks.run(fitted, 2, run)[0][0] is None
    made = pair_folder / "runs" / "run"
    expected, records = load_file(made / "adapter" / WEIGHTS), (made / "metrics.jsonl").read_text()
    shutil.rmtree(made / "adapter")
    shutil.rmtree(made / "checkpoints" / f"step-{STEPS:08}")
    error, _ = ranks.run(fitted, 2, [*run, "resume=auto", "preference.beta=0.2"])[0]
    assert error.startswith("preference.beta=0.2 differs from 0.5, with which ")
    assert ranks.run(fitted, 2, [*run, "resume=auto"])[0][0] is None
    found = load_file(made / "adapter" / WEIGHTS)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    before, after = (
        [json.loads(x) for x in text.splitlines()] for text in (records, (made / "metrics.jsonl").read_text())
    )
    names = ("step", "loss", "gradient_norm", *REWARDS, "held_out_loss")
    assert [[x.get(name) for name in names] for x in after] == [[x.get(name) for name in names] for x in before]


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ([], "DPO, beta 0.5; the reference is the model without its adapters"),
        (
            [*PRECOMPUTED, "preference.loss_type=ipo"],
            "IPO, beta 0.5; the reference is the model before training",
        ),
        (["preference.loss_type=simpo"], "SimPO, beta 0.5, simpo_gamma 0.5; without a reference"),
    ],
    ids=["lora", "all weights", "no reference"],
)
def test_the_plan_of_a_run_has_its_loss_and_reference(pair_folder, others, line):
    config = compose(preference_run(pair_folder, *others))[0]
    assert f"loss       {line}" in planned(config, read_config(config.model))


def test_the_loss_of_orpo_is_finite_where_an_answer_has_all_of_the_probability():
    found = torch.tensor([[0.0, -3.0], [-3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    losses, _ = pair_losses(PreferenceConfig(loss_type="orpo"), found, None, torch.ones(2, 2))
    losses.sum().backward()
    assert losses.isfinite().all()
    assert found.grad.isfinite().all()


NO_LORA, NO_REFERENCE = ["model.lora.rank=null"], ["preference.loss_type=simpo"]
BEFORE = ["preference.precompute_ref_log_probs=true"]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            NO_LORA,
            r"preference\.loss_type=sigmoid compares with the model before training: with all weights trained, set "
            r"preference\.precompute_ref_log_probs=true; with new adapters",
        ),
        (
            [*NO_LORA, "model.lora.path=adapter", "preference.loss_type=ipo"],
            r"preference\.loss_type=ipo compares with the model before training: with model\.lora\.path=adapter, set p",
        ),
        (
            [*NO_LORA, *BEFORE, "data.stream=true", "data.held_out=0"],
            r"preference\.precompute_ref_log_probs=true reads all pairs .*: set data\.stream=false",
        ),
        (
            [*NO_LORA, *BEFORE, "model.path=null", "+model.architecture.model_type=llama"],
            r"preference\.precompute_ref_log_probs=true keeps numbers by the weights' digest: set model\.path",
        ),
        (
            [*NO_REFERENCE, *BEFORE],
            r"preference\.precompute_ref_log_probs=true has no effect with .*=simpo: .* of sigmoid, ipo",
        ),
        (
            ["data.preferences=false", "preference.beta=0.2"],
            r"preference\.beta=0\.2 has no effect without data\.preferences=true",
        ),
        (["preference.loss_type=dpo"], r"preference\.loss_type=dpo must be one of sigmoid, ipo, simpo, orpo"),
        (["preference.beta=0"], r"preference\.beta=0\.0 must be above 0 and finite"),
        (["preference.label_smoothing=0.5"], r"preference\.label_smoothing=0\.5 must be 0 or more and below 0\.5"),
        (
            ["preference.loss_type=ipo", "preference.label_smoothing=0.1"],
            r"preference\.label_smoothing=0\.1 has no effect with preference\.loss_type=ipo: .* sigmoid, simpo",
        ),
        (["preference.sft_weight=-1"], r"preference\.sft_weight=-1\.0 must be 0 or more and finite"),
        (
            ["preference.loss_type=orpo", "preference.sft_weight=1"],
            r"preference\.sft_weight=1\.0 has no effect with preference\.loss_type=orpo",
        ),
        ([*NO_REFERENCE, "preference.simpo_gamma=-1"], r"preference\.simpo_gamma=-1\.0 must be 0 or more and finite"),
        (["preference.simpo_gamma=1"], r"preference\.simpo_gamma=1\.0 has no effect with .*=sigmoid: .* of simpo"),
    ],
    ids=["all weights", "an adapter", "streamed", "random weights", "no reference", "other data", "loss_type", "beta",
         "smoothing", "smoothing of ipo", "sft", "sft of orpo", "gamma", "gamma of dpo"],
)  # fmt: skip
def test_losses_that_are_not_supported_are_refused(tmp_path, others, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        compose(preference_run(tmp_path, *others))
