"""A run with LoRA trains the adapters that plain peft trains on transformers' eager attention, and them alone."""

import json
import logging
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from ringflash.errors import ConfigError
from ringflash.generate.loading import load_encoder, load_model
from ringflash.generate.settings import ReadConfig
from ringflash.models import ModelConfig, build_model, read_config
from ringflash.models.lora import CONFIG, WEIGHTS, LoraConfig
from ringflash.models.quantized import BYTES, quantizable
from ringflash.training.compose import compose
from ringflash.training.flops import matmul_parameters
from ringflash.training.metrics import read
from ringflash.training.preflight import check_inputs
from tests.models.cases import TINY, architecture
from tests.training.plain_loop import plain_steps
from tests.training.runs import fitted, settings, tiny_model, tiny_qwen3

STEPS, ROWS = 4, 2


@pytest.fixture
def base(tmp_path, request):
    """A small published model with tied embeddings, or one with experts of a model_type that a test asks for."""
    if (kind := getattr(request, "param", None)) is None:
        return tiny_qwen3(tmp_path / "base", 384)
    return tiny_model(tmp_path / "base", **architecture(kind, vocab_size=384))


def lora_run(text, base, *others):
    common = ["model.dtype=fp32", f"optim.steps={STEPS}", f"optim.batch={ROWS}", "optim.lr=3e-3", "model.lora.rank=4"]
    return settings(text, "name=run", *common, *others, model=["model=pretrained", f"model.path={base}"])


def losses_of(folder):
    return [record["loss"] for record in read(folder / "metrics.jsonl") if "loss" in record]


def plain(config, base, quantized=None, **lora):
    """Losses, gradient norms and the model of a loop without ringflash, each document alone."""
    options = {} if quantized is None else {"quantization_config": quantized}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager", **options)
    torch.manual_seed(config.seed)
    model = peft.get_peft_model(model, peft.LoraConfig(**lora)).train()  # in evaluation, bitsandbytes repacks weights
    return plain_steps(model, config), model


