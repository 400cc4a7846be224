"""A schedule, read as data: ranks agree on every message, nothing is read before it arrives, and nothing is lost."""

import inspect
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback
from ringflash.layout import LAYOUTS
from ringflash.ring.schedule import RESULTS, Attend, Clear, Post, Shape, Wait
from tests.ring.cases import note_calls, on_ring, whole_inputs
from tests.strategies import masks


def schedules(plan, key_heads=2):
    return plan.schedules(Shape(1, 2 * key_heads, key_heads, 8, 8, torch.bfloat16))


def kind(step):
    return type(step), step.stream, step.label


@st.composite
def plans(draw):
    length, ranks = draw(st.integers(1, 40)), draw(st.integers(1, 8))
    mask, _ = draw(masks(length))
    return AttentionPlan(mask, Layout.named(draw(st.sampled_from(sorted(LAYOUTS))), length, ranks), Loopback(ranks))


@settings(max_examples=60)
@given(plans(), st.sampled_from([1, 2, 8]))
def test_all_ranks_have_the_same_kinds_of_step_and_both_ends_name_each_message_alike(plan, key_heads):
    for schedule in schedules(plan, key_heads):
        for steps in zip(*schedule.steps, strict=True):
            assert len({kind(step) for step in steps}) == 1
            if isinstance(steps[0], Post):
                sent = [(r, x.peer, x.target) for r, step in enumerate(steps) for x in step.sends]
                received = [(x.peer, r, x.target) for r, step in enumerate(steps) for x in step.receives]
                assert sorted(sent) == sorted(received)
                for pair in {message[:2] for message in sent}:  # several messages of two ranks, in the same order
                    assert [m for m in sent if m[:2] == pair] == [m for m in received if m[:2] == pair]


@settings(max_examples=60)
@given(plans(), st.sampled_from([1, 2, 8]))
def test_every_exchange_is_waited_for_once_and_before_its_buffer_is_used_again(plan, key_heads):
    for schedule in schedules(plan, key_heads):
        for steps in schedule.steps:
            under_way = {}
            for step in steps:
                match step:
                    case Post():
                        assert step.label not in under_way
                        arriving = {x.target.buffer for x in step.receives}
                        under_way[step.label] = arriving, arriving | {x.source.buffer for x in step.sends}
                    case Wait():
                        del under_way[step.label]
                    case Attend() if step.pairs:
                        assert step.keys not in {name for arriving, _ in under_way.values() for name in arriving}
                        assert step.gradients not in {name for _, touched in under_way.values() for name in touched}
            assert not under_way


@settings(max_examples=60)
@given(plans(), st.sampled_from([1, 2]))
def test_gradients_of_every_key_that_is_seen_return_to_their_owner(plan, key_heads):
    """Rows carry the set of (rank, hop) that added to them, through every message."""
    _, schedule = schedules(plan, key_heads)
    rows = [{} for _ in schedule.steps]
    for steps in zip(*schedule.steps, strict=True):
        if isinstance(steps[0], Post):
            leaving = [
                (x.peer, x.target, [rows[r].get((x.source.buffer, i)) for i in range(x.source.begin, x.source.end)])
                for r, step in enumerate(steps)
                for x in step.sends
            ]
            for peer, target, content in leaving:
                if target.buffer.startswith(("gradients", "returned")):
                    assert None not in content, "rows that were not cleared are sent"
                    rows[peer].update({(target.buffer, target.begin + i): x for i, x in enumerate(content)})
        for r, step in enumerate(steps):
            if isinstance(step, Clear):
                rows[r].update({(x.buffer, i): frozenset() for x in step.rows for i in range(x.begin, x.end)})
            if isinstance(step, Attend) and step.gradients == RESULTS:  # one call writes all rows, whatever it sees
                assert rows[r] == {}
                rows[r] = {(RESULTS, i): frozenset() for i in range(plan.layout.shard_length)}
            if isinstance(step, Attend) and step.gradients and step.pairs:
                section = schedule.sections[step.section]
                for block in plan.hops_of(section.rows)[step.hop][r].intervals:
                    for i in range(section.rows.end - section.rows.begin):
                        if ((block.start <= i) & (i < block.end)).any():
                            rows[r][step.gradients, i] |= {(r, step.hop)}
    for r in plan.ring.local:
        for section in schedule.sections:
            for i in range(section.rows.end - section.rows.begin):
                seen = {
                    ((r + s) % plan.ring.size, s)
                    for s, hops in enumerate(plan.hops_of(section.rows))
                    for block in hops[(r + s) % plan.ring.size].intervals
                    if ((block.start <= i) & (i < block.end)).any()
                }
                assert rows[r][section.gradients(r, 0), i] == seen


