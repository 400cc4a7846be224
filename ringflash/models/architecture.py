"""Architecture: what no model can have in its configuration.

transformers takes most values as they are: num_hidden_layers=-1 gives a model without layers, vocab_size=0 fails inside
torch, and a billion layers take days to build. Here they are refused before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.activations import ACT2FN

from ringflash.errors import in_one_line

LARGEST = 2**31 - 1
_COUNTS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "num_global_key_value_heads", "head_dim", "global_head_dim", "max_position_embeddings",
    "original_max_position_embeddings", "sliding_window", "num_local_experts", "num_experts_per_tok",
}  # fmt: skip
_WITHOUT_EXPERTS = {"num_local_experts", "num_experts_per_tok"}  # counts that are 0 in Granite 4's dense models
_ABOVE_0 = {"rope_theta", "factor", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"}
# transformers makes a Python list of layers, long before there is a weight; a window may be longer than any sequence
_MOST = {"num_hidden_layers": 10_000, "sliding_window": math.inf}
_FIXED = {"output_attentions": False, "return_dict": True, "is_encoder_decoder": False}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def value_refusal(settings: Mapping[str, Any]) -> str | None:
    """None, or the first field of a configuration that no model can have, "hidden_size=0 must be ..."."""
    dense = settings.get("model_type") == "granitemoehybrid" and settings.get("num_local_experts") == 0
    for key, value in _leaves(settings):
        name = key.rpartition(".")[2]
        if name in _FIXED and value is not _FIXED[name]:
            return f"{key}={value} is not supported: it must be {str(_FIXED[name]).lower()}"
        if name in ("hidden_act", "hidden_activation") and value is not None and str(value) not in ACT2FN:
            return f"{key}={value} is not one of {', '.join(sorted(ACT2FN))}"
        if name == "rope_theta" and not isinstance(value, int | float):
            return f"{key}={value} must be a number"
        if isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith("_id"):
            least = 1 if name in _COUNTS and not (dense and name in _WITHOUT_EXPERTS) else 0
            most = _MOST.get(name, LARGEST)
            if name in _ABOVE_0 and not 0 < value < math.inf:
                return f"{key}={value} must be above 0 and finite"
            if not least <= value < math.inf:
                return f"{key}={value} must be {least} or more and finite"
            if isinstance(value, int) and value > most:
                return f"{key}={value} must be {most} at most"
    rope = settings.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") == "default" and rope.get("factor", 1) != 1:
        return f"rope_parameters.factor={rope['factor']} has no effect with rope_parameters.rope_type=default"
    return None


def token_refusal(settings: Mapping[str, Any], vocab_size: int) -> str | None:
    """None, or the first special token of `settings` that the vocabulary does not have."""
    for name in _TOKENS:
        given = settings.get(name)
        for token in given if isinstance(given, list) else [given]:
            if isinstance(token, int) and not 0 <= token < vocab_size:
                return f"{name}={given} must be null or 0 or more and below vocab_size={vocab_size}"
    return None


def refused(where: str, error: Exception, settings: dict[str, Any]) -> str:
    """What transformers refuses of a configuration, as "<where>FIELD=VALUE must be ..." if it says which field."""
    message = re.sub(r"^.* error for (field|validator) '\w+': \w+Error: ", "", in_one_line(error))
    if field := re.match(r"Field '(\w+)' ", message):
        kinds = " or ".join(re.findall(r"expected (?:an? )?([\w\[\]]+), got", message)).replace("NoneType", "null")
        return f"{where}{field[1]}={settings.get(field[1])!r} must be {kinds}"
    if sizes := re.match(r"The hidden size \((\d+)\) is not a multiple of the number of .* \((\d+)\)", message):
        return f"{where}hidden_size={sizes[1]} is not a multiple of num_attention_heads={sizes[2]}"
    if lacking := re.match(r"KeyError: .Missing required keys in `(\w+)` for .*?: \{(.*)\}", message):
        return f"{where}{lacking[1]}={settings.get(lacking[1])} lacks {lacking[2]}"
    return f"{where.rstrip('. ')} is refused by transformers: {message}"


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values below nested dictionaries, by dotted key."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
