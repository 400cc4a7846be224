"""A run on tokens with labels of their own has the loss of a plain loop over the documents, on one rank and on two.

The step's batch is the whole epoch, so that its loss does not depend on the order of the sequences.
"""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ringflash.data import load_corpus, sequences_per_epoch
from ringflash.models import build_model
from ringflash.training.config import compose
from ringflash.training.metrics import read
from tests.training.runs import SMALL, fitted

RUN = [
    "data=jsonl", "data.field=input_ids", "data.held_out=0.3", "data.sequence_length=64", "model.dtype=fp32",
    "optim.steps=2", "optim.warmup=0", "optim.lr=1e-2", "evaluation.every=0", "checkpoint.every=0",
    "logger.mode=disabled", "name=labelled", *SMALL,
]  # fmt: skip


def plain_loss(model, documents):
    """Mean loss of documents (tokens, labels that are not shifted), each alone through transformers' own loss."""
    total, count = 0.0, 0
    for tokens, labels in documents:
        predicted = int((labels[1:] != -100).sum())
        if predicted:
            inputs = {"input_ids": torch.tensor(tokens)[None], "labels": torch.tensor(labels)[None]}
            total += model(**inputs).loss.item() * predicted
            count += predicted
    return total / count


@pytest.fixture
def records(tmp_path):
    """Forty documents of which a third to all is predicted, of the lengths that a sequence of 64 takes and longer."""
    generator = np.random.default_rng(0)
    (tmp_path / "tokens").mkdir()
    with open(tmp_path / "tokens" / "a.jsonl", "w") as file:
        for i in range(40):
            ids = generator.integers(3, 259, generator.integers(2, 50))
            labels = np.where(generator.random(len(ids)) < 0.3 + 0.02 * i, ids, -100)
            file.write(json.dumps({"input_ids": ids.tolist(), "labels": labels.tolist()}) + "\n")
    return tmp_path / "tokens"


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 2])
def test_loss_and_held_out_loss_are_those_of_a_plain_loop_over_the_documents(ranks, records, size):
    folder = records.parent
    paths = [f"data.path={records}", f"data.cache={folder}/cache", f"output_dir={folder}/runs", "data.packing=whole"]
    config, _ = compose([*RUN, *paths])
    corpora = load_corpus(config.data)
    whole = [sequences_per_epoch(corpus, 64) for corpus in corpora]
    chosen = [*RUN, *paths, f"optim.batch={whole[0]}", f"evaluation.sequences={whole[1]}"]
    assert ranks.run(fitted, size, chosen)[0][0] is None

    training, held_out = (
        [(corpus.document(i).astype(int), corpus.targets(i).astype(int)) for i in range(len(corpus))]
        for corpus in corpora
    )
    assert len(training) + len(held_out) == 40
    torch.manual_seed(config.seed)
    start = build_model(config.model)
    start.set_attn_implementation("sdpa")
    run = folder / "runs" / "labelled"
    first, *_, last = read(run / "metrics.jsonl")
    assert first["loss"] == pytest.approx(plain_loss(start, training), rel=1e-5)
    end = AutoModelForCausalLM.from_pretrained(run / "model", attn_implementation="sdpa")
    assert last["held_out_loss"] == pytest.approx(plain_loss(end, held_out), rel=1e-5)
    assert plain_loss(end, training) < 0.99 * first["loss"]
