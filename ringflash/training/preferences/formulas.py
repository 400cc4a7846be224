"""Losses of preference pairs: one formula per loss, from the log-probabilities of both answers of each pair.

With y the chosen answer c or the rejected answer r of a pair, and log p(y) the sum over its tokens:

    score(y)  = log p(y) - log p_reference(y)      with a reference: sigmoid and ipo
                log p(y) / tokens of y             without one: simpo and orpo
    reward(y) = beta score(y)                      of which the metrics have means

A formula takes scores [pairs, 2], chosen first, and gives losses [pairs]. Its gradient is left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ringflash.errors import ConfigError, check_settings, shown


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss of data.preferences=true."""

    loss_type: str = "sigmoid"
    """sigmoid (DPO) or ipo, which compare the model with a reference; simpo or orpo, which need none."""

    beta: float = 0.1
    """sigmoid and ipo: the larger, the closer the model stays to the reference. simpo: scale of the rewards, 2 or more
    in its paper. orpo: weight of the odds ratio's loss."""

    simpo_gamma: float = 0.5
    """simpo: the margin by which the chosen answer's reward should exceed the rejected one's."""

    label_smoothing: float = 0.0
    """sigmoid and simpo: the fraction of pairs whose answers are assumed to be swapped, 0 or more and below 0.5."""

    sft_weight: float = 0.0
    """Weight of the chosen answer's mean loss per token, which is added to the loss of each pair. orpo has it with
    weight 1."""

    precompute_ref_log_probs: bool = False
    """sigmoid and ipo: compute the reference's log-probabilities by one pass over the pairs before training, instead of
    in each step. These losses need it to train all weights, or an adapter of model.lora.path."""

    def __post_init__(self) -> None:
        checks = (
            ("loss_type", self.loss_type in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("beta", 0 < self.beta < float("inf"), "above 0 and finite"),
            ("simpo_gamma", 0 <= self.simpo_gamma < float("inf"), "0 or more and finite"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "0 or more and below 0.5"),
            ("sft_weight", 0 <= self.sft_weight < float("inf"), "0 or more and finite"),
        )
        check_settings("preference", self, checks)
        for key in (x.name for x in fields(self) if x.name != "loss_type" and getattr(self, x.name) != x.default):
            readers = [name for name, loss in LOSSES.items() if key in loss.settings]
            if self.loss_type not in readers:
                raise ConfigError(
                    f"preference.{key}={shown(getattr(self, key))} has no effect with "
                    f"preference.loss_type={self.loss_type}: it is a setting of {', '.join(readers)}"
                )

    @property
    def loss(self) -> PairLoss:
        """The loss of loss_type."""
        return LOSSES[self.loss_type]

    @property
    def runs_reference(self) -> bool:
        """Whether each step computes the reference's log-probabilities."""
        return self.loss.referenced and not self.precompute_ref_log_probs


def dpo(config: PreferenceConfig, scores: Tensor, tokens: Tensor) -> Tensor:
    """-log sigmoid(reward(c) - reward(r)): direct preference optimisation, equation 7 of arXiv:2305.18290.

    With label_smoothing e, it is (1 - e) times this plus e times the loss of the swapped pair: conservative DPO,
    equation 3 of ericmitchell.ai/cdpo.pdf.
    """
    return _smoothed_logistic(config.beta * _difference(scores), config.label_smoothing)


def ipo(config: PreferenceConfig, scores: Tensor, tokens: Tensor) -> Tensor:
    """(score(c) - score(r) - 1 / (2 beta))^2: equation 17 of arXiv:2310.12036, in which beta is called tau.

    Each score is divided by the tokens of its answer, as in TRL.
    """
    return (_difference(scores / tokens) - 1 / (2 * config.beta)) ** 2


def simpo(config: PreferenceConfig, scores: Tensor, tokens: Tensor) -> Tensor:
    """-log sigmoid(reward(c) - reward(r) - gamma): equation 6 of arXiv:2405.14734, smoothed as in TRL's CPOTrainer."""
    return _smoothed_logistic(config.beta * _difference(scores) - config.simpo_gamma, config.label_smoothing)


def orpo(config: PreferenceConfig, scores: Tensor, tokens: Tensor) -> Tensor:
    """-score(c) - beta log sigmoid(log odds(c) - log odds(r)): equations 6 and 7 of arXiv:2403.07691.

    odds(y) = p / (1 - p), where p is the geometric mean of the probabilities of y's tokens, exp(score(y)).
    """
    scores = scores.clamp(max=-torch.finfo(scores.dtype).eps)  # rounded losses may all be 0: the odds would be infinite
    log_odds = scores - torch.log(-torch.expm1(scores))
    return -scores[:, 0] - config.beta * logsigmoid(_difference(log_odds))


def _difference(scores: Tensor) -> Tensor:
    """The chosen answers' minus the rejected ones'."""
    return scores[:, 0] - scores[:, 1]


def _smoothed_logistic(margins: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)


@dataclass(frozen=True)
class PairLoss:
    """A loss: its name in papers, its formula, whether it needs a reference, and the settings that it reads."""

    name: str
    formula: Callable[[PreferenceConfig, Tensor, Tensor], Tensor]
    referenced: bool
    settings: tuple[str, ...]


PRECOMPUTE = "precompute_ref_log_probs"
LOSSES = {
    "sigmoid": PairLoss("DPO", dpo, True, ("beta", "label_smoothing", "sft_weight", PRECOMPUTE)),
    "ipo": PairLoss("IPO", ipo, True, ("beta", "sft_weight", PRECOMPUTE)),
    "simpo": PairLoss("SimPO", simpo, False, ("beta", "simpo_gamma", "label_smoothing", "sft_weight")),
    "orpo": PairLoss("ORPO", orpo, False, ("beta",)),
}  # by preference.loss_type


def pair_losses(
    config: PreferenceConfig, found: Tensor, reference: Tensor | None, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses [pairs] and rewards [pairs, 2] of pairs.

    found, reference: log p of each answer by the model and by the reference, [pairs, 2], chosen first; reference is
    None for losses without one. tokens: of each answer.
    """
    assert (reference is None) != config.loss.referenced
    scores = found / tokens if reference is None else found - reference
    losses = config.loss.formula(config, scores, tokens)
    if config.sft_weight:
        losses = losses - config.sft_weight * found[:, 0] / tokens[:, 0]
    return losses, config.beta * scores
