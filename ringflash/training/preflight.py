"""Preflight: checks of a run before it allocates anything, and the log lines that describe it.

`check_inputs` needs no GPU and no other process, so `train.py --print` runs it too. `check` adds checks that depend on
the ranks and on this machine's device. Some errors can only be found later: weights that cannot be loaded, a corpus
that is too short, and a run folder that cannot be used or resumed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ringflash.data import DataConfig, check_vocabulary, load_tokenizer, python_stdlib
from ringflash.data.mixture import check_sources
from ringflash.distributed import launcher
from ringflash.distributed.parallel import resolve_parallel
from ringflash.errors import ConfigError
from ringflash.layout import Layout
from ringflash.models import read_config
from ringflash.models.configuration import DTYPES, ModelConfig, attention_kernels, check_length
from ringflash.models.float8 import refusal
from ringflash.models.freezing import forward_only_layers, freeze
from ringflash.models.linear_dtype import count_float8, use_float8
from ringflash.models.lora import add_lora, description
from ringflash.models.mlp import tiles_of
from ringflash.models.quantized import BYTES, quantizable
from ringflash.training.config import Config
from ringflash.training.estimate import Estimate, estimate
from ringflash.training.loss import tile_for
from ringflash.training.memory import MemoryConfig
from ringflash.training.mismatches import mismatches


class Job(NamedTuple):
    """A run that has passed its checks. config: with parallel.ulysses resolved."""

    config: Config
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def check(config: Config) -> Job:
    """Raise ConfigError, on every rank, for a run that these ranks cannot do. Otherwise rank 0 logs the run."""
    device, ranks = launcher.local_device(), launcher.world_size()
    model_config, tokenizer = check_inputs(config, device)
    config, reason = _resolved(config, model_config, ranks)
    if launcher.rank() == 0:
        notes = mismatches(config, model_config, tokenizer)
        print(*_summary(config, model_config, ranks, device), *notes, *filter(None, [reason]), sep="\n", flush=True)
    return Job(config, model_config, tokenizer)


def planned(config: Config, model_config: PreTrainedConfig) -> list[str]:
    """The lines that `train.py --print` adds for WORLD_SIZE ranks: the model, the loss of pairs, a step, the memory.

    All ranks are assumed to be GPUs, where model.dtype=auto is bf16. Raises ConfigError for a run that they cannot do.
    """
    ranks = launcher.world_size()
    if config.model.dtype == "auto":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bf16"))
    notes = []
    if config.parallel.ulysses is None and not torch.cuda.is_available():
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, ulysses=1))
        notes = ["parallel   parallel.ulysses=null depends on the speed of the GPUs; without them, 1 is assumed"]
    config, reason = _resolved(config, model_config, ranks)
    model = _meta_model(config.model, model_config)
    found = _estimate(config, model_config, model, ranks)
    lines = [*_model(config, model), *_preference(config), _grid(config, ranks), _step(config, ranks)]
    lines.append(f"estimate   {found}")
    return [*lines, *notes, *filter(None, [reason])]


def unchecked(device: torch.device | None) -> list[str]:
    """The lines that `train.py --print` adds about checks that it leaves to the run. device: None without a GPU."""
    lines = ["unchecked  records behind the first: the run reads them before its first step"]
    if "WORLD_SIZE" not in os.environ:
        lines.append("unchecked  ranks and memory: for 8 GPUs, put WORLD_SIZE=8 LOCAL_WORLD_SIZE=8 before the command")
    if device is None:
        lines.append("unchecked  attention.kernel and fused.*, which depend on the GPU: this machine has none")
    return lines


def _resolved(config: Config, model_config: PreTrainedConfig, ranks: int) -> tuple[Config, str | None]:
    """The configuration with its grid, and the reason of that; ConfigError for one that cannot run."""
    length = config.data.sequence_length
    parallel, reason = resolve_parallel(config.parallel, model_config, length, ranks, launcher.local_world_size())
    config = dataclasses.replace(config, parallel=parallel)
    check_ranks(config, ranks)
    return config, reason


def check_inputs(
    config: Config, device: torch.device | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Raise ConfigError for a model, a tokenizer or files that cannot be trained on; else return the first two.

    device: where the kernel will run. None: unknown, as on a cluster's login node, so attention.kernel is not checked.
    """
    model_config = read_config(config.model)
    check_length(config.model, model_config, config.data.sequence_length)
    if device is not None:
        attention_kernels(config.model, config.attention, model_config, device)
        for name in (f.name for f in dataclasses.fields(config.fused)):
            config.fused.wanted(name, device)
        if config.model.linear_dtype is not None and (reason := refusal(device)) is not None:
            raise ConfigError(f"model.linear_dtype={config.model.linear_dtype} {reason}; set model.linear_dtype=null")
    config.optim.accumulation(replicas=1)  # what does not divide here divides on no grid
    config.evaluation.needle.check(config.data.sequence_length, config.model, model_config)
    layers, memory = model_config.num_hidden_layers, config.memory
    if memory.keep.layers > layers:
        raise ConfigError(
            f"memory.attention_results={memory.attention_results} memory.layer_inputs={memory.layer_inputs}: the model "
            f"has {layers} layers"
        )
    changed = config.model.lora.enabled or config.model.freeze or config.model.linear_dtype
    checks_model = changed or config.memory.mlp_tile is not None
    model = _meta_model(config.model, model_config) if checks_model else None
    if model is not None and config.memory.mlp_tile is not None and not tiles_of(model):
        raise ConfigError(
            f"memory.mlp_tile={config.memory.mlp_tile}: no MLP of model_type={model_config.model_type} has a form that "
            f"can be tiled (experts and adapters with dropout have none); memory.mlp_tile=null leaves them as they are"
        )
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_vocabulary(config.data.tokenizer, tokenizer, model_config.vocab_size)
    check_sources(config.data, tokenizer)
    return model_config, tokenizer


