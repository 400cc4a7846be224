"""Cross entropy from hidden states, one tile of tokens at a time: the logits of a whole sequence never exist.

For a token with hidden state h, label y and logits z = scale (W h + bias), capped if the model caps them, the loss is
logsumexp(z) - z_y and its gradient is softmax(z) - onehot(y). Both need only one tile of logits. The forward therefore
computes the gradients too, as in Liger (arXiv:2410.10989), and the backward scales them. The weight's gradient is
summed over tiles in fp32. On a GPU, one kernel per tile overwrites the logits with the gradient
(`fused.cross_entropy`); elsewhere, plain torch computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ringflash.data.records import IGNORE
from ringflash.models.mlp import add_product

LOGITS = 2**28  # per tile by default: half a GiB in bf16, and enough for matrix products at full speed


def tile_for(vocabulary: int) -> int:
    """Tokens per tile, a multiple of 128, for a vocabulary of this size.

    >>> tile_for(151936), tile_for(32000)
    (1664, 8320)
    """
    return max(1, LOGITS // vocabulary // 128) * 128


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums of tokens' losses by group, such as their document, which are collected tile by tile.

    groups: int64 [N], that of each token. totals: float64 [groups], to which losses are added.
    """

    groups: Tensor
    totals: Tensor

    def add(self, begin: int, losses: Tensor) -> None:
        """Add the losses [n] of tokens begin to begin + n."""
        self.totals.add_(sums_by(losses, self.groups[begin : begin + len(losses)], len(self.totals)))


def sums_by(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """The sum of the values [N] in each of `count` groups, float64; unlike scatter_add, the same bits each time."""
    own = groups == torch.arange(count, device=groups.device).unsqueeze(1)
    return torch.where(own, values, 0).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class LossOptions:
    """How logits are computed from hidden states, and with which kernel their losses.

    tile: tokens whose logits are held at once. softcap: of the logits, or None. scale: of the logits, before the cap.
    fused: use the Triton kernel.
    """

    tile: int
    softcap: float | None = None
    scale: float = 1.0
    fused: bool = False


def tiled_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: LossOptions,
    bias: Tensor | None = None,
    sums: Sums | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Summed cross entropy, fp32 scalar.

    hidden [N, H]; weight [V, H]; labels int64 [N], already shifted, -100 for no label; bias: [V] or None; sums:
    receives the tokens' losses; weights: fp32 [N], factors of these losses, or None. Differentiable in hidden, weight
    and bias.
    """
    grad = torch.is_grad_enabled()  # which a Function's forward cannot tell
    return _TiledCrossEntropy.apply(hidden, weight, bias, labels, options, sums, weights, grad)


class LossHead(nn.Linear):
    """A model's lm_head that can return the loss instead of the logits.

    It owns the weight and the bias under their usual names, so ZeRO 3 gathers them when the head is called, and
    checkpoints name them as usual.
    """

    def __init__(self, head: nn.Linear, options: LossOptions) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight
        self.bias = head.bias
        self.options: LossOptions = options

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, sums: Sums | None = None, weights: Tensor | None = None
    ) -> Tensor:
        """Logits [..., V], neither scaled nor capped; with labels, int64 of hidden's shape but the last, their loss.

        sums, weights: see `tiled_cross_entropy`.
        """
        if labels is None:
            return super().forward(hidden)
        return tiled_cross_entropy(
            hidden.flatten(0, -2), self.weight, labels.flatten(), self.options, self.bias, sums, weights
        )


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: LossOptions,
        sums: Sums | None,
        weights: Tensor | None,
        grad: bool,
    ) -> Tensor:
        differentiate = grad and any(ctx.needs_input_grad)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden, trained, trained_bias, *_ = ctx.needs_input_grad
        dhidden = torch.empty_like(hidden) if grad and of_hidden else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if grad and trained else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if grad and trained_bias and bias is not None else None
        for begin in range(0, len(hidden), options.tile):
            here = slice(begin, begin + options.tile)
            logits = hidden[here] @ weight.T if bias is None else torch.addmm(bias, hidden[here], weight.T)
            if options.scale != 1.0:
                logits *= options.scale
            if options.fused:
                losses, dlogits = _fused_cross_entropy(logits, labels[here], options.softcap)
            else:
                losses, dlogits = _cross_entropy(logits, labels[here], options.softcap, differentiate)
            if sums is not None:
                sums.add(begin, losses)
            loss += (losses if weights is None else losses * weights[here]).sum()
            if differentiate:
                if weights is not None:
                    dlogits *= weights[here].unsqueeze(1)
                if options.scale != 1.0:
                    dlogits *= options.scale
                if dbias is not None:
                    dbias += dlogits.sum(0, dtype=torch.float32)
                if dhidden is not None:
                    torch.mm(dlogits, weight, out=dhidden[here])
                if dweight is not None:
                    add_product(dweight, dlogits.T, hidden[here])
            del logits, dlogits  # before the next tile's logits
        if differentiate:
            ctx.save_for_backward(dhidden, *(None if x is None else x.to(weight.dtype) for x in (dweight, dbias)))
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        gradients = (None if x is None else x * dloss.to(x.dtype) for x in ctx.saved_tensors)
        return *gradients, None, None, None, None, None


def _cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None, differentiate: bool) -> tuple[Tensor, Tensor]:
    """Losses [N], fp32, and their gradient by the logits in the logits' dtype, empty unless asked for."""
    dtype = logits.dtype
    logits, slope = _capped(logits.float(), softcap)
    valid = labels != IGNORE
    target = labels.clamp(min=0).unsqueeze(1)
    lse = logits.logsumexp(1)
    losses = (lse - logits.gather(1, target).squeeze(1)) * valid
    if not differentiate:
        return losses, logits[:0]
    dlogits = torch.exp(logits - lse.unsqueeze(1))
    dlogits.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=torch.float32))
    return losses, (dlogits * slope * valid.unsqueeze(1)).to(dtype)


def _fused_cross_entropy(logits: Tensor, labels: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The same by one kernel; the gradient lies where the logits were."""
    from ringflash.fused.cross_entropy import cross_entropy_

    return cross_entropy_(logits, labels, IGNORE, softcap), logits


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """Logits after the cap, and the cap's derivative."""
    if softcap is None:
        return logits, 1.0
    x = logits / softcap
    return softcap * torch.tanh(x), torch.cosh(x).pow_(-2)  # 1 - tanh^2 would cancel near the cap
