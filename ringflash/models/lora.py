"""LoRA: low-rank adapters of peft on linear layers and experts, trained instead of the model's weights.

    y = W x + scale B (A x)        W is frozen; A [rank, in], B [out, rank]; scale = alpha / rank

peft replaces the linear layers in place, so the model keeps its class, and everything else reads it as before. Names of
weights are peft's with its adapter's name, "default", in them; in an adapter's folder they have none:

    model.layers.0.self_attn.q_proj.lora_A.default.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

The experts of a layer are one tensor, [experts, out, in] or [experts, in, out], and so are their adapters: A is
[experts x rank, in], and B is [out, rank x experts]. peft wraps the module of experts once for each adapted tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from ringflash.errors import ConfigError, in_one_line
from ringflash.models.quantized import KINDS, UNCALLED

if TYPE_CHECKING:
    import peft

# peft imports bitsandbytes, which asks on some CPUs to install a kernel that `models.quantized` does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE, ROPE = "base_model_name_or_path", "rope_parameters"  # fields of an adapter's configuration; the latter is ours
# Fields of peft's configuration that an adapter may have set; those of others would change what is computed.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "peft_version", "r", "rank_pattern",
    "revision", "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
# Linear layers that cannot have an adapter, by model_type. transformers' kernels for Mamba-2 layers read their weight
# alone, so peft refuses them; the router of phimoe returns three tensors.
_REFUSED = {"falcon_h1": ("out_proj",), "nemotron_h": ("out_proj",), "phimoe": ("router",)}
_NO_DROPOUT = "is not supported with adapters on experts:"


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that peft trains instead of the model's weights."""

    rank: int | None = None
    """Rank of the adapters; null: all weights of the model are trained."""

    alpha: float | None = None
    """The adapters' results are scaled by alpha / rank; null: alpha is twice the rank."""

    dropout: float = 0.0
    """The fraction of an adapter's inputs that is dropped, in training alone."""

    targets: list[str] = field(default_factory=list)
    """Names of the linear layers that get an adapter, such as [q_proj,v_proj]; none: all but lm_head, out_proj of
    Falcon-H1 and Nemotron-H, and, in some models with experts, gate_proj, up_proj and down_proj."""

    experts: list[str] = field(default_factory=list)
    """Names of the experts' weights that get adapters, such as [gate_up_proj,down_proj]; none: no expert has one."""

    rslora: bool = False
    """Scale by alpha / sqrt(rank), for large ranks."""

    path: str | None = None
    """Folder of an adapter of peft's to train on; rank, alpha, targets, experts and rslora are its own."""

    quantize_base: str | None = None
    """nf4: the linear layers of the model take 4 bits per weight (QLoRA, by bitsandbytes); null: as model.dtype. Needs
    memory.recompute=true, and merge=false."""

    merge: bool = True
    """Write the model with its adapters merged at the end of the run, beside the adapters' folder; false: write these
    alone."""

    def __post_init__(self) -> None:
        own = {name: getattr(self, name) for name in ("rank", "alpha", "targets", "experts", "rslora")}
        given = next((f"model.lora.{name}={x}" for name, x in own.items() if x not in (None, [], False)), None)
        if self.path is not None and given is not None:
            raise ConfigError(f"{given}: the adapter of model.lora.path={self.path} has its own; leave it out")
        if self.rank is not None and not self.rank >= 1:
            raise ConfigError(f"model.lora.rank={self.rank} must be 1 or more, or null to train all weights")
        if not self.enabled and (given is not None or self.dropout):
            raise ConfigError(f"{given or f'model.lora.dropout={self.dropout}'} has no effect without model.lora.rank")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ConfigError(f"model.lora.alpha={self.alpha} must be above 0 and finite")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.lora.dropout={self.dropout} must be 0 or more and below 1")
        if self.dropout and self.experts:
            raise ConfigError(f"model.lora.dropout={self.dropout} {_NO_DROPOUT} model.lora.experts={self.experts}")
        if not self.enabled and not self.merge:
            raise ConfigError(
                "model.lora.merge=false has no effect without model.lora.rank: there is no adapter to write"
            )
        self._check_quantized()
        for name in ("peft", "bitsandbytes") if self.quantize_base else ("peft",):
            if self.enabled and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"model.lora needs the package {name}, which is not installed here: pip install {name}"
                )

    def _check_quantized(self) -> None:
        if self.quantize_base is None:
            return
        setting = f"model.lora.quantize_base={self.quantize_base}"
        if self.quantize_base not in KINDS:
            raise ConfigError(f"{setting} is not one of null, {', '.join(KINDS)}")
        if not self.enabled:
            raise ConfigError(f"{setting} has no effect without model.lora.rank")
        if self.merge:
            raise ConfigError(
                f"{setting}: the adapters cannot be merged into weights of 4 bits, so set model.lora.merge=false"
            )

    @property
    def enabled(self) -> bool:
        """Whether adapters are trained."""
        return self.rank is not None or self.path is not None


