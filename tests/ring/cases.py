"""Inputs, the float64 oracle, a ring of every rank, and kernels that compute nothing, for tests of the ring."""

import dataclasses

import torch

from ringflash import Partial, kernels, ring_attention
from ringflash.kernels import Kernel, blocked
from tests import reference

NAMES = ("out", "dq", "dk", "dv", "dsink")


def whole_inputs(batch, length, heads=4, kv_heads=2, dim=16, value_dim=None):
    """q, k, v, dout of whole sequences, the same on every rank. Keys and values have a mean, as those of models do."""
    generator = torch.Generator().manual_seed(length)
    of_values = dim if value_dim is None else value_dim
    counts, dims = (heads, kv_heads, kv_heads, heads), (dim, dim, of_values, of_values)
    shapes = [(batch, length, n, d) for n, d in zip(counts, dims, strict=True)]
    return [torch.randn(shape, generator=generator) + mean for shape, mean in zip(shapes, (0, 2, 1, 0), strict=True)]


def oracle(inputs, visible, softcap=None, sink=None, dtype=torch.float64):
    """out, dq, dk, dv and, where there is a sink, its gradient: of whole sequences, by plain torch in a dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (*inputs[:3], *_listed(sink))]
    out, _ = reference.attention(*leaves[:3], visible, softcap=softcap, sink=None if sink is None else leaves[3])
    return [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].to(dtype))]


def on_ring(inputs, plan, sink=None, **options):
    """The same of the local shards, ranks outermost in the batch; the sink's gradient is this process's share."""
    *shards, dout = (plan.shard(x.detach()) for x in inputs)
    leaves = [x.requires_grad_() for x in (*shards, *(x.detach().clone() for x in _listed(sink)))]
    out = ring_attention(*leaves[:3], plan, sink=None if sink is None else leaves[3], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _listed(sink):
    return [] if sink is None else [sink]


def whole(results, layout):
    """The whole sequences of results whose shards are side by side in the batch; a sink's gradient as it is."""
    return [*(layout.unshard(x.chunk(layout.ranks)) for x in results[:4]), *results[4:]]


def assert_exact(results, expected, layout, case=""):
    """Results, shards side by side in the batch, within 1e-5 of float64: relative norm, absolute below norm 1."""
    for name, found, truth in zip(NAMES[:4], whole(results, layout), expected, strict=True):
        off = (found.double() - truth).norm() / truth.norm().clamp(min=1.0)
        assert off <= 1e-5, f"{name} {case}: relative error {off:.2e}"


def beyond_the_rule(found, exact, plain, spare=0.0):
    """Results that are further from float64 than twice plain torch in their dtype, and `spare`."""
    errors = ((error(x, y), error(rounded, y)) for x, y, rounded in zip(found, exact, plain, strict=True))
    return [
        f"{name}: error {ours:.1e}, plain torch's {theirs:.1e}"
        for name, (ours, theirs) in zip(NAMES, errors, strict=False)
        if not ours <= 2 * theirs + spare
    ]


def error(x, truth):
    """The relative error of the norm."""
    return float((x.double() - truth).norm() / truth.norm())


def idle_kernel(**functions):
    """A kernel that computes nothing and allocates no more than results, with some functions replaced."""

    def forward(q, k, v, intervals, *, carry, out, **options):
        if out is not None:
            out.zero_()
        return Partial.identity(q) if carry is None else carry

    idle = Kernel(
        "idle",
        forward,
        delta=lambda out, dout: torch.zeros(out.shape[0], out.shape[2], out.shape[1]),
        center=lambda q, k, lse, *, scale: (torch.zeros_like(k[:, :1]), torch.zeros_like(lse)),
        backward=lambda *tensors, **options: None,
        round_into=blocked.round_into,
        round_dq=blocked.round_dq,
        supports=lambda *request: None,
    )
    return dataclasses.replace(idle, **functions)


def note_calls(monkeypatch, note):
    """Call note("forward" or "backward", keyword arguments) whenever ring_attention calls a kernel."""
    select = kernels.select

    def noted(kernel, name):
        def call(*args, **options):
            note(name, options)
            return getattr(kernel, name)(*args, **options)

        return call

    def selected(*args):
        kernel = select(*args)
        return dataclasses.replace(kernel, **{name: noted(kernel, name) for name in ("forward", "backward")})

    monkeypatch.setattr(kernels, "select", selected)
