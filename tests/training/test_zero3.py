"""With ZeRO 3 a model is never whole in one rank's memory, and its weights are those of a model built whole."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from pathlib import Path

import deepspeed
import pytest
import torch
from safetensors.torch import load_file

from ringflash.errors import ConfigError
from ringflash.models import ModelConfig, build_model
from ringflash.training import zero3
from ringflash.training.zero3 import pretrained_model, random_model, write_weights
from tests.models.cases import architecture, tiny
from tests.models.test_text_models import save_whole
from tests.training.engines import joined

MAKERS = (random_model, pretrained_model)
M_MMAP_THRESHOLD = -3  # of malloc.h
LARGE = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 32}  # 126 MB in fp32


def changed(model_type):
    """A tiny model none of whose weights is as it was initialised."""
    model, generator = tiny(model_type), torch.Generator().manual_seed(3)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def weights(model):
    """Weights and buffers of a divided model, whole."""
    with deepspeed.zero.GatheredParameters([*model.parameters()]):
        return {name: x.detach().clone() for name, x in (*model.named_parameters(), *model.named_buffers())}


def built(model_type, folder=None):
    joined(None)
    torch.manual_seed(0)
    settings = {"path": folder} if folder else {"architecture": architecture(model_type)}
    model = build_model(ModelConfig(**settings, dtype="fp32"), MAKERS)
    return weights(model), [p.ds_tensor.numel() for p in model.parameters()]


def exported(folder, out, shard):
    world, zero3.SHARD = joined(None), shard
    model = build_model(ModelConfig(path=folder, dtype="fp32"), MAKERS)
    write_weights(model, Path(out), world, lambda: model.config.save_pretrained(out))


def refusal(folder):
    joined(None)
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(path=folder, dtype="fp32"), MAKERS)
    return str(caught.value)


@pytest.mark.ranks
@pytest.mark.parametrize("model_type", ["afmoe", "nanochat", "gemma2"])
def test_random_weights_are_those_of_the_same_seed_built_whole(ranks, model_type):
    # two families initialise parts of their parts, one ties weights
    model = tiny(model_type)
    expected = dict((*model.named_parameters(), *model.named_buffers()))
    for found, sizes in ranks.run(built, 2, model_type):
        assert [name for name in expected.keys() | found.keys() if not torch.equal(expected[name], found[name])] == []
        assert sizes == [-(-p.numel() // 2) for p in model.parameters()]


@pytest.mark.ranks
@pytest.mark.parametrize("model_type", ["mixtral", "gemma2"])
def test_a_checkpoint_is_loaded_and_exported_as_transformers_does(ranks, tmp_path, model_type):
    # one family has experts that are converted, one ties weights
    model = changed(model_type)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    model.save_pretrained(tmp_path / "whole")
    for found, _ in ranks.run(built, 2, model_type, str(tmp_path / "source")):
        assert [name for name, x in model.named_parameters() if not torch.equal(x, found[name])] == []
    for shard in (2**32, 20_000):
        ranks.run(exported, 2, str(tmp_path / "source"), str(tmp_path / f"out-{shard}"), shard)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    one = load_file(tmp_path / f"out-{2**32}" / "model.safetensors")
    assert one.keys() == whole.keys()
    assert [name for name, x in whole.items() if not torch.equal(x, one[name])] == []
    assert len([*(tmp_path / "out-20000").glob("model-*-of-*.safetensors")]) > 1
    again = build_model(ModelConfig(path=str(tmp_path / "out-20000"), dtype="fp32"))
    assert [name for name, x in model.named_parameters() if not torch.equal(x, again.get_parameter(name))] == []


@pytest.mark.ranks
def test_the_text_model_of_a_folder_with_images_is_loaded_and_exported(ranks, tmp_path):
    save_whole("gemma3", tmp_path / "source")
    model = build_model(ModelConfig(path=str(tmp_path / "source"), dtype="fp32"))
    model.save_pretrained(tmp_path / "whole")
    ranks.run(exported, 2, str(tmp_path / "source"), str(tmp_path / "out"), 2**32)
    whole, one = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == whole.keys()
    assert [name for name, x in whole.items() if not torch.equal(x, one[name])] == []


def unwritten(folder):
    def begin():
        raise OSError("no space")

    world, model = joined(None), build_model(ModelConfig(architecture=architecture("llama"), dtype="fp32"), MAKERS)
    try:
        write_weights(model, Path(folder), world, begin)
    except OSError as error:
        return str(error)
    return "nothing"


@pytest.mark.ranks
def test_a_full_disk_of_rank_0_keeps_no_rank_waiting(ranks, tmp_path):
    assert ranks.run(unwritten, 2, str(tmp_path)) == ["no space", "nothing"]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.ranks
def test_checkpoints_that_do_not_fit_are_refused_by_name(ranks, tmp_path):
    changed("llama").save_pretrained(tmp_path / "more")
    shallow = changed("llama").config
    shallow.num_hidden_layers = 1
    shallow.save_pretrained(tmp_path / "more")
    changed("llama").save_pretrained(tmp_path / "less")
    deep = changed("llama").config
    deep.num_hidden_layers = 3
    deep.save_pretrained(tmp_path / "less")
    changed("llama").save_pretrained(tmp_path / "wide")
    wide = changed("llama").config
    wide.intermediate_size = 96
    wide.save_pretrained(tmp_path / "wide")
    wide.save_pretrained(tmp_path / "none")
    expected = {
        "more": "has 9 weights that its config.json lacks, such as model.layers.1.",
        "less": "lacks 9 weights of its config.json, such as model.layers.2.",
        "wide": "has model.layers.0.mlp.down_proj.weight [32, 64], and its config.json asks for [32, 96]",
        "none": "has neither model.safetensors nor model.safetensors.index.json",
    }
    for name, message in expected.items():
        assert message in ranks.run(refusal, 2, str(tmp_path / name))[1]


class Resident:
    """The most memory, in MB, by which a process grows in a with statement: it samples its resident set."""

    def __enter__(self):
        gc.collect()  # models are in cycles
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start, self.most, self.done = self._now(), 0.0, False
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.done = True
        self.thread.join()

    def _now(self):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

    def _sample(self):
        while not self.done:
            self.most = max(self.most, self._now() - self.start)
            time.sleep(0.001)


def growth(folder):
    """By how much a rank grows while a model is built whole; built, loaded and exported divided; in MB."""
    world, found, zero3.SHARD = joined(None), {}, 5 * 10**6
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)  # what is freed goes back to the system at once
    build_model(ModelConfig(architecture=architecture("llama"), dtype="fp32"), MAKERS)  # what is imported first
    config = ModelConfig(architecture=architecture("llama", **LARGE), dtype="fp32")
    with Resident() as found["divided"]:
        build_model(config, MAKERS)
    with Resident() as found["whole"]:
        model = build_model(config)
    if world.is_first:
        model.save_pretrained(folder)
    del model
    torch.distributed.barrier()
    with Resident() as found["loaded"]:
        model = build_model(ModelConfig(path=folder, dtype="fp32"), MAKERS)
    with Resident() as found["exported"]:
        write_weights(model, Path(folder) / "out", world, lambda: None)
    return {name: resident.most for name, resident in found.items()}


@pytest.mark.ranks
def test_no_rank_ever_holds_a_whole_model(ranks, tmp_path):
    size = sum(p.numel() for p in build_model(ModelConfig(architecture=architecture("llama", **LARGE))).parameters())
    size *= 4 / 1e6
    for rank in ranks.run(growth, 2, str(tmp_path)):
        assert rank["whole"] > 0.8 * size, rank
        assert rank["divided"] < 0.75 * size, rank  # half of it, and layers
        assert rank["loaded"] < 0.75 * size, rank
        assert rank["exported"] < 0.3 * size, rank
