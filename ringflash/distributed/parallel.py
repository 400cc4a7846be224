"""Context parallelism: its settings, and the choice of a grid and of layouts where the settings leave them open."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from ringflash.errors import ConfigError, check_choice, check_settings
from ringflash.layout import LAYOUT_NAMES, Layout
from ringflash.mask import IntervalMask
from ringflash.models.layers import layer_kinds, layer_masks, state_refusal
from ringflash.ring.cost import INTER_NODE_GB, INTRA_NODE_GB, Machine, best_ulysses, fastest
from ringflash.ring.transport import TRANSPORTS
from ringflash.ring.ulysses import heads_refusal
from ringflash.ring.watchdog import EXIT_DELAY, POLL

YEAR = 365 * 24 * 60  # in minutes
LayoutChooser = Callable[[IntervalMask], Layout]  # a step's layout over a ring


class Grid(NamedTuple):
    """All ranks: `replicas` groups of ring x ulysses ranks, each of which shares its sequences."""

    replicas: int
    ring: int
    ulysses: int

    @property
    def sharing(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.ulysses


@dataclass(frozen=True)
class ParallelConfig:
    """Context parallelism: how a sequence is divided among ranks."""

    ring: int | None = None
    """Ranks in a ring; null: all ranks / ulysses. ring x ulysses ranks share each sequence, and such groups are data
    parallel replicas."""

    ulysses: int | None = 1
    """Neighbouring ranks of one machine that exchange tokens for heads inside attention; null: the number with the
    least predicted time, whose reason is printed."""

    layout: str = "auto"
    """Which rank holds which tokens: contiguous, zigzag, striped; balanced or document_local, which are fitted to each
    step's documents; or auto, the layout with the least predicted time for each step."""

    intra_node_bandwidth_gb: float = INTRA_NODE_GB
    """Gigabytes per second between GPUs of one machine, for predicted times."""

    inter_node_bandwidth_gb: float = INTER_NODE_GB
    """Gigabytes per second from a GPU to another machine, for predicted times."""

    transport: str = "auto"
    """What carries a ring's messages: nccl, or auto: copy engines between GPUs of one machine, else NCCL."""

    timeout_minutes: int = 10
    """Minutes that a collective waits for ranks that do not join it. Tokenising and saving have no limit."""

    hop_timeout_seconds: float = 300.0
    """Seconds after which the run ends if a hop of the ring hangs or a rank's process is stopped. Every rank reports
    which rank it waits for."""

    def __post_init__(self) -> None:
        check_choice("parallel.layout", self.layout, ("auto", *LAYOUT_NAMES))
        check_choice("parallel.transport", self.transport, TRANSPORTS)
        bandwidths = {x: getattr(self, x) for x in ("intra_node_bandwidth_gb", "inter_node_bandwidth_gb")}
        checks = (
            ("ring", self.ring is None or self.ring >= 1, "1 or more, or null for all ranks"),
            ("ulysses", self.ulysses is None or self.ulysses >= 1, "1 or more, or null for the fastest"),
            # below 1e-6, predicted times would be infinite
            *((name, 1e-6 <= x < math.inf, "1e-6 or more and finite") for name, x in bandwidths.items()),
            ("hop_timeout_seconds", 0 < self.hop_timeout_seconds < math.inf, "above 0 and finite"),
            # gloo's clock, in nanoseconds, wraps after 292 years
            ("timeout_minutes", 1 <= self.timeout_minutes <= YEAR, f"1 or more, and {YEAR} at most"),
        )
        check_settings("parallel", self, checks)
        if self.hop_timeout_seconds + EXIT_DELAY + 2 * POLL > 60 * self.timeout_minutes:
            raise ConfigError(
                f"parallel.hop_timeout_seconds={self.hop_timeout_seconds} must be at least 4 s less than "
                f"parallel.timeout_minutes={self.timeout_minutes}: otherwise NCCL aborts before the watchdog can "
                f"report the hang"
            )
        if self.ulysses is None and self.ring is not None:
            raise ConfigError(f"parallel.ring={self.ring} with parallel.ulysses=null: set both or neither")

    def grid(self, ranks: int) -> Grid:
        """The grid of `ranks` ranks; ulysses=null counts as 1. Raises ConfigError if they do not divide."""
        ulysses = self.ulysses or 1
        if ranks % ulysses:
            raise ConfigError(f"parallel.ulysses={ulysses} does not divide the {ranks} ranks of this run")
        ring = self.ring or ranks // ulysses
        if ranks % (ring * ulysses):
            raise ConfigError(
                f"parallel.ring={ring} x parallel.ulysses={ulysses} does not divide the {ranks} ranks of this run"
            )
        return Grid(ranks // (ring * ulysses), ring, ulysses)


def resolve_parallel(
    config: ParallelConfig, model: PreTrainedConfig, length: int, ranks: int, ranks_per_node: int
) -> tuple[ParallelConfig, str | None]:
    """The configuration with parallel.ulysses chosen if it is null, and the reason for that choice.

    Raises ConfigError if heads do not divide among the Ulysses ranks, or those of linear attention among all ranks of a
    sequence, or if the Ulysses ranks are not on one machine.
    """
    sharing = ranks if config.ulysses is None else config.grid(ranks).sharing
    if (reason := state_refusal(model, sharing)) is not None:
        raise ConfigError(f"model_type={model.model_type}: {reason}")
    if config.ulysses is None:
        ulysses, why = best_ulysses(
            layer_masks(model, IntervalMask.causal(length)), ranks, ranks_per_node, _machine(config, across=False),
            config.inter_node_bandwidth_gb * 1e9,
        )  # fmt: skip
        return dataclasses.replace(config, ulysses=ulysses), f"parallel: {why}"
    for kind in layer_kinds(model):
        if (reason := heads_refusal(config.ulysses, kind.heads.query, kind.heads.key)) is not None:
            raise ConfigError(f"parallel.ulysses={config.ulysses}: {reason}")
    if ranks_per_node % config.ulysses:
        raise ConfigError(
            f"parallel.ulysses={config.ulysses} does not divide the {ranks_per_node} ranks of this machine: heads are "
            f"exchanged inside a machine, and the ring connects machines"
        )
    return config, None


def layout_chooser(
    config: ParallelConfig,
    model: PreTrainedConfig,
    ring: int,
    ranks_per_node: int,
    log: Callable[[str], None] = lambda reason: None,
) -> LayoutChooser:
    """The function that returns each step's layout over `ring` ranks.

    log: called with the reason when layout=auto first chooses a layout.
    """
    ulysses = config.ulysses or 1
    if config.layout != "auto":
        return lambda mask: Layout.of(config.layout, mask, ring, ulysses)
    machine = _machine(config, across=ranks_per_node % (ring * ulysses) != 0)
    known: set[str] = set()

    def chosen(mask: IntervalMask) -> Layout:
        name, layout, why = fastest(layer_masks(model, mask), ring, machine, ulysses)
        if name not in known:
            known.add(name)
            log(f"parallel: a step's layout is {why}")
        return layout

    return chosen


def _machine(config: ParallelConfig, across: bool) -> Machine:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine.of(device, config.inter_node_bandwidth_gb if across else config.intra_node_bandwidth_gb)
