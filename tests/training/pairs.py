"""Short runs on preferences: a tiny model, and pairs of texts and of messages of uneven lengths."""

import json
import random

from tests.data.chat_cases import SMOLLM2, chat_tokenizer
from tests.training.runs import settings, tiny_qwen3

STEPS, ROWS, LENGTH = 2, 4, 160
ALL_WEIGHTS = ["model.lora.rank=null", "optim.optimizer=sgd", "optim.lr=0.03", "optim.weight_decay=0"]
PRECOMPUTED = [*ALL_WEIGHTS, "preference.precompute_ref_log_probs=true"]


def write_pairs(folder):
    """Write a small published model with its chat tokenizer, and 40 pairs."""
    chat_tokenizer(SMOLLM2, eos="<|im_end|>").save_pretrained(tiny_qwen3(folder / "base", 320))
    draw = random.Random(0)

    def text():
        return "".join(draw.choices("abc .", k=draw.randint(1, 12)))

    records = [{"prompt": text(), "chosen": "x" + text(), "rejected": "y" + text()} for _ in range(30)]
    for _ in range(10):
        prompt = [{"role": "user", "content": text()}]
        answers = ([{"role": "assistant", "content": text()}] for _ in range(2))
        records.append(dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers), strict=True)))
    (folder / "pairs").mkdir()
    (folder / "pairs" / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))


def preference_run(folder, *others):
    """The settings of a run of STEPS steps on them."""
    common = [
        *("data=preferences", f"data.tokenizer={folder}/base", f"data.sequence_length={LENGTH}", "data.held_out=0.1"),
        *("model=pretrained", f"model.path={folder}/base", "model.dtype=fp32", "model.lora.rank=4", "name=run"),
        *(f"optim.steps={STEPS}", f"optim.batch={ROWS}", "optim.lr=3e-3", "preference.beta=0.5"),
    ]
    return [x for x in settings(folder / "pairs", *common, *others, model=[]) if x != "data=text"]
