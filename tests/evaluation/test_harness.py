"""RingLM gives lm-eval what one forward over all tokens gives, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ringflash import Loopback, ProcessRing
from tests.data.chat_cases import chat_tokenizer
from tests.models.cases import tiny, with_weights
from tests.pool import needs_gpus, own_device

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance

from ringflash.evaluation import harness
from ringflash.evaluation.harness import RingLM

CONTEXT = "It was a dark and stormy night; the rain fell in torrents."


@pytest.fixture(params=[1, 2])
def lm(request, monkeypatch):
    monkeypatch.setattr(harness, "AT_ONCE", 7)
    model = tiny("gemma2", vocab_size=300, eos_token_id=261)
    return RingLM(model, chat_tokenizer(None), ring=Loopback(request.param), chunk=16, max_gen_toks=6)


def logits_of(tokens):
    model = tiny("gemma2", vocab_size=300, eos_token_id=261).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def asked(kind, *arguments):
    return [Instance(kind, {}, x, i) for i, x in enumerate(arguments)]


def test_loglikelihoods_are_those_of_one_forward(lm):
    pairs = [(CONTEXT, " The end."), (CONTEXT, " A beginning"), ("", "None"), (CONTEXT + "And", " so on and so forth")]
    for (context, continuation), (found, greedy) in zip(
        pairs, lm.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True), strict=True
    ):
        front = lm.tok_encode(context) if context else [lm.eot_token_id]
        tokens = [*front, *lm.tok_encode(continuation)] if not context else lm.tok_encode(context + continuation)
        scores = logits_of(tokens)[len(front) - 1 : -1]
        wanted = torch.tensor(tokens[len(front) :])
        assert found == pytest.approx(float(scores.gather(1, wanted[:, None]).sum()), rel=1e-5)
        assert greedy == bool((scores.argmax(-1) == wanted).all())


def test_a_rolling_loglikelihood_is_of_the_whole_text(lm):
    tokens = [lm.eot_token_id, *lm.tok_encode(CONTEXT)]
    expected = logits_of(tokens)[:-1].gather(1, torch.tensor(tokens[1:])[:, None]).sum()
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (CONTEXT,)))
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_answers_are_greedy_and_end_at_the_first_stop(lm):
    model = tiny("gemma2", vocab_size=300, eos_token_id=261).eval()
    model.set_attn_implementation("eager")
    ids = torch.tensor([lm.tok_encode(CONTEXT)])
    out = model.generate(
        ids, past_key_values=DynamicCache(), max_new_tokens=6, do_sample=False, eos_token_id=261, pad_token_id=261
    )
    expected = lm.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    settings = {"until": [], "do_sample": False}
    assert lm.generate_until(asked("generate_until", (CONTEXT, settings))) == [expected]
    stop = expected[2:4]
    (cut,) = lm.generate_until(asked("generate_until", (CONTEXT, {"until": [stop, ""]})))
    assert cut == expected.split(stop)[0]
    lm.model.generation_config.eos_token_id = [261, int(out[0, ids.shape[1] + 2])]  # as of a chat model's turn
    (ended,) = lm.generate_until(asked("generate_until", (CONTEXT, settings)))
    assert expected.startswith(ended)
    assert len(ended) < len(expected)


def test_what_is_too_long_or_sampled_is_refused(lm):
    lm.max_length = 20
    with pytest.raises(ValueError, match=r"a request of \d+ tokens is longer than max_length=20"):
        lm.loglikelihood(asked("loglikelihood", (CONTEXT, "x")), disable_tqdm=True)
    with pytest.raises(ValueError, match="RingLM decodes greedily, and a task asks for"):
        lm.generate_until(asked("generate_until", ("a", {"do_sample": True})))


def scored_on_a_gpu():
    """Log-likelihoods and an answer of a model whose cache is divided between all GPUs."""
    device = own_device()
    model = with_weights(tiny("gemma2", vocab_size=300, eos_token_id=261, head_dim=64)).to(device)
    lm = RingLM(model, chat_tokenizer(None), ring=ProcessRing(device=device), chunk=16, max_gen_toks=6)
    pairs = asked("loglikelihood", (CONTEXT, " The end."), (CONTEXT, " A beginning"))
    (answer,) = lm.generate_until(asked("generate_until", (CONTEXT, {"until": [], "do_sample": False})))
    return [found for found, _ in lm.loglikelihood(pairs, disable_tqdm=True)], answer


@pytest.mark.gpu
@needs_gpus
def test_two_gpus_score_and_answer_as_one(gpus):
    ((expected, answer),) = gpus.run(scored_on_a_gpu, 1)
    for found, other in gpus.run(scored_on_a_gpu, 2):
        assert found == pytest.approx(expected, rel=1e-4)
        assert other == answer
