"""What went wrong in other libraries for ring attention and long-context training goes right here, or is refused.

failure of a peer                                               -> the test that it would fail here

wrong keys seen
documents must divide by twice the ranks                        -> ring/test_attention.py::test_any_mask_layout_and_ring_size_is_exact
documents leak into each other                                  -> models/test_families.py::test_loss_and_every_gradient_equal_eager_attention
a window is passed unchanged into every block                   -> test_each_block_sees_its_own_part_of_a_window
packing, window, softcap and sinks exclude each other           -> test_packing_window_softcap_and_sinks_work_together
a sink is dropped                                               -> ring/test_attention.py::test_a_sink_is_one_more_key_without_a_value_and_has_a_gradient
a softcap is dropped                                            -> ring/test_attention.py::test_head_groups_and_softcap_are_exact
a mask is dropped in silence                                    -> models/test_models.py::test_a_keyword_that_could_change_the_mask_is_refused
a mask that the configuration asks for is dropped in silence    -> test_a_bidirectional_configuration_is_refused
a cache whose keys the mask does not know                       -> test_a_key_cache_that_the_mask_does_not_know_is_refused
what a kernel cannot do is done by another, or wrongly          -> kernels/test_portable.py::test_what_cannot_be_done_is_refused_with_its_values

wrong numbers
dk and dv are wrong over processes                              -> ring/test_attention.py::test_processes_compute_what_float64_does
the check of gradients prints a tick whatever they are          -> test_the_oracle_refuses_wrong_gradients
precision falls with the ring: state or blocks in 16 bits       -> benchmarks/test_ring.py::test_our_error_is_flat_and_that_of_sixteen_bits_grows
gradients travel in 16 bits                                     -> ring/test_attention.py::test_a_causal_ring_sends_keys_once_per_pass_and_gradients_once
the merge of lse overflows                                      -> test_a_large_lse_does_not_overflow_in_the_merge
rows that see nothing have lse 0                                -> test_rows_that_see_nothing_have_an_lse_of_minus_infinity
gradients are bf16 whatever the inputs                          -> test_gradients_have_the_dtype_of_their_inputs
a comment says fp32 above a product in bf16                     -> test_fp32_stays_fp32_under_autocast
buffers have the size of the first call                         -> test_calls_of_different_sizes_do_not_share_buffers_of_the_first

wrong loss
labels are shifted after sharding                               -> test_labels_are_shifted_before_sharding
positions are those of the shard                                -> ring/test_plan.py::test_position_ids_are_global_and_in_shard_order
positions that were left out are made up from the shard         -> test_positions_that_are_left_out_are_refused
positions that count through all documents are refused          -> test_positions_may_count_through_all_documents
zigzag's positions are read as packed documents                 -> test_zigzag_positions_are_not_read_as_packed_documents
layers that mix tokens otherwise see their shard alone          -> models/test_models.py::test_a_model_that_plain_transformers_built_is_refused_where_shards_would_change_it
RoPE depends on the longest position of a shard                 -> models/test_models.py::test_a_model_that_would_train_wrongly_is_refused_with_its_field
loss and gradients are off by the number of ranks               -> test_the_loss_does_not_depend_on_the_number_of_ranks
the same under ZeRO and accumulation; ZeRO 3's hooks bypassed   -> training/test_step.py::test_loss_and_every_gradient_equal_one_rank
ranks join shards of different texts                            -> test_ranks_that_got_different_texts_are_refused
NaN on a shard that has no label                                -> test_a_shard_without_labels_has_no_nan
NaN in a batch that has no label                                -> test_a_batch_without_labels_has_no_nan
padding is counted, or needed                                   -> models/test_families.py::test_loss_and_every_gradient_equal_eager_attention
a fused loss ignores the scale of what comes back to it         -> training/test_loss.py::test_any_tile_gives_the_loss_and_gradients_of_whole_logits
a tiled loss sums the head's gradient in bf16                   -> training/test_loss.py::test_the_weights_gradient_is_summed_over_tiles_in_fp32
micro-batches are summed in bf16                                -> training/test_config.py::test_what_does_not_fit_the_ranks_is_refused
a resumed run sees other data                                   -> data/test_batches.py::test_a_stream_resumed_at_a_step_equals_an_uninterrupted_one
a resumed run at another degree sees other data                 -> data/test_batches.py::test_rows_are_the_same_however_many_ranks_share_them

slow, large, or hanging
query-sized gradients travel under GQA                          -> ring/test_attention.py::test_a_causal_ring_sends_keys_once_per_pass_and_gradients_once
masked keys travel                                              -> ring/test_attention.py::test_with_a_window_one_neighbour_hop_moves_in_both_passes
masked blocks are computed                                      -> ring/test_attention.py::test_hops_that_see_nothing_launch_no_kernel
the ring runs again under recomputation                         -> ring/test_recompute.py::test_a_layer_runs_one_forward_and_one_backward_ring_per_step
nothing overlaps                                                -> test_transfers_do_not_wait_for_the_kernel
a value is read back to the host in each layer                  -> test_no_layer_reads_a_value_back_to_the_host
a barrier on each hop                                           -> test_no_hop_has_a_barrier
every hop's buffers are kept                                    -> ring/test_memory.py::test_extra_memory_is_two_shards_of_keys_and_two_of_gradients_whatever_the_ring
deadlock where ranks skip different hops                        -> test_ranks_that_skip_different_hops_do_not_deadlock
a rank refuses its input, and the others wait for it            -> test_where_one_rank_refuses_its_input_all_raise
a hang that does not say where                                  -> ring/test_watchdog.py::test_every_rank_reports_where_it_is_and_which_rank_it_waits_for_and_then_exits
a stale compiler lock hangs every later run                     -> test_a_stale_compiler_lock_does_not_hang_a_run
a launcher adds an argument that the configuration rejects      -> test_launch.py::test_a_launcher_trains_with_its_ranks_and_settings
"""  # noqa: E501

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import find_packed_sequence_indices

