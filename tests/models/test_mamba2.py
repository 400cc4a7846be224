"""The scan of Mamba-2 layers, in plain torch, is the recurrence that it stands for."""

import torch

from ringflash import Layout
from ringflash.models.linear_kernels import scan
from ringflash.ring.sequences import Sequences

LENGTHS = (150, 1, 64, 9)  # of documents, with chunks of 64 tokens: parts of one, exactly one, more than two


def inputs():
    """q, k of 2 key heads, v of 6 value heads, and their decays, from none to all that a token before it left."""
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, sum(LENGTHS), 2, 5, generator=random) for _ in range(2))
    v = torch.randn(1, sum(LENGTHS), 6, 3, generator=random)
    g = -torch.logspace(-3, 1.5, 6) * torch.rand(1, sum(LENGTHS), 6, generator=random)
    return [x.requires_grad_() for x in (q, k, v, g)]


def recurrence(q, k, v, g):
    """Token by token, in float64."""
    q, k = (x.repeat_interleave(3, dim=2) for x in (q, k))
    results = []
    for document in zip(*(x.double().split(LENGTHS, dim=1) for x in (q, k, v, g)), strict=True):
        state = torch.zeros(6, 5, 3, dtype=torch.float64)
        for q_, k_, v_, g_ in zip(*(x[0] for x in document), strict=True):
            state = g_.exp()[:, None, None] * state + k_[:, :, None] * v_[:, None, :]
            results.append((q_[:, :, None] * state).sum(1))
    return torch.stack(results)[None]


def test_the_scan_and_its_gradients_are_those_of_the_recurrence():
    starts = torch.zeros(1, sum(LENGTHS), dtype=torch.bool)
    starts[0, torch.tensor([0, *LENGTHS[:-1]]).cumsum(0)] = True
    sequences = Sequences.of(Layout.contiguous(sum(LENGTHS), 1), starts, torch.device("cpu"))
    found, exact = inputs(), inputs()
    out, expected = scan(*found, sequences), recurrence(*exact)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = zip(
        ("out", *"qkvg"),
        (out.detach(), *(x.grad for x in found)),
        (expected.detach(), *(x.grad for x in exact)),
        strict=True,
    )
    errors = {name: float((x - y).norm() / y.norm()) for name, x, y in pairs}
    assert max(errors.values()) < 2e-6, errors
