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

A model trains on the ring if its `model_type` is in the first table. `make models` writes this page and proves each
row: loss and every gradient of a tiny model against its own eager attention, document by document, in fp32.

- Sequences of one document and of several; 1 to 4 ranks; with and without recomputation of layers.
- The model's own loss, and the trainer's, which never makes all logits.
- What the configuration says of each layer's heads and window, from which layouts and FLOPs are predicted, against
  what attention was called with.
- Two models where those of a family differ in kind. Gemma 4: keys shared by layers, and experts. Phi 3 and phimoe: a
  window, and longrope. Llama and Hunyuan: dynamic RoPE. Documents are on both sides of the original length.

The errors are the largest relative ones: of a loss (PASS: {loss:g} at most), and of a parameter's gradient
({gradient:g} at most). transformers {version}.

| model_type | layers with a sliding window | also | loss | gradient | |
|---|---|---|---|---|---|
{rows}

## Experts

With `output_router_logits` a model's loss has the load-balancing loss of its experts, over the tokens of all ranks of
a ring as if on one rank. The trainer adds its gradient, averaged over micro-batches and replicas; the loss that it
reports is that of the tokens. tests/models/test_router_loss.py compares with the definition in float64, and with each
family's own loss. transformers records no router logits of granitemoe's families, so these have none.

## Rotary positions

Positions count within each document. default, linear, yarn and llama3 RoPE are the same on every shard, and so are
queries that are scaled by their position (`llama_4_scaling_beta`). longrope and dynamic RoPE go by a document's length:

- Where sequences are no longer than the model's original positions, nothing depends on the length.
- Beyond, the trainer gives each document the frequencies that transformers gives it alone. Without the trainer,
  `ringflash.models.rope_by_document(model)` does. transformers gives those of a packed row's longest document to all.
- `model.rope_length=N` (or `ringflash.models.pin_rope(model, N)`) gives all documents the frequencies of a document of
  N tokens.
- Keys in a cache stay as they are, so a cache needs the document's final length (`RingCache(rope_length=N)`). Needle
  searches set it. `ringflash.generate` refuses answers that change the frequencies of what was read: those that pass
  longrope's original length, and all beyond that of dynamic RoPE. `rope_length=N` allows them. transformers' own
  caches hold keys of other frequencies there.
- Refused beyond the original length: models whose layers differ in such a RoPE.

`model.rope_parameters` extends the model of `model.path`, as in `{{rope_type: yarn, factor: 4.0}}`. The exported
configuration has it. `rope_type: dynamic` leaves documents within the model's own positions as they are.

## Chunks

`llama4_text` is exact against each document alone: chunks, and the scales of its queries, count within documents.
transformers counts them from a call's first token. Without the trainer, give `ring_inputs` the model's `config`. No
cache takes the family. Published checkpoints are of `llama4`, with images, which is refused.

## Families that are refused

| model_type | why |
|---|---|
{refused}

## Other families

A family that is in neither table can be tried with `model.untested_family=true`, or, without the trainer, after
`ringflash.models.vouch_for("model_type")`. You then vouch for three things:

- Its layers mix tokens in attention alone, called through transformers' `AttentionInterface`, and limited by sliding
  windows at most. Convolutions, recurrences and linear attention would see a shard instead of the sequence.
- Positions enter by `position_ids` alone, and nothing else depends on the number of tokens.
- In the trainer: its logits are those of `lm_head`, times `logit_scale`, capped at `final_logit_softcapping`.

Compare its loss on one rank with that of `attn_implementation="eager"` before you train it.
"""

WINDOWS = {Windows.NONE: "", Windows.SOME: "some", Windows.ALL: "all"}


def prove(model_type):
    """The errors of all cases of a family. Raises AssertionError where its configuration is misread."""
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
        refused = "\n".join(f"| `{name}` | {reason} |" for name, reason in sorted(REFUSED.items()))
        table = "\n".join(line for line, _ in rows)
        version = transformers.__version__
        PAGE.write_text(TEXT.format(loss=LOSS, gradient=GRADIENT, version=version, rows=table, refused=refused))


if __name__ == "__main__":
    main(sys.argv[1:])
