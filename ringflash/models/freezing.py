"""Frozen weights: model.freeze names the parameters that are not trained, by patterns as in .gitignore.

    ["model.embed_tokens"]         freezes the embeddings
    ["*", "!model.layers.3?"]      trains layers 30 to 39 alone

A pattern is a glob of a parameter's name, or of a module above it; its * also matches dots. Patterns are read in order,
and the last one that matches decides: without an exclamation mark it freezes, with one it trains again. Tied weights
are one parameter, which either of their names stands for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ringflash.errors import ConfigError, did_you_mean

# Parameters behind the last layer; what else is outside layers is before them.
_BEHIND = re.compile(r"(.+\.)?(norm|norm_f|final_layer_?norm|lm_head)\.(weight|bias)")


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze what model.freeze names. Raises ConfigError for a pattern without a match, or if too much or none is."""
    named = dict(model.named_parameters(remove_duplicate=False))
    frozen: dict[int, bool] = {}
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        found = [p for name, p in named.items() if fnmatchcase(name, glob) or fnmatchcase(name, f"{glob}.*")]
        if not found:
            modules = [name for name, _ in model.named_modules()]
            hint = did_you_mean(glob, [*named, *modules], otherwise=f"; a name is {next(iter(named))}")
            raise ConfigError(f"model.freeze: {pattern} matches no parameter of this model{hint}")
        frozen |= dict.fromkeys(map(id, found), not pattern.startswith("!"))
    for p in named.values():
        if frozen.get(id(p)):
            p.requires_grad_(False)
    if patterns and not any(frozen.values()):
        raise ConfigError(f"model.freeze={[*patterns]} freezes nothing: the last pattern that matches decides")
    if not any(p.requires_grad for p in named.values()):
        raise ConfigError(f"model.freeze={[*patterns]} leaves no parameter to train: !PATTERN trains some again")


def has_frozen(model: nn.Module) -> bool:
    """Whether a part of a model is not trained: by model.freeze, by adapters, or by the model itself."""
    return not all(p.requires_grad for p in model.parameters())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def forward_only_layers(model: nn.Module) -> int:
    """The number of first layers that run no backward: nothing in them or before them is trained."""
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    for name, p in model.named_parameters(remove_duplicate=False):
        if p.requires_grad and id(p) not in inside and not _BEHIND.fullmatch(name):
            return 0
    trained = (n for n, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters()))
    return next(trained, len(layers))
