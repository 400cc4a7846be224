"""Calls of a transformers model that would be wrong on shards, found on the call stack of its first layer.

A layer knows neither its model nor the arguments of the model's call, and transformers does not pass them on. But the
frames of their `forward` methods are on the stack while the layer runs:

    Trainer.compute_loss > LlamaForSequenceClassification.forward > LlamaModel.forward > ... > attention

Only frames that take a model's inputs are inspected, and only the arguments that are checked are read.
"""

from __future__ import annotations

import sys
from numbers import Integral
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ringflash.models.ring_mask import RingMask
from ringflash.ring.plan import AttentionPlan

_PER_TOKEN = ("ForCausalLM", "ForTokenClassification")  # heads that give each token an output of its own

_OTHER_LOSS = (
    "{} is not supported on the ring: labels are shifted already, and it may shift them again; call the model without "
    "labels, and make the loss of its logits and of what ring_inputs gives as shift_labels"
)


# Keywords that transformers passes to every layer, and that do not change what tokens see.
_HARMLESS = {
    "cache_position", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "shift_labels", "tokenizer", "use_cache",
}  # fmt: skip
# Keywords by which collators tell flash_attn which documents a row holds.
_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
_ARGUMENTS = (
    "labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "position_ids", "input_ids", "inputs_embeds",
)  # fmt: skip


class _Frame(NamedTuple):
    owner: Any  # self
    arguments: dict[str, Any]  # those of _ARGUMENTS that it has


def check_call(plan: AttentionPlan, mask: RingMask | None, shift_labels: Tensor | None, items: Any) -> _Frame | None:
    """Raise ValueError for a head, an argument or a Trainer's setting that needs the whole sequence.

    Returns the call of the innermost model, with positions that some families keep from their layers.

    mask: that of ring_inputs, which knows how many labels there are. shift_labels, items: the keywords shift_labels
    and num_items_in_batch of the model's call.
    """
    frames = _frames()
    models = [frame for frame in frames if isinstance(frame.owner, PreTrainedModel)]
    for depth, (model, arguments) in enumerate(models):
        _check_head(model, bare=depth == 0 and model.base_model is model)
        _check_logits(arguments.get("logits_to_keep"))
        if arguments.get("labels") is not None:
            # A forward of the user's own, with a loss of its own, takes these and need not pass them on.
            own_shift, own_items = arguments.get("shift_labels"), arguments.get("num_items_in_batch")
            _check_loss(
                model, mask, shift_labels if own_shift is None else own_shift, items if own_items is None else own_items
            )
    several = plan.ulysses is not None or len(plan.ring.local) < plan.ring.size
    for owner, _ in frames:
        _check_trainer(owner, several)
    return models[0] if models else None


def tokens_of_call() -> Tensor | None:
    """The integers of the innermost model's input_ids, or the bits of its inputs_embeds; None if it has neither."""
    for owner, arguments in _frames():
        if isinstance(owner, PreTrainedModel):
            if (ids := arguments.get("input_ids")) is not None:
                return ids
            if (embeds := arguments.get("inputs_embeds")) is not None:
                return embeds.contiguous().view(torch.int16)
    return None


def check_keywords(attention_mask: Tensor | RingMask | None, keywords: dict[str, Any]) -> None:
    """Raise ValueError for a mask, or a keyword of a layer's call, that may say otherwise than the plan."""
    if attention_mask is not None and not isinstance(attention_mask, RingMask):
        raise ValueError(f"attention_mask {[*attention_mask.shape]} is not supported: the plan is the mask")
    refused = {name: value for name, value in keywords.items() if name not in _HARMLESS and value is not None}
    if "labels" in refused:
        raise ValueError("labels went to a model that makes no loss of them: call it without labels")
    if packed := refused.keys() & _PACKED:
        raise ValueError(
            f"{min(packed)} is not read by ring attention: give packed documents to ring_inputs, as "
            f"documents=cu_seq_lens_q.diff(), and the model what it returns alone"
        )
    if refused:
        name, value = next(iter(refused.items()))
        shown = [*value.shape] if isinstance(value, Tensor) else f"{value!r:.100}"
        raise ValueError(f"{name}={shown} is not supported by ring attention: it may change the mask")
    if keywords.get("output_attentions"):
        raise ValueError("output_attentions=True is not supported: ring attention has no weights to return")


def _frames() -> list[_Frame]:
    """The calls of a model and of a Trainer's compute_loss that this one is part of, innermost first."""
    found: list[_Frame] = []
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        # A layer's forward takes hidden_states.
        if code.co_name in ("forward", "compute_loss") and code.co_varnames[1:2] != ("hidden_states",):
            found.append(_read(frame))
        frame = frame.f_back
    return found