from ringflash import AttentionPlan, IntervalMask, Layout, Loopback, Partial, ProcessRing, kernels, ring_attention
from ringflash.errors import ConfigError
from ringflash.layout import LAYOUTS
from ringflash.models import ARCHITECTURES, ModelConfig, build_model, ring_inputs
from ringflash.ring.transport import Transfer
from tests import reference
from tests.models.cases import loss_and_gradients, tiny
from tests.ring.cases import assert_exact, on_ring, oracle, whole_inputs

TESTS = Path(__file__).parent
TABLE = re.findall(r"-> (?:(\S+\.py)::)?(test_\w+)$", __doc__, re.MULTILINE)


def test_every_failure_in_the_table_has_its_test():
    sources = {file: (TESTS / (file or Path(__file__).name)).read_text() for file, _ in TABLE}
    missing = [f"{file}::{name}" for file, name in TABLE if f"def {name}(" not in sources[file]]
    here = set(re.findall(r"^def (test_\w+)", sources[""], re.MULTILINE))
    assert missing == []
    assert here - {name for file, name in TABLE if not file} == {"test_every_failure_in_the_table_has_its_test"}
    assert len(TABLE) == __doc__.count("->") - 1, "a line of the table that cannot be read"


# -- wrong keys seen


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_each_block_sees_its_own_part_of_a_window(name):
    """Two ring libraries gave each pair of shards the window of a whole sequence, from local indices: silently wrong.

    Windows that end just before, at and just behind the edges of chunks and shards.
    """
    length, ranks = 48, 4  # shards of 12 tokens; under zigzag, of two chunks of 6
    # Around 0: at left=0 the gradients of q and k are rounding alone, which is larger where inputs have a mean.
    inputs, layout = [x - x.mean() for x in whole_inputs(1, length)], Layout.named(name, length, ranks)
    for left in (0, 5, 6, 7, 11, 12, 13, 24):
        results = on_ring(inputs, AttentionPlan(IntervalMask.causal(length), layout, Loopback(ranks)).window(left))
        i = torch.arange(length)
        visible = (i <= i[:, None]) & (i >= i[:, None] - left)
        assert_exact(results, oracle(inputs, visible[None]), layout, f"left={left}")


