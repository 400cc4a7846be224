"""Prove every family on the ring, and write docs/models.md: python -m tests.models.sweep (5 minutes on two cores).

python -m tests.models.sweep qwen3_moe glm4    # these alone, and write nothing
"""

import sys
import warnings
from itertools import product
from pathlib import Path

import torch
import transformers

from ringflash.models.families import FAMILIES, REFUSED, Windows
from tests.models.proof import GRADIENT, LOSS, PACKED, PLAIN, Prover

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

TEXT = """# Models

A model can be trained on the ring if its `model_type` is in this table. Some families are
[refused](#families-that-are-refused), and [others](#other-families) can be tried. The table has the largest relative
errors of a loss (PASS: {loss:g} at most), and of a parameter's gradient ({gradient:g} at most). transformers {version}.

| model_type | layers with a sliding window | also | loss | gradient | |
|---|---|---|---|---|---|
{rows}

`make models` proves each row and writes this page. The proof compares the loss and every gradient of a tiny model with
the model's own eager attention, run document by document, in fp32. It covers:

- sequences of one document and of several, 1 to 4 ranks, with and without recomputation of layers;
- the model's own loss, and the trainer's loss, which never materialises all logits;
- each layer's heads and window as read from the configuration, compared with those of the actual call of attention;
- two models where the models of a family differ in kind: shared keys and experts for Gemma 4, a window and longrope for
  Phi 3 and phimoe, dynamic RoPE for Llama and Hunyuan. Their documents are shorter and longer than the original length.
  OLMo Hybrid and Granite 4 are proven with and without positions, and Falcon-H1 with and without a gated norm.

## Families that are refused

| model_type | why |
|---|---|
{refused}

## Other families

You can try a family that is in neither table with `model.untested_family=true` or, in your own loop, after
`ringflash.models.allow_untested("model_type")`. You are then responsible for three things:

- Tokens interact only in attention, which is called through transformers' `AttentionInterface` and restricted by
  nothing but sliding windows. Convolutions, recurrences and linear attention would see only a shard of the sequence.
- Positions enter only through `position_ids`, and nothing else depends on the number of tokens.
- In the trainer, the logits are those of `lm_head`, times `logit_scale`, capped at `final_logit_softcapping`.

Compare its loss on one rank with that of `attn_implementation="eager"` before you train it.

## Models of images and text

Published folders of Gemma 3 (from 4B), Gemma 4, Llama 4 and Qwen3.5 are of models with images. `model.path` takes their
text model, without the layers for images, for sound and for multi-token prediction. A run exports it as a model of
text: of `gemma3_text`, for example. An adapter fits that model of text, not the whole, so use the merged model.

## Linear attention

These families have layers that carry a state from token to token of a document:

- Qwen3.5, Qwen3-Next and OLMo Hybrid have gated DeltaNet layers
  ([ringflash/models/delta_net.py](../ringflash/models/delta_net.py)).
- Nemotron-H, Granite 4 (granitemoehybrid), Bamba and Falcon-H1 have Mamba-2 layers
  ([ringflash/models/mamba2.py](../ringflash/models/mamba2.py)).

In such a layer, the ranks of a sequence exchange tokens for heads, and each computes whole documents of its own heads
([ringflash/models/linear_attention.py](../ringflash/models/linear_attention.py)). In your own loop, pass the model's
`config` to `ring_inputs`.

- The ranks that share a sequence (ring x ulysses) share the heads with states: `linear_num_value_heads`, or Mamba-2's
  heads. Their number must be a multiple of the number of ranks and of that of key heads (Mamba-2's groups of B and C).
  Of 48 heads in one group, 2, 3, 4, 6, 8, 12, 16, 24 or 48 ranks can have shares.
- Ranks whose heads share a key head each get a copy of it. More ranks than key heads therefore exchange more: with
  Granite 4's single group, each rank receives B and C of all tokens.
- On GPUs, these layers need flash-linear-attention (`pip install flash-linear-attention`). On the CPU, plain torch
  computes them, document by document.
- On Hopper GPUs, flash-linear-attention refuses the backward with triton older than 3.7.1, whose gradients would be
  wrong. torch 2.11 comes with triton 3.6.0, and torch 2.13 with 3.7.1. tilelang also helps, but was not tried here.
- On GPUs, fp32 is refused. In it, flash-linear-attention's gradients of `A_log` and `dt_bias` were wrong with gated
  DeltaNet layers, and one kernel computes those of both kinds. In bf16, gradients were as exact as by transformers'
  functions: the log has those of [gated DeltaNet](log.md#2026-11-30-gated-deltanet-on-an-h200) and of
  [Mamba-2](log.md#2026-11-30-mamba-2-layers-on-an-h200).
- On GPUs, `attention.deterministic=true` is refused: flash-linear-attention times its kernels in each process and
  takes the fastest.
- A recomputed layer runs its exchanges and its recurrence again. `memory.attention_results` concerns attention alone.
- A plan of your own must be causal within documents. Windows, prefixes and other masks are refused, since a state
  cannot follow them.
- Such a model cannot use a cache, so `ringflash.generate` and needle searches refuse it. dynamic and longrope RoPE are
  refused as well, and so is Bamba's `z_loss_coefficient`.

## Rotary positions

Positions are counted within each document. With default, linear, yarn and llama3 RoPE they do not depend on the shard,
and neither do queries that are scaled by their position (`llama_4_scaling_beta`). longrope and dynamic RoPE depend on
the document's length:

- As long as sequences fit the model's original positions, the length does not matter.
- Beyond that, the trainer gives each document the frequencies that it would have alone in transformers. In your own
  loop, call `ringflash.models.rope_per_document(model)`. (transformers itself gives every document of a packed row the
  frequencies of the longest.)
- `model.rope_length=N`, or `ringflash.models.fix_rope_length(model, N)`, gives all documents the frequencies of a
  document of N tokens.
- Keys in a cache cannot change their frequencies, so a cache must know the document's final length
  (`RingCache(rope_length=N)`). Needle searches set it. `ringflash.generate` refuses answers that would change the
  frequencies of the document: with longrope those that cross the original length, and with dynamic RoPE all beyond it.
  `rope_length=N` allows them. (transformers' own caches then mix keys of different frequencies.)
- Models whose layers differ in such a RoPE are refused beyond the original length.

`model.rope_parameters` extends the context of the model in `model.path`, as in `{{rope_type: yarn, factor: 4.0}}`.
The exported configuration includes it. `rope_type: dynamic` does not change documents within the model's own positions.
A larger base alone, as in `{{rope_theta: 5000000.0}}`, also needs `model.extrapolate_positions=true`: the exported
configuration and tokenizer then allow `data.sequence_length` tokens.

## Experts

With `output_router_logits`, a model's loss includes the load-balancing loss of its experts. It is computed over the
tokens of all ranks of a ring, as if they were on one rank. The trainer adds its gradient, averaged over micro-batches
and replicas, but reports the loss of the tokens alone. tests/models/test_router_loss.py compares it with the definition
in float64 and with each family's own loss. The granitemoe families have no such loss, because transformers records
no router logits for them.

## Chunks

`llama4_text` matches each document run alone: chunks, and the scales of its queries, are counted within documents.
(transformers counts them from the first token of a call.) In your own loop, pass the model's `config` to `ring_inputs`.
The family cannot be used with a cache.
"""

