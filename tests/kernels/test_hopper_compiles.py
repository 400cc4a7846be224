"""The Hopper kernels compile without a GPU, and their machine code is that which was timed.

They are compiled with the installed Triton, and with those that `make test` puts beside it: half a minute each on two
cores, seconds when Triton's cache has them. Prints the figures that are compared here, for the Triton that it finds:

    python -m tests.kernels.test_hopper_compiles
    PYTHONPATH=.venv/triton-3.9.0 python -m tests.kernels.test_hopper_compiles
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from typing import Any

import pytest
import torch

from tests.compiled import ROOT, machine_code, reports, resources

triton = pytest.importorskip("triton")

SHARED_LIMIT = 227 * 1024
TRITONS = [None, *sorted(ROOT.glob(".venv/triton-*"))]
FLAGS = ("carry", "capped", "finishes", "centered", "cluster")
CASES: dict[str, dict[str, Any]] = {
    "forward-D64": {"head_dim": 64},
    "forward-D64-in-ring": {"head_dim": 64, "carry": True, "out": torch.float32, "finishes": True},
    "forward-D128": {"head_dim": 128},
    "forward-D128-in-ring": {"head_dim": 128, "carry": True, "out": torch.float32, "finishes": True},
    "forward-D128-carry-fp16-capped": {"head_dim": 128, "carry": True, "dtype": torch.float16, "capped": True},
    "forward-D256": {"head_dim": 256},
    "forward-D256-in-ring": {"head_dim": 256, "carry": True, "out": torch.float32, "finishes": True},
    "forward-D256-cluster": {"head_dim": 256, "cluster": 1},  # OF_HEADS
    "forward-D256-cluster-carry-fp16-capped": {
        "head_dim": 256,
        "cluster": 2,  # OF_QUERIES
        "carry": True,
        "dtype": torch.float16,
        "capped": True,
    },
    "backward-D64": {"head_dim": 64},
    "backward-D64-capped": {"head_dim": 64, "capped": True},
    "backward-D64-in-ring": {"head_dim": 64, "centered": True, "gradients": torch.float32},
    "backward-D128": {"head_dim": 128},
    "backward-D128-capped": {"head_dim": 128, "capped": True},
    "backward-D128-in-ring": {"head_dim": 128, "centered": True, "gradients": torch.float32},
    "backward-D256": {"head_dim": 256},
    "backward-D256-capped": {"head_dim": 256, "capped": True},
    "backward-D256-in-ring": {"head_dim": 256, "centered": True, "gradients": torch.float32},
}

# Loads and stores of the stack in the loop over unmasked tiles, and why they are accepted.
SPILLS_IN_LOOP = {
    # dk and dv fill 128 of 240 registers, s and dp 64, at head_dim 64 the other way round. What spills, with 3.9.0
    # only, are constant addresses of wgmma operands.
    "backward-D64": 7,
    "backward-D64-in-ring": 7,
    "backward-D64-capped": 13,  # and tanh: 4 with 3.7.1
    "backward-D128": 5,
    "backward-D128-in-ring": 5,
    "backward-D128-capped": 102,  # and tanh: 72 with 3.7.1, 102 with 3.9.0
    "forward-D256-cluster-carry-fp16-capped": 12,  # with 3.9.0 alone, with which clusters do not run
    # dk or dv fills 128, two pieces of dq 64. The consumers' loops differ; this is the shorter one, with the
    # exponentials.
    "backward-D256-in-ring": 1,  # with 3.9.0 alone
    "backward-D256-capped": 1,
}

# Selects in that loop: the forward's keep a row's maximum at head_dim 128, two rows per thread; the backward's swap
# columns of dq at 64. A mask would take one per score: 64 in a forward step and in the backward's at head_dim 64, else
# 32.
SELECTS_IN_LOOP = {
    "forward-D64": 0,
    "forward-D64-in-ring": 0,
    "forward-D128": 2,
    "forward-D128-in-ring": 2,
    "forward-D256": 0,
    "forward-D256-in-ring": 0,
    "forward-D256-cluster": 0,
    "backward-D64": 32,
    "backward-D64-in-ring": 32,
    "backward-D128": 0,
    "backward-D128-in-ring": 0,
    "backward-D256": 0,
    "backward-D256-in-ring": 0,
}


# -- in the process that compiles


def compile_case(name: str):
    """Triton's compiled kernel for a case."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from ringflash.kernels import hopper_backward, hopper_forward, hopper_parts
    from tests.kernels.offline import TYPE_NAMES

    case = {"dtype": torch.bfloat16} | dict.fromkeys(FLAGS, False) | CASES[name]
    module = hopper_forward if name.startswith("forward") else hopper_backward
    kernel = module.forward_kernel if name.startswith("forward") else module.backward_kernel
    head_dim, dtype, tuning = case["head_dim"], case["dtype"], module.TUNINGS[case["head_dim"]]
    out, gradients = case.get("out", dtype), case.get("gradients", dtype)
    rows = hopper_parts.ROWS.value
    registers = hopper_parts.REGISTERS[getattr(tuning, "consumers", 2)]
    constants = {
        "D": head_dim, "CAPPED": case["capped"], "CARRY": case["carry"],
        "CENTERED": case["centered"], "FINISHES": case["finishes"], "CLUSTER": case["cluster"],
        "CONSUMER_REGISTERS": registers.consumer, "PRODUCER_REGISTERS": registers.producer,
    }  # fmt: skip
    constants |= {name.upper(): value for name, value in asdict(tuning).items()}
    if head_dim == 64:
        constants["whole"] = None  # as the launch passes it

    def descriptor(*block: int, dtype: torch.dtype) -> str:
        layout = hopper_parts.tile_layout((1, 1, *block), dtype)
        return f"tensordesc<{TYPE_NAMES[dtype]}{[1, 1, *block]},{layout!r}>"

    def tile_of(rows: int, dtype: torch.dtype) -> str:
        return f"*{TYPE_NAMES[dtype]}" if head_dim > 128 else descriptor(rows, head_dim, dtype=dtype)

    keys_tile = getattr(tuning, "block_k", 2 * rows if head_dim <= 128 else rows)
    queries_tile = getattr(tuning, "block_q", rows)
    types = {
        "q": descriptor(queries_tile, head_dim, dtype=dtype), "dout": descriptor(queries_tile, head_dim, dtype=dtype),
        "k": descriptor(keys_tile, head_dim, dtype=dtype), "v": descriptor(keys_tile, head_dim, dtype=dtype),
        "carry": tile_of(rows, dtype=torch.float32 if case["carry"] else out),
        "out": tile_of(rows, dtype=out), "final": tile_of(rows, dtype=dtype), "seen": "*i32",
        "dq": descriptor(rows, 64, dtype=torch.float32),
        "dk": descriptor(rows, head_dim, dtype=gradients), "dv": descriptor(rows, head_dim, dtype=gradients),
        "lse": "*fp32", "delta": "*fp32", "start": "*i32", "end": "*i32", "order": "*i32",
        "center": f"*{TYPE_NAMES[dtype]}", "scale": "fp32", "counter": "*i32", "c": "fp32", "cap_scale": "fp32",
        "lse_factor": "fp32",
    }  # fmt: skip
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = GluonASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items() if n in signature},
        attrs={(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"},
    )
    options = {"num_warps": 4, "maxnreg": registers.launch, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def report(name: str) -> dict[str, Any]:
    """What decides a case's speed, counted in its PTX and machine code."""
    compiled = compile_case(name)
    code, ptx = machine_code(compiled), compiled.asm["ptx"]

    def count(pattern: str, text: str = code) -> int:
        return len(re.findall(pattern, text))

    # Of the loops with a tile's exponentials, the one without a mask, if there is one: every consumer has both.
    loops = [loop for loop in product_loops(code) if count(r"\bMUFU\.EX2\b", loop) >= 32]
    steady = min(loops, key=lambda loop: (count(r"\bFSEL\b", loop), len(loop)))
    usual = without_what_votes_skip(steady)

    return {
        "name": name, "triton": triton.__version__, "shared": compiled.metadata.shared,
        "stack": resources(compiled)["stack"], "spills": count(r"\b(?:STL|LDL)\b"),
        "spills_in_loop": count(r"\b(?:STL|LDL)\b", steady), "instructions_in_loop": count(r";", steady),
        "selects_in_loop": count(r"\bFSEL\b", steady),
        "usual_instructions": count(r";", usual), "usual_maxima": count(r"\b(?:FMNMX|SHFL)\b", usual),
        "usual_exp2": count(r"\bMUFU\.EX2\b", usual),
        "wgmma": count(r"\bHGMMA\b"), "mma_sync": count(r"\bHMMA\b"),
        "waits": count(r"\bWARPGROUP\.DEPBAR\b"), "waits_in_ptx": ptx.count("wgmma.wait_group"),
        "exp2_under_wgmma": exp2_between_waits(steady),
        "registers": sorted({int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", ptx)}),
        "loads": count(r"\bUTMALDG\b"), "multicasts": count(r"\bUTMALDG\.4D\.MULTICAST\b"),
        "descriptors": [int(i) for i in re.findall(r"\.b8 forward_kernel_param_(\d+)\[128\]", ptx)],
        "stores": count(r"\bUTMASTG\b"), "reductions": count(r"\bUTMAREDG\b"),
        "barriers": barriers(ptx), "tiles": tile_bytes(compiled.asm["ttgir"]),
    }  # fmt: skip


def barriers(ptx: str) -> list[int]:
    """Where in shared memory mbarriers are initialised."""
    at = dict.fromkeys(re.findall(r"mov\.b32\s+(%r\d+), global_smem;", ptx), 0)
    at |= {name: int(offset) for name, offset in re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx)}
    return sorted(at[name] for name in re.findall(r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]", ptx))


def tile_bytes(ttgir: str) -> int:
    """Bytes of the tiles in shared memory, which lie before all else."""
    tiles = re.findall(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x(\d+)x(\d+)x[bf]+(\d+),", ttgir)
    return sum(math.prod(map(int, sizes)) // 8 for sizes in tiles)


def exp2_between_waits(loop: str) -> int:
    """The most exponentials between a wait that leaves one product in flight and the next wait."""
    most = here = 0
    for instruction, left in re.findall(r"\b(WARPGROUP\.DEPBAR|MUFU\.EX2)\b(?:\.LE gsb0, (0x\d))?", loop):
        if instruction == "MUFU.EX2":
            here += 1
        else:
            most, here = max(most, here), 0 if left == "0x1" else -1000
    return most


def product_loops(code: str) -> list[str]:
    """The innermost loops that multiply: from a label to the branch back to it."""
    lines = code.splitlines()
    labels = {line.split(":")[0].strip(): i for i, line in enumerate(lines) if re.match(r"\s*\.L_x_\d+:", line)}
    spans = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target[1], i) < i and "HGMMA" in "".join(lines[labels[target[1]] : i]):
            spans.append((labels[target[1]], i))
    inner = [a for a in spans if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in spans)]
    return ["\n".join(lines[first : last + 1]) for first, last in inner]


def without_what_votes_skip(loop: str) -> str:
    """A loop as a warp runs it in almost every step: without rescaling and without a second computation of weights."""
    skipped = r"(VOTE\.ANY (P\d), P\d ;.*?@!\2 BRA `\((\.L_x_\d+)\) ;).*?\n(?=\s*\3:)"
    return re.sub(skipped, r"\1\n", loop, flags=re.DOTALL)


# -- the claims


@pytest.fixture(scope="module", params=TRITONS, ids=lambda folder: folder.name if folder else "installed")
def compiled(request) -> list[dict]:
    """The report of every case, with one Triton."""
    found = reports("tests.kernels.test_hopper_compiles", request.param)
    assert request.param is None or {r["triton"] for r in found} == {request.param.name.removeprefix("triton-")}
    return found


def consumers(report: dict) -> int:
    """Warpgroups that multiply."""
    return 3 if report["name"].startswith("forward-D64") else 2


def family(report: dict) -> str:
    """Its case without the variant: forward-D64."""
    return "-".join(report["name"].split("-")[:2])


def breaking(compiled: list[dict], **rules) -> list[str]:
    """The reports that violate a rule, with all their figures."""
    return [f"breaks {rule}: {r}" for r in compiled for rule, holds in rules.items() if not holds(r)]


@pytest.mark.slow
def test_products_run_on_warpgroups_and_copies_on_the_copy_engine(compiled):
    assert len(compiled) == len(CASES)
    assert breaking(compiled, wgmma=lambda r: r["wgmma"] > 0 == r["mma_sync"], loads=lambda r: r["loads"] >= 4) == []
    forward = [r for r in compiled if r["name"].startswith("forward")]
    backward = [r for r in compiled if r["name"].startswith("backward")]
    # A consumer stores out in one place, in a ring in either of two, at head_dim 256 from registers. It adds dq in the
    # loop's two forms and in its last step. At 256, a reducer adds it in two pieces, each by two copies. A consumer
    # adds dk and dv (at 256 one of them) in a ring; else it writes them in two places, one of them for keys that no
    # query sees.
    wide = "D256"
    places = lambda r: 0 if wide in r["name"] else 2 if "ring" in r["name"] else 1  # noqa: E731
    stores = lambda r: r["stores"] == places(r) * consumers(r)  # noqa: E731
    of_keys = lambda r: 4 if wide in r["name"] or "ring" in r["name"] else 8  # noqa: E731
    added = lambda r: of_keys(r) if "ring" in r["name"] else 0  # noqa: E731
    written = lambda r: r["stores"] == of_keys(r) - added(r)  # noqa: E731
    reductions = lambda r: r["reductions"] == (8 if wide in r["name"] else 6) + added(r)  # noqa: E731
    assert breaking(forward, stores=stores, none=lambda r: r["reductions"] == 0) == []
    assert breaking(backward, written=written, reductions=reductions) == []


@pytest.mark.slow
def test_nothing_spills_in_the_loop_over_unmasked_tiles_but_what_is_listed(compiled):
    assert breaking(compiled, spills=lambda r: r["spills_in_loop"] <= SPILLS_IN_LOOP.get(r["name"], 0)) == []


@pytest.mark.slow
def test_the_loop_over_unmasked_tiles_has_no_mask(compiled):
    plain = [r for r in compiled if "capped" not in r["name"]]
    assert breaking(plain, selects=lambda r: r["selects_in_loop"] == SELECTS_IN_LOOP[r["name"]]) == []


@pytest.mark.slow
def test_a_guess_takes_no_maximum_and_computes_each_weight_once(compiled):
    weights = {"forward-D64": 64, "forward-D256": 32}  # of a thread, which has one factor of acc for each of two rows
    guesses = [r for r in compiled if "capped" not in r["name"] and family(r) in weights]
    once = lambda r: r["usual_exp2"] == weights[family(r)] + 2  # noqa: E731
    assert breaking(guesses, none=lambda r: r["usual_maxima"] == 0, once=once) == []


@pytest.mark.slow
def test_ptxas_waits_for_products_only_where_the_kernel_does(compiled):
    assert breaking(compiled, waits=lambda r: r["waits"] == r["waits_in_ptx"] > 0) == []


@pytest.mark.slow
def test_a_tile_of_exponentials_runs_under_products(compiled):
    # 64 x 128 scores a forward step over 128 threads, 64 x 64 in a backward step or, at head_dim 64, half of one. The
    # forward's consumers at head_dim 64 and 256 run under each other's products, not their own.
    tile = {"forward-D128": 64, "backward-D64": 32, "backward-D128": 32, "backward-D256": 32}
    own = [r for r in compiled if family(r) in tile]
    assert breaking(own, overlap=lambda r: r["exp2_under_wgmma"] >= tile[family(r)]) == []


@pytest.mark.slow
def test_warps_trade_registers_and_tiles_fit_shared_memory(compiled):
    wanted = {2: {24, 240}, 3: {32, 160}}
    assert breaking(compiled, registers=lambda r: wanted[consumers(r)] <= set(r["registers"])) == []
    assert breaking(compiled, shared=lambda r: r["shared"] <= SHARED_LIMIT) == []


@pytest.mark.slow
def test_no_tile_lies_over_a_barrier(compiled):
    rules = {
        "apart": lambda r: r["barriers"][0] >= r["tiles"] > 0,
        "once": lambda r: len({*r["barriers"]}) == len(r["barriers"]),
    }
    assert breaking(compiled, **rules) == []


@pytest.mark.slow
def test_ptx_at_head_dim_256_finds_barriers_and_descriptors_where_its_constants_say(compiled):
    from ringflash.kernels.hopper_forward_parts import BARRIERS, DESCRIPTOR, FULL_AT, K_AT, STAGES

    def slots(r: dict) -> list[int]:
        """Of `full` of k and v, and in clusters of `k_other` and `v_other`."""
        pipes = 4 if CASES[r["name"]].get("cluster") else 2
        return [FULL_AT.value + BARRIERS.value * i + 8 * slot for i in range(pipes) for slot in range(STAGES.value)]

    of_256 = [r for r in compiled if family(r) == "forward-D256"]
    clustered = [r for r in of_256 if CASES[r["name"]].get("cluster")]
    rules = {
        "barriers": lambda r: r["barriers"][: len(slots(r))] == slots(r),
        "tiles": lambda r: r["tiles"] == FULL_AT.value == 3 * K_AT.value,
    }
    for_clusters = {
        "descriptors": lambda r: r["descriptors"] == [i * DESCRIPTOR.value for i in range(3)],
        "copies": lambda r: r["multicasts"] == 16,  # k or v, in a tile's first step or later, in 4 pieces
    }
    assert clustered
    assert breaking(of_256, **rules) == []
    assert breaking(clustered, **for_clusters) == []


@pytest.mark.parametrize(
    ("group", "longest", "batch_heads", "programs"),
    [
        (4, 2 / 256, 8, 1),
        (4, 92 / 3184, 4, 2),
        (3, 1.0, 1, 1),
        (6, 1.0, 1, 2),
        (16, 1.0, 1, 16),
        (5, 2 / 256, 8, 1),
        (7, 2 / 256, 4, 1),
        (8, 2 / 256, 8, 2),
        (12, 2 / 256, 2, 2),
    ],
    ids=[
        "32k causal",
        "a long document and short ones",
        "3 heads",
        "6 heads",
        "one tile",
        "5 heads",
        "7 heads",
        "8 heads",
        "12 heads",
    ],
)
def test_a_groups_heads_are_divided_where_a_tile_would_outlast_the_others(group, longest, batch_heads, programs):
    from ringflash.kernels.hopper_backward import programs_per_group

    assert programs_per_group(group, longest, batch_heads / 132) == programs


@pytest.mark.parametrize(
    ("programs", "heads", "equal", "divided"),
    [
        (3072, 4, True, 36),  # 1,32,8,48k full: 144 programs of one head take 2 of 4 quarters
        (2048, 4, True, 68),
        (2048, 4, False, 0),  # causal
        (252, 4, True, 0),  # 480 programs of one head would take all 4 quarters
        (2048, 1, True, 0),
        (1320, 4, True, 0),
    ],
)
def test_the_last_wave_of_equal_tiles_is_divided_where_that_makes_it_shorter(programs, heads, equal, divided):
    from ringflash.kernels.hopper_backward import divided_programs

    assert divided_programs(programs, heads, equal, at_a_time=132) == divided


@pytest.mark.parametrize(
    ("triton", "heads", "head_dim", "tokens", "seen", "work"),
    [
        ("3.6", 4, 256, 128, torch.zeros(2, 1, 129), "OF_HEADS"),
        ("3.6", 2, 256, 20000, None, "OF_QUERIES"),  # groups of one head
        ("3.6", 2, 256, 20000, torch.zeros(2, 1, 20001), None),
        ("3.6", 2, 256, 15000, None, None),  # 7628 keys per query tile
        ("3.7", 4, 256, 20000, None, None),  # in clusters, it has run with 3.6 alone
        ("3.6", 4, 128, 20000, None, None),
    ],
)
def test_programs_run_in_clusters_where_that_pays(monkeypatch, triton, heads, head_dim, tokens, seen, work):
    from ringflash import IntervalMask
    from ringflash.kernels import hopper_forward

    monkeypatch.setattr(hopper_forward, "triton_version", lambda: triton)
    q, k = (torch.empty(1, 1, n, head_dim) for n in (heads, 2))
    order = IntervalMask.causal(tokens).intervals().query_order[128]
    assert hopper_forward.clustering(q, k, order, seen) == (getattr(hopper_forward, work).value if work else 0)


@pytest.mark.parametrize(
    ("heads", "tokens", "batch_heads"),
    [
        ((16, 16), 32768, 8),
        ((32, 8), 131072, 2),
        ((32, 8), 32768, 2),
        ((32, 8), 4096, 16),
        ((12, 4), 131072, 3),
        ((64, 4), 131072, 1),
    ],
)
def test_the_forward_works_at_8_heads_or_as_many_as_l2_holds(heads, tokens, batch_heads):
    from ringflash.kernels.hopper_forward import heads_in_l2

    q, k = (torch.empty(1, tokens, count, 128, dtype=torch.bfloat16, device="meta") for count in heads)
    assert heads_in_l2(q, k) == batch_heads


@pytest.mark.parametrize(
    ("tokens", "longest", "batch_heads"),
    [(131072, 0.03, 1), (4096, 0.13, 2), (1024, 0.13, 8), (16384, 0.26, 1), (16384, 0.31, 8)],
    ids=["128k causal", "4k", "1k", "16k causal", "a tile that would end last"],
)
def test_the_backward_works_at_as_many_heads_as_l2_holds_or_at_all(tokens, longest, batch_heads):
    from ringflash.kernels.hopper_backward import heads_at_a_time

    q, k = (torch.empty(1, tokens, count, 128, dtype=torch.bfloat16, device="meta") for count in (32, 8))
    assert heads_at_a_time(q, k, longest) == batch_heads


def test_the_fields_of_an_aggregate_enter_tritons_cache_key():
    from triton.experimental.gluon import language as gl
    from triton.runtime.jit import DependenciesFinder

    from ringflash.kernels.gluon_names import aggregate

    def key(fields: dict[str, Any]) -> str:
        finder = DependenciesFinder("kernel", {}, {}, "")
        finder.record_reference(aggregate(type("Pair", (), {"__annotations__": fields})))
        return finder.ret

    pair = {"a": gl.tensor, "b": gl.tensor}
    assert key(pair) == key(dict(pair))
    assert len({key(pair), key({"a": gl.tensor, "c": gl.tensor}), key(pair | {"b": gl.constexpr})}) == 3


def test_globals_of_one_name_have_one_value_in_all_of_a_kernels_files():
    # Triton's cache key lists them in the order of their modules' addresses: two keys, and two compilations, for one
    # kernel.
    from ringflash.kernels.hopper_backward import backward_kernel
    from ringflash.kernels.hopper_forward import forward_kernel

    for kernel in (forward_kernel, backward_kernel):
        assert kernel.cache_key
        values: dict[str, set] = {}
        for (name, _), (value, _) in kernel.used_global_vals.items():
            values.setdefault(name, set()).add(getattr(value, "value", value))
        assert values["ROWS"] == {64}
        assert {name: of_name for name, of_name in values.items() if len(of_name) > 1} == {}


if __name__ == "__main__":
    for case_name in CASES:
        print(json.dumps(report(case_name)), flush=True)
