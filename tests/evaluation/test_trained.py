"""A model that the trainer teaches to copy a needle finds it at 8x its training context, over two ranks.

A needle is three numbers among filler, each from its own set; a question follows the filler, and the answer it.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, SmolLM3Config

from ringflash import ProcessRing
from ringflash.models import RingCache, prefill
from tests.training.runs import fitted

CONTEXT, STEPS, BATCH = 32, 110, 32
QUESTION, FILLER, NUMBERS = 3, range(4, 12), 5
DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# A layer that knows positions within a window, and one without positions, so that none is new at another length.
MODEL = SmolLM3Config(
    vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, initializer_range=0.15, use_sliding_window=True, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"], no_rope_layers=[1, 0], tie_word_embeddings=True,
    max_position_embeddings=8 * CONTEXT, pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip


def document(length, depth):
    """Tokens: filler with a needle at a depth of 0 to 1, the question and the answer's three."""
    text = torch.randint(FILLER.start, FILLER.stop, (length - 3 - 1 - 3,))
    needle = FILLER.stop + NUMBERS * torch.arange(3) + torch.randint(NUMBERS, (3,))
    place = round(depth * len(text))
    return torch.cat([text[:place], needle, text[place:], torch.tensor([QUESTION]), needle])


def write_documents(folder):
    """Documents of the training context, of which the answer is predicted."""
    folder.mkdir()
    with (folder / "documents.jsonl").open("w") as file:
        for depth in torch.rand(STEPS * BATCH // 2).tolist():
            tokens = document(CONTEXT, depth).tolist()
            record = {"input_ids": tokens, "labels": [-100] * (CONTEXT - 3) + tokens[-3:]}
            file.write(json.dumps(record, separators=(",", ":")) + "\n")


def taught(folder):
    """Train a model, which is exported to runs/taught/model."""
    error, _ = fitted([
        "model=pretrained", f"model.path={folder / 'untaught'}", "data=jsonl", f"data.path={folder / 'text'}",
        "data.field=input_ids", f"data.cache={folder / 'cache'}", f"data.sequence_length={CONTEXT}",
        "data.packing=whole", "data.held_out=0", f"output_dir={folder / 'runs'}", "name=taught",
        f"optim.steps={STEPS}", f"optim.batch={BATCH}", f"optim.micro_batch={BATCH}", "optim.lr=7e-3",
        "checkpoint.every=0", "logger.mode=disabled",
    ])  # fmt: skip
    assert error is None, error


def asked(folder):
    """Its answer, and the right one, at each depth of a document of 8x its context, which the ranks share."""
    path = folder / "runs" / "taught" / "model"
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="ring", dtype=torch.float32).eval()
    cache = RingCache(model, 8 * CONTEXT, ring=ProcessRing(), chunk=100)
    torch.manual_seed(1)
    answers = []
    for depth in DEPTHS:
        tokens = document(8 * CONTEXT, depth)[None]
        cache.reset()
        prefill(model, tokens[:, :-4], cache)
        found = model.generate(tokens[:, :-3], past_key_values=cache, max_new_tokens=3, do_sample=False)
        answers.append((found[0, -3:].tolist(), tokens[0, -3:].tolist()))
    return answers


@pytest.mark.ranks
@pytest.mark.slow
def test_a_needle_is_found_at_eight_times_the_training_context(ranks, tmp_path):
    AutoModelForCausalLM.from_config(MODEL).save_pretrained(tmp_path / "untaught")
    write_documents(tmp_path / "text")
    ranks.run(taught, 1, tmp_path)
    for answers in ranks.run(asked, 2, tmp_path):
        assert [found for found, _ in answers] == [right for _, right in answers]
