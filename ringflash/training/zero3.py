"""ZeRO 3: a model is built, loaded and exported layer by layer, so that it is never whole in one rank's memory.

    building    every module's weights are divided among the ranks as soon as it is made (`deepspeed.zero.Init`)
    loading     the tensors of one layer are read, converted as transformers would, and divided
    exporting   the weights of one layer are gathered; rank 0 writes a file for each SHARD bytes of them

Random weights are those of the same seed without ZeRO 3: constructors and transformers' initialisation run in their
usual order, on every rank. At other stages every rank has all weights, and builds and exports as transformers does.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import _apply_weight_conversions_to_state_dict

from ringflash.distributed.world import World
from ringflash.errors import ConfigError
from ringflash.files import remove, write_atomically
from ringflash.models.building import check_loaded, names_of_text
from ringflash.models.lora import merged
from ringflash.models.quantized import shape_of

SHARD = 4 * 2**30  # bytes of a file of weights
# Divides the weights of modules as they are made; tensors have the device and the dtype that they have without it.
_divided = partial(deepspeed.zero.Init, mem_efficient_linear=False, tensor_overrides=None)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def start_deepspeed() -> None:
    """Start DeepSpeed's own view of the process group, without what it would compile or log."""
    # On the CPU, DeepSpeed would compile an op that serves inference only, for half a minute, under a lock.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # With any optimizer DeepSpeed imports Muon, which would load torch's compiler for seconds.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    deepspeed.utils.logger.setLevel("WARNING")
    deepspeed.init_distributed(verbose=False)


