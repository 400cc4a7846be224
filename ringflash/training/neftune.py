"""NEFTune: noise that is added to embeddings in training (arXiv:2310.05914).

    embedding + u alpha / sqrt(L d)        u uniform in -1 to 1, for each element of each token

L is the length of the token's document and d the embedding's width, so that a document's noise has an expected norm of
about alpha / sqrt(3). The paper has one document per row; with packed rows, the length of the row would make the noise
of short documents too small.

u is a hash (SplitMix64) of the seed, of the token's number in the stream of sequences, and of the element's number. It
is therefore the same, bit for bit, on any grid of ranks, in any layout and on any device, and after a resume.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.data.batches import Batch
from ringflash.ring.plan import AttentionPlan

ELEMENTS = 2**22  # hashed at once: 32 MiB, a few times
GAMMA, FIRST, SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))  # as int64
BITS = 23  # of each u, which fp32 holds exactly


@dataclass(frozen=True, eq=False)
class EmbeddingNoise:
    """The noise of a rank's tokens. keys: int64 [B, S], of each token; lengths: int64 [B, S], of its document."""

    alpha: float
    keys: Tensor
    lengths: Tensor

    def added_to(self, embeddings: Tensor) -> Tensor:
        """embeddings [B, S, d] with their noise, in their dtype."""
        width = embeddings.shape[-1]
        elements = torch.arange(1, width + 1, device=embeddings.device) * GAMMA
        bounds = self.alpha / (self.lengths.flatten() * width).double().sqrt()
        scales = (bounds * 2.0 ** (1 - BITS)).float()[:, None]
        noise = torch.empty_like(embeddings, requires_grad=False).view(-1, width)
        tile = max(1, ELEMENTS // width)
        for begin in range(0, len(noise), tile):
            here = slice(begin, begin + tile)
            x = _mix_(self.keys.flatten()[here, None] + elements) >> (64 - BITS)
            noise[here] = (x.float() + 0.5) * scales[here]
        return embeddings + noise.view_as(embeddings)


@dataclass(frozen=True)
class Neftune:
    """model.neftune_alpha, above 0, and the run's seed."""

    alpha: float
    seed: int

    def noise(self, batch: Batch, plan: AttentionPlan) -> EmbeddingNoise:
        """That of this rank's tokens of a micro-batch, which knows its rows' numbers."""
        rows, length = batch.tokens.shape
        assert len(batch.numbers) == rows
        tokens = torch.tensor(batch.numbers)[:, None] * length + torch.arange(length)
        seed = torch.tensor(self.seed - 2**64 if self.seed >= 2**63 else self.seed)
        keys = _mix_(_mix_(seed + GAMMA) + (tokens + 1) * GAMMA)
        counts = [torch.tensor(row) for row in batch.documents]
        lengths = torch.stack([count.repeat_interleave(count) for count in counts])
        return EmbeddingNoise(self.alpha, plan.shard(keys), plan.shard(lengths, padding=1))


@contextmanager
def noisy(model: PreTrainedModel, noise: EmbeddingNoise | None) -> Iterator[None]:
    """Inside, a model's embeddings have this noise, if it is not None."""

    def added(module: nn.Module, inputs: object, embeddings: Tensor) -> Tensor:
        assert noise is not None
        return noise.added_to(embeddings)

    if noise is None:
        yield
        return
    hook = model.get_input_embeddings().register_forward_hook(added)
    try:
        yield
    finally:
        hook.remove()


def _mix_(x: Tensor) -> Tensor:
    """SplitMix64's output function of each int64, in place; products wrap, and shifts fill with zeros."""
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        x ^= (x >> shift) & (2 ** (64 - shift) - 1)
        x *= factor
    return x
