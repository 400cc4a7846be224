"""Linear attention on the ring: what `tests.models.proof` and `tests.training.test_step` do not prove of them."""

from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, ProcessRing
from ringflash.distributed.parallel import ParallelConfig, resolve_parallel
from ringflash.errors import ConfigError
from ringflash.models import AttentionConfig, ModelConfig, RingCache, linear_kernels, read_config, ring_inputs
from ringflash.models.configuration import attention_kernels, experts_of
from ringflash.models.layers import kinds_of_layers, state_heads, state_layers
from tests.models.cases import architecture, loss_and_gradients, plain_of, tiny, with_weights
from tests.pool import needs_gpus, own_device

TOKENS = torch.randint(3, 97, (2, 150), generator=torch.Generator().manual_seed(0))
DOCUMENTS = [[70, 1, 64, 15], [9, 141]]  # of chunks of 64 tokens: more than one, a part of one, exactly one


@pytest.mark.parametrize(
    ("model_type", "ranks", "layout"),
    [
        ("qwen3_5_text", 4, "balanced"),
        ("qwen3_5_text", 8, "striped"),  # which share 12 key heads, and have 3 value heads each
        ("nemotron_h", 4, "striped"),
        ("falcon_h1", 6, "document_local"),
    ],
)
def test_rows_of_other_documents_longer_than_a_chunk_equal_eager_attention(model_type, ranks, layout):
    model = with_weights(tiny(model_type))
    inputs = ring_inputs(TOKENS, TOKENS, documents=DOCUMENTS, ring=Loopback(ranks), layout=layout, config=model.config)
    loss, gradients = loss_and_gradients(model, inputs)
    plain, total = plain_of(model), 0.0
    for row, lengths in zip(TOKENS, DOCUMENTS, strict=True):
        for piece in row.split(lengths):
            logits = plain(input_ids=piece[None], use_cache=False).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum")
    expected = total / inputs["num_items_in_batch"]
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=2e-6, atol=0)
    for name, p in plain.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 2e-5 * p.grad.norm(), name


def test_a_model_off_the_ring_is_what_it_was_before():
    model = with_weights(tiny("qwen3_next"))
    plain = plain_of(model)
    before = plain(input_ids=TOKENS).logits
    model(**ring_inputs(TOKENS, ring=Loopback(2), config=model.config))
    assert torch.equal(plain(input_ids=TOKENS).logits, before)
    assert plain.generate(TOKENS[:, :9], max_new_tokens=2, do_sample=False).shape == (2, 11)


