"""What the fused passes must be, as functions that both an interpreting process and a GPU can run."""

from __future__ import annotations

import torch

from ringflash.fused.cross_entropy import cross_entropy_
from ringflash.fused.float8 import cast_columns, cast_rows
from ringflash.fused.gated import gated, gated_backward_
from ringflash.fused.gated_norm import gated_norm
from ringflash.fused.norm import rms_norm
from ringflash.fused.rotary import rotary
from ringflash.models import FusedConfig, fuse_layers
from tests.fused import cases
from tests.models.cases import tiny

# name: (shape, whether a residual is added, offset of the weight); rows that do not fill a tile, a row longer than one
NORMS = {
    "one-row": ((1, 1, 7), False, 0.0),
    "odd-width": ((2, 5, 100), True, 0.0),
    "gemma": ((1, 33, 64), True, 1.0),
    "narrow": ((1, 300, 8), False, 0.0),
    "wide": ((1, 3, 5120), True, 0.0),
}
# name: (shape, groups of channels)
GATED_NORMS = {"one-row": ((1, 1, 7), 1), "odd-groups": ((2, 5, 300), 3), "narrow": ((1, 700, 16), 2)}
# name: (B, S, heads, D), rows of cos and sin, whether heads are normalised
ROTARIES = {
    "one-token": ((1, 1, 1, 2), 1, True),
    "rows-share-positions": ((2, 9, 3, 128), 1, True),
    "rows-differ": ((3, 5, 2, 64), 3, True),
    "no-norm": ((2, 7, 4, 16), 2, False),
    "odd-half": ((1, 11, 2, 80), 1, True),
}

# name: shapes of matrices that are cast to 8 bits; the kernels transpose tiles of 128 x 128
CASTS = {"one-row": (1, 16), "odd": (37, 48), "tiles": (300, 176), "wide": (3, 5120), "narrow": (700, 8)}