def test_packing_window_softcap_and_sinks_work_together():
    """In all peers some pair of packing, sliding window, softcap, sinks and GQA was missing or silently ignored."""
    length, ranks, softcap, sink = 53, 4, 1.5, torch.linspace(-1, 2, 4)
    mask = IntervalMask.documents([[3, 1, 30, 19], [50]], length) & IntervalMask.window(length, 8)
    layout, inputs = Layout.zigzag(length, ranks), whole_inputs(2, length)
    plan = AttentionPlan(mask, layout, Loopback(ranks))
    arguments = [*(plan.shard(x).requires_grad_() for x in inputs[:3]), sink.clone().requires_grad_()]
    out = ring_attention(*arguments[:3], plan, softcap=softcap, sink=arguments[3])
    results = [out.detach(), *torch.autograd.grad(out, arguments, plan.shard(inputs[3]))]

    exact = [x.double().requires_grad_() for x in (*inputs[:3], sink)]
    truth, _ = reference.attention(*exact[:3], mask.dense(), softcap=softcap, sink=exact[3])
    expected = [truth.detach(), *torch.autograd.grad(truth, exact, inputs[3].double())]
    assert_exact(results[:4], expected[:4], layout)
    torch.testing.assert_close(results[4].double(), expected[4], rtol=1e-5, atol=1e-5)


def test_a_bidirectional_configuration_is_refused(tmp_path):
    """transformers and trainers on it dropped masks that their attention did not know (transformers#48442).

    is_causal=false in a model's configuration makes transformers' own attention see both ways.
    """
    model = tiny("llama")
    model.config.is_causal = False
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is_causal"):
        build_model(ModelConfig(path=str(tmp_path), dtype="fp32"))


def test_a_key_cache_that_the_mask_does_not_know_is_refused():
    """transformers hands an attention function keys of earlier calls; a shard's are not those just before it."""
    tokens = torch.randint(1, 97, (1, 16))
    inputs = ring_inputs(tokens, ring=Loopback(2)) | {"use_cache": True}
    model = tiny("qwen3")
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match=r"q, k and v must agree on .*length.*\[2, 8, 4, 8\].*\[2, 16, 2, 8\]"):
        model(**inputs, past_key_values=cache)


# -- wrong numbers


def test_the_oracle_refuses_wrong_gradients():
    """A ring library's own check printed a tick over dk and dv that were wrong by more than their size."""
    layout, inputs = Layout.zigzag(40, 4), whole_inputs(1, 40)
    results = on_ring(inputs, AttentionPlan(IntervalMask.causal(40), layout, Loopback(4)))
    expected = oracle(inputs, IntervalMask.causal(40).dense())
    assert_exact(results, expected, layout)
    for i, name in enumerate(("out", "dq", "dk", "dv")):
        for wrong in (0.0, 1.001, float("nan")):  # on one rank of four
            spoilt = [x.clone() for x in results]
            spoilt[i][2] *= wrong
            with pytest.raises(AssertionError, match=name):
                assert_exact(spoilt, expected, layout)


def with_scores_about(levels):
    """q, k, v, dout whose scores with scale 1 lie about levels[j] for key j, all of them exact in fp32.

    Around 0 apart from that: the rounding of an lse of 600 is an error of p, which keys with a mean would magnify.
    """
    inputs = [(8 * (x - x.mean())).round() / 8 for x in whole_inputs(1, len(levels))]
    inputs[0][..., 0] = 1
    inputs[1][..., 0] = levels[:, None]
    return inputs


