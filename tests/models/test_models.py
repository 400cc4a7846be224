"""A Hugging Face model on the ring computes what it computes with its own attention, or refuses by name."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ringflash import IntervalMask, Layout, Loopback
from ringflash.errors import ConfigError
from ringflash.models import AttentionConfig, ModelConfig, build_model, read_config, ring_inputs
from ringflash.models.configuration import attention_kernels, check_length
from ringflash.ring.cost import Heads, Layers, Machine, fastest
from tests.models.cases import TINY, loss_and_gradients, tiny


def test_a_model_from_a_folder_has_its_weights(tmp_path):
    model = tiny("qwen3")
    model.save_pretrained(tmp_path)
    loaded = build_model(ModelConfig(path=str(tmp_path), dtype="fp32"))
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation != "ring"


TOKENS = torch.ones(2, 12, dtype=torch.int64)
WRONG_INPUTS = {
    "one row without its dimension": ((TOKENS[0],), {}, r"input_ids must be \[B, S\] .*, got \[12\]"),
    "no row": ((TOKENS[:0],), {}, r"input_ids must be \[B, S\] with a token or more, got \[0, 12\]"),
    "no token": ((TOKENS[:, :0],), {}, r"input_ids must be \[B, S\] with a token or more, got \[2, 0\]"),
    "a list": ((TOKENS.tolist(),), {}, "input_ids must be a tensor of torch.int64 or torch.int32, got list"),
    "floats": ((TOKENS.float(),), {}, r"input_ids must be a tensor of .*, got torch\.float32"),
    "short labels": ((TOKENS, TOKENS[:, 1:]), {}, r"labels \[2, 11\] must have the shape of input_ids, \[2, 12\]"),
    "labels of one row": ((TOKENS, TOKENS[:1]), {}, r"labels \[1, 12\] must have the shape of input_ids, \[2, 12\]"),
    "int32 labels": ((TOKENS, TOKENS.int()), {}, r"labels must be a tensor of torch\.int64, got torch\.int32"),
    "documents too short": ((TOKENS,), {"documents": [5, 6]}, r"sum\(documents\)=11 must be the 12 tokens"),
    "documents too long": ((TOKENS,), {"documents": [5, 8]}, r"sum\(documents\)=13 must be the 12 tokens"),
    "cu_seqlens": ((TOKENS,), {"documents": [0, 5, 12]}, r"=17 .* \(if these are cu_seqlens, .*=cu_seqlens\.diff\(\)"),
    "no documents": ((TOKENS,), {"documents": []}, r"sum\(documents\)=0 must be the 12 tokens"),
    "a short row": ((TOKENS,), {"documents": [[12], [5, 6]]}, r"sum\(documents\[1\]\)=11 must be the 12 tokens"),
    "rows of documents": ((TOKENS,), {"documents": [[12]] * 3}, "documents has lists for 3 rows, input_ids has 2 rows"),
    "a number": ((TOKENS,), {"documents": 12}, "documents must be a list of ints, .*, got 12"),
    "a tensor of floats": ((TOKENS,), {"documents": torch.tensor([5.0, 7.0])}, r"documents must .* got tensor\(\["),
    "an array of booleans": ((TOKENS,), {"documents": np.ones(12, bool)}, r"documents must .* got array\(\["),
    "a negative count": ((TOKENS,), {"documents": [13, -1]}, r"must not be negative, got \[13, -1\]"),
    "a tensor too short": ((TOKENS,), {"documents": torch.tensor([[12, 0], [5, 6]])}, r"sum\(documents\[1\]\)=11"),
    "half a leading token": (
        (TOKENS,), {"leading_tokens": 0.5},
        r"leading_tokens must be a whole number of tokens, got leading_tokens=0\.5",
    ),
    "an array of floats": ((TOKENS.float().numpy(),), {}, "input_ids must be a tensor of .*, got float32"),
    "lists and numbers": ((TOKENS,), {"documents": [12, [12]]}, r"documents must be a list of .* got \[12, \[12\]\]"),
    "a layout that is none": ((TOKENS,), {"layout": "even"}, "layout=even is not one of auto, .*, striped, balanced"),
    "a layout itself": (
        (TOKENS,), {"layout": Layout.zigzag(4096, 2)}, "layout=an object of .*Layout'> is not one of auto"),
    "a kind of ring": ((TOKENS,), {"ring": Loopback}, "ring must be a ProcessRing or a Loopback, got <class"),
    "the size of a ring": ((TOKENS,), {"ring": 4}, "ring must be a ProcessRing or a Loopback, got 4"),
    "fractions": ((TOKENS,), {"documents": [6.0, 6.0]}, r"documents must be a list of ints, .*, got \[6\.0, 6\.0\]"),
}  # fmt: skip


@pytest.mark.parametrize(("tokens", "options", "message"), WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_inputs_that_do_not_fit_are_refused_with_their_argument_and_values(tokens, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ring_inputs(*tokens, **{"ring": Loopback(2)} | options)


def test_an_auto_layout_is_the_fastest_for_the_models_heads_and_windows():
    model, tokens = tiny("gemma2"), torch.randint(1, 97, (1, 96))
    options = {"documents": [90, 6], "config": model.config}
    inputs = [ring_inputs(tokens, tokens, ring=Loopback(4), layout=name, **options) for name in ("auto", "contiguous")]
    machine = Machine.of(torch.device("cpu"), 300.0)
    mask = IntervalMask.causal(96) & IntervalMask.documents([90, 6])
    heads = Heads(query=4, key=2, dim=8, value_dim=8)
    layers = [Layers(mask, heads, 1), Layers(mask & IntervalMask.window(96, left=4), heads, 1)]
    expected = fastest(layers, 4, machine)[1]
    assert torch.equal(inputs[0]["plan"].layout.chunks, expected.chunks)
    losses = [loss_and_gradients(model, x)[0] for x in inputs]
    torch.testing.assert_close(*losses)


WRONG_CONFIGURATIONS = {
    "none": (None, r'layout="auto" needs config=model\.config: '),
    "the model": (tiny("llama"), r"config must be model\.config, .* got LlamaForCausalLM"),
    "fields": (TINY, r"config must be model\.config, .* got dict"),
    "a model without heads": (AutoConfig.for_model("mamba"), r"config\.model_type=mamba is not supported on"),
    "of images and text": (AutoConfig.for_model("gemma3"), r"config\.model_type=gemma3 is not supported on the"),
}


@pytest.mark.parametrize(("config", "message"), WRONG_CONFIGURATIONS.values(), ids=WRONG_CONFIGURATIONS)
def test_an_auto_layout_needs_the_models_configuration(config, message):
    with pytest.raises(ValueError, match=message):
        ring_inputs(TOKENS, ring=Loopback(2), layout="auto", config=config)


def test_packed_documents_in_a_balanced_layout_give_the_loss_of_one_rank():
    tokens, documents = torch.randint(1, 97, (1, 4096)), [3000, 96, 1000]
    options = ({"ring": Loopback(1)}, {"ring": Loopback(4), "layout": "balanced"})
    losses = [tiny("qwen3")(**ring_inputs(tokens, tokens, documents=documents, **o)).loss for o in options]
    plan = ring_inputs(tokens, documents=documents, **options[1])["plan"]
    assert plan.layout.chunks.shape[1] > 2  # not zigzag
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)


DOCUMENTS = {
    "one list for all rows": [[5, 8]],
    "tuples": ((5, 8), (13,)),
    "a tensor": torch.tensor([5, 8]),
    "an array of rows": np.array([[5, 8, 0], [6, 3, 4]], np.uint8),
    "tensors": [torch.tensor([5, 8]), torch.tensor([13])],
    "numbers of tensors": list(torch.tensor([5, 8])),
}


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_any_length_of_int32_tokens_is_shared_by_any_ring(documents):
    tokens = torch.randint(1, 97, (2, 13), dtype=torch.int32)
    losses = [
        tiny("llama")(**ring_inputs(tokens, tokens.long(), ring=Loopback(ranks), documents=documents)).loss
        for ranks in (1, 5, 16)
    ]
    torch.testing.assert_close(losses, losses[:1] * 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": None}, "needs plan="),
        ({"attention_mask": torch.tensor([[1, 1, 0, 0]])}, "attention_mask hides 2 tokens"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"attention_mask \[1, 1, 4, 4\] is not supported"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, r"cu_seq_lens_q is not read .*documents=cu_seq_lens_q\.diff\(\)"),
        ({"kernel": "magic"}, "kernel=magic is not one of"),
    ],
)
def test_a_keyword_that_could_change_the_mask_is_refused(change, message):
    model = tiny("llama")
    tokens = torch.randint(1, 97, (1, 4))
    inputs = ring_inputs(tokens, ring=Loopback(1)) | change
    with pytest.raises(ValueError, match=message):
        model(**inputs)


def test_attention_dropout_is_refused_while_training():
    model = tiny("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        model.train()(**ring_inputs(torch.ones(1, 4, dtype=torch.int64), ring=Loopback(1)))


WRONG_ON_SHARDS = {
    "chunked attention": (
        "llama4_text", {"intermediate_size_mlp": 64, "num_local_experts": 2, "attention_chunk_size": 8},
        r"ring_inputs\(config=model\.config\) .* chunked and linear attention need it$",
    ),
    "convolutions": ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"^config\.model_type=lfm2 is not"),
    "positions of the longest": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 19},
        r"^config\.rope_parameters\.rope_type=dynamic depends on a document's length beyond 19 tokens, .* 20 tokens",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "fields", "message"), WRONG_ON_SHARDS.values(), ids=WRONG_ON_SHARDS)
def test_a_model_that_plain_transformers_built_is_refused_where_shards_would_change_it(model_type, fields, message):
    config = AutoConfig.for_model(model_type, **TINY, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ring")
    tokens = torch.randint(1, 97, (1, 20))
    with pytest.raises(ValueError, match=message):
        model(**ring_inputs(tokens, tokens, ring=Loopback(2)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama4_text", "attention_chunk_size": None}, "attention_chunk_size=None is not supported"),
        ({"model_type": "gpt2"}, "model_type=gpt2 is not supported on the ring: its"),
        ({"model_type": "llama", "hiden_size": 8}, r"hiden_size is .* mean model\.architecture\.hidden_size\?$"),
        ({"model_type": "llama", "typo": 8}, r"^model\.architecture\.typo is not a field of a llama configuration$"),
        ({"model_type": "llama", "slide_window": 8}, r"slide_window is not a field of a llama configuration$"),
        ({"model_type": "mistral", "slide_window": 8}, r"did you mean model\.architecture\.sliding_window\?$"),
        ({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 3}, "num_attention_heads=4 is not"),
        ({"model_type": "qwen3", "num_attention_heads": 0}, "num_attention_heads=0 must be 1 or more"),
        ({"model_type": "llama", "num_key_value_heads": 0}, "num_key_value_heads=0 must be 1 or more"),
        ({"model_type": "llama", "head_dim": 33}, r"^model\.architecture\.head_dim=33 must be even and 2 or more: "),
        ({"model_type": "gpt_oss", "head_dim": 0}, r"^model\.architecture\.head_dim=0 must be 1 or more"),
        ({"model_type": "llama", "hidden_size": 60}, r"head_dim=15 \(hidden_size=60 / num_attention_heads=4\) must"),
        ({"model_type": "llama", "attention_dropout": 0.1}, r"attention_dropout=0\.1 is not supported"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
         "rope_type=spiral is not supported"),
        ({"model_type": "llama", "hidden_size": 64, "num_attention_heads": 6}, "hidden_size=64 is not a multiple of"),
    ],
)  # fmt: skip
def test_a_model_that_would_train_wrongly_is_refused_with_its_field(fields, message):
    architecture = TINY | fields
    if "hidden_size" in fields:
        del architecture["head_dim"]
    with pytest.raises(ConfigError, match=message):
        build_model(ModelConfig(architecture=architecture))


SCALED = {"rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
POSITIONS = {
    "its own": ({}, 64),
    "linear": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 256),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", **SCALED}}, 256),
    "llama3": ({"rope_parameters": {
        "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}}, 256),
    "llama3, of which the model was trained on more": ({"max_position_embeddings": 500, "rope_parameters": {
        "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}}, 500),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "known"), POSITIONS.values(), ids=POSITIONS)
def test_sequences_longer_than_the_models_positions_are_refused_unless_allowed(fields, known):
    architecture = {"model_type": "llama", "max_position_embeddings": 64, **TINY, **fields}
    config = ModelConfig(architecture=architecture)
    hf_config = read_config(config)
    check_length(config, hf_config, known)
    with pytest.raises(ConfigError, match=rf"^data\.sequence_length={known + 1} is more than the {known} positions"):
        check_length(config, hf_config, known + 1)
    check_length(ModelConfig(architecture=architecture, extrapolate_positions=True), hf_config, known + 1)


def test_positions_of_a_folders_model_are_named_with_its_file(tmp_path):
    tiny("llama", max_position_embeddings=64).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config\.json: max_position_embeddings=64, rope_type=llama3"):
        check_length(config, read_config(config), 129)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_under_autocast_attention_takes_what_sdpa_takes(model_type):
    tokens = torch.randint(1, 97, (1, 32))
    ring, sdpa = tiny(model_type), tiny(model_type)
    sdpa.set_attn_implementation("sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        loss = ring(**ring_inputs(tokens, tokens, ring=Loopback(2))).loss
        expected = sdpa(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_a_kernel_that_cannot_run_on_the_device_is_refused_with_its_reason(kernel):
    config = ModelConfig(architecture={"model_type": "llama", **TINY}, dtype="bf16")
    with pytest.raises(ConfigError, match=rf"^attention\.kernel={kernel} .*(got device cpu|Triton's interpreter)"):
        attention_kernels(config, AttentionConfig(kernel), read_config(config), torch.device("cpu"))


@pytest.mark.parametrize("kernel", ["auto", "blocked"])
def test_plain_torch_is_the_kernel_of_a_cpu(kernel):
    config = ModelConfig(architecture={"model_type": "gemma2", **TINY})
    assert attention_kernels(config, AttentionConfig(kernel), read_config(config), torch.device("cpu")) == ["blocked"]


def test_labels_that_are_shifted_already_give_what_labels_give():
    tokens = torch.randint(1, 97, (2, 13))
    shifted = tokens.roll(-1, dims=1)
    shifted[:, [4, 12]] = -100  # the last tokens of documents
    options = {"ring": Loopback(2), "documents": [5, 8]}
    expected, found = ring_inputs(tokens, tokens, **options), ring_inputs(tokens, shift_labels=shifted, **options)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items() if isinstance(x, torch.Tensor))
    assert found["num_items_in_batch"] == expected["num_items_in_batch"] == 2 * 11
    with pytest.raises(ValueError, match="labels and shift_labels were both given"):
        ring_inputs(tokens, tokens, shift_labels=shifted, **options)
    with pytest.raises(ValueError, match=r"^shift_labels \[2, 12\] must have the shape of input_ids, \[2, 13\]"):
        ring_inputs(tokens, shift_labels=shifted[:, 1:], **options)


def test_a_layout_can_be_chosen_by_a_function_of_the_mask():
    masks = []
    tokens = torch.randint(1, 97, (1, 12))
    inputs = ring_inputs(
        tokens, documents=[5, 7], ring=Loopback(2), layout=lambda mask: masks.append(mask) or Layout.striped(12, 2)
    )
    assert inputs["input_ids"].tolist() == [tokens[0, 0::2].tolist(), tokens[0, 1::2].tolist()]
    assert masks[0].area() == 5 * 6 // 2 + 7 * 8 // 2


def test_arrays_of_tokens_give_what_tensors_give():
    tokens = torch.randint(1, 97, (2, 13))
    backwards = tokens.numpy()[:, ::-1].copy()[:, ::-1]
    expected, *others = (ring_inputs(x, x, ring=Loopback(2)) for x in (tokens, tokens.numpy(), backwards))
    for found in others:
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["shift_labels"], expected["shift_labels"])


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gpt_oss"])
def test_a_default_device_is_not_where_plans_are_made(model_type):
    """As after torch.set_default_device("cuda"); here on a device where a plan's own tensors would have no values."""
    model, tokens = tiny(model_type), torch.randint(1, 97, (2, 24))
    options = {"ring": Loopback(2), "documents": [15, 9], "layout": "auto", "config": model.config}
    expected, gradients = loss_and_gradients(model, ring_inputs(tokens, tokens, **options))
    with torch.device("meta"):
        found, others = loss_and_gradients(model, ring_inputs(tokens, tokens, **options))
    assert torch.equal(found, expected)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


