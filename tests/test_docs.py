"""What the documentation shows is true: examples in docstrings, the README's code, and the picture."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHOWN = [
    "ringflash",
    "ringflash.mask",
    "ringflash.layout",
    "ringflash.ring.plan",
    "ringflash.ring.cost",
    "ringflash.models.ring_mask",
]


@pytest.mark.parametrize("name", SHOWN)
def test_examples_in_docstrings_give_what_they_show(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readmes_torch_example_runs(capsys):
    code = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    exec(code[0], {})
    assert "hop 3" in capsys.readouterr().out


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"(?:ringflash|configs|launch|benchmarks|docs)/[\w./-]*\w", text)
    assert [path for path in named if not (ROOT / path).exists()] == []
