"""A run with model.freeze trains what a plain loop on transformers' eager attention trains, and leaves the rest."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ringflash.errors import ConfigError
from ringflash.models.freezing import freeze
from ringflash.training.compose import compose
from ringflash.training.metrics import read
from ringflash.training.preflight import check_inputs
from tests.training.plain_loop import plain_steps
from tests.training.runs import fitted, settings, tiny_qwen3

WHOLE = "/model/model.safetensors"


def frozen_run(text, patterns, *others, **fields):
    base = tiny_qwen3(text.parent / "base", 384, num_hidden_layers=3, **fields)
    common = ["optim.steps=4", "optim.batch=2", "optim.lr=3e-3", "optim.eps=1e-5", "checkpoint.every=2", "name=run"]
    model = ["model=pretrained", f"model.path={base}", f"model.freeze={patterns}"]
    return settings(text, *common, *others, model=model), base


def resumed(ranks, size, run, folder):
    """Deletes the last checkpoint and the model, and resumes: steps 3 and 4 again. Returns the weights."""
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")
    assert ranks.run(fitted, size, [*run, "resume=auto"])[0][0] is None
    return load_file(f"{folder}{WHOLE}")


RECOMPUTED = ["memory.recompute=true", "memory.mlp_tile=128", "model.dtype=fp32"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "patterns", "others", "tied"),
    [
        (1, "[model.embed_tokens]", ["memory.zero=0", "model.dtype=fp32"], True),
        (2, "[lm_head,'*norm*',model.embed_tokens,model.layers.0]",
         ["memory.zero=2", "memory.layer_inputs=host", "memory.attention_results=host", *RECOMPUTED], False),
        (2, "['*','!*.[12].mlp','!*.2.self_attn.q_proj']", ["memory.zero=3", *RECOMPUTED], False),
    ],
    ids=["tied-embeddings", "recompute-host", "zero-3"],
)  # fmt: skip
def test_the_trained_weights_are_those_of_a_plain_loop_and_the_others_stay(ranks, text, size, patterns, others, tied):
    run, base = frozen_run(text, patterns, *others, tie_word_embeddings=tied)
    config, _ = compose(run)
    error, printed = ranks.run(fitted, size, run)[0]
    assert error is None
    folder, start = text.parent / "runs" / "run", load_file(base / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    freeze(model, config.model.freeze)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"parameters in fp32, of which {count:,} are trained" in printed

    records = [record for record in read(folder / "metrics.jsonl") if "gradient_norm" in record]
    for record, figures in zip(records, plain_steps(model, config), strict=True):
        assert (record["loss"], record["gradient_norm"]) == pytest.approx(figures, rel=1e-5)
    found, trained = load_file(f"{folder}{WHOLE}"), dict(model.named_parameters())
    assert found.keys() == start.keys()
    for name, x in found.items():
        if trained[name].requires_grad:
            assert torch.allclose(x, trained[name], rtol=0, atol=1e-5), name
            assert (x - start[name]).abs().max() > 1e-3, name
        else:
            assert torch.equal(x, start[name]), name

    stored = [*(folder / "checkpoints" / "step-00000004" / "state").glob("*model_states.pt")]
    names = {name for file in stored for name in torch.load(file, weights_only=False)["module"]}
    assert {name.removeprefix("model.") for name in names} == {name for name, p in trained.items() if p.requires_grad}
    again = resumed(ranks, size, run, folder)
    assert all(torch.equal(x, again[name]) for name, x in found.items())


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("states", "zero", "sizes"), [("bf16", 1, (1, 1)), ("host", 2, (1, 1)), ("fp32", 3, (2, 1))], ids=str
)
def test_a_resumed_run_in_bf16_continues_with_the_same_frozen_weights(ranks, text, states, zero, sizes):
    memory = [
        f"memory.optimizer_states={states}",
        f"memory.zero={zero}",
        "model.dtype=bf16",
        "parallel.ring=1",
        "optim.batch=4",
    ]
    run, base = frozen_run(text, "['*','!model.layers.1','!lm_head']", *memory)
    size, later = sizes
    assert ranks.run(fitted, size, [*run, f"optim.micro_batch={4 // size}"])[0][0] is None
    folder, start = text.parent / "runs" / "run", load_file(base / "model.safetensors")
    found = load_file(f"{folder}{WHOLE}")
    moved = {name for name, x in found.items() if not torch.equal(x, start[name].bfloat16())}
    assert all(".layers.1." in name or name == "model.embed_tokens.weight" for name in moved)
    assert len(moved) > 9
    again = resumed(ranks, later, [*run, f"optim.micro_batch={4 // later}"], folder)
    alike = [torch.equal(x, again[name]) for name, x in found.items()]
    assert all(alike) or size != later
    assert all(torch.allclose(x, again[name], rtol=0, atol=5e-3) for name, x in found.items())


def test_patterns_are_checked_before_the_run(text):
    run, _ = frozen_run(text, "[model.layer.0]")
    with pytest.raises(ConfigError, match=r"^model\.freeze: model\.layer\.0 matches no parameter"):
        check_inputs(compose(run)[0])
