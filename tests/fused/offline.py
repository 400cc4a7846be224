"""Compile the fused kernels without a GPU: one JSON object per kernel, its registers and stack."""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from ringflash.fused import adamw, cross_entropy, float8, gated, gated_norm, norm, rotary
from ringflash.fused.launch import tile_of
from tests.compiled import resources

FP32 = {
    "inverse", "parts", "losses", "scales", "maxima", "eps", "offset", "softcap", "lr", "beta1", "beta2", "decay",
    "correct1", "correct2",
}  # fmt: skip
TYPES = {"values": "fp8e4nv", "labels": "i64", "high": "i16", "low": "i16", "mean": "i16", "square": "i16"}


def norm_of(width: int, **more: bool) -> tuple[dict, int]:
    """Constants and warps of a norm's launch."""
    rows, columns, warps = tile_of(width)
    return {"ROWS": rows, "COLUMNS": columns} | more, warps


def rotary_of(normed: bool, **more: bool) -> tuple[dict, int]:
    """Constants and warps of rotary's launch."""
    return {"NORM": normed, "ROWS": 16, "HALF": 64} | more, 4


# name: (kernel, its constants and warps)
KERNELS = {
    **{
        f"{name}-{width}": (kernel, norm_of(width, **more))
        for width in (64, 1024, 5120, 16384)
        for name, kernel, more in (
            ("norm-forward", norm._forward, {"ADDS": True}),
            ("norm-backward", norm._backward, {"ADDS": True, "TRAINED": True}),
        )
    },
    **{
        f"gated-norm-{name}-{width}": (kernel, norm_of(width, **more))
        for width in (512, 8192)
        for name, kernel, more in (
            ("forward", gated_norm._forward, {}),
            ("backward", gated_norm._backward, {"TRAINED": True}),
        )
    },
    **{
        f"rotary-{name}-{normed}": (kernel, rotary_of(normed, **more))
        for normed in (True, False)
        for name, kernel, more in (
            ("forward", rotary._forward, {}),
            ("backward", rotary._backward, {"TRAINED": normed}),
        )
    },
    "norm-frozen-1024": (norm._backward, norm_of(1024, ADDS=True, TRAINED=False)),
    "rotary-frozen": (rotary._backward, rotary_of(True, TRAINED=False)),
    **{
        f"gated-{name}-{gelu}": (kernel, ({"GELU": gelu, "BLOCK": gated.BLOCK}, 8))
        for gelu in (True, False)
        for name, kernel in (("forward", gated._forward), ("backward", gated._backward))
    },
    **{
        f"cross-entropy-{capped}": (cross_entropy._kernel, ({"CAPPED": capped, "BLOCK": cross_entropy.BLOCK}, 16))
        for capped in (True, False)
    },
}
TRANSPOSED = ({"TOKENS": float8.TOKENS, "COLUMNS": float8.COLUMNS}, 8)
HOPPER = {  # which 8-bit values need
    **{f"cast-rows-{width}": (float8._rows, norm_of(width)) for width in (1024, 4096, 14336)},
    "cast-maxima": (float8._maxima, TRANSPOSED),
    "cast-columns": (float8._columns, TRANSPOSED),
}
KERNELS["adamw"] = (adamw._kernel, ({"BLOCK": adamw.BLOCK}, 4))
POINTERS = {
    "x", "residual", "weight", "h", "y", "inverse", "dh", "dy", "dx", "parts", "cos", "sin", "gate", "up", "out",
    "dgate", "dout", "logits", "losses", "gradient", "values", "scales", "maxima", *TYPES,
}  # fmt: skip


def report(name: str, arch: int) -> dict:
    """A kernel's resources, compiled for bf16 tensors."""
    kernel, (constants, warps) = (KERNELS | HOPPER)[name]

    def type_of(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        kind = TYPES.get(argument, "fp32" if argument in FP32 else "bf16")
        if argument in POINTERS:
            return f"*{kind}"
        return kind if argument in FP32 else "i32"

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    return {"kernel": f"{name}-sm{arch}"} | resources(compiled)


if __name__ == "__main__":
    for arch, kernels in ((80, KERNELS), (90, KERNELS | HOPPER)):
        for name in kernels:
            print(json.dumps(report(name, arch)), flush=True)
