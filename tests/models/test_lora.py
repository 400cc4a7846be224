"""LoRA's adapters: what can have one, how they are drawn and read back, and what is refused by name."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ringflash import Loopback
from ringflash.errors import ConfigError
from ringflash.models import ModelConfig, checkpoint_layers, ring_inputs
from ringflash.models.lora import (
    CONFIG,
    WEIGHTS,
    LoraConfig,
    adapted,
    add_lora,
    merge,
    merged,
    without_adapters,
    write_adapter,
)
from ringflash.models.lora_linear import replace_adapted
from ringflash.models.mlp import tile_mlps
from tests.models.cases import tiny

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
DELTA = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
RANK = LoraConfig(rank=3)


def with_adapters(config=RANK, model_type="llama"):
    model = tiny(model_type)
    add_lora(model, config)
    return model


def adapters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def folder(tmp_path):
    """An adapter with weights that are not 0, in peft's format."""
    model = with_adapters(LoraConfig(rank=3, alpha=5, rslora=True))
    with torch.no_grad():
        for p in adapters(model).values():
            p.normal_()
    write_adapter(model, adapters(model), tmp_path / "adapter", "base")
    return tmp_path / "adapter"


def test_all_linear_layers_but_the_head_get_adapters_and_nothing_else_is_trained():
    model = with_adapters()
    assert {name.rpartition(".")[2] for name in adapted(model)} == LINEAR
    assert len(adapters(model)) == 2 * len(LINEAR) * model.config.num_hidden_layers
    assert all(".lora_" in name for name in adapters(model))
    of_hybrid = {name.rpartition(".")[2] for name in adapted(with_adapters(RANK, "qwen3_5_text"))}
    assert of_hybrid == LINEAR | DELTA


def test_layers_that_are_not_called_or_that_peft_refuses_get_none():
    dense = {"layer_types": ["linear_attention", "full_attention", "mlp"], "num_hidden_layers": 3}
    for model in (tiny("falcon_h1"), tiny("nemotron_h", **dense)):
        add_lora(model, RANK)
        found = {name.rpartition(".")[2] for name in adapted(model)}
        assert found - LINEAR == {"in_proj"}
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets: out_proj is not one of"):
        with_adapters(replace(RANK, targets=["out_proj"]), "falcon_h1")
    assert "correction_coefs" not in {name.rpartition(".")[2] for name in adapted(with_adapters(RANK, "gemma3n_text"))}
    with pytest.raises(ConfigError, match=r"^model\.lora\.targets: correction_coefs is not one of"):
        with_adapters(replace(RANK, targets=["correction_coefs"]), "gemma3n_text")


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("llama", "all-linear"), ("qwen3_5_text", "all-linear"), ("falcon_h1", ["in_proj", "q_proj", "down_proj"])],
)
def test_a_model_that_peft_wraps_has_its_loss_and_gradients_on_a_ring(model_type, targets):
    config = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(tiny(model_type), config)
    tokens, lengths = torch.arange(3, 43)[None], [15, 25]

    def results(loss):
        model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad for p in adapters(model).values())]

    inputs = ring_inputs(tokens, tokens, ring=Loopback(2), documents=lengths, config=model.config)
    found = results(model(**inputs).loss)
    model.set_attn_implementation("eager")
    losses = [model(input_ids=x, labels=x).loss * (x.shape[1] - 1) for x in tokens.split(lengths, 1)]
    expected = results(sum(losses) / (40 - 2))
    assert all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(found, expected, strict=True))


