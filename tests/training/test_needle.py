"""Needles searched during training: cells are those of the exported model, and the run is bit for bit as without."""

import re

import pytest
import torch

from ringflash.errors import ConfigError
from ringflash.evaluation.needle import NeedleConfig, run
from ringflash.models import ModelConfig, read_config
from ringflash.training.evaluation import NeedleConfig as TrainingConfig
from ringflash.training.metrics import read
from tests.generate.test_answers import ALONE
from tests.models.cases import DYNAMIC, GEMMA4_EXPERTS, architecture
from tests.training.runs import fitted, settings

SEARCHES = ["evaluation.needle.every=2", "evaluation.needle.lengths=[120,180]", "evaluation.needle.depths=[100,30]"]
TIMED = ("seconds", "tokens_per_second", "memory_gib", "ring_wait_seconds", "ulysses_wait_seconds")
GRIDS = {
    "one rank": (1, []),
    "a ring of two, weights in shards": (2, ["memory.zero=3", "memory.recompute=true"]),
    "Ulysses": (2, ["parallel.ulysses=2"]),
}


def plain_and_searching(text, others):
    """Two runs of three steps, of which the second searches for needles: torch's random numbers after each."""
    states = []
    for more in (["name=plain"], ["name=searching", *SEARCHES]):
        error, _ = fitted(settings(text, "optim.steps=3", "checkpoint.every=0", *more, *others))
        assert error is None, error
        states.append(torch.get_rng_state())
    return states


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "others"), GRIDS.values(), ids=GRIDS)
def test_searches_change_no_bit_of_a_run_and_find_what_its_model_finds(ranks, text, size, others):
    for without, searching in ranks.run(plain_and_searching, size, text, others):
        assert torch.equal(without, searching)
    runs = [text.parent / "runs" / name for name in ("plain", "searching")]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in runs]
    assert weights[0] == weights[1]
    plain, searching = (
        [{name: x for name, x in r.items() if name not in TIMED} for r in read(folder / "metrics.jsonl")]
        for folder in runs
    )
    found = [{name: r.pop(name) for name in [*r] if name.startswith("needle_")} for r in searching]
    assert plain == searching
    assert [r["step"] for r, cells in zip(searching, found, strict=True) if cells] == [0, 2, 3]
    assert len({cells["needle_loss"] for cells in found if cells}) == 3  # of other weights
    assert (runs[1] / "needle.png").read_bytes().startswith(b"\x89PNG")
    asked = [
        f"model={runs[1] / 'model'}",
        "tokenizer=bytes",
        "lengths=[120,180]",
        "depths=[100,30]",
        f"out={text.parent}",
    ]
    cells = run(NeedleConfig.parse(asked), ALONE)
    assert found[3] == pytest.approx({
        "needle_found": sum(x.found for x in cells) / 4, "needle_loss": sum(x.loss for x in cells) / 4,
        **{f"needle_found/{x.length}-{x.depth}": float(x.found) for x in cells},
        **{f"needle_loss/{x.length}-{x.depth}": x.loss for x in cells},
    })  # fmt: skip


REFUSED = {
    "every": ("every=-1", "every=-1 must be 0 or more"),
    "lengths": ("lengths=[200,0]", r"lengths=\[200,0\] must be 1 or more"),
    "not a list": (
        "lengths=200,300",
        r"lengths=200,300 must be a list of whole numbers, such as .*=\[200,300\]",
    ),
    "not numbers": ("lengths=[1k]", r"lengths=\[1k\] must be a list of whole numbers, such as .*lengths=\[1\]"),
    "no depth": ("depths=[]", r"depths=\[\] must have one depth or more"),
    "depth": ("depths=[0,101]", r"depths=\[0,101\] must be at most 100 percent"),
    "no number": ("needle=hidden", r"needle='hidden' must have \{number\} once"),
    "positions": (
        "lengths=[9000]",
        "lengths=9000 tokens are 9000 positions, more than the 8192 .* by model.extrap",
    ),
    "short": ("lengths=[60]", r"lengths=60 is too short: needle, question and answer are \d+ tokens"),
    "text": ("text=/nowhere", "text=/nowhere cannot be read: No such file or directory"),
}


def errors(given):
    """What runs of these settings raise."""
    return [fitted(one)[0] for one in given]


@pytest.mark.ranks
def test_what_cannot_be_searched_is_refused_in_one_line_before_the_run(ranks, text):
    every = "evaluation.needle.every=2"
    given = [settings(text, every, *f"evaluation.needle.{setting}".split()) for setting, _ in REFUSED.values()]
    (found,) = ranks.run(errors, 1, given)
    for error, (_, message) in zip(found, REFUSED.values(), strict=True):
        assert re.match(rf"evaluation\.needle\.{message}", error), error
    assert not (text.parent / "runs").exists()


@pytest.mark.parametrize(
    ("model_type", "field"), [("gemma4_text", "num_kv_shared_layers=2"), ("diffllama", "model_type=diffllama")]
)
def test_a_model_that_no_cache_takes_is_refused_by_the_setting_that_asks_for_searches(model_type, field):
    model = ModelConfig(architecture=architecture(model_type))
    with pytest.raises(ConfigError, match=rf"^evaluation\.needle\.every=3: {field} is not supported by a RingCache"):
        TrainingConfig(every=3).check(64, model, read_config(model))
    TrainingConfig(every=0).check(64, model, read_config(model))


def test_a_family_is_searched_where_its_layers_share_no_keys():
    model = ModelConfig(architecture=architecture("gemma4_text", **GEMMA4_EXPERTS))
    TrainingConfig(every=3).check(64, model, read_config(model))


def test_lengths_beyond_the_original_positions_are_searched_where_all_layers_have_the_same_rope():
    fields = {"max_position_embeddings": 20, "rope_parameters": DYNAMIC}
    model = ModelConfig(architecture=architecture("llama", **fields))
    TrainingConfig(every=3, lengths=(48,)).check(20, model, read_config(model))
    by_layer = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": DYNAMIC}
    model = ModelConfig(architecture=architecture("gemma3_text", **fields | {"rope_parameters": by_layer}))
    with pytest.raises(
        ConfigError, match=r"^evaluation\.needle\.lengths=48: .*rope_type=dynamic depends on a document's"
    ):
        TrainingConfig(every=3, lengths=(48,)).check(20, model, read_config(model))
