"""An exported model is the loaded one with other weights, and its export is tried before training."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ringflash.errors import ConfigError, DiskError
from ringflash.training.compose import compose
from ringflash.training.export import rehearse
from tests.data.cases import write_tokenizer
from tests.models.cases import TINY
from tests.training.runs import fitted, settings

# As published ones are: transformers loads it with a warning and refuses to write it.
INVALID = '{"_from_model_config": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}\n'
BOOKKEEPING = {"transformers_version"}


@pytest.fixture
def source(tmp_path):
    """A small published model, of another dtype than training's."""
    folder = tmp_path / "source"
    config = AutoConfig.for_model("llama", **TINY | {"vocab_size": 384})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    (folder / "generation_config.json").write_text(INVALID)
    return folder


def pretrained(folder):
    return ["model=pretrained", f"model.path={folder}"]


def loaded(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def uses_cache(folder):
    """Whether `generate` feeds the exported model one token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    fed, forward = [], model.forward

    def recorded(input_ids, *args, **options):
        fed.append(input_ids.shape[1])
        return forward(input_ids, *args, **options)

    model.forward = recorded
    model.generate(torch.arange(3, 8)[None], max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return fed == [5, 1, 1]


@pytest.mark.ranks
def test_an_exported_model_is_the_loaded_one_but_for_its_weights(ranks, text, source):
    others = ["name=exported", "optim.steps=2", "model.dtype=fp32", "memory.recompute=true", "memory.zero=3"]
    run = settings(text, *others, model=pretrained(source))
    assert ranks.run(fitted, 1, run)[0][0] is None
    folder = text.parent / "runs" / "exported"
    assert (folder / "model" / "generation_config.json").read_text() == INVALID
    before, after = loaded(source), loaded(folder / "model")
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed - BOOKKEEPING == {"dtype"}
    assert after["dtype"] == "float32"
    assert uses_cache(folder / "model")
    readable = (folder / "model").stat().st_mode & 0o666  # by whom, as the umask says
    assert {file.stat().st_mode & 0o777 for file in (folder / "model").iterdir()} == {readable}
    shutil.rmtree(folder / "model")
    assert ranks.run(fitted, 1, [*run, "resume=auto"])[0][0] is None
    assert loaded(folder / "model") == after
    assert sorted(path.name for path in folder.parent.iterdir()) == ["exported"]


@pytest.mark.ranks
@pytest.mark.parametrize(("rope_type", "positions"), [("default", 64), ("dynamic", 32)])
def test_the_length_that_was_trained_on_is_allowed_by_config_and_tokenizer(ranks, text, source, rope_type, positions):
    rope = {"rope_type": rope_type, "rope_theta": 1e6} | ({"factor": 2.0} if rope_type == "dynamic" else {})
    settings_of = loaded(source) | {"max_position_embeddings": 32, "rope_parameters": rope}
    (source / "config.json").write_text(json.dumps(settings_of))
    write_tokenizer(source, ["the", "of", "and", "to", "a", "in"])
    made = loaded(source, "tokenizer_config.json") | {"model_max_length": 32}
    (source / "tokenizer_config.json").write_text(json.dumps(made))
    others = ["name=longer", "optim.steps=1", "model.extrapolate_positions=true", f"data.tokenizer={source}"]
    assert ranks.run(fitted, 1, settings(text, *others, model=pretrained(source)))[0][0] is None
    folder = text.parent / "runs" / "longer" / "model"
    assert loaded(folder)["max_position_embeddings"] == positions
    assert loaded(folder, "tokenizer_config.json")["model_max_length"] == 64


@pytest.mark.ranks
def test_a_model_from_an_architecture_exports_that_architecture(ranks, text):
    run = settings(text, "name=exported", "optim.steps=2", "model.dtype=fp32")
    assert ranks.run(fitted, 1, run)[0][0] is None
    folder, asked = text.parent / "runs" / "exported", compose(run)[0].model.architecture
    exported = loaded(folder / "model")
    assert {name: exported.get(name) for name in asked} == asked
    assert exported["use_cache"]
    assert not {name for name in exported if "attn_implementation" in name or "checkpointing" in name}
    assert GenerationConfig.from_pretrained(folder / "model").use_cache
    assert uses_cache(folder / "model")


@pytest.mark.ranks
def test_what_would_fail_at_the_end_is_refused_before_tokenising(ranks, text, source):
    (text.parent / "file").write_text("no folder")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    ((unwritable, _),) = ranks.run(fitted, 1, settings(text, f"output_dir={text.parent}/file/runs"))
    assert unwritable == f"output_dir={text.parent}/file/runs cannot be written: Not a directory"
    ((broken, _),) = ranks.run(fitted, 1, settings(text, model=pretrained(source)))
    assert broken is not None
    assert not (text.parent / "cache").exists()


def test_a_full_disk_is_not_blamed_on_the_model(tmp_path, source, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    model = AutoModelForCausalLM.from_pretrained(source)
    monkeypatch.setattr(model, "save_pretrained", full)
    message = rf"^{tmp_path} was not written: .*No space left on device; .* GiB are free on its disk$"
    with pytest.raises(DiskError, match=message):
        rehearse(model, Unwritable(), "x", tmp_path)


class Unwritable:
    """A tokenizer that is loaded and cannot be saved."""

    def save_pretrained(self, folder):
        raise NotImplementedError("no files")


def test_a_tokenizer_that_cannot_be_saved_is_refused_and_leaves_nothing(tmp_path, source):
    model = AutoModelForCausalLM.from_pretrained(source)
    message = "^model.path=x: the trained model could not be exported: no files$"
    with pytest.raises(ConfigError, match=message):
        rehearse(model, Unwritable(), "x", tmp_path / "runs")
    assert model.generation_config.temperature == 0.6
    assert list((tmp_path / "runs").iterdir()) == []