ATTENTION, EXPERTS = ["k_proj", "o_proj", "q_proj", "v_proj"], ["gate_up_proj", "down_proj"]
ON_BOTH = {"target_modules": ATTENTION, "target_parameters": EXPERTS, "lora_alpha": 8}
ON_EXPERTS = "model.lora.experts=[gate_up_proj,down_proj]"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("base", "size", "others", "lora"),
    [
        (None, 1, ["memory.zero=1"], {"target_modules": "all-linear", "lora_alpha": 8}),
        (
            None,
            2,
            ["memory.zero=2", "memory.recompute=true", "memory.attention_results=host", "memory.layer_inputs=host",
             "model.lora.alpha=3", "model.lora.targets=[down_proj,v_proj]", "model.lora.rslora=true"],
            {"target_modules": ["down_proj", "v_proj"], "lora_alpha": 3, "use_rslora": True},
        ),
        ("gpt_oss", 1, ["memory.zero=0", ON_EXPERTS], ON_BOTH),
        ("qwen2_moe", 2, ["memory.zero=3", ON_EXPERTS], ON_BOTH | {"target_modules": "all-linear"}),
        ("qwen3_moe", 4, ["memory.zero=1", "memory.recompute=true", "parallel.ring=2", ON_EXPERTS], ON_BOTH),
    ],
    indirect=["base"],
    ids=["one-rank", "recompute-host", "gpt-oss", "shared-expert-zero-3", "four-ranks-recompute"],
)  # fmt: skip
def test_adapters_are_those_of_plain_peft(ranks, text, base, size, others, lora):
    run = lora_run(text, base, *others)
    error, printed = ranks.run(fitted, size, run)[0]
    assert error is None
    assert re.search(
        r"^adapters +[\d,]+ parameters, which alone are trained: LoRA of rank 4, alpha [38] on ", printed, re.M
    )
    folder = text.parent / "runs" / "run"
    figures, model = plain(compose(run)[0], base, r=4, **lora)

    records = [record for record in read(folder / "metrics.jsonl") if "gradient_norm" in record]
    for record, (loss, norm) in zip(records, figures, strict=True):
        assert (record["loss"], record["gradient_norm"]) == pytest.approx((loss, norm), rel=1e-5)
    expected, found = peft.get_peft_model_state_dict(model), load_file(folder / "adapter" / WEIGHTS)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[name], x, rtol=0, atol=1e-5) for name, x in expected.items())
    assert min(x.abs().max() for name, x in found.items() if "lora_B" in name) > 5e-3

    tokens = torch.arange(3, 40)[None]
    logits = model(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(start, folder / "adapter")
    for other in (merged, loaded):
        assert torch.allclose(other(tokens).logits, logits, rtol=0, atol=1e-4)
    assert json.loads((folder / "adapter" / CONFIG).read_text())["base_model_name_or_path"] == str(base)

    asked = [ReadConfig(model=str(folder / name)) for name in ("adapter", "model")]
    first, second = (load_model(config, torch.device("cpu")) for config in asked)
    assert all(torch.equal(p, second.get_parameter(name)) for name, p in first.named_parameters())
    assert load_encoder(asked[0], first)[1].get_vocab() == load_encoder(asked[1], second)[1].get_vocab()


NF4 = ["model.lora.quantize_base=nf4", "model.lora.merge=false", "memory.recompute=true", "checkpoint.every=2"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "others"),
    [
        (1, ["memory.zero=0", "memory.mlp_tile=128"]),
        (
            2,
            ["memory.zero=2", "memory.layer_inputs=host", "memory.mlp_tile=128", "model.lora.targets=[q_proj,up_proj]"],
        ),
    ],
    ids=["zero-0", "two-ranks"],
)
def test_adapters_on_a_base_in_4_bits_are_those_of_plain_peft(ranks, text, base, size, others):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = lora_run(text, base, *NF4, *others)
    error, printed = ranks.run(fitted, size, run)[0]
    assert error is None
    assert "parameters in fp32, linear layers in nf4" in printed
    assert "MLP tiles of 128 tokens" in printed
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=["lm_head"]
    )
    targets = compose(run)[0].model.lora.targets or "all-linear"
    figures, model = plain(compose(run)[0], base, nf4, r=4, target_modules=targets, lora_alpha=8)
    folder = text.parent / "runs" / "run"
    records = [record for record in read(folder / "metrics.jsonl") if "gradient_norm" in record]
    for record, (loss, norm) in zip(records, figures, strict=True):
        assert (record["loss"], record["gradient_norm"]) == pytest.approx((loss, norm), rel=1e-5)
    expected, found = peft.get_peft_model_state_dict(model), load_file(folder / "adapter" / WEIGHTS)
    assert all(torch.allclose(found[name], x, rtol=0, atol=1e-5) for name, x in expected.items())
    assert expected.keys() == found.keys()
    wide = lora_run(text, base, *(x for x in NF4 if "base" not in x), *others, "name=wide")
    assert ranks.run(fitted, size, wide)[0][0] is None
    assert losses_of(folder.with_name("wide")) != pytest.approx(losses_of(folder), rel=1e-3)

    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    losses = losses_of(folder)
    assert ranks.run(fitted, size, [*run, "resume=auto"])[0][0] is None
    assert losses_of(folder) == losses
    assert all(torch.equal(x, found[name]) for name, x in load_file(folder / "adapter" / WEIGHTS).items())
    (stored, *_) = (folder / "checkpoints" / "step-00000004" / "state").glob("*model_states.pt")
    assert all(".lora_" in name for name in torch.load(stored, weights_only=False)["module"])


def test_bitsandbytes_asks_for_no_other_package():
    ops = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert [ops.isEnabledFor(level) for level in (logging.WARNING, logging.ERROR)] == [False, True]


def test_weights_in_4_bits_are_counted_as_the_weights_that_they_stand_for(base):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def built(**options):
        lora = LoraConfig(rank=4, targets=["q_proj"], merge=False, **options)
        return build_model(ModelConfig(path=str(base), dtype="bf16", lora=lora))

    wide, narrow = built(), built(quantize_base="nf4")
    assert matmul_parameters(wide, True) == matmul_parameters(narrow, True)
    states = [p.quant_state for p in narrow.parameters() if hasattr(p, "quant_state")]
    assert sum(torch.Size(state.shape).numel() for state in states) == quantizable(wide)
    held = [x for p in narrow.parameters() if hasattr(p, "quant_state") for x in (p, p.quant_state.absmax)]
    assert sum(x.nbytes for x in held) == pytest.approx(BYTES * quantizable(wide), rel=0.02)