def test_a_window_has_no_steps_for_hops_that_no_rank_computes():
    plan = AttentionPlan(IntervalMask.window(512, left=7), Layout.contiguous(512, 32), Loopback(32))
    for schedule in schedules(plan):
        assert {step.hop for step in schedule.steps[5] if isinstance(step, Attend)} == {0, 1}
        assert len(schedule.steps[0]) < 30


def test_documents_that_stay_on_their_rank_are_one_launch_and_no_buffer_of_keys():
    mask = IntervalMask.causal(64) & IntervalMask.documents([16] * 4)
    plan = AttentionPlan(mask, Layout.contiguous(64, 4), Loopback(4))
    for schedule in schedules(plan):
        assert not any(isinstance(step, (Post, Wait)) for step in schedule.steps[0])
        assert sum(isinstance(step, Attend) for step in schedule.steps[0]) == 1
        assert schedule.buffers == {}


@pytest.mark.parametrize(
    ("ranks", "leading_tokens", "dtype"),
    [(4, 0, torch.bfloat16), (1, 2, torch.bfloat16), (1, 0, torch.float32)],
    ids=["several hops", "two masks", "fp32"],
)
def test_calls_add_to_fp32_sums_where_one_call_does_not_write_the_gradients(ranks, leading_tokens, dtype):
    whole = AttentionPlan(IntervalMask.causal(64), Layout.zigzag(64, ranks), Loopback(ranks), None, leading_tokens)
    _, schedule = whole.window(20).schedules(Shape(1, 4, 2, 8, 8, dtype))
    into = {step.gradients for step in schedule.steps[0] if isinstance(step, Attend)}
    assert into
    assert into <= {name for name, buffer in schedule.buffers.items() if buffer[0].dtype == torch.float32}


def test_schedules_are_compiled_once_per_shape_and_kept_with_the_plan():
    plan = AttentionPlan(IntervalMask.causal(64), Layout.zigzag(64, 4), Loopback(4))
    assert schedules(plan) is schedules(plan)
    assert schedules(plan) is not schedules(plan, 1)


def test_keys_and_values_of_different_size_have_buffers_of_their_own_size():
    plan = AttentionPlan(IntervalMask.causal(64), Layout.zigzag(64, 4), Loopback(4))
    _, schedule = plan.schedules(Shape(2, 4, 2, 24, 16, torch.bfloat16))
    assert [buffer.shape for buffer in schedule.buffers["keys 1"]] == [(16, 2, 2, 24), (16, 2, 2, 16)]
    assert [buffer.shape for buffer in schedule.buffers["gradients 0.1"]] == [(16, 2 * 1 * (24 + 16))]


@pytest.mark.parametrize("ranks", [1, 4])
def test_at_most_four_frames_lie_between_ring_attention_and_a_kernel(monkeypatch, ranks):
    depths = []

    def note(name, options):
        names = [frame.function for frame in inspect.stack()]
        if name == "forward":
            depths.append(names.index("ring_attention") - names.index("call") - 1)

    note_calls(monkeypatch, note)
    plan = AttentionPlan(IntervalMask.causal(64), Layout.zigzag(64, ranks), Loopback(ranks))
    on_ring(whole_inputs(1, 64), plan)
    assert depths
    assert max(depths) <= 4, depths


def test_the_profiler_shows_the_steps_of_both_passes():
    plan = AttentionPlan(IntervalMask.causal(64), Layout.zigzag(64, 2), Loopback(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        on_ring(whole_inputs(1, 64), plan)
    shown = Counter(event.name for event in profile.events())
    assert shown["gradients of hop 1, section 0"] == 2  # posted, waited for
    assert shown["hop 0"] == 2 * 2  # sections, passes
