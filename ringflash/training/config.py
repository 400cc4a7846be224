"""Config: all settings of a run, typed. Each part is the dataclass at the head of the module that reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields

from ringflash.data import DataConfig
from ringflash.distributed.parallel import ParallelConfig
from ringflash.errors import ConfigError, check_choice, shown
from ringflash.models import AttentionConfig, FusedConfig, ModelConfig
from ringflash.training.checkpoints.checkpoint import CheckpointConfig
from ringflash.training.evaluation import EvaluationConfig
from ringflash.training.memory import MemoryConfig
from ringflash.training.metrics import LoggerConfig
from ringflash.training.optimizers.config import OptimConfig
from ringflash.training.preferences.formulas import PreferenceConfig

LONGEST_NAME = 200  # bytes; a file system takes 255, and -2 or .partial may follow


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    name: str = "demo"
    """Name of the run; its folder is OUTPUT_DIR/NAME, or OUTPUT_DIR/NAME-2 if that is taken."""

    output_dir: str = "runs"
    """Folder of all runs."""

    resume: str = "never"
    """never: start in a new folder; auto: continue from the newest intact checkpoint, if there is one."""

    seed: int = 0
    """Seed of the random weights; data.seed is that of the data."""

    model: ModelConfig
    data: DataConfig
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    fused: FusedConfig = field(default_factory=FusedConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed} must be 0 or more and below 2^64")
        if not self.output_dir:
            raise ConfigError("output_dir= must be a folder, such as output_dir=runs")
        check_choice("resume", self.resume, ("never", "auto"))
        if not re.fullmatch(r"[\w.-]+", self.name) or not self.name.strip("."):
            raise ConfigError(f"name={self.name!r} must be letters, digits, '.', '_', '-': it names the run's folder")
        if len(self.name.encode()) > LONGEST_NAME:
            raise ConfigError(f"name={self.name[:20]}... has {len(self.name.encode())} bytes, {LONGEST_NAME} at most")
        self._check_best()
        self.optim.check_states(self.memory.optimizer_states)
        self._check_quantized()
        self._check_preference()
        if found := re.search(r"[\[*?]", self.output_dir):
            raise ConfigError(
                f"output_dir={self.output_dir} holds {found[0]!r}: DeepSpeed would take it for a pattern on resume"
            )

    def _check_best(self) -> None:
        """Raise ConfigError for keep_best without evaluations, and for patience without it."""
        if not self.checkpoint.keep_best and self.evaluation.patience is not None:
            raise ConfigError(
                f"evaluation.patience={self.evaluation.patience} has no effect without checkpoint.keep_best=true"
            )
        if self.checkpoint.keep_best and self.evaluation.every == 0:
            raise ConfigError("checkpoint.keep_best=true has no effect with evaluation.every=0: set evaluation.every")
        if self.checkpoint.keep_best and not self.data.held_out and self.data.evaluation.path is None:
            raise ConfigError(
                f"checkpoint.keep_best=true needs held-out text: set data.held_out (now {self.data.held_out}) or "
                f"data.evaluation.path"
            )

    def _check_quantized(self) -> None:
        """Raise ConfigError for what weights of 4 bits cannot have."""
        if (kind := self.model.lora.quantize_base) is None:
            return
        if self.memory.zero == 3:
            raise ConfigError(
                f"model.lora.quantize_base={kind} needs memory.zero=0, 1 or 2: DeepSpeed divides no weights of 4 bits"
            )
        if not self.memory.recompute:
            raise ConfigError(
                f"model.lora.quantize_base={kind} needs memory.recompute=true: without it MLPs keep dequantized weights"
            )

    def _check_preference(self) -> None:
        """Raise ConfigError for a loss without its reference, and for settings of a loss that is not computed."""
        lora, loss = self.model.lora, f"preference.loss_type={self.preference.loss_type}"
        if self.data.preferences and self.preference.runs_reference and (lora.path is not None or not lora.enabled):
            trained = "all weights trained" if lora.path is None else f"model.lora.path={lora.path}"
            raise ConfigError(
                f"{loss} compares with the model before training: with {trained}, set "
                f"preference.precompute_ref_log_probs=true; with new adapters, such as model.lora.rank=16, the model "
                f"without them is the reference; preference.loss_type=simpo and orpo need none"
            )
        if self.data.preferences and self.preference.precompute_ref_log_probs:
            self._check_precomputed()
        if not self.data.preferences and self.preference != PreferenceConfig():
            name = next(f.name for f in fields(self.preference) if getattr(self.preference, f.name) != f.default)
            raise ConfigError(
                f"preference.{name}={shown(getattr(self.preference, name))} has no effect without data.preferences=true"
            )

    def _check_precomputed(self) -> None:
        """Raise ConfigError for pairs or a model whose reference cannot be computed before training."""
        if self.data.stream:
            raise ConfigError(
                "preference.precompute_ref_log_probs=true reads all pairs before training, and data.stream=true reads "
                "them during it: set data.stream=false"
            )
        if self.model.path is None:
            raise ConfigError(
                "preference.precompute_ref_log_probs=true keeps numbers by the weights' digest: set model.path, since "
                "random weights have no file"
            )

    @property
    def pair_loss(self) -> PreferenceConfig | None:
        """With preferences, the settings of their loss."""
        return self.preference if self.data.preferences else None