class Passes(TorchDispatchMode):
    """Counts the operations that read or write a tensor of [tokens, out] or its transpose, by name."""

    def __init__(self, tokens, out):
        super().__init__()
        self.shapes, self.counts = ((tokens, out), (out, tokens)), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in (*args, found) if isinstance(x, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "mul", "add") and any(tuple(x.shape) in self.shapes for x in tensors):
            self.counts[name] += 1
        return found


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapted_layer_has_the_gradients_of_peft_without_passes_over_its_outputs(bias):
    layer = nn.Sequential(nn.Linear(16, 24, bias))
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, layer)
    exact, layer = layer.double(), deepcopy(layer).float()
    x, dy = torch.randn(2, 20, 16), torch.randn(2, 20, 24)

    def results(module, x):
        x = x.clone().requires_grad_()
        y = module(x)
        y.backward(dy.to(y.dtype))
        return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in module.named_parameters() if p.requires_grad}

    expected = results(exact, x.double())
    replace_adapted(layer)
    with Passes(40, 24) as passes:
        found = results(layer, x)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(y.double(), expected[name], rtol=1e-5, atol=1e-6) for name, y in found.items())
    # B t with the bias, and + W x; then u, dB and dx
    assert passes.counts == ({"addmm": 1, "addmm_": 3, "mm": 1} if bias else {"addmm_": 3, "mm": 2})
    layer[0].merge()
    with pytest.raises(RuntimeError, match="had it merged"):
        layer(x)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_model_without_its_adapters_is_the_one_before_them_and_then_has_them_again(dropout):
    model = tiny("llama").train()
    inputs = ring_inputs(torch.arange(3, 43)[None], ring=Loopback(1))
    expected = model(**inputs).logits
    add_lora(model, LoraConfig(rank=3, dropout=dropout))
    replace_adapted(model)
    tile_mlps(model, 7)
    for p in adapters(model).values():
        nn.init.normal_(p)

    def logits():
        torch.manual_seed(0)
        return model(**inputs).logits

    before = logits()
    assert (before - expected).abs().max() > 0.1
    with without_adapters(model):
        found = logits()
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    assert not found.requires_grad
    after = logits()
    assert torch.equal(after, before)
    after.sum().backward()
    assert all(p.grad is not None for p in adapters(model).values())


def test_a_recomputed_layer_drops_what_its_forward_dropped():
    def gradients(recompute):
        model = with_adapters(replace(RANK, dropout=0.3)).train()
        if recompute:
            checkpoint_layers(model)
        torch.manual_seed(1)
        tokens = torch.arange(3, 43)[None]
        model(**ring_inputs(tokens, tokens, ring=Loopback(1))).loss.backward()
        return [p.grad for p in adapters(model).values()]

    kept, again = gradients(False), gradients(True)
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(kept, again, strict=True))
    assert max(x.abs().max() for x in kept) > 1e-3


def test_adapters_depend_on_the_seed_alone():
    def drawn(seed, numbers_before):
        model = tiny("llama")
        torch.manual_seed(seed)
        torch.rand(numbers_before)
        add_lora(model, RANK)
        return adapters(model)

    first, again, other = drawn(5, 0), drawn(5, 17), drawn(6, 0)
    assert all(torch.equal(first[name], p) for name, p in again.items())
    assert not any(torch.equal(first[name], p) for name, p in other.items() if "lora_A" in name)


