"""MLPs as a single function with its own backward, so that no tensor of tokens x intermediate size is kept.

    h_i = x W_i^T + b_i        one or two: up, or gate and up
    a   = combine(act, h_i)    act(up), or act(gate) * up
    y   = a D^T + d

With a LoRA adapter, a product also adds scale (x A^T) B^T, and its own weight is frozen (`models.lora_linear`). Layers
in 8 bits have their products in 8 bits (`models.float8`), and each tile has scales of its own.

In a checkpointed layer, only x is kept, and the backward recomputes h and a one tile of tokens at a time, which
checkpointing does once in any case. x is saved before y is computed: torch's checkpoint stops recomputing as soon as it
has all saved tensors, so y, the layer's last product, is not recomputed. In layers that are not checkpointed, h is kept
and a is recomputed from it.

Weight gradients are summed over tiles in fp32 and rounded once, and DeepSpeed sees each of them once. The MLP uses the
weights of its linear layers directly, so for ZeRO 3 it must be a leaf module (`leaf_modules` lists them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ringflash.models import float8
from ringflash.models.digests import digest
from ringflash.models.float8 import Operand, in_float8
from ringflash.models.lora_experts import experts_forward
from ringflash.models.lora_linear import (
    Parts,
    adapted_forward,
    parts_of,
    product,
    product_backward,
    reduced,
    reduced_gradient,
)

TENSORS = 4  # of a product's `Parts`: W, bias, A and B; what an MLP lacks is None
ELEMENTS = 2**27  # elements of h per tile by default: 256 MiB in bf16, and enough for matrix products at full speed


def _plain(act: Callable[[Tensor], Tensor], up: Tensor) -> Tensor:
    return act(up)


def _gated(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def _halves(act: Callable[[Tensor], Tensor], both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return act(gate) * up


class MlpSpec(NamedTuple):
    """The submodules of an MLP by name, and the function between its products."""

    inputs: tuple[str, ...]
    output: str
    act: str
    combine: Callable[..., Tensor]


# By the digest of an MLP's forward (`models.digests`), each with the first family that has it.
GATED = "9eb101c4fe03"
SPECS = {
    GATED: MlpSpec(("gate_proj", "up_proj"), "down_proj", "act_fn", _gated),  # llama
    "b0576bbd6b90": MlpSpec(("gate_up_proj",), "down_proj", "activation_fn", _halves),  # phi3
    "dea4da216889": MlpSpec(("input_linear",), "output_linear", "activation", _halves),  # granitemoeshared
    "12ba6a0ab285": MlpSpec(("up_proj",), "down_proj", "act_fn", _plain),  # arcee
    "da4afea26ee0": MlpSpec(("dense_h_to_4h",), "dense_4h_to_h", "act", _plain),  # gpt_neox
    "dfc5043de657": MlpSpec(("fc1",), "fc2", "activation_fn", _plain),  # phi
}


def spec_of(module: nn.Module) -> MlpSpec | None:
    """The spec of a known MLP; None for other modules, and for an MLP whose products are no linear layers.

    These may have adapters of LoRA, but without dropout.
    """
    kind: Any = type(module)
    spec = SPECS.get(digest(kind.forward)) if kind.__module__.startswith("transformers.models.") else None
    if spec is None or _products(module, spec) is None:
        return None
    act = getattr(module, spec.act)
    return None if isinstance(act, nn.Module) and any(True for _ in act.parameters()) else spec


def _products(module: nn.Module, spec: MlpSpec) -> list[Parts] | None:
    """The parts of W_1, ..., D; None if one of them has none."""
    found = [parts_of(getattr(module, name)) for name in (*spec.inputs, spec.output)]
    return None if None in found else found  # type: ignore[return-value]  # none is None


def linear_layers(module: nn.Module) -> tuple[str, ...]:
    """The names of the linear layers of a known MLP; none for other modules."""
    return () if (spec := spec_of(module)) is None else (*spec.inputs, spec.output)


def tile_for(width: int) -> int:
    """Tokens per tile, a multiple of 128, if h has `width` columns.

    >>> tile_for(3072), tile_for(14336)
    (43648, 9344)
    """
    return max(1, ELEMENTS // width // 128) * 128


def tiles_of(model: nn.Module, tile: int | None = None) -> set[int]:
    """The tile sizes, in tokens, of a model's known MLPs. tile: the same for all; None: by their widths."""
    known = ((module, spec) for module in model.modules() if (spec := spec_of(module)) is not None)
    return {tile or tile_for(_width(module, spec)) for module, spec in known}