def check_ranks(config: Config, ranks: int) -> None:
    """Raise ConfigError for a grid, batch or length that does not divide among `ranks` ranks."""
    grid = config.parallel.grid(ranks)
    sharing, accumulation = grid.sharing, config.optim.accumulation(grid.replicas)
    if sharing > 1 and config.data.sequence_length < 2 * sharing:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is smaller than 2 x {sharing} ranks that share it"
        )
    if config.memory.keep.recomputes_attention and sharing > 1:
        raise ConfigError(
            f"memory.attention_results={config.memory.attention_results} would run attention's exchanges again, "
            f"between {sharing} ranks: set memory.attention_results=host or gpu"
        )
    bf16 = DTYPES[config.model.dtype] == torch.bfloat16
    if bf16 and config.memory.zero == 0 and accumulation > 1:
        raise ConfigError(
            f"memory.zero=0 with bf16 weights would accumulate {accumulation} micro-batches in bf16; "
            f"set memory.zero=1, model.dtype=fp32 or a larger optim.micro_batch"
        )
    states = config.memory.optimizer_states
    if states != "fp32" and accumulation > 1:
        raise ConfigError(
            f"memory.optimizer_states={states} would accumulate {accumulation} micro-batches in bf16; "
            f"set memory.optimizer_states=fp32 or a larger optim.micro_batch"
        )
    if states != "fp32" and not bf16:
        raise ConfigError(
            f"memory.optimizer_states={states} needs bf16 weights, and model.dtype={config.model.dtype} gives fp32 "
            f"here; set model.dtype=bf16"
        )


