"""docs/fine-tuning.md and docs/data.md run as pasted, with a tiny model instead of the one that is downloaded."""

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from tests import forked
from tests.data.chat_cases import SMOLLM2, chat_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PAGES = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("fine-tuning", "data"))


def blocks(language):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGES, re.DOTALL | re.MULTILINE)
    return [code for of, code in found if of == language]


def run(command, folder):
    """What a command prints in a folder from which the checkout's programs can be started."""
    python, *arguments = shlex.split(command.replace("\\\n", ""))
    assert python == "python", command
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = forked.run([sys.executable, *arguments], cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture
def folder(tmp_path):
    """A folder with the programs, a tiny chat model called smollm2, and a file of tokens."""
    for name in ("launch", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    tokenizer = chat_tokenizer(SMOLLM2, eos="<|im_end|>")
    tokenizer.save_pretrained(tmp_path / "smollm2")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=320, max_position_embeddings=8192, **shape))
    model.save_pretrained(tmp_path / "smollm2")
    (tmp_path / "tokens").mkdir()
    record = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "position_ids": [0, 1, 2]}
    (tmp_path / "tokens" / "a.jsonl").write_text(json.dumps(record))
    return tmp_path


@pytest.mark.timeout(900)
def test_every_command_and_program_of_the_pages_runs(folder):
    programs = {re.search(r"# Save as (\w+\.py)", code)[1]: code for code in blocks("python")}
    assert [*programs] == ["conversations.py", "ask.py", "preferences.py"]
    for name, code in programs.items():
        (folder / name).write_text(code, encoding="utf-8")
    outputs = ("training ", "held-out ", "adapters ")
    download, train, best, lora, qlora, *others = [block for block in blocks("") if not block.startswith(outputs)]
    assert download.startswith("hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir smollm2\n")
    assert len(others) == 3
    run("python conversations.py", folder)
    run("python preferences.py", folder)
    printed = run(train, folder)
    assert re.search(r"^training +380 documents of [\d,]+ tokens, [\d,]+ of them predicted, in \d+ seq", printed, re.M)
    assert (folder / "runs" / "additions" / "model" / "model.safetensors").exists()
    run("python ask.py", folder)
    assert "rank: 16" in run(lora, folder)
    if importlib.util.find_spec("bitsandbytes"):
        assert "quantize_base: nf4" in run(qlora, folder)
    expected = ("keep_best: true", "preferences: true", "field: input_ids", "field: input_ids")
    for command, setting in zip([best, *others], expected, strict=True):
        assert setting in run(command, folder)
