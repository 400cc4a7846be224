"""On a ring of one, the backward by groups of heads gives the same bits, and never holds all heads' fp32 gradients.

On larger rings, the halves of the heads run at the same time, and kernels are told so.
"""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ringflash import IntervalMask, Layout, Loopback, flash_attention, ring_attention
from ringflash.ring import attention
from ringflash.ring.plan import AttentionPlan
from tests.ring.cases import note_calls

TOKENS, QUERIES, KEYS, DIM = 40, 12, 6, 16
OF_ALL = 4 * 2 * TOKENS * (QUERIES + 2 * KEYS) * DIM  # bytes of fp32 dq, dk and dv
OF_DQ = 4 * 2 * TOKENS * QUERIES * DIM
# (dtype, limit): the groups that it makes of six KV heads. dk and dv of 16-bit inputs are written in 16 bits.
LIMITS = {
    **{(torch.float32, limit): n for limit, n in {OF_ALL: 1, OF_ALL - 1: 2, OF_ALL // 3: 3, 1: 6}.items()},
    **{(torch.bfloat16, limit): n for limit, n in {OF_DQ: 1, OF_DQ - 1: 2, OF_DQ // 4: 6}.items()},
}


def gradients(monkeypatch, limit, dtype=torch.float32, **options):
    """Those of q, k, v and the sink, and the KV heads of each call of the kernel's backward."""
    monkeypatch.setattr(attention, "GROUP_BYTES", limit)
    heads = []
    note_calls(monkeypatch, lambda name, options: heads.append(options["dk"].shape[2]) if name == "backward" else None)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, TOKENS, n, DIM, generator=generator).to(dtype) for n in (QUERIES, KEYS, KEYS))
    leaves = [x.requires_grad_() for x in (q, k + 2, v, torch.randn(QUERIES, generator=generator))]
    mask = IntervalMask.causal(TOKENS) & IntervalMask.documents([[25, 15], [40]], TOKENS)
    plan = AttentionPlan(mask, Layout.contiguous(TOKENS, 1), Loopback(1))
    sink = leaves[3] if options.pop("sink", False) else None
    out = ring_attention(*leaves[:3], plan, sink=sink, kernel="blocked", **options)
    found = torch.autograd.grad(out, leaves if sink is not None else leaves[:3], torch.ones_like(out).cumsum(1))
    monkeypatch.undo()
    return found, heads


@pytest.mark.parametrize(("dtype", "limit"), LIMITS, ids=str)
def test_groups_are_as_large_as_the_limit_allows_and_change_no_bit(monkeypatch, dtype, limit):
    groups = LIMITS[dtype, limit]
    whole, _ = gradients(monkeypatch, 2**40, dtype)
    found, heads = gradients(monkeypatch, limit, dtype)
    assert heads == [KEYS // groups] * groups
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


@pytest.mark.parametrize(
    "options", [{"sink": True}, {"softcap": 2.0}, {"compensated": False}], ids=["sink", "cap", "-"]
)
def test_sinks_and_what_rounding_took_go_by_groups_too(monkeypatch, options):
    whole, _ = gradients(monkeypatch, 2**40, torch.bfloat16, **options)
    found, heads = gradients(monkeypatch, 1, torch.bfloat16, **options)
    assert heads == [1] * KEYS
    assert all(torch.equal(a, b) for a, b in zip(whole, found, strict=True))


def test_a_groups_fp32_gradients_are_freed_before_the_next_ones_are_made(monkeypatch):
    made, alive = [], []

    class Followed(attention.Memory):
        @classmethod
        def of(cls, schedule, allocate):
            alive.append(sum(not storage.expired() for storage in made))
            memory = super().of(schedule, allocate)
            made.extend(StorageWeakRef(x.untyped_storage()) for buffer in memory.values() for x in buffer)
            return memory

    monkeypatch.setattr(attention, "Memory", Followed)
    q, k, v = (torch.randn(1, TOKENS, n, DIM, requires_grad=True) for n in (QUERIES, KEYS, KEYS))
    out = flash_attention(q, k, v, IntervalMask.causal(TOKENS))
    monkeypatch.setattr(attention, "GROUP_BYTES", 1)
    made.clear(), alive.clear()
    out.sum().backward()
    assert made
    assert alive == [0] * KEYS


@pytest.mark.parametrize(("ranks", "kv_heads", "calls"), [(1, 2, 1), (2, 2, 2), (2, 1, 1)], ids=str)
def test_a_call_is_told_how_many_run_at_the_same_time(monkeypatch, ranks, kv_heads, calls):
    told = set()
    note_calls(monkeypatch, lambda name, options: told.add(options["calls"]) if name == "backward" else None)
    q, k, v = (torch.randn(ranks, TOKENS // ranks, n, DIM, requires_grad=True) for n in (2, kv_heads, kv_heads))
    plan = AttentionPlan(IntervalMask.causal(TOKENS), Layout.zigzag(TOKENS, ranks), Loopback(ranks))
    ring_attention(q, k, v, plan, kernel="blocked").sum().backward()
    assert told == {calls}