def test_an_adapter_is_read_back_and_merged_as_peft_does(folder):
    tokens = torch.arange(3, 20)[None]
    model = with_adapters(LoraConfig(path=str(folder)))
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), folder)
    for each in (model, theirs):
        each.set_attn_implementation("eager")
    assert torch.equal(model(tokens).logits, theirs(tokens).logits)
    whole = tiny("llama")
    whole.load_state_dict(merged(model, dict(model.named_parameters())), strict=False)
    merge(model, str(folder))
    expected = theirs.merge_and_unload()
    for name, p in whole.named_parameters():
        assert torch.allclose(p, expected.get_parameter(name), atol=1e-6), name
        assert torch.equal(p, model.get_parameter(name)), name
    assert [*model.state_dict()] == [*whole.state_dict()]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("query", "query is not one of .* down_proj, gate_proj, k_proj, o_"),
        ("proj", "proj is not one of the layers that can have"),
        ("lm_head", "lm_head is not one of the layers that can have"),
        ("embed_tokens", "embed_tokens is not one of the layers that can have"),
    ],
)
def test_layers_that_cannot_have_an_adapter_are_refused_by_name(target, message):
    with pytest.raises(ConfigError, match=rf"^model\.lora\.targets: {message}"):
        with_adapters(replace(RANK, targets=["q_proj", target]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be 1 or more"),
        ({"alpha": 4.0}, "alpha=4.0 has no effect without model.lora.rank"),
        ({"dropout": 0.1}, "dropout=0.1 has no effect without model.lora.rank"),
        ({"merge": False}, "merge=false has no effect without model.lora.rank"),
        ({"rank": 2, "alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"rank": 2, "dropout": 1.0}, "dropout=1.0 must be 0 or more and below 1"),
        ({"rank": 2, "quantize_base": "int8"}, "quantize_base=int8 is not one of null, nf4"),
        (
            {"rank": 2, "quantize_base": "nf4"},
            "quantize_base=nf4: the adapters cannot be merged",
        ),
        ({"quantize_base": "nf4"}, "quantize_base=nf4 has no effect without model.lora.rank"),
        ({"path": "x", "targets": ["q_proj"]}, r"targets=\['q_proj'\]: the adapter of model.lora.path=x has its own"),
    ],
    ids=str,
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=rf"^model\.lora\.{message}"):
        LoraConfig(**settings)


def test_peft_is_asked_for_where_it_is_missing(monkeypatch):
    LoraConfig()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    LoraConfig()
    with pytest.raises(ConfigError, match=r"^model\.lora needs the package peft, which is not installed here"):
        LoraConfig(rank=2)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(ConfigError, match=r"^model\.lora needs the package bitsandbytes, which is not installed here"):
        LoraConfig(rank=2, quantize_base="nf4", merge=False)


def test_random_weights_are_not_adapted():
    with pytest.raises(ConfigError, match=r"^model\.lora adapts a model of model\.path"):
        ModelConfig(architecture={"model_type": "llama"}, lora=RANK)


def edited(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def reshaped(folder):
    weights = load_file(folder / WEIGHTS)
    name = next(name for name in weights if "layers.1.mlp.up_proj.lora_A" in name)
    save_file(weights | {name: weights[name][:, :-1].contiguous()}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
        (lambda folder: (folder / CONFIG).write_text("{"), f"{CONFIG} cannot be read"),
        (lambda folder: (folder / CONFIG).write_text('{"peft_type": "IA3"}'), "peft_type=IA3 is not supported"),
        (lambda folder: edited(folder, use_dora=True), "use_dora=True in adapter_config.json is not supported"),
        (lambda folder: edited(folder, init_lora_weights="pissa"), "init_lora_weights=pissa in adapter_config.json"),
        (lambda folder: edited(folder, modules_to_save=["lm_head"]), "modules_to_save="),
        (lambda folder: edited(folder, target_modules=["q_proj"]), "which has no adapter for base_model.model."),
        (lambda folder: edited(folder, target_modules=["lm_head"]), "lm_head cannot have an adapter"),
        (lambda folder: edited(folder, target_modules=["nothing"]), "peft cannot adapt this model: "),
        (lambda folder: edited(folder, r=2), r"has .*lora_A.weight \[3, 32\], and this model \[2, 32\]"),
        (reshaped, r"has .*layers.1.mlp.up_proj.lora_A.weight \[3, 31\], and this model \[3, 32\]"),
    ],
    ids=["no-weights", "damaged", "ia3", "dora", "pissa", "saved", "too-many", "head", "none", "rank", "shape"],
)  # fmt: skip
def test_an_adapter_that_would_be_wrong_is_refused(folder, change, message):
    change(folder)
    with pytest.raises(ConfigError, match=rf"^model\.lora\.path={folder}.*{message}"):
        with_adapters(LoraConfig(path=str(folder)))
