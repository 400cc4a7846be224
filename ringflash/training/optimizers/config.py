"""OptimConfig: the settings of the optimizer and its schedule, and the learning rate of each step."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ringflash.errors import ConfigError, check_choice, check_settings
from ringflash.training.optimizers.learning_rate import SCHEDULES, fraction_of_peak

OPTIMIZERS = ("adamw", "sgd")
SMALLEST_EPS = 2.0**-126  # of normal fp32 numbers; at 0, unused rows of an embedding would become 0 / 0


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    optimizer: str = "adamw"
    """adamw; or sgd, with momentum beta1 and weight decay added to the gradient."""

    steps: int | None = 100
    """Optimizer steps of the whole run, including those before a resume; null: set by optim.epochs."""

    epochs: float | None = None
    """Passes over the training sequences, instead of optim.steps; 0.5 is half a pass. On a command line without
    optim.steps, it implies optim.steps=null."""

    batch: int = 1
    """Sequences per optimizer step, over all replicas and micro-batches."""

    micro_batch: int = 1
    """Sequences that a ring processes at once; gradients are accumulated over the micro-batches of a step."""

    lr: float = 3e-4
    """Peak learning rate, reached by a linear warm-up."""

    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine or linear, which fall to final_lr; constant; or warmup_stable_decay,
    which holds the peak and falls linearly to final_lr in the last steps."""

    decay: float = 0.2
    """With schedule=warmup_stable_decay, the fraction of all steps in which the learning rate falls."""

    warmup: float = 10
    """Warm-up steps, the last of which has the peak learning rate; below 1, a fraction of all steps; 0: no warm-up."""

    final_lr: float = 0.1
    """Learning rate of the last step, as a fraction of the peak; unused with schedule=constant."""

    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""

    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""

    eps: float = 1e-8
    """Added to the square root of AdamW's second moment, by which updates are divided."""

    weight_decay: float = 0.1
    """AdamW's decoupled weight decay of matrices. Norms and biases have none."""

    clip: float = 1.0
    """Largest gradient norm: larger gradients are scaled down to it; 0: no clipping."""

    def __post_init__(self) -> None:
        check_choice("optim.optimizer", self.optimizer, OPTIMIZERS)
        check_choice("optim.schedule", self.schedule, SCHEDULES)
        self._check_duration()
        self._check_numbers()
        self._check_overlap()

    def _check_duration(self) -> None:
        """Raise ConfigError unless either steps or epochs are set."""
        if self.steps is None and self.epochs is None:
            raise ConfigError("optim.steps=null needs optim.epochs: set one of them")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"optim.epochs={self.epochs} and optim.steps={self.steps} exclude each other: set only one of them"
            )
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"optim.epochs={self.epochs} must be more than 0 and finite")

    def _check_numbers(self) -> None:
        """Raise ConfigError for a number that is out of its range."""
        counts = ("batch", "micro_batch", *["steps"] * (self.steps is not None))
        check_settings("optim", self, ((name, type(getattr(self, name)) is int, "a whole number") for name in counts))
        numbers = {name: getattr(self, name) for name in ("lr", "warmup", "weight_decay", "clip")}
        whole = self.warmup <= 1 or self.warmup % 1 == 0
        checks = (
            ("decay", 0 < self.decay <= 1, "a fraction of the steps, more than 0 and at most 1"),
            *((name, getattr(self, name) >= 1, "1 or more") for name in counts),
            ("final_lr", 0 <= self.final_lr <= 1, "a fraction of the peak, 0 to 1"),
            *((name, 0 <= x < math.inf, "0 or more and finite") for name, x in numbers.items()),
            ("warmup", whole, "a whole number of steps, or a fraction below 1"),
            *((name, 0 <= getattr(self, name) < 1, "0 or more and below 1") for name in ("beta1", "beta2")),
            ("eps", SMALLEST_EPS <= self.eps <= 1, f"{SMALLEST_EPS:.3g} or more and at most 1"),
        )
        check_settings("optim", self, checks)
        for name in ("beta2", "eps"):
            if self.optimizer != "adamw" and (value := getattr(self, name)) != getattr(OptimConfig, name):
                raise ConfigError(f"optim.{name}={value} has no effect with optim.optimizer={self.optimizer}")
        if self.schedule != "warmup_stable_decay" and self.decay != OptimConfig.decay:
            raise ConfigError(
                f"optim.decay={self.decay} has no effect with optim.schedule={self.schedule}: it is a setting of "
                f"warmup_stable_decay"
            )

    def _check_overlap(self) -> None:
        """Raise ConfigError if the run has fewer steps than warm-up and decay take together."""
        if self.steps is None:
            return
        if self.warmup > self.steps:
            raise ConfigError(
                f"optim.warmup={self.warmup:g} is more than optim.steps={self.steps}: the learning rate would never "
                f"reach optim.lr={self.lr}; set optim.warmup={self.steps} or less"
            )
        decay = self._decay_steps() if self.schedule == "warmup_stable_decay" else 0
        if self._warmup_steps() + decay > self.steps:
            raise ConfigError(
                f"optim.warmup={self.warmup:g} and optim.decay={self.decay} of optim.steps={self.steps} overlap: give "
                f"more steps, or less of either"
            )

    def check_states(self, states: str) -> None:
        """Raise ConfigError for memory.optimizer_states that the optimizer does not have."""
        if states != "fp32" and self.optimizer != "adamw":
            raise ConfigError(
                f"memory.optimizer_states={states} is for optim.optimizer=adamw, not for {self.optimizer}"
            )

    @property
    def total_steps(self) -> int:
        """The steps of the run. With epochs, `of_epoch` must have set them."""
        assert self.steps is not None
        return self.steps

    def of_epoch(self, sequences: int) -> OptimConfig:
        """The same settings with steps instead of epochs. sequences: the number in an epoch.

        Raises ConfigError if the steps are fewer than the schedule needs.
        """
        if self.epochs is None:
            return self
        steps = math.ceil(self.epochs * sequences / self.batch)
        try:
            return dataclasses.replace(self, epochs=None, steps=steps)
        except ConfigError as error:
            raise ConfigError(f"optim.epochs={self.epochs} has {steps} steps: {error}") from error

    def _decay_steps(self) -> int:
        """Steps of the last decay; with epochs, `of_epoch` must have set the steps."""
        return max(1, round(self.decay * (self.steps or 0)))

    def _warmup_steps(self) -> int:
        """Steps of the warm-up; with epochs, `of_epoch` must have set the steps."""
        if self.warmup >= 1:
            return int(self.warmup)
        return math.ceil(round(self.warmup * (self.steps or 0), 6))  # 0.07 * 100 is a little more than 7

    def accumulation(self, replicas: int) -> int:
        """Micro-batches per step. Raises ConfigError if the batch does not divide."""
        if self.batch % (replicas * self.micro_batch):
            remedy = ": a larger parallel.ring makes fewer replicas" if replicas > 1 else ""
            raise ConfigError(
                f"optim.batch={self.batch} is not a multiple of {replicas} replicas "
                f"x optim.micro_batch={self.micro_batch}{remedy}"
            )
        return self.batch // (replicas * self.micro_batch)

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        steps, decay = self.total_steps, self._decay_steps()
        return self.lr * fraction_of_peak(self.schedule, step, steps, self._warmup_steps(), decay, self.final_lr)