def beside_float64(inputs, mask, layout):
    """out, dq, dk and dv on a Loopback ring with scale 1, and their distances from float64.

    Without the dimension that holds the levels: there dq is a sum that cancels, times 600.
    """
    results = on_ring(inputs, AttentionPlan(mask, layout, Loopback(layout.ranks)), scale=1.0)
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out, _ = reference.attention(q, k, v, mask.dense(), scale=1.0)
    expected = [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3].double())]
    wholes = [layout.unshard(x.chunk(layout.ranks))[..., 1:] for x in results]
    return wholes, [((x - y[..., 1:]).norm() / y.norm()).item() for x, y in zip(wholes, expected, strict=True)]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_large_lse_does_not_overflow_in_the_merge(name):
    """A trainer's ring took exp(lse) of whole blocks in the merge, infinite or 0 above 88 (EasyContext#14)."""
    levels = 300.0 * (torch.arange(48) // 6 % 5 - 2)  # -600 to 600, by chunk: some rows see nothing above -600
    _, errors = beside_float64(with_scores_about(levels), IntervalMask.causal(48), Layout.named(name, 48, 4))
    assert max(errors) < 1e-4, errors  # fp32 holds an lse of 600 to 3e-5


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_rows_that_see_nothing_have_an_lse_of_minus_infinity(name):
    """Some backends give rows that see nothing lse 0 instead of -inf, which outweighs all scores far below 0.

    Each query sees keys 10 to 20 before it: most see nothing of their own shard, the first see nothing at all.
    """
    i = torch.arange(48)
    mask = IntervalMask((i - 20).clamp(min=0)[None], (i - 9).clamp(min=0)[None], 48)
    inputs = with_scores_about(torch.full((48,), -60.0))
    (out, dq, _, _), errors = beside_float64(inputs, mask, Layout.named(name, 48, 4))
    assert max(errors) < 1e-4, errors
    assert out[:, :9].abs().max() == dq[:, :9].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_have_the_dtype_of_their_inputs(dtype):
    """Ring libraries rounded gradients to bf16 whatever the dtype of the inputs, which autograd then cast back."""
    layout, inputs = Layout.zigzag(32, 2), [x.to(dtype) for x in whole_inputs(1, 32)]
    results = on_ring(inputs, AttentionPlan(IntervalMask.causal(32), layout, Loopback(2)))
    assert [x.dtype for x in results] == [dtype] * 4
    for x, exact in zip(results, oracle(inputs, IntervalMask.causal(32).dense()), strict=True):
        error = (layout.unshard(x.chunk(2)) - exact).norm() / exact.norm()
        assert error <= max(torch.finfo(dtype).eps, 1e-5)


def test_fp32_stays_fp32_under_autocast():
    """A ring library's comment said fp32 above a cast to bf16. Here torch.autocast makes it of a product in fp32."""
    layout, inputs = Layout.zigzag(64, 4), whole_inputs(1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        results = on_ring(inputs, AttentionPlan(IntervalMask.causal(64), layout, Loopback(4)))
    assert_exact(results, oracle(inputs, IntervalMask.causal(64).dense()), layout)


def test_calls_of_different_sizes_do_not_share_buffers_of_the_first():
    """A ring library kept global buffers of the first call's size and dtype.

    Calls of three sizes and dtypes on one ring, all forward first, then all backward.
    """
    ring, calls = Loopback(4), []
    for length, heads, kv_heads, dtype in ((16, 2, 1, torch.float16), (81, 4, 2, torch.float32), (33, 4, 4, None)):
        inputs, layout = whole_inputs(1, length, heads, kv_heads), Layout.zigzag(length, 4)
        plan = AttentionPlan(IntervalMask.causal(length), layout, ring)
        q, k, v, dout = (plan.shard(x).to(dtype or torch.float32).requires_grad_() for x in inputs)
        calls.append((inputs, layout, (q, k, v), ring_attention(q, k, v, plan), dout))
    for inputs, layout, arguments, out, dout in calls:
        results = [out.detach(), *torch.autograd.grad(out, arguments, dout)]
        if out.dtype == torch.float32:
            assert_exact(results, oracle(inputs, IntervalMask.causal(layout.length).dense()), layout)
        for x, whole in zip(results, [inputs[0], *inputs[:3]], strict=True):
            assert layout.unshard(x.chunk(4)).shape == whole.shape


# -- wrong loss


def test_labels_are_shifted_before_sharding():
    """Trainers shifted a shard's labels: at each edge of a shard a token was given another one's successor, or none."""
    documents = [5, 1, 15]
    tokens = torch.arange(21)[None]
    inputs = ring_inputs(tokens, tokens, ring=Loopback(3), documents=documents)
    ends = torch.tensor(documents).cumsum(0) - 1
    positions = inputs["plan"].positions[0]
    expected = torch.where((positions < 21) & ~torch.isin(positions, ends), positions + 1, -100)
    assert torch.equal(inputs["shift_labels"], expected)
    assert inputs["num_items_in_batch"] == (expected != -100).sum() == 21 - 3


def test_positions_that_are_left_out_are_refused():
    """Without position_ids transformers counts a shard's tokens from 0, so RoPE is wrong on all ranks but the first."""
    for model_type in ARCHITECTURES:
        model = tiny(model_type)
        for batch in (1, 3):
            inputs = ring_inputs(torch.randint(1, 97, (batch, 16)), ring=Loopback(2), config=model.config)
            model(**inputs)
            del inputs["position_ids"]
            with pytest.raises(ValueError, match="position_ids"):
                model(**inputs)
    for documents in ([4, 12], [4, 4, 8], [8, 8]):
        inputs = ring_inputs(torch.randint(1, 97, (1, 16)), ring=Loopback(2), documents=documents)
        del inputs["position_ids"]
        with pytest.raises(ValueError, match="position_ids"):
            tiny("qwen3")(**inputs)


def test_positions_may_count_through_all_documents():
    """They are as good as those that begin again with each document, but for rounding."""
    tokens, documents = torch.randint(1, 97, (1, 16)), [3, 8, 5]
    inputs = ring_inputs(tokens, tokens, ring=Loopback(2), documents=documents)
    expected = tiny("qwen3")(**inputs).loss
    through = inputs["plan"].shard(torch.arange(16)[None])
    torch.testing.assert_close(tiny("qwen3")(**inputs | {"position_ids": through}).loss, expected)


def on_processes(tokens, labels):
    """This rank's share of the loss and gradients of a small Qwen3, through gloo, and its positions."""
    inputs = ring_inputs(torch.tensor(tokens), torch.tensor(labels), ring=ProcessRing())
    return *loss_and_gradients(tiny("qwen3"), inputs), inputs["position_ids"], inputs["labels"]


def assert_shares_add_up(shares, tokens, labels):
    """The ranks' losses and gradients sum to those of the model's own attention on one rank."""
    model = tiny("qwen3")
    model.set_attn_implementation("eager")
    loss, gradients = loss_and_gradients(model, {"input_ids": tokens, "labels": labels})
    torch.testing.assert_close(sum(share[0] for share in shares), loss, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(sum(share[1][name] for share in shares), gradient, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.ranks
def test_the_loss_does_not_depend_on_the_number_of_ranks(ranks):
    """Loss or gradients were off by the sequence-parallel degree in three trainers (DeepSpeed#5248, tmax#9).

    The labels lie unevenly: a mean of the ranks' means would be wrong too (transformers#46775).
    """
    tokens = torch.randint(1, 97, (2, 29))
    labels = tokens.masked_fill(torch.arange(29) % 11 > 3, -100)
    assert_shares_add_up(ranks.run(on_processes, 2, tokens.tolist(), labels.tolist()), tokens, labels)


def on_sequences_of_its_own(same):
    """What ring_inputs says on a rank whose sequence is its own, or all ranks' but for one label."""
    seed = 0 if same else dist.get_rank()
    tokens = torch.randint(1, 97, (2, 29), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    labels[1, 28] += dist.get_rank() if same else 0
    with pytest.raises(ValueError, match="must be the same on every rank of a ring") as caught:
        ring_inputs(tokens, labels, ring=ProcessRing())
    return str(caught.value)


@pytest.mark.ranks
@pytest.mark.parametrize("same", [False, True], ids=["all other", "one label"])
def test_ranks_that_got_different_texts_are_refused(ranks, same):
    """A data-parallel sampler under sequence parallelism: ranks joined shards of different texts into one sequence."""
    assert len(ranks.run(on_sequences_of_its_own, 3, same)) == 3


def where_one_rank_is_given(wrong):
    """What ring_inputs raises on every rank if rank 1 has another argument."""
    arguments = {"input_ids": torch.ones(1, 24, dtype=torch.int64), "documents": [24], "layout": "zigzag"}
    if dist.get_rank() == 1:
        arguments |= wrong
    with pytest.raises((ValueError, TypeError)) as caught:
        ring_inputs(**arguments, ring=ProcessRing())
    return str(caught.value)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("wrong", "own"),
    [
        ({"documents": [23]}, "=23 must be the 24 tokens"),
        ({"layout": "diagonal"}, "layout=diagonal is not one of"),
        ({"input_ids": torch.ones(24, dtype=torch.int64)}, "input_ids must be"),
        ({"input_ids": [[1]]}, "input_ids must be"),
        ({"layout": "striped"}, None),
        ({"documents": [20, 4]}, None),
    ],
    ids=["documents", "layout", "shape", "type", "other layout", "other documents"],
)
def test_where_one_rank_refuses_its_input_all_raise(ranks, wrong, own):
    """One rank raised, and the others waited for it until the communicator's timeout."""
    said = ranks.run(where_one_rank_is_given, 3, wrong)
    other = "another rank of the ring refused" if own else "must be the same on every rank of a ring"
    assert all((own if rank == 1 and own else other) in line for rank, line in enumerate(said))


@pytest.mark.ranks
def test_a_shard_without_labels_has_no_nan(ranks):
    """In several trainers a shard whose tokens all had the label -100 divided 0 by 0, and all ranks got the NaN."""
    tokens = torch.randint(1, 97, (1, 24))
    labels = tokens.masked_fill(torch.arange(24) > 5, -100)  # rank 1 of 2 holds tokens 6 to 17
    shares = ranks.run(on_processes, 2, tokens.tolist(), labels.tolist())
    assert [(share[3] != -100).any().item() for share in shares] == [True, False]
    assert_shares_add_up(shares, tokens, labels)


@pytest.mark.parametrize("documents", [None, [1] * 16], ids=["labels of -100", "documents of one token"])
def test_a_batch_without_labels_has_no_nan(documents):
    """The same where no shard has a label, as in a long prompt that is masked, or documents of one token."""
    tokens = torch.randint(1, 97, (1, 16))
    labels = tokens if documents else torch.full_like(tokens, -100)
    loss, gradients = loss_and_gradients(
        tiny("qwen3"), ring_inputs(tokens, labels, ring=Loopback(2), documents=documents)
    )
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients.values())


@pytest.mark.ranks
def test_zigzag_positions_are_not_read_as_packed_documents(ranks):
    """transformers takes a jump in the positions of one sequence for the next document's start, and hides the rest."""
    tokens = torch.randint(1, 97, (1, 32))
    shares = ranks.run(on_processes, 2, tokens.tolist(), tokens.tolist())
    assert find_packed_sequence_indices(shares[0][2]).max() == 1  # it is two documents for transformers
    assert_shares_add_up(shares, tokens, tokens)


# -- slow, or hanging


class Recording(Loopback):
    """A Loopback that notes when each exchange is set off and when it is waited for."""

    def __init__(self, size, events):
        super().__init__(size)
        self.events = events

    def exchange(self, outgoing, incoming, context):
        transfer, number = super().exchange(outgoing, incoming, context), len(self.events)
        if outgoing:
            self.events.append(("sent", number, str(context)))
        return Noted(transfer, lambda: self.events.append(("waited for", number, str(context))))


@dataclasses.dataclass
class Noted:
    """A transfer that tells when it is waited for."""

    transfer: Transfer
    tell: Callable[[], None]

    def wait(self):
        self.transfer.wait()
        self.tell()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("mask", [IntervalMask.full(64), IntervalMask.causal(64)], ids=["full", "causal"])
def test_transfers_do_not_wait_for_the_kernel(monkeypatch, mask, heads):
    """In practice nothing overlapped: peers sent after a kernel or waited before it (AI_analysis#2, nanotron#236)."""
    events, real = [], kernels.select

    def noting(*args):
        kernel = real(*args)

        def noted(run):
            return lambda *a, **k: (events.append(("kernel", 0, "")), run(*a, **k))[1]

        return dataclasses.replace(kernel, forward=noted(kernel.forward), backward=noted(kernel.backward))

    monkeypatch.setattr(kernels, "select", noting)
    on_ring(whole_inputs(1, 64, *heads), AttentionPlan(mask, Layout.zigzag(64, 4), Recording(4, events)))
    exposed = []
    for i, (what, number, context) in enumerate(events):
        if what == "sent":
            until = events.index(("waited for", number, context))
            exposed += [] if "kernel" in [what for what, *_ in events[i:until]] else [context]
    assert {context for _, _, context in events if "gradients of hop" in context}
    assert set(exposed) <= {"attention, backward, hop 1"}  # own keys come last: only delta is computed meanwhile


class NoHostReads(TorchDispatchMode):
    """Raises where a tensor's value, or a size that depends on it, is asked for: on a GPU the host would wait."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not name.startswith(self.READS), f"{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


def test_no_layer_reads_a_value_back_to_the_host(monkeypatch):
    """Ring libraries called .item() on document bounds in each layer, so that the host never ran ahead of the GPU."""

    def forward(q, k, v, intervals, *, scale, softcap, carry, out, seen):
        state = Partial.identity(q) if carry is None else carry
        return state if out is None else Partial(out, state.lse)

    def selected(*args):  # the CPU's own kernel does read bounds
        return dataclasses.replace(real(*args), forward=forward, backward=lambda *args, **options: None)

    real = kernels.select
    monkeypatch.setattr(kernels, "select", selected)
    mask = IntervalMask.documents([[10, 54], [64]]) & IntervalMask.window(64, 20)
    plan = AttentionPlan(mask, Layout.zigzag(64, 4), Loopback(4))
    q, k, v, dout = (plan.shard(x).requires_grad_() for x in whole_inputs(2, 64))
    sink = torch.zeros(4, requires_grad=True)
    with NoHostReads():
        out = ring_attention(q, k, v, plan, sink=sink, softcap=2.0)
        torch.autograd.grad(out, (q, k, v, sink), dout)
        with pytest.raises(AssertionError, match="_local_scalar_dense makes the host wait"):
            out.sum().item()


COLLECTIVES = ("barrier", "all_reduce", "all_gather", "all_gather_into_tensor", "all_to_all_single", "broadcast")


def calls_of_a_pass():
    """The torch.distributed functions, and synchronisations, that ring attention calls on this rank."""
    called = []

    def note(owner, name):
        real = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **options: (called.append(name), real(*args, **options))[1])

    with pytest.MonkeyPatch.context() as patch:
        for name in (*COLLECTIVES, "batch_isend_irecv"):
            note(dist, name)
        patch.setattr(torch.cuda, "synchronize", lambda *args: called.append("synchronize"))
        plan = AttentionPlan(IntervalMask.causal(32), Layout.zigzag(32, dist.get_world_size()), ProcessRing())
        on_ring(whole_inputs(1, 32), plan)
    return called


@pytest.mark.ranks
def test_no_hop_has_a_barrier(ranks):
    """Ring libraries met at a barrier, or synchronised the device, on each hop."""
    for called in ranks.run(calls_of_a_pass, 2):
        assert set(called) == {"batch_isend_irecv"}


UNEVEN = {
    "documents that end with shards": IntervalMask.causal(64) & IntervalMask.documents([22, 30, 12]),
    "a window into one neighbour": IntervalMask.window(64, 5),
    "only the first rank's tokens": IntervalMask.causal(64) & IntervalMask.documents([20], 64),
    "no tokens at all": IntervalMask.documents([0], 64),
    "only the last ranks' keys": IntervalMask.documents([40, 24]) & IntervalMask.window(64, 0, 63),
}


def passes_over_uneven_masks():
    """One rank's results under each mask and layout, one after another without a meeting point between them."""
    size = dist.get_world_size()
    return [
        on_ring(whole_inputs(1, 64), AttentionPlan(mask, Layout.named(name, 64, size), ProcessRing()))
        for mask in UNEVEN.values()
        for name in sorted(LAYOUTS)
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("size", [3, 8])
def test_ranks_that_skip_different_hops_do_not_deadlock(ranks, size):
    """Rings hung where some ranks had nothing to do on a hop, or nothing to send (EasyContext#47)."""
    by_rank = iter(zip(*ranks.run(passes_over_uneven_masks, size), strict=True))
    for case, mask in UNEVEN.items():
        for name in sorted(LAYOUTS):
            side_by_side = [torch.cat(shards) for shards in zip(*next(by_rank), strict=True)]
            expected = oracle(whole_inputs(1, 64), mask.dense())
            assert_exact(side_by_side, expected, Layout.named(name, 64, size), f"{case}, {name}")


def compiled_by_an_engine(folder):
    """What building DeepSpeed's engine leaves in the folder for compiled extensions."""
    from ringflash.training.engine import build_engine
    from ringflash.training.memory import MemoryConfig
    from ringflash.training.optimizers.config import OptimConfig
    from tests.training.engines import build, joined

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TORCH_EXTENSIONS_DIR", str(folder))
        build_engine(build("llama"), OptimConfig(), MemoryConfig(), joined(None))
    return [path.name for path in folder.iterdir()]


@pytest.mark.ranks
def test_a_stale_compiler_lock_does_not_hang_a_run(ranks, tmp_path):
    """DeepSpeed on a CPU compiles an op under a lock at first use; a killed build left it, and all later runs hung."""
    assert ranks.run(compiled_by_an_engine, 1, tmp_path) == [[]]
