"""A ring model generates with a RingCache as it does with its own eager attention, on one rank and on several."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from ringflash import Loopback, ProcessRing
from ringflash.models import FusedConfig, RingCache, attention, fuse_layers, prefill, ring_inputs
from tests.models.cases import DYNAMIC, LONGROPE, plain_of, tiny, with_weights

# What a family asks: grouped heads, windows and a softcap, sinks, windows everywhere, MLA, experts, KV heads by layer.
FAMILIES = ("llama", "gemma2", "gpt_oss", "mistral", "deepseek_v3", "qwen3_moe", "mimo_v2_flash")
TOKENS = torch.randint(3, 97, (2, 41), generator=torch.Generator().manual_seed(1))
NEW = 9


def eager(model_type, **fields):
    model = tiny(model_type, **fields)
    model.set_attn_implementation("eager")
    return model


def generate(model, tokens, cache, **options):
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, past_key_values=cache, **settings | options)[:, tokens.shape[1] :]


def generated(ring, model_type, read=30, chunk=12, dim=8, **options):
    """New tokens after a document, of which `read` tokens are prefilled."""
    device = "cpu" if ring is None else ring.device
    model, tokens = tiny(model_type, head_dim=dim).eval().to(device), TOKENS.to(device)
    cache = RingCache(model, TOKENS.shape[1] + NEW, ring=ring, chunk=chunk)
    prefill(model, tokens[:, :read], cache)
    return generate(model, tokens, cache, **options).cpu()


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("size", [1, 2])
def test_logits_of_prefill_and_decoding_are_those_of_one_forward(model_type, size):
    model, cache = tiny(model_type).eval(), None
    with torch.no_grad():
        expected = eager(model_type).eval()(TOKENS).logits
        cache = RingCache(model, 41, ring=Loopback(size), chunk=8)
        prefill(model, TOKENS[:, :30], cache)
        steps = [TOKENS[:, 30:35], *TOKENS[:, 35:].split(1, dim=1)]
        found = torch.cat([model(x, past_key_values=cache, use_cache=True).logits for x in steps], dim=1)
    error = (found - expected[:, 30:]).norm() / expected[:, 30:].norm()
    assert error < 1e-5, f"relative error {error:.1e}"


DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    ]),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_logits_in_16_bits_are_within_the_rule(model_type, device):
    tokens = torch.randint(3, 97, (2, 600), generator=torch.Generator().manual_seed(2)).to(device)
    fields = {"head_dim": 64, "sliding_window": 100, "max_position_embeddings": 600, "rope_parameters": None}
    fields = {name: value for name, value in fields.items() if model_type == "gemma2" or name != "sliding_window"}
    models = [make(model_type, **fields).eval().to(device) for make in (eager, eager, tiny)]
    exact, plain, ours = models[0].double(), models[1].bfloat16(), models[2].bfloat16()
    fuse_layers(ours, FusedConfig(), ours.device)  # on a GPU, as commands do
    with torch.no_grad():
        truth, direct = (model(tokens).logits.double()[:, 500:] for model in (exact, plain))
        for ring in (Loopback(1, device), Loopback(2, device)):
            cache = RingCache(ours, 600, ring=ring, chunk=150)
            prefill(ours, tokens[:, :500], cache)  # tiles of queries
            steps = [tokens[:, 500:590], *tokens[:, 590:].split(1, dim=1)]
            found = torch.cat([ours(x, past_key_values=cache, use_cache=True).logits for x in steps], dim=1)
            error, bound = ((x.double() - truth).norm() / truth.norm() for x in (found, direct))
            assert error <= 2 * bound + 1e-4, f"error {error:.1e}, plain torch {bound:.1e}"


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_generate_gives_eager_attentions_tokens(model_type):
    expected = generate(eager(model_type).eval(), TOKENS, DynamicCache())
    assert torch.equal(generated(None, model_type, read=0), expected)  # generate reads the prompt itself
    assert torch.equal(generated(None, model_type), expected)
    for options in ({}, {"prefill_chunk_size": 7}):
        model = tiny(model_type).eval()
        assert torch.equal(generate(model, TOKENS, RingCache(model, 50), **options), expected)


def test_a_document_that_is_read_in_many_parts_fits_the_capacity():
    """Padding on the same rank each time would leave too few rows on the others."""
    model = tiny("llama").eval()
    cache = RingCache(model, 41, ring=Loopback(4))
    with torch.no_grad():
        for end in range(5, 41, 5):
            prefill(model, TOKENS[:, :end], cache)
        found = model(TOKENS[:, 40:], past_key_values=cache, use_cache=True).logits
        expected = eager("llama").eval()(TOKENS).logits[:, 40:]
    assert (found - expected).norm() < 1e-5 * expected.norm()


LONG = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 20, "sliding_window": None}
LENGTH_DEPENDENT = {
    "longrope": ("phi3", LONG),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 20}),
}


@pytest.mark.parametrize(("model_type", "fields"), LENGTH_DEPENDENT.values(), ids=LENGTH_DEPENDENT)
@pytest.mark.parametrize("read", [12, 30])
def test_logits_have_the_rope_of_a_document_of_the_length_that_the_cache_is_told(model_type, fields, read):
    """Also those of its first 20 tokens, up to which the model's frequencies are others."""
    model = with_weights(tiny(model_type, **fields)).eval()
    cache = RingCache(model, 41, ring=Loopback(2), chunk=8, rope_length=41)
    with torch.no_grad():
        expected = plain_of(model).eval()(TOKENS).logits[:, read:]
        prefill(model, TOKENS[:, :read], cache)
        steps = [TOKENS[:, read:35], *TOKENS[:, 35:].split(1, dim=1)]
        found = torch.cat([model(x, past_key_values=cache, use_cache=True).logits for x in steps], dim=1)
    error = (found - expected).norm() / expected.norm()
    assert error < 1e-5, f"relative error {error:.1e}"


