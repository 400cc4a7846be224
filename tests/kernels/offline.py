"""Compile the portable kernels without a GPU, and count what decides their speed in the machine code.

Prints one JSON object per case, for `tests/kernels/test_compiles.py`. By hand, for one architecture or all:

    python -m tests.kernels.offline 90
"""

from __future__ import annotations

import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

from ringflash.kernels import portable_backward, portable_decode, portable_forward
from ringflash.kernels.portable_parts import Tuning
from tests.compiled import machine_code, resources

TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
TILED = ("q", "k", "v", "dout", "q_part", "k_part")
KERNELS = {
    "forward": (portable_forward.forward_kernel, portable_forward.tuning_for),
    "dq": (portable_backward.dq_kernel, portable_backward.dq_tuning_for),
    "dkdv": (portable_backward.dkdv_kernel, lambda *args: portable_backward.dkdv_tuning_for(*args)[0]),
}
APART = {  # of large heads, dk and dv by separate programs
    "dk": KERNELS["dkdv"],
    "dv": (portable_backward.dkdv_kernel, lambda *args: portable_backward.dkdv_tuning_for(*args)[1]),
}
LARGE = ("forward", "dq", *APART)
DECODING = {  # loads without the copy engine, for rows that are too few for a warpgroup's products
    "decode": (
        portable_decode.decode_kernel,
        lambda head_dim, dtype, arch: portable_decode.tuning_for(head_dim, dtype, 4, arch),
    ),
    "combine": (portable_decode.combine_kernel, lambda *args: Tuning(16, 16, warps=4, stages=1, tma=False)),
}


@dataclass(frozen=True)
class Case:
    """One kernel, specialised as a launch on 8 query heads over 2 KV heads would specialise it."""

    kernel: str
    arch: int
    head_dim: int = 128
    dtype: str = "bfloat16"
    capped: bool = False
    carry: bool = False
    value_dim: int | None = None  # None: head_dim

    @property
    def name(self) -> str:
        flags = "".join(f"-{flag}" for flag in ("capped", "carry") if getattr(self, flag))
        dims = f"D{self.head_dim}" if self.value_dim is None else f"D{self.head_dim}-DV{self.value_dim}"
        return f"{self.kernel}-sm{self.arch}-{self.dtype}-{dims}{flags}"


CASES = [
    *(Case(kernel, arch, head_dim) for arch in (80, 90, 100) for head_dim in (64, 128) for kernel in KERNELS),
    *(Case(kernel, arch, head_dim=256) for arch in (80, 90) for kernel in LARGE),
    *(Case(kernel, 90, head_dim=192, value_dim=128) for kernel in LARGE),
    *(Case(kernel, 90, head_dim=512) for kernel in LARGE),
    *(
        Case(kernel, arch, head_dim=512)
        for arch, kernels in ((80, ("forward", "dq")), (100, ("forward", "dk")))
        for kernel in kernels
    ),
    *(Case(kernel, 90, capped=True) for kernel in KERNELS),
    Case("forward", 90, carry=True),
    *(Case("decode", arch) for arch in (80, 90, 100)),
    Case("decode", 90, head_dim=256),
    Case("combine", 90),
]