def test_positions_begin_again_with_each_document_so_that_rope_keeps_its_digits():
    """A document at 131,008 has fp32's error, hundreds of times less than RoPE has at large positions."""
    where = ring_inputs(torch.ones(1, 2**17, dtype=torch.int64), ring=Loopback(1), documents=[2**17 - 64, 64])
    tokens = torch.randint(1, 97, (1, 64), generator=torch.Generator().manual_seed(0))
    inputs = ring_inputs(tokens, tokens, ring=Loopback(1)) | {"position_ids": where["position_ids"][:, -64:]}
    model = tiny("qwen3")
    _, gradients = loss_and_gradients(model, inputs)
    model.set_attn_implementation("eager")
    _, expected = loss_and_gradients(model.double(), {"input_ids": tokens, "labels": tokens})
    for name, gradient in gradients.items():
        assert (gradient.double() - expected[name]).norm() <= 5e-6 * expected[name].norm(), name


def test_rows_of_other_documents_have_positions_of_their_own():
    tokens = torch.randint(1, 97, (2, 12))
    inputs = ring_inputs(tokens, ring=Loopback(2), documents=[[5, 7], [12]], layout="contiguous")
    assert inputs["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 11],
    ]  # fmt: skip


@pytest.mark.parametrize("window", [2**63 - 1, 2**70])
def test_a_window_longer_than_any_sequence_hides_nothing(window):
    tokens = torch.randint(1, 97, (1, 24))
    inputs = ring_inputs(tokens, tokens, ring=Loopback(2))
    losses = [tiny("mistral", sliding_window=x)(**inputs).loss for x in (None, window)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_token_is_refused(window):
    model = tiny("mistral")
    model.config.sliding_window = window
    with pytest.raises(ValueError, match=rf"sliding_window must be 1 or more tokens, got sliding_window={window}"):
        model(**ring_inputs(TOKENS, ring=Loopback(1)))
    with pytest.raises(ConfigError, match=rf"sliding_window={window} must be 1 or more"):
        tiny("mistral", sliding_window=window)


def test_windows_of_layers_show_leading_tokens_where_ring_inputs_is_asked_to():
    model, tokens = tiny("mistral").eval(), torch.randint(1, 97, (1, 32))
    found = model(**ring_inputs(tokens, ring=Loopback(1), documents=[20, 12], leading_tokens=2)).logits
    i, j = torch.arange(32)[:, None], torch.arange(32)
    document = (i < 20) == (j < 20)
    seen = (j <= i) & document & ((i - j < 7) | (j < 2) | ((j >= 20) & (j < 22)))
    bias = torch.zeros(1, 1, 32, 32).masked_fill(~seen, torch.finfo(torch.float32).min)
    model.set_attn_implementation("eager")
    expected = model(input_ids=tokens, attention_mask=bias, position_ids=torch.arange(32)[None], use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_gives_the_same_gradients():
    """Attention runs as it is between graphs, which are compiled."""
    model, tokens = tiny("llama", num_hidden_layers=1), torch.randint(1, 97, (1, 32))
    inputs = ring_inputs(tokens, tokens, ring=Loopback(2))
    loss, gradients = loss_and_gradients(model, inputs)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    again, compiled = loss_and_gradients(model, inputs)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name], gradient, msg=name)