WRONG = {
    "without the configuration": (
        lambda model: ring_inputs(TOKENS, ring=Loopback(2)), "chunked and linear attention need it"),
    "more ranks than value heads divide among": (
        lambda model: ring_inputs(TOKENS, ring=Loopback(16), config=model.config),
        r"linear_num_value_heads=24 with .*key_heads=12 does not divide among the 16 ranks .*parallel\.ring=8"),
    "inputs of another plan": (
        lambda model: ring_inputs(TOKENS, ring=Loopback(2), config=model.config)
        | {"plan": ring_inputs(TOKENS[:, :9], ring=Loopback(2))["plan"]},
        r"hidden_states \[4, 76, 32\] do not fit the plan"),
    "a keyword that could change what tokens see": (
        lambda model: ring_inputs(TOKENS, ring=Loopback(1), config=model.config)
        | {"cu_seq_lens_q": torch.tensor([0, 9])},
        "cu_seq_lens_q is not read by ring attention"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_a_call_that_would_be_wrong_on_shards_is_refused(make, message):
    model = tiny("qwen3_5_text")
    with pytest.raises(ValueError, match=message):
        model(**make(model))


OTHER_MASKS = {
    "prefix": IntervalMask.prefix(150, 9),
    "window": IntervalMask.window(150, left=8),
    "full": IntervalMask.full(150),
    "window and leading tokens": IntervalMask.causal(150).windowed(8, leading_tokens=2),
}


@pytest.mark.parametrize("mask", OTHER_MASKS.values(), ids=OTHER_MASKS)
def test_a_mask_that_a_state_cannot_follow_is_refused(mask):
    model = tiny("qwen3_5_text")
    inputs = ring_inputs(TOKENS, ring=Loopback(2), config=model.config)
    plan = AttentionPlan(mask, Layout.zigzag(150, 2), Loopback(2))
    with pytest.raises(ValueError, match=r"^mask=.* is not causal within documents"):
        model(**inputs | {"plan": plan, "position_ids": plan.position_ids(2)})


def test_masks_by_layer_type_do_not_hide_that_linear_attention_was_not_told(monkeypatch):
    model = tiny("qwen3_5_text")
    inputs = ring_inputs(TOKENS, ring=Loopback(2))
    kind = type(model.model.layers[0].linear_attn)
    monkeypatch.setattr(kind, "forward", getattr(kind.forward, "__wrapped__", kind.forward))
    mask = {"full_attention": inputs["attention_mask"], "linear_attention": None}
    with pytest.raises(ValueError, match=r"qwen3_5_text needs ring_inputs\(config=model\.config\)"):
        model(**inputs | {"attention_mask": mask})


def test_a_layer_of_another_release_of_transformers_is_refused(monkeypatch):
    model = tiny("qwen3_next")
    kind = type(model.model.layers[0].linear_attn)

    def forward(self, hidden_states, **keywords):
        return hidden_states

    monkeypatch.setattr(kind, "forward", forward)
    with pytest.raises(
        ValueError, match=r"Qwen3NextGatedDeltaNet of transformers .* is not the one that ringflash was written for"
    ):
        ring_inputs(TOKENS, ring=Loopback(2), config=model.config)


CONFIGURATIONS = {
    "no attention": (
        "qwen3_5_text", {"layer_types": ["linear_attention"] * 2}, r"layer_types=\[.*\] is not supported: all must be"),
    "another activation": ("qwen3_5_text", {"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
    "another activation of Mamba-2": ("nemotron_h", {"mamba_hidden_act": "gelu"}, "mamba_hidden_act=gelu is not"),
    "heads": (
        "qwen3_5_text", {"linear_num_value_heads": 13},
        "linear_num_value_heads=13 is not divisible by linear_num_key_heads=12"),
    "groups": ("nemotron_h", {"n_groups": 5}, "mamba_num_heads=12 is not divisible by n_groups=5"),
    "a loss of the logits": ("bamba", {"z_loss_coefficient": 0.1}, "z_loss_coefficient=0.1 is not supported"),
    "layers that are not there": ("nemotron_h", {"num_hidden_layers": 5}, "num_hidden_layers=5 is not the 4 layers"),
    "RoPE by length": (
        "bamba", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope_type=dynamic is not"),
}  # fmt: skip


@pytest.mark.parametrize(("model_type", "fields", "message"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_configuration_that_is_not_supported_is_refused_with_its_field(model_type, fields, message):
    with pytest.raises(ConfigError, match=message):
        read_config(ModelConfig(architecture=architecture(model_type, **fields)))


def test_a_hybrid_family_without_linear_attention_or_without_experts_is_read_as_such():
    dense = {"num_local_experts": 0, "layer_types": ["full_attention"] * 2}
    granite = read_config(ModelConfig(architecture=architecture("granitemoehybrid", **dense)))
    assert (state_heads(granite), experts_of(granite)) == (None, (1, 1))
    assert linear_kernels.device_refusal(granite, torch.device("meta")) is None
    with pytest.raises(ConfigError, match="num_experts_per_tok=0 must be 1 or more"):
        read_config(ModelConfig(architecture=architecture("granitemoehybrid", num_experts_per_tok=0)))
    kinds = ["linear_attention", "full_attention", "mlp", "linear_attention"]
    nemotron = read_config(ModelConfig(architecture=architecture("nemotron_h", layer_types=kinds)))
    assert (state_layers(nemotron), experts_of(nemotron)) == (2, (1, 1))
    assert [kind is None for kind in kinds_of_layers(nemotron)] == [True, False, True, True]


def version_or_error(found):
    if found is None:
        raise metadata.PackageNotFoundError("fla-core")
    return found


def test_the_trainer_refuses_ranks_without_heads_a_gpu_without_kernels_and_a_cache(monkeypatch):
    settings = ModelConfig(architecture=architecture("qwen3_5_text"), dtype="bf16")
    config = read_config(settings)
    for parallel in (ParallelConfig(), ParallelConfig(ring=8, ulysses=2)):
        with pytest.raises(ConfigError, match=r"^model_type=qwen3_5_text: .*key_heads=12 does not divide among the 16"):
            resolve_parallel(parallel, config, 4096, 16, 16)
    assert resolve_parallel(ParallelConfig(ring=8, ulysses=1), config, 4096, 16, 16)[0].ulysses == 1  # two replicas
    for found, message in {"0.5.9": r"has fla-core 0\.5\.9: pip install", None: "has none: pip install"}.items():
        monkeypatch.setattr(linear_kernels.metadata, "version", lambda name, found=found: version_or_error(found))
        with pytest.raises(ConfigError, match=message):
            attention_kernels(settings, AttentionConfig(), config, torch.device("meta"))
    monkeypatch.setattr(linear_kernels.metadata, "version", lambda name: "0.10.0")
    assert attention_kernels(settings, AttentionConfig(), config, torch.device("meta")) == ["blocked"]
    with pytest.raises(ConfigError, match=r"qwen3_5_text is not supported in fp32 on GPUs.* \(model\.dtype=bf16\)"):
        attention_kernels(replace(settings, dtype="fp32"), AttentionConfig(), config, torch.device("meta"))
    with pytest.raises(ConfigError, match=r"qwen3_5_text is not supported with .*\(attention\.deterministic=true\)"):
        attention_kernels(settings, AttentionConfig(deterministic=True), config, torch.device("meta"))
    with pytest.raises(ValueError, match="model_type=qwen3_5_text is not supported by a RingCache"):
        RingCache(tiny("qwen3_5_text"), capacity=64)


@pytest.mark.parametrize(
    ("capability", "triton", "tilelang", "refused"),
    [
        ((9, 0), "3.6.0", None, True),
        ((9, 0), "3.7.0", None, True),
        ((9, 0), "3.7.1", None, False),
        ((9, 0), "3.6.0", "tilelang", False),
        ((8, 0), "3.6.0", None, False),
        ((10, 0), "3.6.0", None, False),
    ],
)
def test_a_triton_that_miscompiles_the_backward_is_refused_on_hopper_alone(
    monkeypatch, capability, triton, tilelang, refused
):
    monkeypatch.setattr(linear_kernels.metadata, "version", lambda name: "0.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("triton.__version__", triton)
    monkeypatch.setattr(linear_kernels, "find_spec", {"tilelang": tilelang}.get)
    reason = linear_kernels.device_refusal(tiny("qwen3_5_text").config, torch.device("cuda"), torch.bfloat16)
    assert (reason is not None) == refused
    assert not refused or "needs triton 3.7.1 or newer for linear attention on device cuda" in reason
    assert not refused or f"this environment has triton {triton}" in reason


def test_a_layer_refuses_gradients_that_its_kernels_do_not_give(monkeypatch):
    monkeypatch.setattr(linear_kernels, "_has_kernels", lambda x: True)
    model = tiny("qwen3_5_text")
    inputs = ring_inputs(TOKENS, ring=Loopback(1), config=model.config)
    with pytest.raises(ValueError, match="linear attention is not supported in fp32 on GPUs"):
        model(**inputs)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="linear attention is not supported with deterministic=True"),
    ):
        model(**inputs, deterministic=True)


def test_a_whole_model_of_images_and_text_is_refused_where_it_is_called():
    text = {name: x for name, x in architecture("qwen3_5_text").items() if name != "model_type"}
    config = AutoConfig.for_model(
        "qwen3_5", text_config=text, vision_config={"depth": 1, "hidden_size": 16, "num_heads": 2}
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation={"text_config": "ring"})
    with pytest.raises(ValueError, match=r"Qwen3_5.* is not supported on the ring"):
        model(**ring_inputs(TOKENS, ring=Loopback(1), config=model.config.text_config))


def test_a_causal_model_of_the_whole_folder_is_the_text_model_in_a_loop_of_ones_own(tmp_path):
    model = tiny("qwen3_5_text")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="ring")
    loss = loaded(**ring_inputs(TOKENS, TOKENS, ring=Loopback(3), config=loaded.config)).loss
    torch.testing.assert_close(loss, model(**ring_inputs(TOKENS, TOKENS, ring=Loopback(1), config=model.config)).loss)


LARGER = {  # heads, and Mamba-2's time steps and layers without experts, whose choices rounding would change
    "qwen3_5_text": {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
                     "linear_value_head_dim": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 64, "ssm_state_size": 64, "time_step_min": 0.001,
                   "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip


def gradients_on(ring, model_type, dtype, kernels):
    """Every gradient of a small model, by flash-linear-attention or by plain torch."""
    model = with_weights(tiny(model_type, **LARGER[model_type])).to(ring.device, dtype)
    inputs = ring_inputs(TOKENS, TOKENS, documents=DOCUMENTS, ring=ring, config=model.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_kernels, "_has_kernels", lambda x: kernels)
        gradients = loss_and_gradients(model, inputs)[1]
    if isinstance(ring, ProcessRing):
        for x in gradients.values():
            dist.all_reduce(x)
    return {name: x.double() for name, x in gradients.items()}


def wrong_gradients(model_type, ring):
    """The gradients by kernels on a ring in bf16 whose error is more than twice that of plain torch on one rank."""
    one = Loopback(1, ring.device)
    exact, plain = (gradients_on(one, model_type, x, kernels=False) for x in (torch.float32, torch.bfloat16))
    found = gradients_on(ring, model_type, torch.bfloat16, kernels=ring.device.type == "cuda")
    return [name for name, x in exact.items() if (found[name] - x).norm() > 2 * (plain[name] - x).norm()]


def wrong_between_processes(model_type):
    return wrong_gradients(model_type, ProcessRing(device=own_device()))


def skip_without_kernels(model_type):
    if (reason := linear_kernels.device_refusal(tiny(model_type).config, torch.device("cuda"))) is not None:
        pytest.skip(reason)


without_fla = pytest.mark.skipif(find_spec("fla") is None, reason="flash-linear-attention is not installed")


@pytest.mark.gpu
@without_fla
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("model_type", LARGER)
def test_on_a_gpu_the_error_of_bf16_is_at_most_twice_that_of_plain_torch(model_type, ranks):
    skip_without_kernels(model_type)
    assert wrong_gradients(model_type, Loopback(ranks, torch.device("cuda"))) == []


@pytest.mark.gpu
@without_fla
@needs_gpus
@pytest.mark.parametrize("model_type", LARGER)
def test_between_gpus_the_error_of_bf16_is_at_most_twice_that_of_plain_torch_on_one(model_type, gpus):
    skip_without_kernels(model_type)
    assert gpus.run(wrong_between_processes, 2, model_type) == [[], []]
