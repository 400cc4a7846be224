"""A run on preferences minimises the DPO loss of its pairs, as a plain loop of transformers and peft does."""

import json
import math
import random
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoModelForCausalLM

from ringflash.data import batch, load_corpus
from ringflash.errors import ConfigError
from ringflash.models.lora import WEIGHTS
from ringflash.training.compose import compose
from ringflash.training.metrics import read
from tests.data.chat_cases import SMOLLM2, chat_tokenizer
from tests.training.runs import fitted, settings, tiny_qwen3

STEPS, ROWS, LENGTH = 2, 4, 160
REWARDS = ["rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]


@pytest.fixture
def folder(tmp_path):
    """A small published model with its chat tokenizer, and 40 pairs of texts and of messages of uneven lengths."""
    chat_tokenizer(SMOLLM2, eos="<|im_end|>").save_pretrained(tiny_qwen3(tmp_path / "base", 320))
    draw = random.Random(0)

    def text():
        return "".join(draw.choices("abc .", k=draw.randint(1, 12)))

    records = [{"prompt": text(), "chosen": "x" + text(), "rejected": "y" + text()} for _ in range(30)]
    for _ in range(10):
        prompt = [{"role": "user", "content": text()}]
        answers = ([{"role": "assistant", "content": text()}] for _ in range(2))
        records.append(dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers), strict=True)))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    return tmp_path


def preference_run(folder, *others):
    common = [
        *("data=preferences", f"data.tokenizer={folder}/base", f"data.sequence_length={LENGTH}", "data.held_out=0.1"),
        *("model=pretrained", f"model.path={folder}/base", "model.dtype=fp32", "model.lora.rank=4", "name=run"),
        *(f"optim.steps={STEPS}", f"optim.batch={ROWS}", "optim.lr=3e-3", "preference.beta=0.5"),
    ]
    return [x for x in settings(folder / "pairs", *common, *others, model=[]) if x != "data=text"]


def pairs_of(rows):
    """The pairs of a batch: tokens and labels of the chosen and of the rejected document."""
    for tokens, labels, lengths in zip(rows.tokens, rows.labels, rows.documents, strict=True):
        pieces = [*zip(tokens.split(lengths), labels.split(lengths), strict=True)]
        yield from ((c, r) for c, r in zip(pieces[::2], pieces[1::2], strict=False) if (c[1] != -100).any())


def log_probability(model, tokens, labels):
    found = log_softmax(model(input_ids=tokens[None]).logits[0].double(), -1)
    return found.gather(1, labels.clamp(min=0)[:, None])[labels != -100].sum()


def dpo(model, pair, config):
    """A pair's loss by the formulas of the papers, and its figures."""
    found = [log_probability(model, *document) for document in pair]
    with torch.no_grad(), model.disable_adapter():
        reference = [log_probability(model, *document) for document in pair]
    chosen, rejected = (config.beta * (p - q) for p, q in zip(found, reference, strict=True))
    eps, margin = config.label_smoothing, chosen - rejected
    loss = -logsigmoid(margin) * (1 - eps) - logsigmoid(-margin) * eps
    loss = loss - config.sft_weight * found[0] / (pair[0][1] != -100).sum()
    return loss, torch.stack([(margin > 0).double(), margin, chosen, rejected]).detach()


def plain(config, folder):
    """Losses, rewards and gradient norms of a loop without ringflash, each document alone; and the model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(config.seed)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = peft.get_peft_model(model, lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    optim, figures = config.optim, []
    adamw = torch.optim.AdamW(trained, betas=(optim.beta1, optim.beta2), weight_decay=optim.weight_decay)
    corpus, held_out = load_corpus(config.data)
    for step in range(STEPS):
        rows = batch(corpus, seed=config.data.seed, step=step, batch_size=ROWS, length=LENGTH)
        losses, rewards = zip(*(dpo(model, pair, config.preference) for pair in pairs_of(rows)), strict=True)
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, optim.clip)
        adamw.param_groups[0]["lr"] = optim.learning_rate(step + 1)
        adamw.step()
        adamw.zero_grad()
        figures.append([loss.item(), norm.item(), *torch.stack(rewards).mean(0).tolist()])
    rows = batch(held_out, seed=0, step=0, batch_size=config.evaluation.sequences, length=LENGTH)
    losses, rewards = zip(*(dpo(model, pair, config.preference) for pair in pairs_of(rows)), strict=True)
    return figures, [torch.stack(losses).mean().item(), *torch.stack(rewards).mean(0).tolist()], model


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
             "memory.layer_inputs=host"],
        ),
    ],
    ids=["one-rank", "replicas-smooth-sft", "zero-3-ulysses"],
)  # fmt: skip
def test_losses_rewards_and_adapters_are_those_of_plain_peft(ranks, folder, size, others):
    run = preference_run(folder, *others)
    error, _ = ranks.run(fitted, size, run)[0]
    assert error is None
    config = compose(run)[0]
    figures, held_out, model = plain(config, folder)
    records = read(folder / "runs" / "run" / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    for record, expected in zip(steps, figures, strict=True):
        assert [record[x] for x in ("loss", "gradient_norm", *REWARDS)] == pytest.approx(expected, rel=2e-5, abs=2e-6)
    if not config.preference.sft_weight:
        assert (records[0]["held_out_loss"], steps[0]["loss"]) == pytest.approx((math.log(2),) * 2, abs=1e-6)
    assert abs(steps[-1]["loss"] - steps[0]["loss"]) > 1e-3
    names = ["held_out_loss", *(f"held_out_{x}" for x in REWARDS)]
    assert [records[-1][x] for x in names] == pytest.approx(held_out, rel=1e-4, abs=1e-5)
    expected, found = peft.get_peft_model_state_dict(model), load_file(folder / "runs" / "run" / "adapter" / WEIGHTS)
    assert expected.keys() == found.keys()
    assert max((found[name] - x).abs().max().item() for name, x in expected.items()) < 1e-5


@pytest.mark.ranks
def test_a_resumed_run_is_the_same_bit_for_bit_and_one_of_another_loss_is_refused(ranks, folder):
    run = preference_run(
        folder, "memory.zero=3", "model.lora.dropout=0.2", "model.lora.merge=false", "checkpoint.every=1"
    )
    assert ranks.run(fitted, 2, run)[0][0] is None
    made = folder / "runs" / "run"
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
    ("others", "message"),
    [
        (
            ["model.lora.rank=null"],
            r"data\.preferences=true needs LoRA, such as model\.lora\.rank=16: the model without",
        ),
        (
            ["model.lora.rank=null", "model.lora.path=adapter"],
            r"data\.preferences=true needs new adapters: without that of model\.lora\.path=adapter, the model is not",
        ),
        (
            ["data.preferences=false", "preference.beta=0.2"],
            r"preference\.beta=0\.2 has no effect without data\.preferences=true",
        ),
        (["preference.beta=0"], r"preference\.beta=0\.0 must be above 0 and finite"),
        (["preference.label_smoothing=0.5"], r"preference\.label_smoothing=0\.5 must be 0 or more and below 0\.5"),
        (["preference.sft_weight=-1"], r"preference\.sft_weight=-1\.0 must be 0 or more and finite"),
    ],
    ids=["all weights", "an adapter", "other data", "beta", "smoothing", "sft"],
)
def test_losses_that_are_not_supported_are_refused(tmp_path, others, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        compose(preference_run(tmp_path, *others))
