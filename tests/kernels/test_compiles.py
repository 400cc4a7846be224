"""The portable kernels compile without a GPU, and what decides their speed in the machine code holds.

This takes about a minute on two cores, and seconds when Triton's cache has them. `python -m tests.kernels.offline`
prints the figures that are compared here.
"""

from __future__ import annotations

import pytest

from tests.compiled import reports

pytest.importorskip("triton")

SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # 99: sm_80 has 163, but sm_86 runs the same tiles

# Bytes of stack that are accepted, and why; every other kernel must not spill at all.
STACK_LIMIT = {
    # dk, dv, s and dp fill 192 of 255 registers; what spills are addresses, a handful of loads in the loop.
    "dkdv-sm90-bfloat16-D128": 256,
    "dkdv-sm90-bfloat16-D128-capped": 256,
    "forward-sm90-bfloat16-D128-capped": 16,
    # None with triton 3.7.1; 3.6.0 spends more registers on addresses.
    "dkdv-sm80-bfloat16-D64": 64,
}
# Of heads above 128, results alone take 128 registers of a thread. What a loop needs fits beside them; what comes
# before and after does not. A loop spills a few addresses, beside 33 products or more.
LOOP_LIMIT = 24

TILED = ("forward", "dq", "dkdv", "dk", "dv")  # the others' rows are too few for the largest products


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    """The report of every case of `tests.kernels.offline`, by name."""
    return {report["case"]["name"]: report for report in reports("tests.kernels.offline")}


def only(compiled: dict[str, dict], *kernels: str) -> dict[str, dict]:
    return {name: report for name, report in compiled.items() if report["case"]["kernel"] in kernels}


def large(report: dict) -> bool:
    return report["case"]["head_dim"] > 128


def wrong(compiled: dict[str, dict], arch: int | None, **rules) -> list[str]:
    """The reports of an architecture that break a rule, with all their figures."""
    return [
        f"{name} breaks {rule}: {report}"
        for name, report in compiled.items()
        if arch in (None, report["case"]["arch"])
        for rule, holds in rules.items()
        if not holds(report)
    ]


@pytest.mark.slow
def test_nothing_spills_but_what_is_listed(compiled):
    def within_limit(report: dict) -> bool:
        limit = STACK_LIMIT.get(report["case"]["name"], 0)
        return report["stack"] <= limit and (limit > 0 or report["spills"] == 0)

    small = {name: report for name, report in compiled.items() if not large(report)}
    assert wrong(small, None, stack=within_limit) == []


@pytest.mark.slow
def test_large_heads_spill_next_to_nothing_in_their_loops(compiled):
    found = {name: report for name, report in compiled.items() if large(report)}
    assert {report["case"]["head_dim"] for report in found.values()} == {192, 256, 512}
    assert wrong(found, None, loops=lambda r: r["spills_in_loops"] <= LOOP_LIMIT) == []


@pytest.mark.slow
def test_tiles_fit_shared_memory(compiled):
    assert wrong(compiled, None, shared=lambda r: r["shared"] <= SHARED_LIMIT[r["case"]["arch"]]) == []


@pytest.mark.slow
def test_sm80_loads_ahead_into_shared_memory_for_its_tensor_cores(compiled):
    several_stages = only(compiled, *TILED)
    del several_stages["dq-sm80-bfloat16-D512"]
    assert wrong(several_stages, 80, mma=lambda r: r["mma_sync"] > 0, copies=lambda r: r["cp_async"] > 0) == []


@pytest.mark.slow
def test_sm90_feeds_warpgroup_products_from_the_copy_engine(compiled):
    rules = {
        "tma": lambda r: r["tma_loads"] > 0,
        "wgmma": lambda r: r["wgmma"] > 0,
        "no older products": lambda r: r["mma_sync"] == 0,
        # ptxas may serialise products it cannot prove independent: then every one has its own wait.
        "asynchronous": lambda r: r["wgmma_waits"] == r["wgmma_waits_in_ptx"],
    }
    assert wrong(only(compiled, *TILED), 90, **rules) == []


@pytest.mark.slow
def test_sm90_forward_takes_exponentials_while_tensor_cores_run(compiled):
    names = [f"forward-sm90-bfloat16-D128{flag}" for flag in ("", "-carry", "-capped")]
    # 64 per thread in a tile of 128 x 128 scores; all but a few must not wait for the next scores.
    assert wrong({name: compiled[name] for name in names}, 90, overlap=lambda r: r["exp2_under_wgmma"] >= 48) == []


@pytest.mark.slow
def test_sm100_uses_its_fifth_generation_tensor_cores(compiled):
    assert (
        wrong(only(compiled, *TILED), 100, tcgen05=lambda r: r["tcgen05"] > 0, tma=lambda r: r["tma_loads"] > 0) == []
    )


@pytest.mark.slow
def test_decoding_loads_ahead_into_shared_memory_for_its_tensor_cores(compiled):
    half = {name: report for name, report in only(compiled, "decode").items() if "bfloat16" in name}
    rules = {"mma": lambda r: r["mma_sync"] > 0, "copies": lambda r: r["cp_async"] > 0}
    assert wrong(half, None, **rules) == []
    programs = {"decode-sm90-bfloat16-D128": 1, "decode-sm90-bfloat16-D256": 2}  # portable_decode.programs_per_sm
    for name, count in programs.items():
        fits = lambda r, n=count: n * r["shared"] <= 227 * 1024 and r["registers"] <= 255  # noqa: E731
        assert wrong({name: half[name]}, 90, fits=fits) == []