def tile_mlps(model: nn.Module, tile: int | None = None) -> None:
    """Make a model's known MLPs keep only their input. tile: tokens at once; None: by their widths.

    The others, such as experts, stay as they are.
    """
    for module in model.modules():
        if (spec := spec_of(module)) is not None:
            replace_forward(module, getattr(module, "fused_activation", None), tile or tile_for(_width(module, spec)))


def replace_forward(module: Any, kernel: str | None, tile: int | None) -> None:
    """Compute a known MLP with this file. kernel: see `_Mlp`. tile: tokens at once; None: keep h."""
    spec = spec_of(module)
    assert spec is not None
    module.fused_activation = kernel
    scales = tuple(parts.scale for parts in _products(module, spec) or ())
    in_8_bits = in_float8(getattr(module, spec.output))
    mlp = _Mlp(spec.combine, getattr(module, spec.act), scales, kernel, tile, in_8_bits)
    module.forward = partial(_forward, module, spec, mlp)


def leaf_modules(model: nn.Module) -> list[nn.Module]:
    """The MLPs, adapted layers and experts that are one function: they use weights of others without calling these."""
    replaced = (_forward, adapted_forward, experts_forward)
    return [module for module in model.modules() if getattr(vars(module).get("forward"), "func", None) in replaced]