def representable(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix x [M, K] that 8 bits hold exactly, its values, and the scales of rows, powers of two."""
    torch.manual_seed(0)
    rows, columns = CASTS[name]
    values = (torch.randn(rows, columns) * 4).to(torch.float8_e4m3fn).float()
    values[:, 0] = -448.0
    scales = torch.randint(-9, 9, (rows, 1)).float().exp2()
    return (values * scales).bfloat16(), values.to(torch.float8_e4m3fn), scales


def casts_are_exact(name: str, device: str = "cpu") -> bool:
    """Whether casts by rows, and by columns of the transposed matrix, have the values and scales."""
    x, values, scales = (y.to(device) for y in representable(name))
    by_rows, by_columns = cast_rows(x), cast_columns(x.T)
    padded = torch.nn.functional.pad(values.float(), (0, -values.shape[1] % 16))
    right = torch.equal(by_rows[0].float(), values.float()) and torch.equal(by_columns[0].float(), padded)
    return right and torch.equal(by_rows[1], scales) and torch.equal(by_columns[1], scales)


def norm_excess(name: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """How far rms_norm is from float64, over what is allowed."""
    shape, adds, offset = NORMS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(shape[-1]) * 0.2 + 1 - offset, *([torch.randn(shape)] if adds else [])]

    def fused(x, weight, residual=None):
        return rms_norm(x, weight, 1e-6, residual=residual, offset=offset)

    def plain(x, weight, residual=None):
        return cases.norm(x, weight, residual, offset)

    return cases.excess(fused, plain, [x.to(device, dtype) for x in inputs])


def gated_norm_excess(name: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """How far gated_norm is from float64, over what is allowed."""
    shape, groups = GATED_NORMS[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape), torch.randn(shape) * 2, torch.randn(shape[-1]) * 0.2 + 1]
    return cases.excess(
        lambda x, gate, weight: gated_norm(x, gate, weight, 1e-6, groups),
        lambda x, gate, weight: cases.gated_norm(x, gate, weight, groups),
        [x.to(device, dtype) for x in inputs],
    )


def rotary_excess(name: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """How far rotary is from float64, over what is allowed."""
    shape, rows, normalised = ROTARIES[name]
    torch.manual_seed(0)
    angles = torch.rand(rows, shape[1], shape[3] // 2, device=device) * 6
    cos, sin = (torch.cat((f(angles), f(angles)), -1).to(dtype) for f in (torch.cos, torch.sin))
    inputs = [torch.randn(shape) * 2, *([torch.randn(shape[3]) * 0.2 + 1] if normalised else [])]

    def fused(x, weight=None):
        return rotary(x, cos, sin, weight, 1e-6)

    def plain(x, weight=None):
        return cases.rotated(x, cos, sin, weight)

    return cases.excess(fused, plain, [x.to(device, dtype) for x in inputs])


def frozen_weight_differences() -> list[float]:
    """How much the gradient of x differs, for norms and for rotary heads, if the weight gets none."""
    torch.manual_seed(0)
    x, dy, cos, sin = torch.randn(4, 2, 9, 3, 64)
    x, weight = x.requires_grad_(), torch.randn(64, requires_grad=True)
    functions = (
        lambda w: rms_norm(x, w, 1e-6)[1],
        lambda w: gated_norm(x, x, w, 1e-6, 2),
        lambda w: rotary(x, cos[:, :, 0], sin[:, :, 0], w, 1e-6),
    )
    pairs = [[torch.autograd.grad(f(w), x, dy)[0] for w in (weight, weight.detach())] for f in functions]
    return [float((trained - frozen).abs().max()) for trained, frozen in pairs]


def gated_excess(activation: str, dtype: torch.dtype, device: str = "cpu") -> float:
    """How far gated is from float64, over what is allowed; also for values whose exponential overflows."""
    torch.manual_seed(0)
    gate = torch.cat([torch.randn(3, 1000) * 2, torch.tensor([-100.0, 100.0, 0.0, -20.0]).expand(3, 4)], 1)
    inputs = [gate, torch.randn(3, 1004)]
    return cases.excess(
        lambda g, u: _Gated.apply(g, u, activation),
        lambda g, u: cases.gated(g, u, activation),
        [x.to(device, dtype) for x in inputs],
    )


class _Gated(torch.autograd.Function):
    """gated with its backward; raises AssertionError if either pass writes anything but what it says."""

    @staticmethod
    def forward(ctx, gate, up, activation):
        out = gated(gate, up, activation)
        ctx.save_for_backward(gate, up, out)
        ctx.activation = activation
        over = gate.clone()
        gated(over, up, activation, out=over)
        assert torch.equal(over, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        gate, up, out = ctx.saved_tensors
        dgate, dup, again = gate.clone(), up.clone(), dout.clone()
        gated_backward_(dgate, dup, again, ctx.activation)
        assert torch.equal(again, out)
        return dgate, dup, None


def losses(vocabulary: int, softcap: float | None, dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """The error of losses and of their gradient against float64, each over what is allowed."""
    torch.manual_seed(0)
    logits = (torch.randn(6, vocabulary) * 4).to(device, dtype)
    labels = torch.randint(0, vocabulary, (6,), device=device)
    labels[1] = -100
    labels[2] = vocabulary - 1

    def reference(kind):
        z = logits.to(kind).clone().requires_grad_()
        found = cases.cross_entropy(z, labels, softcap)
        (dz,) = torch.autograd.grad(found.sum(), z)
        return found.detach().double(), dz.double()

    exact, plain = reference(torch.float64), reference(dtype)
    mine = logits.clone()
    found = (cross_entropy_(mine, labels, -100, softcap).double(), mine.double())
    ratios = []
    for m, p, e in zip(found, plain, exact, strict=True):
        allowed = 1e-5 if dtype == torch.float32 else 2 * float((p - e).norm() / e.norm()) + 1e-5
        ratios.append(float((m - e).norm() / e.norm()) / allowed)
    return ratios[0], ratios[1]


def adamw_distances(device: str = "cpu") -> dict[str, float]:
    """How far the kernel's step is from the plain one's: the master's movement, and each moment (relative norms)."""
    from ringflash.fused.adamw import adamw_
    from ringflash.training.optimizers.split_adamw import _plain_step, joined, split

    torch.manual_seed(0)
    weight, low = split(torch.randn(5000, device=device) * 0.02)
    before = joined(weight, low)
    gradient, mean, square = (draw(5000, device=device).bfloat16() for draw in (torch.randn, torch.randn, torch.rand))
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 0.1, "decay": 0.1, "step": 3}

    def stepped(by_kernel: bool):
        state = [x.clone() for x in (weight, low.view(torch.bfloat16), mean, square)]
        if by_kernel:
            adamw_(*state, gradient, **settings, seed=7)
        else:
            _plain_step(*state, gradient, torch.Generator(device).manual_seed(7), **settings)
        return joined(state[0], state[1].view(torch.int16)) - before, state[2].float(), state[3].float()

    return {
        name: float((mine - plain).norm() / plain.norm())
        for name, mine, plain in zip(("moved", "mean", "square"), stepped(True), stepped(False), strict=True)
    }


def adamw_in_parts_is_equal(device: str = "cpu") -> bool:
    """A parameter that is updated in two parts gets the bits that it gets whole."""
    from ringflash.fused.adamw import adamw_

    torch.manual_seed(0)
    tensors = [torch.rand(3000, device=device).bfloat16() for _ in range(5)]
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.1, "step": 3, "seed": 7}
    whole, parts = ([x.clone() for x in tensors] for _ in range(2))
    adamw_(*whole, **settings)
    for begin, end in ((0, 1024), (1024, 3000)):
        adamw_(*(x[begin:end] for x in parts), **settings, begin=begin)
    return all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(whole, parts, strict=True))


def ignored_rows_are_zero(device: str = "cpu") -> bool:
    """A token without a label has no loss and no gradient, whatever its logits are."""
    logits = torch.full((2, 9000), float("nan"), device=device)
    found = cross_entropy_(logits, torch.full((2,), -100, device=device), -100)
    return bool((found == 0).all() and (logits == 0).all())


def second_backward_error(device: str = "cpu") -> str:
    """What a second backward through a fused MLP raises."""
    model = tiny("llama").to(device)
    fuse_layers(model, FusedConfig(), torch.device(device))
    out = model.model.layers[0].mlp(torch.randn(1, 4, model.config.hidden_size, device=device))
    out.sum().backward(retain_graph=True)
    try:
        out.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"