def compile_case(case: Case, tuning: Tuning | None = None):
    """Triton's compiled kernel for a case."""
    kernel, tuning_for = (KERNELS | APART | DECODING)[case.kernel]
    dtype = getattr(torch, case.dtype)
    t = tuning or tuning_for(case.head_dim, dtype, case.arch)
    dims = case.head_dim, case.value_dim or case.head_dim
    padded, padded_v = map(triton.next_power_of_2, dims)
    of_values = case.kernel in ("forward", "dv")
    part = t.chunk(dims[1] if of_values else dims[0])
    padded_v = part if of_values else padded_v
    constants = {
        "GROUP": 4, "D": dims[0], "BLOCK_D": padded, "DV": dims[1], "BLOCK_DV": padded_v,
        "BLOCK_Q": t.block_q, "BLOCK_K": t.block_k,
        "STAGES": t.stages, "TMA": t.tma, "CAPPED": case.capped, "IN_PLACE": case.carry,
        "BLOCK_C": part, "OF_K": case.kernel != "dv", "OF_V": case.kernel != "dk",
        "FINISHES": case.carry,
        "LEAST": portable_decode.LEAST_KEYS, "BLOCK_N": portable_decode.PARTS, "SINK": True,
    }  # fmt: skip
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}

    width = {"q": padded, "k": padded, "v": padded_v, "dout": padded_v, "q_part": part, "k_part": part}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in TILED and t.tma and (not name.endswith("_part") or part < padded):
            rows = t.block_k if name in ("k", "v", "k_part") else t.block_q
            return f"tensordesc<{TYPE_NAMES[dtype]}[1, 1, {rows}, {width[name]}]>"
        if name in (*TILED, "final") or (name == "out" and not case.carry and case.kernel != "decode"):
            return f"*{TYPE_NAMES[dtype]}"
        if name in ("out", "carry", "lse", "delta", "dq", "dk", "dv", "parts", "lses", "sink"):
            return "*fp32"
        if name.startswith(("start", "end")) or name == "seen":
            return "*i32"
        return "fp32" if name in ("c", "cap_scale", "scale") else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or "_stride_" in name]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": t.warps, "num_stages": t.stages}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def report(case: Case, tuning: Tuning | None = None) -> dict:
    """Registers, stack and shared bytes, spills, tensor-core and copy instructions of a case."""
    compiled = compile_case(case, tuning)
    code = machine_code(compiled)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return {
        "case": asdict(case) | {"name": case.name},
        **resources(compiled), "shared": compiled.metadata.shared,
        "spills": count(r"\b(?:STL|LDL)\b"), "wgmma": count(r"\bHGMMA\b"), "mma_sync": count(r"\bHMMA\b"),
        "tcgen05": count(r"\bUTC\w*MMA\b"), "tma_loads": count(r"\bUTMALDG\b"), "cp_async": count(r"\bLDGSTS\b"),
        "wgmma_waits_in_ptx": compiled.asm["ptx"].count("wgmma.wait_group"),
        "wgmma_waits": count(r"\bWARPGROUP\.DEPBAR\b"),
        "spills_in_loops": _spills_in_loops(code),
        "exp2_under_wgmma": _exp2_under_wgmma(code),
    }  # fmt: skip


def _spills_in_loops(code: str) -> int:
    """The most spills in one innermost loop with matrix products: those that every tile pays for."""
    lines = code.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"\s*(\.L_\w+):", line))}
    most, innermost = 0, -1  # where the last loop that holds no other ended
    for end, line in enumerate(lines):
        found = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if not found or not innermost < labels.get(found[1], -1) < end:
            continue
        loop, innermost = "\n".join(lines[labels[found[1]] : end]), end
        if re.search(r"\b(?:HGMMA|HMMA|UTC\w*MMA)\b", loop):
            most = max(most, len(re.findall(r"\b(?:STL|LDL)\b", loop)))
    return most


def _exp2_under_wgmma(code: str) -> int:
    """The most exponentials issued between a matrix product and the wait for it: what overlaps."""
    most = here = 0
    in_flight = False
    for instruction in re.findall(r"\b(HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2)\b", code):
        if instruction == "MUFU.EX2":
            here += in_flight
        else:
            in_flight = instruction == "HGMMA"
            most, here = (max(most, here), 0) if not in_flight else (most, here)
    return most


if __name__ == "__main__":
    chosen = [case for case in CASES if not sys.argv[1:] or str(case.arch) in sys.argv[1:]]
    with ProcessPoolExecutor(max_workers=2) as pool:
        for result in pool.map(report, chosen):
            print(json.dumps(result), flush=True)