def require_input_gradients(module: nn.Module) -> None:
    """Make the first input of a leaf module that trains need a gradient, also above frozen layers.

    Otherwise torch runs its backward hook, in which ZeRO 3 reduces its gradients, before there are any.
    """

    def detached(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *others = inputs
        return None if x.requires_grad else (x.detach().requires_grad_(), *others)

    if any(p.requires_grad for p in module.parameters()):
        module.register_forward_pre_hook(detached)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in fp32; a and b may have 16 bits."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def _width(module: nn.Module, spec: MlpSpec) -> int:
    return getattr(module, spec.inputs[0]).out_features


def _forward(module: nn.Module, spec: MlpSpec, mlp: _Mlp, x: Tensor) -> Tensor:
    """y [..., H] of x [..., H]."""
    products = _products(module, spec)
    if products is None or any(x.a is not None and x.scale != y for x, y in zip(products, mlp.scales, strict=True)):
        raise RuntimeError("an MLP that is computed as one function had its adapters merged or changed")
    weights: list[Any] = [x for parts in products for x in parts[:TENSORS]]
    rows = x.flatten(0, -2)
    if mlp.tile is None:
        y = _Kept.apply(mlp, rows, *weights)
    else:
        detached = [None if w is None else w.detach() for w in weights]
        y = _Computed.apply(mlp, _Tiled.apply(mlp, rows, *weights), rows.detach(), detached)
    return y.view(*x.shape[:-1], y.shape[-1])


@dataclass(frozen=True)
class _Mlp:
    """An MLP's arithmetic on tensors [tokens, columns]; weights: of W_1, ..., D, the tensors of each one's `Parts`.

    kernel: the activation that a Triton kernel computes in one pass (`fused.gated`); None: plain torch. in_8_bits:
    whether products are in 8 bits.
    """

    combine: Callable[..., Tensor]
    act: Callable[[Tensor], Tensor]
    scales: tuple[float, ...]
    kernel: str | None
    tile: int | None
    in_8_bits: bool

    def parts(self, weights: Sequence[Any]) -> list[Parts]:
        """Those of W_1, ..., D."""
        starts = range(0, len(weights), TENSORS)
        each = zip(starts, self.scales, strict=True)
        found = [Parts(*weights[at : at + TENSORS])._replace(scale=scale) for at, scale in each]
        return [parts._replace(weight=self.operand(parts.weight)) for parts in found]

    def operand(self, x: Tensor) -> Any:
        """x as products take it."""
        return Operand(x) if self.in_8_bits else x

    def tiles(self, tokens: int) -> Iterator[slice]:
        """Slices of tokens of about equal length, of `tile` at most; one for no tokens, whose gradients are 0."""
        whole = max(1, tokens)
        tile = self.tile or whole
        tile = min(tile, -(-whole // -(-whole // tile) // 128) * 128)
        return (slice(begin, begin + tile) for begin in range(0, whole, tile))

    def hidden(self, x: Any, inputs: list[Parts]) -> list[Tensor]:
        """The tensors h_i of an operand x."""
        return [product(x, reduced(x, parts), parts) for parts in inputs]

    def output(self, a: Tensor, parts: Parts, out: Tensor | None = None) -> Tensor:
        """y of a, with the parts of D. out: the tensor to write."""
        operand = self.operand(a)
        return product(operand, reduced(operand, parts), parts, out)

    def activated(self, hidden: list[Tensor], overwrite: bool) -> Tensor:
        """a. overwrite: whether h may be overwritten."""
        if self.kernel is None:
            return self.combine(self.act, *hidden)
        from ringflash.fused.gated import gated

        gate, up = hidden
        return gated(gate, up, self.kernel, out=gate if overwrite else None)

    def activation_backward(self, hidden: list[Tensor], da: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """a, recomputed, and the gradients of h. A kernel overwrites da and h with them."""
        if self.kernel is not None:
            from ringflash.fused.gated import gated_backward_

            gate, up = hidden
            gated_backward_(gate, up, da, self.kernel)
            return da, hidden
        with torch.enable_grad():
            leaves = [h.detach().requires_grad_() for h in hidden]
            a = self.combine(self.act, *leaves)
        return a.detach(), torch.autograd.grad(a, leaves, da)

    def gradients(
        self, x: Tensor, dy: Tensor, weights: Sequence[Any], needed: Sequence[bool], kept: list[Tensor] | None = None
    ) -> list[Tensor | None]:
        """The gradients of x and of the weights. needed: which weights need one. kept: h, if it is not recomputed."""
        dx = torch.empty_like(x)
        sums = _Sums(weights, needed, len(x) > (self.tile or len(x)))
        parts = self.parts(weights)
        for here in self.tiles(len(x)):
            self._tile_backward(self.operand(x[here]), dy[here], kept, parts, sums, dx[here])
        return [dx, *sums.rounded()]

    def _tile_backward(
        self, x: Any, dy: Tensor, kept: list[Tensor] | None, parts: list[Parts], sums: _Sums, dx: Tensor
    ) -> None:
        *inputs, output = parts
        hidden = kept or self.hidden(x, inputs)
        gradient = self.operand(dy)
        u = reduced_gradient(gradient, output)
        a, dhidden = self.activation_backward(hidden, product_backward(gradient, u, output))
        sums.add(len(inputs), gradient, u, self.operand(a), output)
        del a, gradient
        for i, (dh, own) in enumerate(zip(dhidden, inputs, strict=True)):
            gradient = self.operand(dh)
            u = reduced_gradient(gradient, own)
            product_backward(gradient, u, own, dx, add=i > 0)
            sums.add(i, gradient, u, x, own)


class _Sums:
    """Sums gradients of weights, biases and adapters over tiles. in_fp32: whether there are several tiles."""

    def __init__(self, weights: Sequence[Any], needed: Sequence[bool], in_fp32: bool) -> None:
        self.weights, self.needed, self.in_fp32 = weights, needed, in_fp32
        self.totals: list[Tensor | None] = [None] * len(weights)

    def add(self, number: int, dout: Any, u: Tensor | None, x: Any, parts: Parts) -> None:
        """Add those of the product `number`, of an operand x, with these parts. u: `reduced_gradient` of dout."""
        weight, bias, a, b = range(number * TENSORS, (number + 1) * TENSORS)
        self._add(weight, dout, x)
        if self.needed[bias]:
            of_bias = (dout.x if isinstance(dout, Operand) else dout).sum(0, dtype=torch.float32)
            before = self.totals[bias]
            self.totals[bias] = of_bias if before is None else before + of_bias
        if u is not None and (t := reduced(x, parts)) is not None:
            self._add(a, u, x)
            self._add(b, dout, t)

    def _add(self, at: int, dout: Any, x: Any) -> None:
        """Add dout^T x to the gradient of weight `at`, if that is needed."""
        if not self.needed[at]:
            return
        if isinstance(dout, Operand):
            found = float8.weight_gradient(dout, x, torch.float32 if self.in_fp32 else self.weights[at].dtype)
            self.totals[at] = found if (total := self.totals[at]) is None else total.add_(found)
        elif not self.in_fp32:
            self.totals[at] = dout.T @ x
        elif (total := self.totals[at]) is not None:
            add_product(total, dout.T, x)
        else:
            self.totals[at] = torch.zeros_like(self.weights[at], dtype=torch.float32)
            add_product(self.totals[at], dout.T, x)  # type: ignore[arg-type]

    def rounded(self) -> list[Tensor | None]:
        """The gradients in their weights' dtypes."""
        return [None if x is None else x.to(w.dtype) for x, w in zip(self.totals, self.weights, strict=True)]


class _Tiled(torch.autograd.Function):
    """Saves x and has the backward. Returns a tensor of y's shape without memory, which receives y's gradient."""

    @staticmethod
    def forward(ctx, mlp: _Mlp, x: Tensor, *weights: Tensor | None) -> Tensor:
        ctx.mlp = mlp
        ctx.save_for_backward(x, *weights)
        return x.new_empty(()).expand(len(x), len(weights[-TENSORS]))  # type: ignore[arg-type]  # it is D

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, *weights = ctx.saved_tensors
        return None, *ctx.mlp.gradients(x, dy, weights, ctx.needs_input_grad[2:])


class _Computed(torch.autograd.Function):
    """Computes y; its gradient is passed on to `_Tiled`."""

    @staticmethod
    def forward(ctx, mlp: _Mlp, handle: Tensor, x: Tensor, weights: list[Any]) -> Tensor:
        y = torch.empty(handle.shape, dtype=x.dtype, device=x.device)
        *inputs, output = mlp.parts(weights)
        for here in mlp.tiles(len(x)):
            a = mlp.activated(mlp.hidden(mlp.operand(x[here]), inputs), overwrite=True)
            mlp.output(a, output, out=y[here])
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return None, dy, None, None


class _Kept(torch.autograd.Function):
    """Computes y from all tokens at once, and saves h."""

    @staticmethod
    def forward(ctx, mlp: _Mlp, x: Tensor, *weights: Tensor | None) -> Tensor:
        *inputs, output = mlp.parts(weights)
        hidden = mlp.hidden(mlp.operand(x), inputs)
        ctx.mlp, ctx.overwritten = mlp, False
        ctx.save_for_backward(x, *hidden, *weights)
        return mlp.output(mlp.activated(hidden, overwrite=False), output)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        if ctx.overwritten:
            raise RuntimeError("a second backward through a fused MLP: its gate and up were overwritten by the first")
        needed = ctx.needs_input_grad[2:]
        x, *others = ctx.saved_tensors
        hidden, weights = others[: -len(needed)], others[-len(needed) :]
        found = ctx.mlp.gradients(x, dy, weights, needed, hidden)
        if ctx.mlp.kernel is not None:
            torch.autograd.graph.increment_version(hidden)  # so that torch reports anyone else who kept them
            ctx.overwritten = True
        return None, *found
