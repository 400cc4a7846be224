"""Each layer's heads and window are read off the configuration, also where layers of one model differ."""

import pytest
from transformers import AutoConfig

from ringflash import IntervalMask
from ringflash.errors import ConfigError
from ringflash.models import AttentionConfig, ModelConfig, read_config
from ringflash.models.layers import LayerKind, kinds_of_layers, layer_kinds, layer_masks
from ringflash.ring.cost import Heads
from ringflash.training.engine import TrainedModel
from ringflash.training.memory import MemoryConfig
from tests.models.cases import GEMMA4_EXPERTS, architecture, tiny
from tests.models.test_checkpointing import inputs_of

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
ALIKE = Heads(query=2, key=1, dim=8, value_dim=8)


def test_layers_with_a_window_are_of_another_kind():
    sizes = SIZES | {"sliding_window": 10}
    assert layer_kinds(AutoConfig.for_model("llama", **SIZES)) == {LayerKind(None, ALIKE): 4}
    assert layer_kinds(AutoConfig.for_model("mistral", **sizes)) == {LayerKind(10, ALIKE): 4}
    found = layer_kinds(AutoConfig.for_model("gemma2", **sizes))
    assert found == {LayerKind(10, ALIKE): 2, LayerKind(None, ALIKE): 2}


def test_a_layer_that_calls_attention_twice_counts_twice():
    kinds = layer_kinds(AutoConfig.for_model("diffllama", **SIZES))
    assert kinds == {LayerKind(None, ALIKE): 8}


def test_layers_of_gemma_4_and_mimo_have_heads_of_their_own():
    gemma = read_config(ModelConfig(architecture=architecture("gemma4_text", **GEMMA4_EXPERTS)))
    assert kinds_of_layers(gemma) == [LayerKind(7, Heads(4, 2, 8, 8)), LayerKind(None, Heads(4, 1, 16, 16))]
    mimo = read_config(ModelConfig(architecture=architecture("mimo_v2_flash")))
    assert kinds_of_layers(mimo) == [LayerKind(7, Heads(4, 4, 8, 10)), LayerKind(None, Heads(4, 2, 8, 10))]
    mask = IntervalMask.causal(20)
    areas = [(layers.mask.area(), layers.heads.key, layers.number) for layers in layer_masks(mimo, mask)]
    assert areas == [(mask.area() - 13 * 14 // 2, 4, 1), (mask.area(), 2, 1)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 4, "num_attention_heads": 4}, "num_key_value_heads=8 of layers with sliding_window=7"),
        ({"head_dim": 7}, "head_dim=7 of layers with sliding_window=7 must be even"),
    ],
)
def test_heads_that_do_not_fit_are_refused_with_the_layers_that_have_them(fields, message):
    with pytest.raises(ConfigError, match=message):
        read_config(ModelConfig(architecture=architecture("mimo_v2_flash", **fields)))


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text", "mimo_v2_flash"])
def test_host_memory_is_reserved_for_what_each_layer_keeps(model_type):
    """Attention's results, of other sizes in other layers, and one input or two, of other sizes in other families."""
    memory = MemoryConfig(recompute=True, attention_results="host", layer_inputs="host")
    model = TrainedModel(tiny(model_type), memory, AttentionConfig())
    model.reserve_host_memory(tokens=32)
    pool = model.model.host_store.pool
    reserved = pool.bytes
    loss = model(**inputs_of())
    assert pool.bytes == reserved > 0
    assert not any(pool._free.values())  # all that was reserved is used
    loss.backward()