def test_what_a_base_in_4_bits_cannot_have_is_refused(text, base, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for others, message in (
        (["memory.zero=3"], r"needs memory\.zero=0, 1 or 2: DeepSpeed divides no weights of 4 bits"),
        (["memory.recompute=false"], r"needs memory\.recompute=true: without it MLPs keep dequantized weights"),
    ):
        with pytest.raises(ConfigError, match=rf"^model\.lora\.quantize_base=nf4 {message}"):
            compose(lora_run(text, base, *NF4, *others))
    AutoConfig.for_model("mixtral", **TINY).save_pretrained(base)
    with pytest.raises(ConfigError, match=r"^model\.lora\.quantize_base=nf4: the experts of model_type=mixtral are no"):
        read_config(compose(lora_run(text, base, *NF4))[0].model)


DROPOUT = "model.lora.dropout=0.2"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("base", "size", "others"),
    [
        (
            None,
            1,
            ["memory.zero=1", "model.dtype=bf16", "memory.optimizer_states=bf16", "optim.micro_batch=2", DROPOUT],
        ),
        (
            "qwen3_moe",
            1,
            ["memory.zero=2", "model.dtype=bf16", "memory.optimizer_states=host", "optim.micro_batch=2", ON_EXPERTS],
        ),
        (
            None,
            2,
            [
                "memory.zero=3",
                "memory.recompute=true",
                "model.rope_parameters={rope_type: linear, factor: 2.0}",
                DROPOUT,
            ],
        ),
    ],
    indirect=["base"],
    ids=["bf16", "experts-host", "zero-3"],
)
def test_a_resumed_run_has_the_same_adapters_and_dropout_bit_for_bit(ranks, text, base, size, others):
    run = lora_run(text, base, *others, "model.lora.merge=false", "checkpoint.every=2")
    assert ranks.run(fitted, size, run)[0][0] is None
    folder = text.parent / "runs" / "run"
    expected, losses = load_file(folder / "adapter" / WEIGHTS), losses_of(folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert ranks.run(fitted, size, [*run, "resume=auto"])[0][0] is None
    found = load_file(folder / "adapter" / WEIGHTS)
    assert all(torch.equal(found[name], x) for name, x in expected.items())
    assert losses_of(folder) == losses
    assert not (folder / "model").exists()
    rope = json.loads((folder / "adapter" / CONFIG).read_text()).get("rope_parameters")
    assert rope == (compose(run)[0].model.rope_parameters or None)

    stored = [*(folder / "checkpoints" / "step-00000004" / "state").glob("*model_states.pt")]
    states = [torch.load(file, weights_only=False) for file in stored]
    assert all(".lora_" in name for state in states for name in state["module"])
    assert states
    assert not any(state["frozen_param_fragments"] for state in states)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("base", "others"),
    [
        (None, ["memory.zero=1"]),
        # below the first layer's experts nothing is trained, and DeepSpeed would by itself take their block for a leaf
        ("qwen3_moe", ["memory.zero=3", ON_EXPERTS, "model.lora.targets=[1.self_attn.v_proj]"]),
    ],
    indirect=["base"],
    ids=["zero-1", "experts-zero-3"],
)
def test_adapters_are_trained_further_on_another_number_of_ranks(ranks, text, base, others):
    run = lora_run(text, base, *others, "model.lora.merge=false", "checkpoint.every=2")
    assert ranks.run(fitted, 2, run)[0][0] is None
    folder = text.parent / "runs" / "run"
    expected, losses = load_file(folder / "adapter" / WEIGHTS), losses_of(folder)
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    error, printed = ranks.run(fitted, 1, [*run, "resume=auto"])[0]
    assert (error, "ranks=1 replaces 2" in printed) == (None, True)
    assert losses_of(folder) == pytest.approx(losses, rel=1e-6)
    found = load_file(folder / "adapter" / WEIGHTS)
    assert all(torch.allclose(found[name], x, rtol=0, atol=1e-6) for name, x in expected.items())


def test_targets_are_checked_before_the_run(text, base):
    config, _ = compose(lora_run(text, base, "model.lora.targets=[q_proj,query]"))
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets: query is not one of the layers that can have"):
        check_inputs(config)
    config, _ = compose(lora_run(text, base, "model.lora.dropout=0.1", "memory.recompute=true", "memory.mlp_tile=8"))
    with pytest.raises(
        ConfigError, match=r"^memory\.mlp_tile=8: no MLP of model_type=qwen3 has a form that can be tiled"
    ):
        check_inputs(config)
