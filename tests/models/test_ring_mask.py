"""Inputs of ring_inputs are refused by every model that is not on the ring, and by nothing that only carries them."""

import copy
import operator
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from ringflash import Loopback
from ringflash.models import ring_inputs
from ringflash.models.ring_mask import RingMask
from tests.models.cases import TINY, tiny

OFF_THE_RING = 'not on the ring .*attn_implementation="ring" and a configuration of its own'
TOKENS = torch.arange(1, 33)[None]
OTHERS = [
    *(("llama", name) for name in ("sdpa", "eager", "flex_attention")),
    *((kind, "sdpa") for kind in ("gemma2", "mistral", "phi3", "stablelm", "gpt2", "opt", "qwen3_moe", "lfm2")),
    *((kind, "eager") for kind in ("gpt_oss", "bloom", "gptj", "mamba", "gemma3_text")),
]


def inputs_of(ranks=2):
    return ring_inputs(TOKENS, TOKENS, ring=Loopback(ranks))


@pytest.mark.parametrize(("model_type", "attention"), OTHERS, ids=lambda x: x)
def test_a_model_with_other_attention_refuses_at_its_first_forward(model_type, attention):
    config = AutoConfig.for_model(model_type)
    for name, value in {**TINY, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "num_experts": 2}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if len(getattr(config, "layer_types", None) or []) > config.num_hidden_layers:
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    inputs = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs_of().items()}
    with pytest.raises(ValueError, match=OFF_THE_RING):
        model(**inputs)


@pytest.mark.parametrize("name", sorted(set(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()) - {"ring"}))
def test_every_mask_function_of_transformers_refuses(name):
    """Those of attention that is not installed here are among them."""
    with pytest.raises(ValueError, match=OFF_THE_RING):
        ALL_MASK_ATTENTION_FUNCTIONS[name](
            batch_size=1, q_length=16, kv_length=16, q_offset=0, kv_offset=0, mask_function=causal_mask_function,
            attention_mask=RingMask((1, 16)), dtype=torch.float32, config=tiny("llama").config, device="cpu",
        )  # fmt: skip


def by_its_method(model):
    model.set_attn_implementation("sdpa")


def by_its_configuration(model):
    model.config._attn_implementation_internal = "eager"


def in_one_layer(model):
    layer = model.model.layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config._attn_implementation_internal = "sdpa"


def compiled(model):
    model.set_attn_implementation("sdpa")
    model.forward = torch.compile(model.forward, backend="eager")


@pytest.mark.parametrize("leave", [by_its_method, by_its_configuration, in_one_layer, compiled])
def test_a_model_that_left_the_ring_after_it_was_loaded_refuses(leave):
    model = tiny("llama")
    model(**inputs_of())
    leave(model)
    with pytest.raises(ValueError, match=OFF_THE_RING):
        model(**inputs_of())


def test_what_carries_inputs_to_a_model_leaves_the_mask_as_it_is():
    mask = inputs_of()["attention_mask"]
    assert (mask.shape, mask.size(1), mask.dim(), len(mask), mask.labels) == (torch.Size([2, 16]), 16, 2, 2, 31)
    for carried in (
        {mask: mask}[mask], mask.to("cpu", non_blocking=True), mask.pin_memory(), mask.detach(), mask.contiguous(),
        copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), copy.deepcopy(mask.cuda()),
        torch.utils.data._utils.pin_memory.pin_memory({"attention_mask": mask})["attention_mask"],
    ):  # fmt: skip
        model, inputs = tiny("llama"), inputs_of()
        assert model(**inputs | {"attention_mask": carried}).loss == model(**inputs).loss
    assert mask[:] is mask[:, :, 0:, :] is mask
    assert repr(mask) == "RingMask(shape=[2, 16], labels=31)"


READINGS = [
    lambda x: x[:, None, None, :], lambda x: x[:, :2], lambda x: list(x), lambda x: x.all(), lambda x: x.sum(-1),
    lambda x: 1.0 - x, lambda x: x - 1, lambda x: x * 2, lambda x: ~x, lambda x: x == 0, lambda x: x != 0,
    lambda x: x < 1, lambda x: x & True, lambda x: bool(x), lambda x: x.view(-1), lambda x: x.float(),
    lambda x: x.unsqueeze(1), lambda x: torch.ones(2, 16) * x, lambda x: torch.where(x, 1, 0), lambda x: x.tolist(),
    lambda x: torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 4), attn_mask=x),
    lambda x: torch.zeros(2, 16).masked_fill(x, 1.0), lambda x: operator.index(x), lambda x: x.expand(2, 2, 16),
    lambda x: x[:, ::2],
]  # fmt: skip


@pytest.mark.parametrize("read", READINGS)
def test_whatever_reads_the_mask_is_refused(read):
    with pytest.raises(ValueError, match=OFF_THE_RING):
        read(RingMask((2, 16)))


@pytest.mark.parametrize("lengthen", [lambda x: torch.cat([torch.ones(2, 4), x], dim=1), lambda x: x.new_ones(2, 4)])
def test_prompts_in_front_of_a_sequence_are_refused_in_our_words(lengthen):
    with pytest.raises(ValueError, match=r"made longer .*: prompt tuning, prefix tuning and generate .* Use LoRA"):
        lengthen(RingMask((2, 16)))
