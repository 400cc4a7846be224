"""Needle in a haystack: each cell is one forward over all tokens, the text is read once, and bad input is named."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch

from ringflash import Loopback
from ringflash.errors import ConfigError
from ringflash.evaluation import haystack
from ringflash.evaluation.haystack import Row, Task, search, task_of
from ringflash.evaluation.needle import NeedleConfig, run
from ringflash.generate.loading import load_encoder
from ringflash.models import RingCache
from tests.generate.test_answers import ALONE, given  # noqa: F401, a fixture
from tests.models.cases import tiny

HAYSTACK = torch.randint(3, 97, (80,), generator=torch.Generator().manual_seed(1)).tolist()
TASKS = {depth: Task([7, 8, x], [9, 10], [x, x + 1]) for depth, x in ((50, 20), (0, 30), (100, 40))}
ROW = Row(HAYSTACK, 60, TASKS)


@pytest.mark.parametrize("size", [1, 2])
def test_a_cell_is_the_loss_of_one_forward_over_all_its_tokens(size):
    eager, ring = tiny("gemma2").eval(), tiny("gemma2").eval()
    eager.set_attn_implementation("eager")
    cells = search(ring, ROW, RingCache(ring, 60, ring=Loopback(size), chunk=8))
    for cell, (depth, task) in zip(cells, TASKS.items(), strict=True):
        text = HAYSTACK[: 60 - 7]
        place = round(len(text) * depth / 100)
        tokens = [*text[:place], *task.needle, *text[place:], *task.question, *task.answer]
        assert (len(tokens), cell.length, cell.depth) == (60, 60, depth)
        with torch.no_grad():
            logits = eager(torch.tensor([tokens])).logits[0, -3:-1]
        assert cell.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, torch.tensor(task.answer)).item())
        assert cell.found == (logits.argmax(-1).tolist() == task.answer)


def test_an_answer_is_found_where_each_of_its_tokens_is_likeliest(monkeypatch):
    model = tiny("llama").eval()
    for likeliest, found in (([20, 21], True), ([20, 22], False)):
        logits = torch.nn.functional.one_hot(torch.tensor(likeliest), 97) * 50.0
        monkeypatch.setattr(model.lm_head, "forward", lambda hidden, logits=logits: logits[None])
        (cell,) = search(model, Row(HAYSTACK, 30, {50: TASKS[50]}), RingCache(model, 30))
        assert cell.found == found
        assert (cell.loss < 1e-3) == found


def test_text_in_front_of_needles_is_read_once(monkeypatch):
    read, prefill = [], haystack.prefill
    monkeypatch.setattr(
        haystack, "prefill", lambda model, ids, cache: read.append(ids.shape[1] - cache.get_seq_length()) or prefill(
            model, ids, cache)
    )  # fmt: skip
    model = tiny("llama").eval()
    search(model, ROW, RingCache(model, 60))
    text, rest = 60 - 7, 3 + 2 - 1  # of the rest, the last token is read with the answer
    assert read == [0, text + rest, 26, text - 26 + rest, text - 26, rest]


def config(given, *more):  # noqa: F811
    asked = [f"model={given / 'model'}", "tokenizer=bytes", f"text={given / 'book.txt'}", f"out={given}"]
    return NeedleConfig.parse([*asked, *more])


def test_the_grid_is_written_as_json_and_as_a_heat_map(given, capsys):  # noqa: F811
    cells = run(config(given, "lengths=[200,900]", "depths=[0,50,100]", "seed=3"), ALONE)
    assert [(x.length, x.depth) for x in cells] == [(n, d) for n in (200, 900) for d in (0, 50, 100)]
    assert json.loads((given / "needle.json").read_text()) == [vars(x) for x in cells]
    assert (given / "needle.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert "found 0 of 6; wrote" in printed.out
    assert printed.err.count("lost") == 6
    assert run(config(given, "lengths=[200,900]", "depths=[0,50,100]", "seed=3"), ALONE) == cells


def test_a_task_asks_for_the_number_of_its_needle(given):  # noqa: F811
    asked = config(given)
    encoder, tokenizer = load_encoder(asked, tiny("llama", vocab_size=384))
    task = task_of(asked, encoder, 4711)
    assert tokenizer.decode(task.needle) == "\nThe secret number of the lighthouse is 4711.\n"
    assert tokenizer.decode([*task.question, *task.answer]) == "\nThe secret number of the lighthouse is 4711"
    assert tokenizer.decode(task.answer) == " 4711"
    assert task.tokens == len(
        "\nThe secret number of the lighthouse is 4711.\n\nThe secret number of the lighthouse is 4711"
    )


BAD = {
    "depths": (["depths=[0,101]"], "depths=[0,101] must be at most 100 percent"),
    "lengths": (["lengths=[100,0]"], "lengths=[100,0] must be 1 or more"),
    "twice": (["depths=[50,50]"], "depths=[50,50] has a number more than once"),
    "no numbers": (["lengths=[1k]"], "lengths=[1k] must be a list of whole numbers, such as 'lengths=[1]'"),
    "no list": (["lengths=200,900"], "lengths=200,900 must be a list of whole numbers, such as 'lengths=[200,900]'"),
    "an empty list": (["depths=[]"], "depths=[] must be a list of whole numbers"),
    "no number": (["needle=hidden"], "needle='hidden' must have {number} once"),
    "no folder": (["out=/nowhere"], "out=/nowhere is not a folder that exists"),
}


@pytest.mark.parametrize(("more", "message"), BAD.values(), ids=BAD)
def test_a_bad_setting_is_named_in_one_line(more, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        NeedleConfig.parse(["model=m", *more])


def test_lengths_that_do_not_fit_are_named_in_one_line_before_any_search(given, capsys):  # noqa: F811
    longest = len(task_of(config(given), load_encoder(config(given), tiny("llama", vocab_size=384))[0],
                          random.Random(0).randrange(10**6, 10**7)).needle)  # fmt: skip
    with pytest.raises(ConfigError, match=f"lengths={longest} is too short: needle, question and answer are"):
        run(config(given, f"lengths=[{longest}]"), ALONE)
    with pytest.raises(ConfigError, match="lengths=2001 tokens are 2001 positions, more than the 2000"):
        run(config(given, "lengths=[200,2001]"), ALONE)
    assert "lost" not in capsys.readouterr().err
