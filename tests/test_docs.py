"""What the documentation shows is true: its examples run, its links lead somewhere, the README is short."""

import doctest
import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig

from ringflash import Loopback, ProcessRing
from ringflash.models import ring_inputs
from tests import forked
from tests.models.cases import loss_and_gradients, tiny

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INTEGRATIONS = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SHOWN = [  # every module with an example in a docstring
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("ringflash", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}  # of examples


def example(beginning: str, page: str = README) -> str:
    """The Python example of a page, by default the README, that begins so."""
    found = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if code.startswith(beginning)]
    assert len(found) == 1, f"{len(found)} examples begin with {beginning!r}"
    return found[0]


def on_ranks(folder: Path, code: str, ranks: int, *arguments: str) -> str:
    """The stdout of an example that torchrun starts on ranks of the CPU, with its arguments."""
    (folder / "example.py").write_text(code, encoding="utf-8")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    ran = forked.run([*launcher, "example.py", *arguments], cwd=folder, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("name", SHOWN)
def test_examples_in_docstrings_give_what_they_show(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_worked_examples_of_docs_why_give_what_they_show():
    result = doctest.testfile(str(ROOT / "docs" / "why.md"), module_relative=False)
    assert result.attempted >= 10
    assert result.failed == 0


def test_the_readmes_torch_example_runs(capsys):
    exec(example("import torch\n"), {})
    assert "hop 3" in capsys.readouterr().out


def test_the_readmes_transformers_example_gives_the_loss_of_one_rank_on_two(tmp_path):
    code = example("# Save as example.py")
    assert "torchrun --nproc-per-node 2 example.py" in code
    printed = on_ranks(tmp_path, code, 2)
    losses = re.findall(r"rank \d: loss ([\d.]+)", printed)
    assert len(losses) == 2, printed

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **SHAPE), attn_implementation="sdpa")
    documents = torch.randint(256, (1, 1024)).split([400, 624], dim=1)
    summed = sum(model(input_ids=x, labels=x).loss.item() * (x.shape[1] - 1) for x in documents)
    expected = f"{summed / (1024 - 2):.4f}"
    assert losses == [expected, expected]


@pytest.mark.parametrize("wrapped", ["ddp", "fsdp"])
def test_the_loop_of_docs_integrations_trains_on_two_ranks_as_a_plain_loop_on_one(tmp_path, wrapped):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **SHAPE), attn_implementation="sdpa")
    optimizer, expected = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(3):
        tokens = torch.randint(256, (1, 1024), generator=torch.Generator().manual_seed(step))
        summed = sum(model(input_ids=x, labels=x).loss * (x.shape[1] - 1) for x in tokens.split([400, 624], dim=1))
        loss = summed / (1024 - 2)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected += [loss.item(), norm.item()]
    printed = on_ranks(tmp_path, example("# Save as loop.py", INTEGRATIONS), 2, wrapped)
    found = re.findall(r"step \d: loss ([\d.]+), gradient norm ([\d.]+)", printed)
    assert [float(x) for pair in found for x in pair] == pytest.approx(expected, abs=1e-4)


def test_the_own_model_of_docs_integrations_has_the_loss_and_gradients_of_plain_attention(tmp_path, capsys):
    code = example("# Save as own.py", INTEGRATIONS)
    found = on_ranks(tmp_path, code, 2)
    for ours, plain in (
        ("ring_attention(q, k, v, plan)", "attention(q, k, v)"),
        ('"nccl" if gpu else "gloo"', '"gloo", store=dist.HashStore(), rank=0, world_size=1'),
    ):
        assert ours in code
        code = code.replace(ours, plain)

    def attention(*of_tokens):
        by_head = (x.transpose(1, 2) for x in of_tokens)
        return torch.nn.functional.scaled_dot_product_attention(*by_head, is_causal=True).transpose(1, 2)

    exec(code, {"attention": attention})
    numbers = [[float(x) for x in re.findall(r"\d+\.\d{4}", text)] for text in (found, capsys.readouterr().out)]
    assert len(numbers[1]) == 2
    assert numbers[0] == pytest.approx(numbers[1] * 2, abs=1e-4)


def test_the_trainer_of_docs_integrations_gives_the_losses_of_one_rank_on_two(tmp_path):
    code = example("# Save as trainer.py", INTEGRATIONS)
    found = [re.findall(r"'(?:loss|grad_norm)': '[\d.]+'", on_ranks(tmp_path, code, ranks)) for ranks in (1, 2)]
    assert len(found[0]) == 6
    assert found[0] == found[1]


def on_two_rings(code):
    """The loss and the gradients' norm of the example of several rings, with a row of tokens for each ring."""
    model, ranks = tiny("llama"), dist.get_world_size()
    rows = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(1))
    names = {"model": model, "rings": 2, "ranks": ranks, "device": torch.device("cpu"), "ring_inputs": ring_inputs}
    names |= {"init_device_mesh": init_device_mesh, "ProcessRing": ProcessRing, "torch": torch, "dist": dist}
    before, after = code.split("...")
    exec(before, names)
    names["tokens"] = rows[names["mesh"]["dp"].get_local_rank()][None]
    exec("#" + after, names)
    gradients = [p.grad for p in model.parameters()]
    for x in [names["loss"].data, *gradients]:
        dist.all_reduce(x)
    expected, of_one = loss_and_gradients(tiny("llama"), ring_inputs(rows, labels=rows, ring=Loopback(1)))
    errors = [(x / ranks - y).norm() / y.norm() for x, y in zip(gradients, of_one.values(), strict=True)]
    return max([(names["loss"] - expected).abs() / expected, *errors]).item()


@pytest.mark.ranks
def test_the_example_of_several_rings_has_the_loss_and_gradients_of_one_rank(ranks):
    assert max(ranks.run(on_two_rings, 4, example("mesh = init_device_mesh(", INTEGRATIONS))) < 1e-5


def test_the_readme_has_120_lines_at_most():
    assert len(README.splitlines()) <= 120


def test_the_readme_opens_with_context_parallelism():
    assert "context parallel" in README.splitlines()[0].lower()


def test_every_path_that_the_readme_names_exists():
    named = re.findall(r"(?:ringflash|configs|launch|benchmarks|docs|tests)/[\w./-]*\w", README)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_files_and_headings_that_exist(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, heading = link.partition("#")
        path = ROOT / page.parent / target if target else ROOT / page
        outside = link.startswith(("http://", "https://"))
        if not outside and not (path.exists() and (not heading or heading in _headings(path))):
            broken.append(link)
    assert broken == []


def _headings(path: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_committed_results_hold_no_profiler_spans():
    results = sorted((ROOT / "docs" / "measured").glob("*.json"))
    assert results
    assert [path.name for path in results if '"spans"' in path.read_text(encoding="utf-8")] == []