def add_lora(model: PreTrainedModel, config: LoraConfig) -> None:
    """Give a model the adapters that a LoraConfig asks for, and freeze its own weights.

    New ones are drawn from torch's seed alone, on any device. Raises ConfigError for targets that the model does not
    have, and for an adapter that is not of this model or has what is not supported.
    """
    import peft

    asked = _read(config.path, config.dropout) if config.path is not None else _new(model, config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(torch.initial_seed())
            peft.inject_adapter_in_model(asked, model)
    except Exception as error:  # of peft, of any kind
        raise ConfigError(f"{_source(config)}: peft cannot adapt this model: {in_one_line(error)}") from error
    kinds = (peft.tuners.lora.Linear, getattr(peft.tuners.lora, "Linear4bit", None))
    head, stacked = model.get_output_embeddings(), _stacked(model)
    for name, layer in adapted(model).items():
        if layer is head:
            raise ConfigError(
                f"{_source(config)}: {name} cannot have an adapter, since the loss reads its weight alone"
            )
        if on_experts(layer) and (weight := weight_name(name, layer)) not in stacked:
            raise ConfigError(f"{_source(config)}: {weight} is no weight of experts that can have an adapter")
        if not on_experts(layer) and type(layer) not in kinds:
            raise ConfigError(f"{_source(config)}: {name} is no plain linear layer, and cannot have an adapter")
    if config.path is not None:
        _load(model, Path(config.path))


def adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def on_experts(layer: Any) -> bool:
    """Whether an adapted layer is a module of experts, or one that peft has wrapped already."""
    return hasattr(layer, "parameter_name")


def expert_adapters(model: nn.Module) -> set[str]:
    """Names of the weights of the adapters on experts."""
    names = [name for name, layer in adapted(model).items() if on_experts(layer)]
    return {f"{name}.lora_{part}.default.weight" for name in names for part in "AB"}


def weight_name(name: str, layer: Any) -> str:
    """What the weight under the adapter of `adapted`'s layer is called in a model without adapters."""
    return f"{_plain(name)}.{getattr(layer, 'parameter_name', 'weight')}"


def factors(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views of the adapters of experts, A [experts, rank, in] and B [experts, out, rank]."""
    return a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes in evaluation mode what it would without adapters, and no gradients."""
    training, layers = model.training, adapted(model).values()
    try:
        model.eval()
        for layer in layers:
            layer._disable_adapters = True  # peft's enable_adapters would also freeze them
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        model.train(training)


def description(model: PreTrainedModel) -> str:
    """What is trained of a model with adapters, in words."""
    layers, config = adapted(model), _config(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = [name for name, layer in layers.items() if not on_experts(layer)]
    stacked = [weight_name(name, layer) for name, layer in layers.items() if on_experts(layer)]
    on = [f"{len(linear)} linear layers ({_kinds(linear)})"] if linear else []
    if stacked:
        places = {name.rpartition(".")[0] for name in stacked}
        on.append(f"the experts of {len(places)} layers ({_kinds(stacked)})")
    return (
        f"{trained:,} parameters, which alone are trained: LoRA of rank {config.r}, alpha {config.lora_alpha:g} on "
        f"{' and '.join(on)}"
    )


def merged(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of some layers with their adapters merged, under the names of a model without adapters.

    weights: whole, by name; if an adapted layer's are among them, its adapter's are too.
    """
    found = {_plain(name): x for name, x in weights.items() if ".lora_" not in name}
    for name, layer in adapted(model).items():
        if (weight := weight_name(name, layer)) in found:
            a, b = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
            found[weight] = _merged(layer, found[weight], a, b)
    return found


def merge(model: PreTrainedModel, folder: str) -> None:
    """Merge the adapters that `add_lora` gave a whole model from a folder into its weights; they are gone then.

    They are read again: a model in bf16 has rounded them.
    """
    with safe_open(Path(folder, WEIGHTS), "pt") as file:
        for name, layer in adapted(model).items():
            a, b = (file.get_tensor(_outside(f"{name}.lora_{part}.default.weight")) for part in "AB")
            parameter = getattr(layer.get_base_layer(), weight_name(name, layer).rpartition(".")[2])
            parameter.data = _merged(layer, parameter.data, a, b)
            if not name.endswith(".base_layer"):
                model.set_submodule(name, layer.get_base_layer())
    del model.peft_config


def _merged(layer: Any, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A layer's weight with its adapter; the sum is made one expert at a time."""
    scale = layer.scaling["default"]
    if not on_experts(layer):
        return _sum(weight, a, b, scale)
    found = torch.empty_like(weight)
    transposed = layer.get_base_layer().is_transposed
    before, after = (x.mT if transposed else x for x in (weight, found))
    for expert, (of_a, of_b) in enumerate(zip(*factors(a, b, len(weight)), strict=True)):
        after[expert] = _sum(before[expert], of_a, of_b, scale)
    return found


def _sum(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + scale B A, rounded once."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def _plain(name: str) -> str:
    """The name of a weight or module in a model without adapters."""
    return name.replace(".base_layer", "")


def is_adapter(folder: str) -> bool:
    """Whether a folder is that of an adapter."""
    return os.path.isfile(os.path.join(folder, CONFIG))  # pathlib raises for a name that is too long


def read_fields(folder: str) -> dict[str, Any]:
    """The fields of an adapter's configuration, ours among them. Raises ConfigError if it cannot be read."""
    for name in (CONFIG, WEIGHTS):
        if not os.path.isfile(os.path.join(folder, name)):
            raise ConfigError(f"model.lora.path={folder} holds no {name}: it must be a folder that peft wrote")
    try:
        fields = json.loads(Path(folder, CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.lora.path={folder}: {CONFIG} cannot be read: {in_one_line(error)}") from error
    return fields if isinstance(fields, dict) else {}


def write_adapter(
    model: PreTrainedModel, weights: dict[str, Tensor], folder: Path, base: str, rope: dict[str, Any] | None = None
) -> None:
    """Write adapters to a folder, as peft does. weights: of the adapters, whole, by name; base: the model's folder.

    rope: the model.rope_parameters that they were trained with. peft has no such field and warns that it ignores it.
    """
    folder.mkdir()
    config = _config(model)
    targets = config.target_modules
    dataclasses.replace(
        config, base_model_name_or_path=base, inference_mode=True, task_type="CAUSAL_LM",
        target_modules=targets if isinstance(targets, str) else sorted(targets),
    ).save_pretrained(folder)  # fmt: skip
    if rope:
        fields = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {ROPE: rope}
        (folder / CONFIG).write_text(json.dumps(fields, indent=2), encoding="utf-8")
    save_file({_outside(name): x.contiguous() for name, x in weights.items()}, folder / WEIGHTS, {"format": "pt"})


def _config(model: PreTrainedModel) -> Any:
    """peft's configuration of the adapters."""
    return model.peft_config["default"]


def _source(config: LoraConfig) -> str:
    return f"model.lora.rank={config.rank}" if config.path is None else f"model.lora.path={config.path}"


def _new(model: PreTrainedModel, config: LoraConfig) -> peft.LoraConfig:
    """peft's configuration of new adapters."""
    import peft

    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    taken, kind = _read_as_experts(model, linear), model.config.model_type
    unadapted = UNCALLED + _REFUSED.get(kind, ()) + taken
    names = [name for name in linear if name.rpartition(".")[2] not in unadapted]
    stacked = _stacked(model)
    for target in config.targets:
        if target.rpartition(".")[2] in taken:
            raise ConfigError(
                f"model.lora.targets: peft reads {target} as experts' weights in model_type={kind}, so linear layers "
                f"of this name cannot have an adapter; model.lora.experts=[{_kinds(stacked)}] adapts the experts"
            )
        _check_named("targets", "layers", target, names, "; lm_head and embeddings cannot")
    for target in config.experts:
        _check_named("experts", "experts' weights", target, stacked, f" in model_type={kind}")
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]
    has_experts = any(len(shape) == 3 and shape[1] > 1 for shape in shapes)  # no convolution
    if has_experts and not config.targets and not config.experts:
        both = f", or also experts' weights in model.lora.experts, of {_kinds(stacked)}" if stacked else ""
        raise ConfigError(
            f"model.lora.targets=[]: model_type={kind} has experts, which take no adapter unless they are named; name "
            f"the layers to adapt, of {_kinds(names)}{both}"
        )
    # peft's "all-linear" would also adapt experts and routers of some models.
    all_of_them = sorted({name.rpartition(".")[2] for name in names}) if has_experts or taken else "all-linear"
    assert config.rank is not None
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]  # or a float
        lora_dropout=config.dropout,
        target_modules=config.targets or all_of_them,
        target_parameters=config.experts or None,
        exclude_modules=sorted({*linear} - {*names}) or None,
        use_rslora=config.rslora,
    )


def _check_named(setting: str, kind: str, target: str, names: Iterable[str], which: str) -> None:
    """Raise ConfigError if none of the names ends with a target."""
    if not any(f".{name}".endswith(f".{target}") for name in names):
        raise ConfigError(
            f"model.lora.{setting}: {target} is not one of the {kind} that can have an adapter, which are "
            f"{_kinds(names) or 'none'}{which}"
        )


def _kinds(names: Iterable[str]) -> str:
    """The last parts of names."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _stacked(model: nn.Module) -> dict[str, Tensor]:
    """The weights of experts that can have an adapter, under their names in a model without adapters."""
    of_experts = [(name, x) for name, x in model.named_modules() if hasattr(x, "has_gate")]  # transformers' own mark
    return {
        f"{_plain(name)}.{weight}": p
        for name, module in of_experts
        for weight, p in module.named_parameters(recurse=False)
        if len(getattr(p, "ds_shape", p.shape)) == 3
    }


def _read_as_experts(model: PreTrainedModel, names: Iterable[str]) -> tuple[str, ...]:
    """Which names of linear layers peft takes for experts' weights, as these were called before transformers 5."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def taken(name: str) -> bool:
        config = peft.LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it is one of two names of a weight
            return True
        return name not in (config.target_modules or ())

    return tuple(name for name in sorted({name.rpartition(".")[2] for name in names}) if taken(name))


def _read(path: str, dropout: float) -> peft.LoraConfig:
    """peft's configuration in an adapter's folder. Raises ConfigError if it is missing or not supported."""
    import peft

    read_fields(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=rf"Unexpected keyword arguments \['{ROPE}'\]")
            config: Any = peft.PeftConfig.from_pretrained(path)
    except Exception as error:  # of peft and json, of any kind
        raise ConfigError(f"model.lora.path={path}: {CONFIG} cannot be read: {in_one_line(error)}") from error
    if type(config) is not peft.LoraConfig:
        raise ConfigError(
            f"model.lora.path={path}: peft_type={config.peft_type.value} is not supported: it must be LORA"
        )
    plain = peft.LoraConfig()
    for name in sorted({f.name for f in dataclasses.fields(config)} - _KNOWN):
        if (value := getattr(config, name)) != getattr(plain, name) and value:
            raise ConfigError(f"model.lora.path={path}: {name}={value} in {CONFIG} is not supported")
    if dropout and config.target_parameters:
        raise ConfigError(f"model.lora.dropout={dropout} {_NO_DROPOUT} model.lora.path={path} has them")
    return dataclasses.replace(config, lora_dropout=dropout, inference_mode=False)


def _load(model: nn.Module, folder: Path) -> None:
    """Fill a model's adapters. Raises ConfigError for weights that are missing, too many or of other shapes."""
    named = {_outside(name): p for name, p in model.named_parameters() if p.requires_grad}
    with safe_open(folder / WEIGHTS, "pt") as file, torch.no_grad():
        for name in sorted(named.keys() ^ set(file.keys())):
            lacks = "lacks" if name in named else "is not of this model, which has no adapter for"
            raise ConfigError(f"model.lora.path={folder} {lacks} {name}")
        for name, parameter in named.items():
            found = file.get_tensor(name)
            if found.shape != parameter.shape:
                raise ConfigError(
                    f"model.lora.path={folder} has {name} {[*found.shape]}, and this model {[*parameter.shape]}"
                )
            parameter.copy_(found)


def _outside(name: str) -> str:
    """A weight's name in an adapter's folder."""
    return f"base_model.model.{name.replace('.default.', '.')}"