def test_longrope_generates_what_whole_forwards_do_also_where_the_prompt_passes_the_original_length():
    model = with_weights(tiny("phi3", **LONG)).eval()
    plain, expected = plain_of(model).eval(), TOKENS[:, :25]
    with torch.no_grad():
        for _ in range(NEW):
            expected = torch.cat([expected, plain(expected).logits[:, -1:].argmax(-1)], dim=1)
    cache = RingCache(model, 34, rope_length=34)
    prefill(model, TOKENS[:, :12], cache)
    assert torch.equal(generate(model, TOKENS[:, :25], cache), expected[:, 25:])


def test_a_padded_chunk_has_no_position_beyond_the_document():
    """Six ranks read 20 tokens as 24, and transformers' own rule goes by the longest position."""
    plain = plain_of(tiny("llama", rope_parameters=LONGROPE)).eval()
    with torch.no_grad():
        expected = with_weights(plain)(TOKENS[:, :20]).logits[:, 18:]
        plain.set_attn_implementation("ring")
        cache = RingCache(plain, 20, ring=Loopback(6))
        prefill(plain, TOKENS[:, :18], cache)
        found = plain(TOKENS[:, 18:20], past_key_values=cache, use_cache=True).logits
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_generate_one_ranks_tokens(ranks, size):
    expected = greedy_and_sampled()
    for found in ranks.run(greedy_and_sampled_on_a_process, size):
        assert torch.equal(found, expected)


def greedy_and_sampled(ring=None, **fields):
    torch.manual_seed(5)
    options = ({}, {"do_sample": True, "temperature": 2.0})
    return torch.stack([generated(ring, "gemma2", **fields, **option) for option in options])


def greedy_and_sampled_on_a_process():
    return greedy_and_sampled(ProcessRing())


GPUS = min(torch.cuda.device_count(), 4)


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs or more, here are {GPUS}")
def test_gpus_generate_one_gpus_tokens(gpus):
    expected = greedy_and_sampled(Loopback(1, "cuda"), dim=32)
    for found in gpus.run(greedy_and_sampled_on_a_gpu, GPUS):
        assert torch.equal(found, expected)


