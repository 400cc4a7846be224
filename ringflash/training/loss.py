"""Cross entropy from hidden states, one tile of tokens at a time: the logits of a whole sequence never exist.

For a token with hidden state h, label y and logits z = W h (capped where the model caps them), the loss is
logsumexp(z) - z_y and its gradient softmax(z) - onehot(y). Both need one tile of logits only, so the forward computes
the gradients too, as Liger does (arXiv:2410.10989), and the backward scales them. The weight's gradient is summed over
tiles in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ringflash.data.packing import IGNORE


def tiled_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int, softcap: float | None) -> Tensor:
    """Summed cross entropy, fp32 scalar.

    hidden [N, H]; weight [V, H]; labels int64 [N], already shifted, -100 where nothing is predicted; tile, tokens whose
    logits exist at once; softcap of the logits, or None. Differentiable in hidden and weight.
    """
    return _TiledCrossEntropy.apply(hidden, weight, labels, tile, softcap)


class LossHead(nn.Linear):
    """A model's lm_head that can return the loss instead of the logits.

    It owns the weight under its usual name, so ZeRO 3 gathers it when the head is called, and checkpoints name it as
    usual.
    """

    def __init__(self, head: nn.Linear, tile: int, softcap: float | None) -> None:
        if head.bias is not None:
            raise ValueError("a language model's head with a bias is not supported")
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight
        self.tile: int = tile
        self.softcap: float | None = softcap

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits [..., V], or with labels, int64 of hidden's leading shape, their summed loss."""
        if labels is None:
            return super().forward(hidden)
        return tiled_cross_entropy(hidden.flatten(0, -2), self.weight, labels.flatten(), self.tile, self.softcap)


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, tile: int, softcap: float | None) -> Tensor:
        differentiate = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        dhidden = torch.empty_like(hidden if differentiate else hidden[:0])
        dweight = torch.zeros_like(weight if differentiate else weight[:0], dtype=torch.float32)
        for rows, target in zip(torch.arange(len(hidden)).split(tile), labels.split(tile), strict=True):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            logits, slope = _capped((hidden[here] @ weight.T).float(), softcap)
            valid = target != IGNORE
            target = target.clamp(min=0).unsqueeze(1)
            lse = logits.logsumexp(1)
            loss += ((lse - logits.gather(1, target).squeeze(1)) * valid).sum()
            if differentiate:
                dlogits = torch.exp(logits - lse.unsqueeze(1))
                dlogits.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=torch.float32))
                dlogits = (dlogits * slope * valid.unsqueeze(1)).to(hidden.dtype)
                dhidden[here] = dlogits @ weight
                dweight += dlogits.T @ hidden[here]
        if differentiate:
            ctx.save_for_backward(dhidden, dweight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, dloss: Tensor):
        dhidden, dweight = ctx.saved_tensors
        return dhidden * dloss.to(dhidden.dtype), dweight * dloss.to(dweight.dtype), None, None, None


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | float]:
    """Logits after the cap, and the cap's derivative."""
    if softcap is None:
        return logits, 1.0
    x = logits / softcap
    return softcap * torch.tanh(x), torch.cosh(x).pow_(-2)  # 1 - tanh^2 would cancel near the cap
