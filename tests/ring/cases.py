"""Inputs, the float64 oracle and a ring of every rank, for tests of the ring."""

import torch

from ringflash import ring_attention
from tests import reference


def whole_inputs(batch, length, heads=4, kv_heads=2, dim=16, value_dim=None):
    """q, k, v, dout of whole sequences, the same on every rank. Keys and values have a mean, as those of models do."""
    generator = torch.Generator().manual_seed(length)
    of_values = dim if value_dim is None else value_dim
    counts, dims = (heads, kv_heads, kv_heads, heads), (dim, dim, of_values, of_values)
    shapes = [(batch, length, n, d) for n, d in zip(counts, dims, strict=True)]
    return [torch.randn(shape, generator=generator) + mean for shape, mean in zip(shapes, (0, 2, 1, 0), strict=True)]


def oracle(inputs, visible, softcap=None):
    """out, dq, dk and dv of whole sequences in float64."""
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out, _ = reference.attention(q, k, v, visible, softcap=softcap)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].double())]


def on_ring(inputs, plan, **options):
    """out, dq, dk, dv of the local shards, ranks outermost in the batch."""
    shards = [torch.cat([plan.layout.shard(x, rank) for rank in plan.ring.local]) for x in inputs]
    q, k, v = (x.requires_grad_() for x in shards[:3])
    out = ring_attention(q, k, v, plan, **options)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), shards[3])]


def assert_exact(results, expected, layout, case=""):
    """Results, shards side by side in the batch, within 1e-5 of float64: relative norm, absolute below norm 1."""
    for name, shards, truth in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
        whole = layout.unshard(shards.chunk(layout.ranks))
        error = (whole.double() - truth).norm() / truth.norm().clamp(min=1.0)
        assert error <= 1e-5, f"{name} {case}: relative error {error:.2e}"