def greedy_and_sampled_on_a_gpu():
    return greedy_and_sampled(ProcessRing(device=torch.device("cuda", torch.cuda.current_device())), dim=32)


def test_ranks_that_read_different_tokens_are_refused(ranks):
    assert all(ranks.run(reads_its_own, 2))


def reads_its_own():
    """A document of its own, a prompt of its own, and a sample of its own, on each rank."""
    model, ring = tiny("llama").eval(), ProcessRing()
    cache = RingCache(model, 50, ring=ring)
    message = "input_ids, capacity and chunk must be the same on every rank of a ring: each computes all new tokens"
    with pytest.raises(ValueError, match=message):
        prefill(model, TOKENS + ring.rank, cache)
    for shifted, options in ((ring.rank, {}), (0, {"do_sample": True, "temperature": 9.0})):
        cache.reset()
        torch.manual_seed(ring.rank)
        with pytest.raises(ValueError, match=message):
            generate(model, TOKENS + shifted, cache, **options)
    return True


def test_beams_reorder_the_cache():
    options = {"num_beams": 3, "num_return_sequences": 3}
    expected = generate(eager("mistral").eval(), TOKENS, DynamicCache(), **options)
    model = tiny("mistral").eval()
    assert torch.equal(generate(model, TOKENS, RingCache(model, 50), **options), expected)


def test_a_document_answers_several_prompts_without_being_read_again():
    model = tiny("gemma2").eval()
    document, prompts = TOKENS[:, :30], (TOKENS[:, 30:41], TOKENS[:, 20:27], TOKENS[:, 30:41])
    cache = RingCache(model, 60, ring=Loopback(2), chunk=8)
    prefill(model, document, cache)
    state, answers = cache.snapshot(), []
    for prompt in prompts:
        answers.append(generate(model, torch.cat([document, prompt], dim=1), cache))
        cache.restore(state)
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[0], generated(None, "gemma2"))
    assert not torch.equal(answers[0], answers[1])
    assert cache.get_seq_length() == 30


def test_a_snapshot_of_another_cache_or_of_forgotten_tokens_is_refused():
    model = tiny("llama").eval()
    cache, other = (RingCache(model, 60, ring=Loopback(size)) for size in (1, 2))
    states = []
    for end in (10, 20, 30):
        prefill(model, TOKENS[:, :end], cache)
        states.append(cache.snapshot())
    with pytest.raises(ValueError, match="a snapshot of 10 tokens is of another RingCache, or of tokens that this one"):
        other.restore(states[0])
    cache.restore(states[1])
    cache.restore(states[1])
    with pytest.raises(ValueError, match="a snapshot of 30 tokens"):
        cache.restore(states[2])
    cache.restore(states[0])
    cache.reset()
    with pytest.raises(ValueError, match="a snapshot of 10 tokens"):
        cache.restore(states[0])


def test_a_cache_states_its_memory():
    model = tiny("mistral", sliding_window=7)  # 2 layers of 2 KV heads of 8, fp32
    cache = RingCache(model, 1000, chunk=100)
    prefill(model, TOKENS, cache)
    held = sum(x.nbytes for x in cache._stored.values())
    assert held == 2 * cache.nbytes  # batch rows
    assert cache.nbytes == 2 * (6 + 256) * 2 * (8 + 8) * 4
    assert RingCache(tiny("llama"), 1000).nbytes == 2 * 1000 * 2 * (8 + 8) * 4
    # a layer with a window of 7 and 4 KV heads, and one without and 2, of 8 and 10 dimensions
    mimo = RingCache(tiny("mimo_v2_flash"), 1000, chunk=100)
    assert mimo.nbytes == ((6 + 256) * 4 + 1000 * 2) * (8 + 10) * 4


# -- what is refused


