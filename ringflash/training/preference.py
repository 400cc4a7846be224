"""Preferences: direct preference optimisation (DPO, arXiv:2305.18290) on pairs of packed documents.

The model learns to prefer the chosen answer c to the rejected answer r of a prompt, more than its reference does:

    reward(y) = beta (log p(y) - log p_reference(y))        log p(y): the sum over the tokens of y
    loss      = -log sigmoid(reward(c) - reward(r))

The reference is the model without its adapters: the one that training starts from. The tokens of a document are on all
ranks of its sequence. Their losses are -log p, so the gradient of the loss is that of a weighted cross-entropy,

    d loss = w d(losses of c) - w d(losses of r)            w = beta sigmoid(reward(r) - reward(c))

The losses are therefore computed twice from the same hidden states. First without a gradient: their sums over each
document and over the ranks give w. Then with these weights: no gradient passes the sums, and no logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from ringflash.data.batches import Batch
from ringflash.data.records import IGNORE
from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from ringflash.ring.plan import AttentionPlan
from ringflash.training.loss import LossHead
from ringflash.training.sums import Sums

FIGURES = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")  # as TRL names them


@dataclass(frozen=True)
class PreferenceConfig:
    """The loss of data.preferences=true: DPO, with the model without its adapters as the reference."""

    beta: float = 0.1
    """Scale of the rewards. The larger, the closer the model stays to the reference."""

    label_smoothing: float = 0.0
    """The fraction of pairs whose answers are assumed to be swapped (conservative DPO), 0 or more and below 0.5."""

    sft_weight: float = 0.0
    """Weight of the chosen answer's mean loss per token, which is added to the loss of each pair."""

    def __post_init__(self) -> None:
        for key, valid, expected in (
            ("beta", 0 < self.beta < float("inf"), "above 0 and finite"),
            ("label_smoothing", 0 <= self.label_smoothing < 0.5, "0 or more and below 0.5"),
            ("sft_weight", 0 <= self.sft_weight < float("inf"), "0 or more and finite"),
        ):
            if not valid:
                raise ConfigError(f"preference.{key}={getattr(self, key)} must be {expected}")


@dataclass(frozen=True, eq=False)
class PreferencePairs:
    """The pairs of a micro-batch.

    documents: int64 [N], the document of each of this rank's tokens; pair i has the documents 2 i, chosen, and 2 i + 1.
    labels: float64 [pairs, 2], the predicted tokens of each, over all ranks. ranks: those that share the sequences, by
    `groups`. totals: float64 [2, FIGURES], this rank's share of the figures' sums, and of the number of pairs.
    """

    config: PreferenceConfig
    documents: Tensor
    labels: Tensor
    ranks: int
    groups: Sequence[dist.ProcessGroup]
    totals: Tensor

    @classmethod
    def of(cls, config: PreferenceConfig, batch: Batch, plan: AttentionPlan, world: World) -> PreferencePairs:
        """Those of a batch, in which the pairs of each row come before its padding."""
        numbers, labels, count = [], [], 0
        for row, lengths in zip(batch.labels, batch.documents, strict=True):
            number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            found = number[row != IGNORE].bincount(minlength=len(lengths))
            pairs = int(found.nonzero().max()) // 2 + 1 if found.any() else 0
            numbers.append(count + number.clamp(max=max(0, 2 * pairs - 1)))  # padding has no label
            labels.append(found[: 2 * pairs])
            count += 2 * pairs
        groups = [world.ring.group] if world.ulysses is None else [world.ring.group, world.ulysses.group]
        ranks, totals = world.size // world.replicas, no_totals(world.device)
        totals[1] = count / 2 / ranks
        documents = plan.shard(torch.stack(numbers)).flatten()
        return cls(config, documents, torch.cat(labels).double().view(-1, 2).to(world.device), ranks, groups, totals)

    def log_probabilities(self, head: LossHead, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p of each answer, float64 [pairs, 2], from this rank's hidden states and shifted labels."""
        totals = torch.zeros(self.labels.numel(), dtype=torch.float64, device=hidden.device)
        with torch.no_grad():
            head(hidden, labels, sums=Sums(self.documents, totals))
        for group in self.groups:
            dist.all_reduce(totals, group=group)
        return -totals.view(-1, 2)

    def loss(self, head: LossHead, hidden: Tensor, labels: Tensor, reference: Tensor) -> Tensor:
        """The summed loss of the pairs, in equal shares on the ranks of the sequence, with this rank's gradient.

        reference: log p of each answer by the reference.
        """
        found = self.log_probabilities(head, hidden, labels)
        losses, weights = self._losses(found, reference)
        weighted = head(hidden, labels, weights=weights.flatten()[self.documents].float())
        return (losses.sum() / self.ranks).float() + (weighted - weighted.detach())

    def _losses(self, found: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs' losses [pairs], which are counted in `totals`, and their derivatives by each answer's -log p."""
        beta, smoothing = self.config.beta, self.config.label_smoothing
        rewards = beta * (found - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        losses = -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)
        slope = beta * (torch.sigmoid(-margins) - smoothing)
        weights = torch.stack([slope, -slope], 1)
        if self.config.sft_weight:
            per_token = self.config.sft_weight / self.labels[:, 0].clamp(min=1)
            losses = losses - per_token * found[:, 0]
            weights[:, 0] += per_token
        self.totals[0] = torch.stack([losses, (margins > 0).double(), margins, *rewards.T]).sum(1) / self.ranks
        return losses, weights


def no_totals(device: torch.device) -> Tensor:
    """Zeros for the totals of `PreferencePairs`, float64 [2, FIGURES]."""
    return torch.zeros(2, len(FIGURES), dtype=torch.float64, device=device)


def means(totals: Tensor) -> dict[str, float]:
    """The mean figures by their names, but for the loss; empty if there are no pairs."""
    found = {name: x / count for name, x, count in zip(FIGURES, *totals.tolist(), strict=True) if count}
    return {name: x for name, x in found.items() if name != "loss"}