def _meta_model(config: ModelConfig, model_config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device. Raises ConfigError for adapters or products that it cannot have, and what cannot be
    frozen."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        if config.lora.enabled:
            add_lora(model, config.lora)
    if config.linear_dtype is not None:
        use_float8(model)
    freeze(model, config.freeze)
    return model


def _summary(config: Config, model_config: PreTrainedConfig, ranks: int, device: torch.device) -> list[str]:
    """Model, data, ranks, step and memory."""
    model = _meta_model(config.model, model_config)
    memory = config.memory
    tile = memory.loss_tile or tile_for(model_config.vocab_size)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    kernels = " and ".join(attention_kernels(config.model, config.attention, model_config, device))
    found = _estimate(config, model_config, model, ranks)
    kinds = {"fp32": "", "bf16": ", bf16 optimizer states", "host": ", fp32 optimizer states on the host"}
    states = kinds[memory.optimizer_states]
    return [
        *_model(config, model),
        *_preference(config),
        f"data       {_data_paths(config.data)}, tokenizer {config.data.tokenizer}",
        f"{_grid(config, ranks, where)}; attention kernel {kernels}",
        _step(config, ranks),
        f"memory     ZeRO {memory.zero}{states}, {_recomputation(memory)}{_mlp_tiling(memory, model)}, loss tiles of "
        f"{min(tile, config.data.sequence_length):,} tokens",
        *([f"estimate   {found}"] if device.type == "cuda" else []),
        *_disk_warning(config, found.checkpoint),
    ]


def _model(config: Config, model: PreTrainedModel) -> list[str]:
    """A line on the model and what of it is trained, and one on its adapters, if it has any."""
    parameters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    dtype = "bf16" if DTYPES[config.model.dtype] == torch.bfloat16 else "fp32"
    quantized = f", linear layers in {kind}" if (kind := config.model.lora.quantize_base) else ""
    line = f"model      {model.config.model_type}, {parameters:,} parameters in {dtype}{quantized}"
    if config.model.linear_dtype is not None:
        line += f", products of {count_float8(model)} linear layers in {config.model.linear_dtype}"
    if config.model.freeze:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        layers = forward_only_layers(model)
        line += f", of which {trained:,} are trained" + f"; the first {layers} layers run no backward" * bool(layers)
    if alpha := config.model.neftune_alpha:
        line += f"; NEFTune with alpha {alpha:g}"
    return [line, *([f"adapters   {description(model)}"] if config.model.lora.enabled else [])]


def _preference(config: Config) -> list[str]:
    """A line on the loss of pairs, with preferences."""
    if (loss := config.pair_loss) is None:
        return []
    read = [f"{name} {x:g}" for name in loss.loss.settings if (x := getattr(loss, name)) and x is not True]
    reference = "without a reference"
    if loss.loss.referenced:
        which = "before training" if loss.precompute_ref_log_probs else "without its adapters"
        reference = f"the reference is the model {which}"
    return [f"loss       {loss.loss.name}, {', '.join(read)}; {reference}"]


def _grid(config: Config, ranks: int, where: str = "GPU") -> str:
    replicas, ring, ulysses = config.parallel.grid(ranks)
    grid = f"replicas {replicas} x ring {ring} x ulysses {ulysses}"
    return f"ranks      {ranks} x {where}: {grid}, layout {config.parallel.layout}"


def _step(config: Config, ranks: int) -> str:
    optim, length, replicas = config.optim, config.data.sequence_length, config.parallel.grid(ranks).replicas
    duration = f"{optim.steps} steps" if optim.epochs is None else f"{optim.epochs:g} epochs"
    return (
        f"step       {optim.batch} x {length:,} = {optim.batch * length:,} tokens in {optim.accumulation(replicas)} x "
        f"{optim.micro_batch} sequences per replica; {duration}"
    )


def _estimate(config: Config, model_config: PreTrainedConfig, model: PreTrainedModel, ranks: int) -> Estimate:
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    bf16 = DTYPES[config.model.dtype] == torch.bfloat16
    quantized = quantizable(model) if config.model.lora.quantize_base else 0
    frozen = BYTES * quantized + (2 if bf16 else 4) * (parameters - trained - quantized)
    return estimate(
        model_config, trained, config.memory, bf16=bf16, tokens=shard_tokens(config, ranks), ranks=ranks,
        ring=config.parallel.grid(ranks).ring, frozen=frozen, forward_only=forward_only_layers(model),
    )  # fmt: skip


def shard_tokens(config: Config, ranks: int) -> int:
    """Tokens that a rank holds of a micro-batch."""
    _, ring, ulysses = config.parallel.grid(ranks)
    shard = Layout.zigzag(config.data.sequence_length, ring, ulysses).shard_length // ulysses
    return config.optim.micro_batch * shard


def _disk_warning(config: Config, checkpoint: float) -> list[str]:
    """A line if the disk has no room for the checkpoints, of `checkpoint` bytes each."""
    output_dir = Path(config.output_dir)
    there = next(path for path in (output_dir, *output_dir.absolute().parents) if path.is_dir())
    keep, best = config.checkpoint.keep, config.checkpoint.keep_best
    number, free = keep + best + 1, shutil.disk_usage(there).free
    if number * checkpoint <= free:
        return []
    setting = f"checkpoint.keep={keep}{' with keep_best' * best}"
    return [
        f"disk       {setting} needs room for {number} checkpoints, while one is written: "
        f"{number * checkpoint / 2**30:,.1f} GiB, and {free / 2**30:,.1f} are free in output_dir={output_dir}"
    ]


def _recomputation(memory: MemoryConfig) -> str:
    """The description of what layers keep for the backward, and where."""
    if not memory.recompute:
        return "no recomputation"
    if memory.attention_results == memory.layer_inputs == "gpu":
        return "recomputation"
    return f"recomputation (results of attention: {memory.attention_results}, inputs: {memory.layer_inputs})"


def _mlp_tiling(memory: MemoryConfig, model: PreTrainedModel) -> str:
    """The number of tokens per MLP tile, if layers are recomputed."""
    if not memory.recompute:
        return ""
    tiles = sorted(tiles_of(model, memory.mlp_tile))
    return f", MLP tiles of {' or '.join(f'{tile:,}' for tile in tiles)} tokens" if tiles else ", MLPs not tiled"


def _data_paths(data: DataConfig) -> str:
    """The paths, with a note on the demo's text."""
    note = " (source text of Python's standard library; data=... trains on other text)"
    paths = [part.path for part in data.parts().values()]
    return ", ".join(f"{path}{note * (path == python_stdlib())}" for path in paths)