WINDOWS = {Windows.NONE: "", Windows.SOME: "some", Windows.ALL: "all"}


def prove(model_type):
    """The errors of all cases of a family. Raises AssertionError if its configuration is misread."""
    errors = []
    for prover in Prover.all_of(model_type):
        assert prover.attention(PACKED) == prover.attention_of_configuration(PACKED)
        cases = product((PLAIN, PACKED), (1, 2, 3, 4), (False, True), (False, True))
        errors += [prover.error(documents, ranks, recompute, trainer) for documents, ranks, recompute, trainer in cases]
    return errors


def row(model_type):
    """A line of the table, and whether the family passes."""
    errors = prove(model_type)
    loss, gradient = max(e.loss for e in errors), max(e.gradient for e in errors)
    passes = all(e.passes for e in errors)
    family = FAMILIES[model_type]
    cells = (f"`{model_type}`", WINDOWS[family.windows], family.needs, f"{loss:.0e}", f"{gradient:.0e}")
    return f"| {' | '.join(cells)} | {'PASS' if passes else 'FAIL'} |", passes


def refusals():
    """Lines of the second table: all families that are refused for one reason, by the first of them."""
    by_reason = {}
    for name, reason in sorted(REFUSED.items()):
        by_reason.setdefault(reason, []).append(f"`{name}`")
    return [f"| {', '.join(names)} | {reason} |" for reason, names in by_reason.items()]


def main(names):
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for name in names or FAMILIES:
        try:
            rows.append(row(name))
        except Exception as error:  # the other families are still to be seen
            rows.append((f"| `{name}` | | | | | FAIL: {type(error).__name__}: {str(error)[:300]} |", False))
        print(rows[-1][0], flush=True)
    if not all(passes for _, passes in rows):
        sys.exit("a family fails: docs/models.md is not written")
    if not names:
        refused = "\n".join(refusals())
        table = "\n".join(line for line, _ in rows)
        version = transformers.__version__
        PAGE.write_text(TEXT.format(loss=LOSS, gradient=GRADIENT, version=version, rows=table, refused=refused))


if __name__ == "__main__":
    main(sys.argv[1:])