def test_what_a_cache_cannot_hold_is_refused_with_the_memory_for_it():
    model = tiny("llama")
    cache = RingCache(model, 40)
    with pytest.raises(ValueError, match=r"41 tokens do not fit a RingCache of capacity=40: one .* takes 0.0 MiB per"):
        prefill(model, TOKENS, cache)
    with pytest.raises(
        ValueError, match=r"holds 0, and cannot hold 41 more: one of capacity=41 takes .* per batch row"
    ):
        generate(model, TOKENS, cache)


def test_what_does_not_fit_a_cache_is_refused_by_name():
    model = tiny("llama")
    with pytest.raises(ValueError, match='needs a model on the ring, got attn_implementation="eager"'):
        RingCache(eager("llama"), 40)
    with pytest.raises(ValueError, match="model must be a transformers model, got NoneType"):
        RingCache(None, 40)
    with pytest.raises(ValueError, match="kernel=fast is not one of auto"):
        RingCache(model, 40, kernel="fast")
    with pytest.raises(ValueError, match="chunk must be 2 or more"):
        RingCache(model, 40, chunk=1)
    with pytest.raises(TypeError, match="ring must be None, a ProcessRing or a Loopback, got 2"):
        RingCache(model, 40, ring=2)
    with pytest.raises(ValueError, match=r"input_ids must be int64 \[B, N\], got \[41\]"):
        prefill(model, TOKENS[0], RingCache(model, 50))
    with pytest.raises(ValueError, match=r"capacity=40: config.rope_parameters.rope_type=longrope depends on a"):
        RingCache(tiny("phi3", **LONG), 40)
    with pytest.raises(ValueError, match="rope_length must be 40 or more"):
        RingCache(tiny("phi3", **LONG), 40, rope_length=30)
    with pytest.raises(ValueError, match=r"capacity=40: .* or call ringflash\.models\.rope_per_document\(model\), and"):
        RingCache(plain_of(tiny("phi3", **LONG), "ring"), 40, rope_length=40)
    with pytest.raises(ValueError, match=r"config.num_kv_shared_layers=2 is not supported by a RingCache"):
        RingCache(tiny("gemma4_text"), 40)
    with pytest.raises(ValueError, match=r"config.model_type=diffllama is not supported by a RingCache"):
        RingCache(tiny("diffllama"), 40)
    with pytest.raises(
        ValueError, match=r"config.model_type=llama4_text is not supported by a RingCache: .* no chunks"
    ):
        RingCache(tiny("llama4_text"), 40)


def test_calls_that_would_come_out_wrong_are_refused():
    model = tiny("llama")
    with pytest.raises(ValueError, match=r"needs plan=.* to generate, give past_key_values=RingCache"):
        generate(model, TOKENS, DynamicCache())
    mask = torch.ones_like(TOKENS).index_fill(1, torch.tensor([0]), 0)
    with pytest.raises(ValueError, match="attention_mask hides 2 tokens"):
        generate(model, TOKENS, RingCache(model, 50), attention_mask=mask)
    with pytest.raises(RuntimeError, match="a RingCache is for generating, without gradients"):
        model(TOKENS, past_key_values=RingCache(model, 50))
    prefill(model, TOKENS, cache := RingCache(model, 50))
    with torch.no_grad(), pytest.raises(ValueError, match=r"of 2 batch rows of torch\.float32 cannot take 1 rows"):
        model(TOKENS[:1, :2], past_key_values=cache)
    inputs = ring_inputs(TOKENS, ring=Loopback(1)) | {"past_key_values": RingCache(model, 50)}
    with torch.no_grad(), pytest.raises(ValueError, match="plan= and past_key_values=RingCache were both given"):
        model(**inputs)
    with pytest.raises(NotImplementedError, match="cannot be cropped"):
        cache.crop(-1)


def test_a_cache_refuses_layers_whose_mask_is_more_than_a_window(monkeypatch):
    model = tiny("llama").eval()
    monkeypatch.setattr(attention, "_only_windowed", lambda mask_function, window: False)
    with torch.no_grad(), pytest.raises(ValueError, match="neither causal nor a sliding window alone"):
        model(TOKENS[:1, :8], past_key_values=RingCache(model, 40), use_cache=True)