def random_model(hf_config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """A model of random weights, divided among the ranks; all ranks call it."""
    start_deepspeed()
    with _divided(), _gathered_initialisation():
        return AutoModelForCausalLM.from_config(hf_config, **options)


def pretrained_model(path: str, hf_config: PreTrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The model of a folder of safetensors, divided among the ranks; all ranks call it.

    Raises ConfigError for weights that are missing or of other shapes.
    """
    start_deepspeed()
    files = _files(Path(path))
    with _divided(), no_init_weights():
        model = AutoModelForCausalLM.from_config(hf_config, **options)
    model.tie_weights()
    check_loaded(path, *_load(model, files))
    return model


def write_weights(model: PreTrainedModel, folder: Path, world: World, begin: Callable[[], None]) -> None:
    """Write a model's weights to `folder`, layer by layer, with adapters merged into them; all ranks call it.

    begin: what rank 0 does before, such as making `folder`.

    Rank 0 takes part in every gather even after its disk is full, and raises the error after the last one.
    """
    named, buffers, writer = dict(model.named_parameters()), _buffers(model), _Writer(model, folder)
    error: Exception | None = None
    for number, names in enumerate(_layers([*named, *buffers])):
        parameters = [named[name] for name in names if name in named]
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=None):
            if world.is_first and error is None:
                try:
                    if number == 0:
                        begin()
                    layer = {name: (named | buffers)[name].detach().to("cpu", copy=True) for name in names}
                    writer.add(merged(model, layer))
                except Exception as raised:
                    error = raised
    if error is not None:
        raise error
    if world.is_first:
        writer.finish()


class _Writer:
    """Writes weights to files of about SHARD bytes, as transformers would: under their names in published checkpoints.

    Until the number of files is known, they are 0.safetensors, 1.safetensors and so on.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model, self.folder = model, folder
        self.held: dict[str, Tensor] = {}
        self.written: list[list[str]] = []  # the names in each file

    def add(self, layer: dict[str, Tensor]) -> None:
        """Take a layer's weights, and write those before it if these would be too many."""
        if self.held and sum(x.nbytes for x in (*self.held.values(), *layer.values())) > SHARD:
            self._write()
        self.held |= layer

    def finish(self) -> None:
        """Write what is left, and give the files the names that transformers looks for."""
        self._write()
        files = [f"model-{n + 1:05d}-of-{len(self.written):05d}.safetensors" for n in range(len(self.written))]
        files = files if len(files) > 1 else [WEIGHTS]
        for n, file in enumerate(files):
            os.rename(self.folder / f"{n}.safetensors", self.folder / file)
        if len(files) > 1:
            size = sum((self.folder / file).stat().st_size for file in files)
            where = {name: file for file, names in zip(files, self.written, strict=True) for name in names}
            index = {"metadata": {"total_size": size}, "weight_map": where}
            write_atomically(self.folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _write(self) -> None:
        aside, file = self.folder / "aside", self.folder / f"{len(self.written)}.safetensors"
        self.model.save_pretrained(aside, state_dict=dict(self.held), max_shard_size="1TB")
        os.rename(aside / WEIGHTS, file)
        remove(aside)
        with safe_open(file, "pt") as opened:
            self.written.append([*opened.keys()])
        self.held.clear()


@contextmanager
def _gathered_initialisation() -> Iterator[None]:
    """Gather a module's weights, a layer's at most, while transformers initialises it."""
    own = PreTrainedModel._initialize_weights

    def gathered(model: PreTrainedModel, module: nn.Module, *args: Any) -> None:
        inner = not isinstance(module, PreTrainedModel | nn.ModuleList)  # its initialisation may reach into its parts
        parameters = list(module.parameters(recurse=inner))
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            whole = [p.data for p in parameters]
            for p in parameters:
                p.data = p.data.cpu()  # whose random numbers are those of a model that is built whole
            own(model, module, *args)
            for p, x in zip(parameters, whole, strict=True):
                p.data = x.copy_(p.data)

    PreTrainedModel._initialize_weights = gathered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = own  # type: ignore[method-assign]


def _files(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a folder. Raises ConfigError if it has no safetensors."""
    if (folder / INDEX).is_file():
        where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in where.items()}
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"model.path={folder} has neither {WEIGHTS} nor {INDEX}, which memory.zero=3 loads layer by layer: "
            f"set memory.zero=2, or convert its weights"
        )
    with safe_open(folder / WEIGHTS, "pt") as file:
        return dict.fromkeys(file.keys(), folder / WEIGHTS)


def _load(model: PreTrainedModel, files: dict[str, Path]) -> tuple[list[str], list[tuple], list[str]]:
    """Fill a divided model. Returns missing names, (name, found, expected) of wrong shapes, and unexpected names."""
    conversions = get_model_conversion_mapping(model, names_of_text(model.config))
    named = dict(model.named_parameters(remove_duplicate=False))
    buffers = _buffers(model)
    filled: set[int] = set()
    mismatched, unexpected = [], []
    for names in _layers(files):
        state = _apply_weight_conversions_to_state_dict(model, _read(names, files), conversions)
        unexpected += [] if state else names
        wanted = {name: named[name] for name in state if name in named}
        shapes = [(name, (*state[name].shape,), (*shape_of(p),)) for name, p in wanted.items()]
        mismatched += [each for each in shapes if each[1] != each[2]]
        with deepspeed.zero.GatheredParameters([*wanted.values()], modifier_rank=0), torch.no_grad():
            for name, parameter in wanted.items():
                if state[name].shape == parameter.shape:
                    parameter.copy_(state[name])
                filled.add(id(parameter))
            for name in state.keys() & buffers.keys():
                buffers[name].copy_(state[name])
                filled.add(id(buffers[name]))
    missing = [name for name, x in (named | buffers).items() if id(x) not in filled]
    return missing, mismatched, unexpected


def _read(names: list[str], files: dict[str, Path]) -> dict[str, Tensor]:
    """Tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file, those in itertools.groupby(sorted(names, key=lambda name: str(files[name])), key=files.__getitem__):
        with safe_open(file, "pt") as source:
            found |= {name: source.get_tensor(name) for name in those}
    return found


def _layers(names: Iterable[str]) -> list[list[str]]:
    """Names by their layer, the first number in them; those without one are each alone, but for their adapters."""
    groups: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        own = re.sub(r"\.(base_layer|lora_[AB]\.default)\.", ".", name)
        groups.setdefault(number[1] if number else own, []).append(name)
    return [*groups.values()]


def _buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that a checkpoint has; ZeRO 3 does not divide them."""
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: x for name, x in model.state_dict().items() if name not in weights}
