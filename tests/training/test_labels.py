"""A run on conversations, or on tokens with labels, has the loss of a plain transformers loop, on one rank and on two.

The loop takes the documents one by one, then packed as they were under a mask of blocks. The step's batch is the whole
epoch, so that its loss does not depend on the order of the sequences.
"""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ringflash.data import batch, load_corpus
from ringflash.models import build_model
from ringflash.training.compose import compose
from ringflash.training.metrics import read
from tests.data.chat_cases import MARKED, chat, chat_tokenizer
from tests.training.runs import SMALL, fitted

LENGTH = 160
RUN = [
    "data.packing=whole", "data.held_out=0.3", f"data.sequence_length={LENGTH}", "model.dtype=fp32", "optim.steps=2",
    "optim.warmup=0", "optim.lr=1e-2", "evaluation.every=0", "checkpoint.every=0", "logger.mode=disabled", "name=run",
    *SMALL,
]  # fmt: skip


def loss_one_by_one(model, documents):
    """Mean loss of documents (tokens, labels that are not shifted), each alone through transformers' own loss."""
    total, count = 0.0, 0
    for tokens, labels in documents:
        predicted = sum(label != -100 for label in labels[1:])
        if predicted:
            inputs = {"input_ids": torch.tensor(tokens)[None], "labels": torch.tensor(labels)[None]}
            total += model(**inputs).loss.item() * predicted
            count += predicted
    return total / count


def loss_packed(model, sequences):
    """Mean loss of packed sequences: a mask of blocks, and positions that begin again with each document."""
    total, count = 0.0, 0
    for tokens, labels, documents in zip(sequences.tokens, sequences.labels, sequences.documents, strict=True):
        blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in documents)).bool()[None, None]
        positions = torch.cat([torch.arange(n) for n in documents])[None]
        logits = model(input_ids=tokens[None], attention_mask=blocks, position_ids=positions).logits[0]
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


def write_tokens(folder):
    """Sixteen documents of token ids, of which a third to all is predicted. Returns the settings, tokens and labels."""
    generator, documents = np.random.default_rng(0), []
    for i in range(16):
        ids = generator.integers(3, 259, generator.integers(2, LENGTH))
        documents.append((ids.tolist(), np.where(generator.random(len(ids)) < 0.3 + 0.05 * i, ids, -100).tolist()))
    lines = [json.dumps({"input_ids": ids, "labels": labels}) for ids, labels in documents]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return ["data=jsonl", "data.field=input_ids"], documents


def write_chats(folder):
    """Sixteen conversations. Returns the settings, and tokens and labels by transformers' own template and mask."""
    generator = np.random.default_rng(0)
    words = [["he" * generator.integers(1, 8) for _ in range(2 * generator.integers(1, 3))] for _ in range(16)]
    chats = [chat(*(f"{i} {word}" for word in contents)) for i, contents in enumerate(words)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in chats))
    tokenizer = chat_tokenizer(MARKED)
    tokenizer.save_pretrained(folder / "tokenizer")
    rendered = [tokenizer.apply_chat_template(x, return_dict=True, return_assistant_tokens_mask=True) for x in chats]
    masked = [
        (x["input_ids"], [id if seen else -100 for id, seen in zip(x["input_ids"], x["assistant_masks"], strict=True)])
        for x in rendered
    ]
    return ["data=chat", "data.files=[a.jsonl]", f"data.tokenizer={folder}/tokenizer"], masked


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("write", "size"), [(write_tokens, 2), (write_chats, 1), (write_chats, 2)], ids=lambda x: getattr(x, "__name__", x)
)
def test_loss_and_held_out_loss_are_those_of_a_plain_loop(ranks, tmp_path, write, size):
    (tmp_path / "data").mkdir()
    given, documents = write(tmp_path / "data")
    labels_of = {tuple(tokens): labels for tokens, labels in documents}
    paths = [f"data.path={tmp_path}/data", f"data.cache={tmp_path}/cache", f"output_dir={tmp_path}/runs"]
    config, _ = compose([*given, *RUN, *paths])
    corpora = load_corpus(config.data)
    counts = [corpus.epoch_length(LENGTH) for corpus in corpora]
    chosen = [*given, *RUN, *paths, f"optim.batch={counts[0]}", f"evaluation.sequences={counts[1]}"]
    assert ranks.run(fitted, size, chosen)[0][0] is None

    splits = [[tuple(corpus.document(i).tolist()) for i in range(len(corpus))] for corpus in corpora]
    assert sorted(splits[0] + splits[1]) == sorted(labels_of)
    training, held_out = ([(tokens, labels_of[tokens]) for tokens in split] for split in splits)
    torch.manual_seed(config.seed)
    start = build_model(config.model)
    start.set_attn_implementation("sdpa")
    before, first, *_, last = read(tmp_path / "runs" / "run" / "metrics.jsonl")
    assert before["held_out_loss"] == pytest.approx(loss_one_by_one(start, held_out), rel=1e-5)
    assert first["loss"] == pytest.approx(loss_one_by_one(start, training), rel=1e-5)
    packed = batch(corpora[0], seed=config.data.seed, step=0, batch_size=counts[0], length=LENGTH)
    assert first["loss"] == pytest.approx(loss_packed(start, packed), rel=1e-5)
    end = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "run" / "model", attn_implementation="sdpa")
    assert last["held_out_loss"] == pytest.approx(loss_one_by_one(end, held_out), rel=1e-5)
    assert loss_one_by_one(end, training) < 0.99 * first["loss"]


@pytest.mark.ranks
def test_a_step_without_a_label_is_reported_and_an_evaluation_without_one_is_refused(ranks, tmp_path):
    for folder, labelled in (("data", 12), ("held-out", 11)):
        (tmp_path / folder).mkdir()
        ids, none = [*range(3, 3 + LENGTH)], [-100] * LENGTH
        lines = [json.dumps({"input_ids": ids, "labels": ids if i == labelled else none}) for i in range(12 + 1)]
        (tmp_path / folder / "a.jsonl").write_text("\n".join(lines))
    paths = [f"data.path={tmp_path}/data", f"data.cache={tmp_path}/cache", f"output_dir={tmp_path}/runs"]
    settings = ["data=jsonl", "data.field=input_ids", *RUN, *paths, "data.held_out=0"]
    ((error, printed),) = ranks.run(fitted, 1, settings)
    assert error is None
    records = [record for record in read(tmp_path / "runs/run/metrics.jsonl") if "loss" in record]
    empty = [record["step"] for record in records if record["predicted"] == 0]
    assert empty
    assert all(f"step {step}: no token of its batch has a label" in printed for step in empty)
    evaluated = [f"data.evaluation.path={tmp_path}/held-out", "evaluation.sequences=1"]
    ((error, _),) = ranks.run(fitted, 1, [*settings, *evaluated])
    assert error.startswith("evaluation.sequences=1: no token of these held-out sequences has a label")