def _read(frame: FrameType) -> _Frame:
    variables = frame.f_locals
    read = _Frame(variables.get("self"), {name: variables[name] for name in _ARGUMENTS if name in variables})
    # Before Python 3.13, a copy that the frame keeps until it ends. References: the frame's, this one, the call's; with
    # more, it is what the frame's own code got from locals().
    if isinstance(variables, dict) and sys.getrefcount(variables) <= 3:
        variables.clear()
    return read


def _check_head(model: PreTrainedModel, bare: bool) -> None:
    names = [kind.__name__ for kind in type(model).__mro__]
    if not bare and not any(name.endswith(_PER_TOKEN) for name in names):
        raise ValueError(
            f"{names[0]} is not supported on the ring: its head reads some tokens of a whole sequence, and would read "
            f"those of each shard; supported are {' and '.join(f'...{kind}' for kind in _PER_TOKEN)}, and models "
            f"without a head"
        )


def _check_logits(logits_to_keep: Any) -> None:
    if isinstance(logits_to_keep, Integral) and logits_to_keep != 0:
        raise ValueError(
            f"logits_to_keep={logits_to_keep} is not supported on the ring: it would keep the last tokens of each "
            f"shard, not of the sequence; leave it out, or give a tensor of this shard's own indices"
        )


def _check_loss(model: PreTrainedModel, mask: RingMask | None, shift_labels: Tensor | None, items: Any) -> None:
    """The loss must be this rank's share: the sum over its own labels by the count of the whole sequences' labels."""
    if not any(kind.__name__.endswith("ForCausalLM") for kind in type(model).__mro__):
        raise ValueError(
            f"labels are not supported for {type(model).__name__} on the ring: its loss is a mean over a shard's own "
            f"labels; leave them out and make the loss of its logits"
        )
    if shift_labels is None:
        raise ValueError(
            "labels without shift_labels would be shifted within each shard: give the labels to "
            "ring_inputs(input_ids, labels), which shifts them before it cuts shards, and pass all that it returns"
        )
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(_OTHER_LOSS.format(f"loss_function={_name(model.loss_function)}"))
    if items is None:
        raise ValueError(
            "num_items_in_batch is missing, so each rank would divide by its own labels: pass all that ring_inputs "
            "returns"
        )
    if mask is None or mask.labels is None:
        return
    message = (
        f"num_items_in_batch={{}} is less than the {mask.labels} labels of the whole sequences: each rank would divide "
        f"by its own labels. A Trainer must count them over ranks: average_tokens_across_devices=True"
    )
    if mask.labels == 0:
        message = (
            "num_items_in_batch={} and every label of the batch is -100, so the loss would be 0/0: leave out sequences "
            "without labels"
        )
    expected = max(1, mask.labels)
    if isinstance(items, Tensor) and items.is_cuda:  # the device compares and stops the program; the host does not wait
        torch._assert_async((items >= expected).all(), message.format("..."))
    elif (least := int(items.min() if isinstance(items, Tensor) else items)) < expected:
        raise ValueError(message.format(least))


def _check_trainer(owner: Any, several: bool) -> None:
    """Refuse a Trainer that counts labels or trains by rank, where there are several, or that shifts labels again.

    Other classes may have such attributes, and mean something else by them.
    """
    if not any(kind.__module__ == "transformers.trainer" for kind in type(owner).__mro__):
        return
    args = getattr(owner, "args", None)
    if several and getattr(args, "average_tokens_across_devices", True) is False:
        raise ValueError(
            "average_tokens_across_devices=False is not supported on the ring: each rank would divide by its own "
            "labels; set it to True"
        )
    if several and torch.is_grad_enabled() and _trains_alone(owner):
        raise ValueError(
            "the Trainer has not wrapped its model in DDP, so each rank would train on its own gradients: evaluate() "
            "before train() is the usual reason; set eval_on_start=True instead"
        )
    if several and (alpha := getattr(args, "neftune_noise_alpha", None)):
        raise ValueError(
            f"neftune_noise_alpha={alpha} is not supported on the ring: the noise would be scaled by the length of a "
            f"shard; leave it out"
        )
    if smoothing := getattr(args, "label_smoothing_factor", 0.0):
        raise ValueError(
            f"label_smoothing_factor={smoothing} is not supported on the ring: the Trainer would "
            f"shift labels again, which ring_inputs has shifted; set it to 0"
        )
    if (loss := getattr(owner, "compute_loss_func", None)) is not None:
        raise ValueError(_OTHER_LOSS.format(f"compute_loss_func={_name(loss)}"))


def _trains_alone(trainer: Any) -> bool:
    """Whether a Trainer should sum gradients by DDP, and does not."""
    wrapped = getattr(trainer, "model_wrapped", None)
    by_ddp = getattr(getattr(trainer, "accelerator", None), "distributed_type", None) in ("MULTI_CPU", "MULTI_GPU")
    return by_ddp and not isinstance(getattr(wrapped, "_orig_mod", wrapped), DistributedDataParallel)


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))
