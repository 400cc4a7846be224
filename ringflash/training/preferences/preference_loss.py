"""Preferences: losses of pairs of packed documents, a prompt with the chosen and with the rejected answer.

A loss depends on log p(y) of both answers, the sums over their tokens, and on the same by a reference if it has one
(formulas.py). The reference is the model that training starts from. A step computes its log p with the model
without its adapters, or finds those that were computed before training (reference.py).

The tokens of a document are on all ranks of its sequence. Their losses are -log p, so the gradient of a pair's loss is
that of a weighted cross-entropy:

    d loss = w_c d(losses of c's tokens) + w_r d(losses of r's tokens)        w_y = -d loss / d log p(y)

The losses are therefore computed twice from the same hidden states. First without a gradient: their sums over each
document and over the ranks give w. Then with these weights: no gradient passes the sums, and no logits are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringflash.data.batches import Batch
from ringflash.data.pairs import digests, predicted
from ringflash.intervals import to_device
from ringflash.models.router_loss import sum_over_ranks
from ringflash.ring.heads import sequence_ranks
from ringflash.ring.plan import AttentionPlan
from ringflash.training.loss import LossHead, Sums
from ringflash.training.preferences.formulas import PreferenceConfig, pair_losses
from ringflash.training.preferences.reference import LogProbabilities

FIGURES = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")  # as TRL names them


@dataclass(frozen=True, eq=False)
class PreferenceLoss:
    """The loss of pairs. reference: what is computed before training, with preference.precompute_ref_log_probs."""

    config: PreferenceConfig
    reference: LogProbabilities | None = None


@dataclass(frozen=True, eq=False)
class PreferencePairs:
    """The pairs of a micro-batch.

    documents: int64 [N], the document of each of this rank's tokens; pair i has the documents 2 i, chosen, and 2 i + 1.
    labels: float64 [pairs, 2], the predicted tokens of each, over all ranks. plan: that of the sequences. totals:
    float64 [2, FIGURES], this rank's share of the figures' sums, and of the number of pairs. digests: of the pairs;
    none if the reference is not computed before training.
    """

    pair_loss: PreferenceLoss
    documents: Tensor
    labels: Tensor
    plan: AttentionPlan
    totals: Tensor
    digests: list[bytes]

    @classmethod
    def of(cls, loss: PreferenceLoss, batch: Batch, plan: AttentionPlan) -> PreferencePairs:
        """Those of a batch."""
        numbers, labels, names, count = [], [], [], 0
        for tokens, row, lengths in zip(batch.tokens, batch.labels, batch.documents, strict=True):
            found = predicted(row, lengths)
            number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
            numbers.append(count + number.clamp(max=max(0, len(found) - 1)))  # padding has no label
            labels.append(found)
            count += len(found)
            if loss.config.precompute_ref_log_probs:
                names += digests(tokens, row, lengths)
        device = plan.ring.device
        totals = no_totals(device)
        totals[1] = count / 2 / sequence_ranks(plan)
        documents = plan.shard(torch.stack(numbers)).flatten()
        predictions = torch.cat(labels).double().view(-1, 2).to(device)
        return cls(loss, documents, predictions, plan, totals, names)

    @property
    def reference(self) -> Tensor | None:
        """log p of each answer by the reference, float64 [pairs, 2]; None if it is not computed before training."""
        if (known := self.pair_loss.reference) is None:
            return None
        found = [known[name] for name in self.digests]
        return to_device(torch.tensor(found, dtype=torch.float64).view(-1, 2), self.labels.device)

    def log_probabilities(self, head: LossHead, hidden: Tensor, labels: Tensor) -> Tensor:
        """log p of each answer, float64 [pairs, 2], from this rank's hidden states and shifted labels."""
        totals = torch.zeros(self.labels.numel(), dtype=torch.float64, device=hidden.device)
        with torch.no_grad():
            head(hidden, labels, sums=Sums(self.documents, totals))
        sum_over_ranks(totals, self.plan)
        return -totals.view(-1, 2)

    def loss(self, head: LossHead, hidden: Tensor, labels: Tensor, reference: Tensor | None) -> Tensor:
        """The summed loss of the pairs, in equal shares on the ranks of the sequence, with this rank's gradient.

        reference: log p of each answer by the reference, or None for a loss without one.
        """
        found = self.log_probabilities(head, hidden, labels)
        losses, weights = self._losses(found, reference)
        weighted = head(hidden, labels, weights=weights.flatten()[self.documents].float())
        return (losses.sum() / sequence_ranks(self.plan)).float() + (weighted - weighted.detach())

    @torch.enable_grad()
    def _losses(self, found: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        """The pairs' losses [pairs], which are counted in `totals`, and their derivatives by each answer's -log p."""
        found.requires_grad_()
        losses, rewards = pair_losses(self.pair_loss.config, found, reference, self.labels)
        (slopes,) = torch.autograd.grad(losses.sum(), found)
        rewards = rewards.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        figures = torch.stack([losses.detach(), (margins > 0).double(), margins, *rewards.T])
        self.totals[0] = figures.sum(1) / sequence_ranks(self.plan)
        return figures[0], -slopes


def no_totals(device: torch.device) -> Tensor:
    """Zeros for the totals of `PreferencePairs`, float64 [2, FIGURES]."""
    return torch.zeros(2, len(FIGURES), dtype=torch.float64, device=device)


def means(totals: Tensor) -> dict[str, float]:
    """The mean figures by their names, but for the loss; empty if there are no pairs."""
    found = {name: x / count for name, x, count in zip(FIGURES, *totals.tolist(), strict=True) if count}
    return {name: x for name, x in found.items() if name != "loss"}
