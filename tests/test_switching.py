"""docs/switching.md is true: its example runs, masks equal mask_mods, and layouts equal those of other libraries."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.experimental._context_parallel import _HeadTailLoadBalancer
from torch.nn.attention.flex_attention import create_mask

from ringflash import IntervalMask, Layout

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "switching.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]*\b[qk]\b[^`]*)`[^|`]*\| `(Interval[^`]*)` \|$", PAGE, re.MULTILINE)
S = 16


def test_every_mask_of_the_table_is_compared():
    assert len(ROWS) == len(
        re.findall(r"^\|.*\| `IntervalMask.*` \|$", PAGE.split("## FlexAttention")[1], re.MULTILINE)
    )


@pytest.mark.parametrize(("returned", "made"), ROWS, ids=[returned for returned, _ in ROWS])
def test_a_mask_equals_the_mask_mod_beside_it(returned, made):
    doc = torch.tensor([0] * 2 + [1] * 9 + [2] * 5)
    start, end = torch.tensor([0, 2, 11])[doc], torch.tensor([2, 11, 16])[doc]
    names = {"doc": doc, "start": start, "end": end, "S": S, "torch": torch, "IntervalMask": IntervalMask}
    expected = create_mask(
        lambda b, h, q, k: eval(returned.replace("\\|", "|"), names | {"q": q, "k": k}), 1, 1, S, S, "cpu"
    )
    mask = eval(made, names)
    masks = mask if isinstance(mask, tuple) else (mask,)
    assert torch.equal(sum(x.dense() for x in masks).bool(), expected[0])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layouts_give_ranks_the_tokens_that_other_libraries_give_them(ranks):
    length = 4 * ranks
    tokens = torch.arange(length)
    runs = tokens.chunk(2 * ranks)
    zigzag, striped, contiguous = (
        [named(length, ranks).positions(rank).tolist() for rank in range(ranks)]
        for named in (Layout.zigzag, Layout.striped, Layout.contiguous)
    )
    assert zigzag == [torch.cat([runs[r], runs[-1 - r]]).tolist() for r in range(ranks)]
    assert [token for held in zigzag for token in held] == _HeadTailLoadBalancer(
        length, ranks, "cpu"
    )._generate_indices().flatten().tolist()
    assert striped == [tokens[r::ranks].tolist() for r in range(ranks)]
    assert contiguous == [x.tolist() for x in tokens.chunk(ranks)]


def test_the_example_prints_what_it_says(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})
    assert f"# {capsys.readouterr().out}" in code
