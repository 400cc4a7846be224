"""flash_decode is attention over a cache: plain torch, and the Triton kernel in the interpreter, against float64.

Caches hold NaN wherever no query may read. The claims on the Triton kernel run in a process whose kernels are
interpreted.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from unittest import mock

import pytest
import torch
from torch import Tensor

from ringflash import Partial, flash_decode, merge
from ringflash.kernels import decode
from tests import reference
from tests.kernels.oracle import distance, poisoned, strided

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(scope="module")
def interpreter(interpreting):
    return partial(interpreting, "tests.kernels.test_decode")


# What each query of two batch rows sees of a cache of 700 keys: (start, end) of its window, and of leading tokens.
CASES = {
    "a row that sees nothing": ([[0], [5]], [[0], [5]], None),
    "one key": ([[0], [699]], [[1], [700]], None),
    "lengths that differ": ([[0], [0]], [[700], [13]], None),
    "windows": ([[600], [3]], [[613], [290]], None),
    "windows and leading tokens": ([[600], [9]], [[613], [290]], ([[0], [0]], [[4], [4]])),
    "new tokens one after another": ([[0, 0, 0]] * 2, [[640, 641, 642], [3, 4, 5]], None),
    "a packed prompt": ([[0, 0, 300, 300]], [[1, 2, 301, 302]], None),
}


def problem(case: str, heads=(4, 2), dims=(64, 64), dtype=torch.float32, queries=None, **options):
    """Arguments of flash_decode, and the booleans [2, Sq, 700] that a definition reads. Keys and values have a mean."""
    start, end, leading = CASES[case] if case else ([[0] * queries] * 2, [[*range(600, 600 + queries)]] * 2, None)
    spans = [[torch.tensor(bound, dtype=torch.int32) for bound in span] for span in ((start, end), leading) if span]
    generator = torch.Generator().manual_seed(len(case))
    queries, j = spans[0][0].shape[1], torch.arange(700)
    visible = sum((lo[..., None] <= j) & (j < hi[..., None]) for lo, hi in spans).bool().expand(2, queries, 700)
    q, k, v = (
        torch.randn(2, length, count, dim, generator=generator).add(mean).to(dtype)
        for length, count, dim, mean in zip(
            (queries, 700, 700), (heads[0], *heads[1:] * 2), (*dims[:1] * 2, dims[1]), (0, 1, 0.5), strict=True
        )
    )
    between = [(lo.min(1).values[:, None] <= j) & (j < hi.max(1).values[:, None]) for lo, hi in spans]
    read = sum(x.int() for x in between).bool().expand(2, 700)
    for x in (k, v):
        x[~read] = float("nan")
    arguments = {"q": q, "k_cache": k, "v_cache": v, "start": spans[0][0], "end": spans[0][1]}
    if leading:
        arguments["leading"] = tuple(spans[1])
    return arguments | options, visible


def dense(arguments: dict, visible: Tensor, dtype: torch.dtype) -> Tensor:
    q, k, v = (arguments[name].nan_to_num(0).to(dtype) for name in ("q", "k_cache", "v_cache"))
    sink = arguments.get("sink")
    options = {"softcap": arguments.get("softcap"), "sink": None if sink is None else sink.to(dtype)}
    return reference.attention(q, k, v, visible, scale=arguments.get("scale"), **options)[0]


def errors(arguments: dict, visible: Tensor) -> list[str]:
    """The results of flash_decode whose error against float64 exceeds the bound; empty if none does."""
    truth, dtype = dense(arguments, visible, torch.float64), arguments["q"].dtype
    with mock.patch("torch.empty", poisoned):
        out = flash_decode(**arguments)
    bound = 1e-5 if dtype == torch.float32 else 2 * distance(dense(arguments, visible, dtype), truth) + 1e-4
    found = distance(out, truth)
    return [] if found <= bound and out.dtype == dtype else [f"{out.dtype}: error {found:.2e}, bound {bound:.2e}"]


def errors_of(case: str, options: dict, seed_sink: bool = False) -> list[str]:
    if seed_sink:
        options = {**options, "sink": torch.tensor([-torch.inf, 0.0, 3.0, 9.0])}
    return errors(*problem(case, **options))


# -- plain torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_plain_torch_is_within_the_rule_of_float64(case, dtype, monkeypatch):
    monkeypatch.setattr(decode, "RUN", 256)
    assert errors_of(case, {"dtype": dtype}) == []


@pytest.mark.parametrize("case", ["a row that sees nothing", "windows and leading tokens"])
def test_plain_torch_takes_sinks_softcaps_scales_and_values_of_their_own_size(case):
    assert errors_of(case, {"softcap": 3.0, "scale": 0.3, "dims": (24, 40)}, True) == []


@pytest.mark.parametrize("sink", [None, torch.tensor([-torch.inf, 0.0, 3.0, 9.0])])
def test_combine_is_merge_of_all_parts(sink):
    out, lse = torch.randn(5, 2, 3, 4, 8), torch.randn(5, 2, 4, 3) * 20
    lse[1:, 0, 1] = lse[:, 1, 2] = -torch.inf
    out[1:, 0, :, 1] = out[:, 1, :, 2] = float("nan")  # of parts that have seen nothing
    found = decode.combine(Partial(out, lse), sink=sink)
    parts = [Partial(x.nan_to_num(0), y) for x, y in zip(out, lse, strict=True)]
    if sink is not None:
        parts.append(Partial(torch.zeros(2, 3, 4, 8), sink[None, :, None].expand(2, 4, 3)))
    for part in parts[1:]:
        parts[0] = merge(parts[0], part)
    torch.testing.assert_close((found.out, found.lse), (parts[0].out, parts[0].lse))


# -- the Triton kernel


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_triton_kernel_is_within_the_rule_of_float64(interpreter, case):
    assert interpreter("errors_of", case, {"kernel": "portable"}) == []


SHAPES = {
    "fp16, heads of 128, a group of 7": {"heads": (7, 1), "dims": (128, 128), "dtype": torch.float16},
    "fp16, heads of 80": {"heads": (4, 4), "dims": (80, 80), "dtype": torch.float16},
    "heads of 256, softcap": {"heads": (2, 2), "dims": (256, 256), "softcap": 3.0},
    "values of their own size": {"heads": (4, 2), "dims": (192, 128), "scale": 0.3},
    "more rows than a tile": {"heads": (4, 1), "queries": 20, "dtype": torch.float16},
}


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_the_triton_kernel_takes_every_shape(interpreter, shape):
    case = "" if "queries" in SHAPES[shape] else "lengths that differ"
    assert interpreter("errors_of", case, {"kernel": "portable", **SHAPES[shape]}) == []


@needs_triton
@pytest.mark.parametrize("case", ["a row that sees nothing", "windows and leading tokens"])
def test_the_triton_kernel_takes_sinks(interpreter, case):
    assert interpreter("errors_of", case, {"kernel": "portable"}, True) == []


def strided_and_combined() -> list[float]:
    """Distances: of a cache of another layout from a contiguous one; of parts gathered as rows from splits alone."""
    arguments, _ = problem("lengths that differ")
    whole = flash_decode(**arguments)
    views = {name: strided(arguments[name]) for name in ("q", "k_cache", "v_cache")}
    spans = ((arguments["start"], arguments["end"]),)
    parts = decode.parts(*(arguments[name] for name in views), spans, scale=0.125)
    flat = torch.cat([parts.out.flatten(1), parts.lse.flatten(1)], dim=1)
    width = parts.out[0].numel()
    gathered = Partial(flat[:, :width].view(parts.out.shape), flat[:, width:].view(parts.lse.shape))
    return [
        distance(flash_decode(**arguments | views), whole),
        distance(decode.combine(gathered).out, whole),
        float(len(parts.out) < 2),
    ]


@needs_triton
def test_strides_of_caches_and_of_parts_do_not_matter(interpreter):
    assert max(interpreter("strided_and_combined")) < 1e-6


@needs_triton
def test_splits_fill_the_sms_in_whole_waves():
    splits_for = partial(pytest.importorskip("ringflash.kernels.portable_decode").splits_for, sms=132)
    assert splits_for(capacity=256, programs=8, programs_per_sm=2) == 1
    assert splits_for(capacity=2**18, programs=8, programs_per_sm=2) == 32  # 256 programs of 264, two on each SM
    assert splits_for(capacity=2**18, programs=64, programs_per_sm=2) == 4
    assert splits_for(capacity=2**18, programs=8, programs_per_sm=1) == 16
    for programs in (1, 3, 64, 72, 200, 1000):
        splits = splits_for(2**20, programs, programs_per_sm=2)
        waves = splits * programs / 264
        assert waves / -(-splits * programs // 264) >= 0.75, (programs, splits)


# -- what is refused


WRONG = {
    "dtype": ({"k_cache": torch.zeros(2, 9, 2, 64).half()}, TypeError, "q, k_cache, v_cache must have one dtype, got"),
    "heads": ({"q": torch.zeros(2, 1, 3, 64)}, ValueError, "query heads a multiple of KV heads.*got 3 and 2"),
    "batch": ({"q": torch.zeros(3, 1, 4, 64)}, ValueError, "q and k of one batch on one device, got 3 and 2"),
    "capacity": ({"v_cache": torch.zeros(2, 8, 2, 64)}, ValueError, r"got q \[2, 1, 4, 64\].*v_cache \[2, 8, 2, 64\]"),
    "end": ({"end": torch.tensor([[4], [4]])}, ValueError, "end must be int32 on cpu.*got torch.int64"),
    "a number": ({"end": 4}, ValueError, "end must be int32 on cpu.*got int"),
    "shape": ({"end": torch.tensor([4, 4]).int()}, ValueError, r"end must be \[1 or 2, 1\], got \[2\]"),
    "past the cache": ({"end": torch.tensor([[4], [10]]).int()}, ValueError, r"end must lie in 0..9, .* got 4..10"),
    "leading": ({"leading": (None, torch.tensor([[4]]).int())}, ValueError, "start of leading must be int32.*NoneType"),
    "scale": ({"scale": 0.0}, ValueError, "scale must be None .*got 0.0"),
    "softcap": ({"softcap": -1.0}, ValueError, "flash_decode takes as softcap a number above 0.*got -1.0"),
    "sink": ({"sink": torch.zeros(2)}, ValueError, r"sink must be \[4\], .*got \[2\]"),
    "kernel": ({"kernel": "hopper"}, ValueError, "kernel=hopper is not one of auto, portable, blocked"),
    "no GPU": ({"kernel": "portable"}, ValueError, "kernel=portable needs .*got device cpu"),
    "strides": ({"q": torch.zeros(2, 1, 64, 4).mT}, ValueError, "q must have a contiguous last dimension"),
    "gradients": ({"q": torch.zeros(2, 1, 4, 64, requires_grad=True)}, RuntimeError, "q requires a gradient"),
}


@pytest.mark.parametrize("name", [name for name in WRONG if name != "no GPU" or find_spec("triton")])
def test_what_does_not_fit_is_refused_by_name(name):
    cache = torch.zeros(2, 9, 2, 64)
    right = {"q": torch.zeros(2, 1, 4, 64), "k_cache": cache, "v_cache": cache, "end": torch.tensor([[4], [9]]).int()}
    assert flash_decode(**right).shape == (2, 1, 4, 64)
    wrong, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        flash_decode(**right | wrong)


# -- on a GPU

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_gpu(test):
    for mark in GPU:
        test = mark(test)
    return test


def to_gpu(arguments: dict) -> dict:
    moved = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in arguments.items()}
    if "leading" in moved:
        moved["leading"] = tuple(x.cuda() for x in moved["leading"])
    return moved


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)], ids=str)
def test_the_compiled_kernel_is_within_the_rule_of_float64(dims, dtype):
    sink = torch.tensor([-torch.inf, 0.0, 3.0, 9.0])
    for case in ("", *CASES):
        for options in ({}, {"sink": sink, "softcap": 3.0}):
            arguments, visible = problem(case, dims=dims, dtype=dtype, queries=None if case else 33, **options)
            assert errors(to_gpu(arguments | {"kernel": "portable"}), visible) == [], (case, options)


@on_gpu
def test_a_captured_step_follows_lengths_that_change_on_the_device():
    arguments, _ = problem("lengths that differ", dims=(128, 128), dtype=torch.bfloat16)
    for name in ("k_cache", "v_cache"):
        arguments[name].nan_to_num_(0.5)
    arguments = to_gpu(arguments)
    flash_decode(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_decode(**arguments)
    for lengths in ([[1], [700]], [[300], [0]]):
        arguments["end"].copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, flash_decode(**arguments))
    assert bool((out[1] == 0).all())
