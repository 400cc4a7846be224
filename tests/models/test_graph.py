"""step_graph gives the tokens of a model's own forwards, and leaves alone what cannot be a graph.

On the CPU nothing can be recorded. There a stand-in for the graph runs the forward again at each replay, which tests
what the host does around a replay: which numbers change, and which rows move.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ringflash.models import FusedConfig, RingCache, fuse_layers, graph, prefill, step_graph
from ringflash.ring import cache_plan
from tests.models.cases import DYNAMIC, tiny
from tests.models.test_cache import TOKENS, generate

FAMILIES = ("llama", "gemma2", "mistral", "gpt_oss", "deepseek_v3")
BEYOND = {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}
NEW = 20
READ = 30


@pytest.fixture
def recorded(monkeypatch):
    """The _Steps that were made; windows move their rows every four tokens."""
    made = []

    class Kept(graph._Steps):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(graph, "_Steps", Kept)
    monkeypatch.setattr(cache_plan, "SPARE", 4)
    return made


@pytest.fixture
def stand_in(recorded, monkeypatch):
    """A graph's stand-in: a replay reads and writes the same tensors as the forward before it."""

    def record(steps):
        steps.out = steps._run()

        def replay():
            steps.out.logits.copy_(steps._run().logits)

        steps.replay = replay

    monkeypatch.setattr(graph._Steps, "_record", record)
    monkeypatch.setattr(graph, "_refusal", lambda model, cache: None)
    return recorded


def answers(model, tokens, prompts=((11, 0), (5, 3), (11, 0)), graphed=True, **graph_options):
    """New tokens after prompts on one document; each prompt repeats some of the document's tokens."""
    cache = RingCache(model, 100, chunk=2, rope_length=100)
    prefill(model, tokens[:, :READ], cache)
    state, found = cache.snapshot(), []

    def all_prompts():
        for count, first in prompts:
            prompt = torch.cat([tokens[:, :READ], tokens[:, first : first + count]], dim=1)
            found.append(generate(model, prompt, cache, max_new_tokens=NEW).cpu())
            cache.restore(state)

    if graphed:
        with step_graph(model, cache, **graph_options):
            all_prompts()
        assert "forward" not in model.__dict__
    else:
        all_prompts()
    return torch.cat(found)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_replays_give_the_tokens_of_forwards(stand_in, model_type):
    model = tiny(model_type).eval()
    assert torch.equal(answers(model, TOKENS), answers(model, TOKENS, graphed=False))
    assert stand_in[0].replays == 3 * (NEW - 1)


def test_a_graph_with_other_logits_is_refused(stand_in, monkeypatch):
    record = graph._Steps._record

    def frozen(steps):
        record(steps)
        steps.replay = lambda: None

    monkeypatch.setattr(graph._Steps, "_record", frozen)
    with pytest.raises(
        RuntimeError, match=r"gives other logits than its forward \(relative error .*without step_graph"
    ):
        answers(tiny("llama").eval(), TOKENS)


def test_what_is_no_step_of_one_token_stays_a_forward(stand_in):
    model = tiny("llama").eval()
    cache, other = RingCache(model, 60), RingCache(model, 60)
    with torch.no_grad(), step_graph(model, cache):
        for begun in (cache, other):
            model(TOKENS[:, :8], past_key_values=begun)
        token = {"input_ids": TOKENS[:, 8:9], "past_key_values": cache}
        for changed in ({"past_key_values": other}, {"input_ids": TOKENS[:, 8:10]}, {"output_hidden_states": True}):
            model(**token | changed)
        assert stand_in[0].replays == 0
        with pytest.raises(ValueError, match="attention_mask hides 1 tokens"):
            model(**token, attention_mask=torch.ones(2, 9).index_fill_(1, torch.tensor([0]), 0)[:1])
        with pytest.raises(RuntimeError, match="without gradients"), torch.enable_grad():
            model(**token)
        expected = model.__dict__["forward"].__wrapped__(TOKENS[:, 8:9], past_key_values=other).logits
        assert expected.shape == model(**token).logits.shape
        assert stand_in[0].replays == 1


def test_a_full_cache_refuses_a_step_with_the_memory_for_it(stand_in):
    model = tiny("llama").eval()
    cache = RingCache(model, 42)
    with (
        step_graph(model, cache),
        pytest.raises(ValueError, match="capacity=42 tokens holds 42, and cannot hold 1 more"),
    ):
        generate(model, TOKENS, cache)


def test_a_cpu_and_several_ranks_are_refused_by_name_and_nothing_changes():
    model = tiny("llama").eval()
    with (
        pytest.warns(UserWarning, match="without a CUDA graph, which needs a GPU, got device cpu"),
        step_graph(model, RingCache(model, 60)),
    ):
        assert "forward" not in model.__dict__
    gpu, reasons = torch.device("cuda", 0), []
    for size in (1, 4):
        cache = SimpleNamespace(ring=SimpleNamespace(device=gpu, size=size))
        with step_graph(model, cache, refused=reasons.append):
            assert "forward" not in model.__dict__
    assert reasons == [
        "needs all weights on cuda:0, got some on cpu",
        "needs one rank, got 4: the exchange of a layer is not part of a graph",
    ]


# -- on a GPU

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


@pytest.mark.parametrize("dtype", [pytest.param(x, marks=on_gpu) for x in (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize(
    ("model_type", "fields"), [("llama", {}), ("llama", BEYOND), ("gemma2", {}), ("mistral", {})],
    ids=["llama", "dynamic RoPE", "gemma2", "mistral"],
)  # fmt: skip
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_recorded_graph_gives_the_tokens_of_forwards(recorded, recwarn, fused, model_type, fields, dtype):
    model, tokens = tiny(model_type, head_dim=32, **fields).eval().to("cuda", dtype), TOKENS.cuda()
    if fused:
        fuse_layers(model, FusedConfig(), model.device)
    expected = answers(model, tokens, graphed=False)
    assert torch.equal(answers(model, tokens), expected)
    assert recorded[0].replays == 3 * (NEW - 1), [str(x.message) for x in recwarn]


@pytest.mark.parametrize("dim", [pytest.param(8, marks=on_gpu)])
def test_a_model_that_waits_for_the_gpu_is_no_graph(recorded, dim):
    model, tokens = tiny("llama", head_dim=dim).eval().cuda(), TOKENS.cuda()  # heads of 8 are plain torch's
    reasons = []
    found = answers(model, tokens, refused=reasons.append)
    assert torch.equal(found, answers(model, tokens, graphed=False))
    assert [reason.split(" (")[0] for reason in reasons] == [
        "needs a model that never waits for the GPU, and this one does"
    ]
    assert recorded[0].replays == 0
