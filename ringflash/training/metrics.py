"""Metrics: a record per step, to metrics.jsonl, wandb, TensorBoard and the progress bar; the loss plot."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from tqdm import tqdm

from ringflash.errors import ConfigError
from ringflash.training import positions
from ringflash.training.files import write_atomically, write_figure, writing

FILE = "metrics.jsonl"
WANDB_ID = "wandb-id"
HELD_OUT = "held_out_"  # and the name of a value
BY_POSITION, HELD_OUT_BY_POSITION = "loss/", "held_out_loss/"  # and a range of positions, in names of values
HELD_OUT_BY_SOURCE = "held_out_loss_of/"  # and a source
LINE_INTERVAL = 10.0  # seconds between two lines of progress in a log
RECENT = 20  # steps whose mean losses by position are drawn
MODES = ("offline", "online", "disabled")


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go, in addition to metrics.jsonl."""

    mode: str = "offline"
    """wandb's mode: offline (into the run's folder, without network), online (needs an API key) or disabled."""

    project: str = "ringflash"
    """Name of the wandb project."""

    tensorboard: bool = False
    """Also write TensorBoard events, to the folder tensorboard in the run's folder; needs the package tensorboard."""

    def __post_init__(self) -> None:
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError("logger.tensorboard=true needs the package tensorboard, which is not installed here")
        if self.mode not in MODES:
            raise ConfigError(f"logger.mode={self.mode} is not one of {', '.join(MODES)}")
        if not re.fullmatch(r"[^/\\#?%:]{1,128}", self.project):  # what wandb takes
            raise ConfigError(f"logger.project={self.project} must be 1 to 128 characters other than / \\ # ? % :")


class Metrics:
    """Writes the records of a run, on rank 0.

    When a run is resumed, records of steps after the checkpoint are dropped, since those steps run again. The record of
    step 0 describes the model before the first step.
    """

    def __init__(self, config: LoggerConfig, folder: Path, settings: dict[str, Any], start: int, steps: int) -> None:
        self.path = folder / FILE
        kept = [line for line in read(self.path) if line["step"] <= start > 0]
        write_atomically(self.path, "".join(_json(line) for line in kept))
        self._file = self.path.open("a", buffering=1)
        self._wandb = None if config.mode == "disabled" else _wandb_run(config, folder, settings)
        self._events = _tensorboard_writer(folder, start) if config.tensorboard else None
        self._steps, self._line_due = steps, 0.0
        # disable=None: no bar where stderr is no terminal
        self._bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None)

    def log(self, step: int, record: dict[str, float]) -> None:
        """Write the record of `step`.

        A value that is not finite is null in metrics.jsonl, since JSON has no NaN; the others get it unchanged.
        """
        with writing(self.path):
            self._file.write(_json({"step": step, **record}))
        if self._wandb is not None:
            self._wandb.log(record, step=step)
        if self._events is not None:
            for name, value in record.items():
                self._events.add_scalar(name, value, step)

    def draw(self, step: int, name: str, figure: Any) -> None:
        """Write matplotlib's figure to NAME.png in the run's folder; wandb and TensorBoard get the same picture."""
        path = self.path.with_name(f"{name}.png")
        write_figure(path, figure)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(str(path))}, step=step)
        if self._events is not None:
            from matplotlib.image import imread

            self._events.add_image(name, imread(path)[..., :3], step, dataformats="HWC")

    def show(self, step: int, record: dict[str, float]) -> None:
        """Move the progress bar to `step`; if there is none, as in a job's log, print a line at intervals."""
        parts = [f"loss {record['loss']:.3f}", f"{record['tokens_per_second']:,.0f} tok/s"]
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        parts.append(f"{record['memory_gib']:.1f} GiB")
        if not self._bar.disable:
            self._bar.set_postfix_str(", ".join(parts), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._steps or time.monotonic() >= self._line_due:
            self._line_due = time.monotonic() + LINE_INTERVAL
            parts.insert(1, f"gradient norm {record['gradient_norm']:.3g}")
            print(f"step {step} of {self._steps}: {', '.join(parts)}", flush=True)

    def write_line(self, message: str) -> None:
        """Print a line above the progress bar."""
        self._bar.write(message)

    def conclude(self, step: int, held_out: dict[str, float], unigram_entropy: float | None) -> None:
        """Write the last record of a complete run, of `step`, with its held-out losses if there are any; then close.

        If a complete run is resumed, this record already exists, unless the run was killed after its last checkpoint.
        """
        written = any(record["step"] == step and "loss" not in record for record in read(self.path))
        if held_out and not written:
            self.log(step, held_out | ({} if unigram_entropy is None else {"unigram_entropy": unigram_entropy}))
        self.close()

    def close(self, exit_code: int = 0, preempted: bool = False) -> None:
        """Close the file, the bar and the wandb run.

        wandb shows a run with another exit code than 0 as failed, or as preempted.
        """
        self._bar.close()
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            if preempted:
                self._wandb.mark_preempting()
            self._wandb.finish(exit_code=exit_code)


def _json(record: dict[str, Any]) -> str:
    """A record's line."""
    finite = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, None for values that were not finite. Lines cut short by a kill are skipped."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def check_plot(folder: Path) -> None:
    """Raise DiskError, before the first step, if `plot` could not replace loss.png after the last."""
    with writing(folder / "loss.png"):
        if (folder / "loss.png").is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / "loss.png"))


def plot(folder: Path, unigram: float | None, unit: str = "token") -> Path:
    """Draw the training loss, and the held-out loss and unigram entropy if text is held out, to loss.png.

    unit: what a loss is of.
    A second panel has the loss by position in a document: held-out, of the first and the last evaluation that have it,
    and training, as the mean of the last RECENT steps.
    """
    from matplotlib.figure import Figure

    records = read(folder / FILE)
    lines = _lines_by_position(records)
    figure = Figure(figsize=(11 if lines else 7, 4), layout="constrained")
    axes, *beside = figure.subplots(1, 2 if lines else 1, squeeze=False)[0]
    for name, style in (("loss", {"linewidth": 1}), ("held_out_loss", {"marker": "o", "markersize": 4})):
        points = [(r["step"], math.nan if r[name] is None else r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", "-").replace("-loss", " loss"), **style)
    if unigram is not None:
        axes.axhline(unigram, color="grey", linestyle=":", label="unigram entropy, held out")
    axes.set(xlabel="step", ylabel=f"nats per {unit}", title=folder.name)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    for panel in beside:
        _draw_by_position(panel, lines)
    write_figure(folder / "loss.png", figure)
    return folder / "loss.png"


def _lines_by_position(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is drawn by position, by its label: losses by the names of their ranges."""
    held_out, training = (
        [(r["step"], found) for r in records if (found := _by_position(r, prefix))]
        for prefix in (HELD_OUT_BY_POSITION, BY_POSITION)
    )
    lines = {f"held-out, step {step}": found for step, found in held_out[:1] + held_out[1:][-1:]}
    if recent := training[-RECENT:]:
        names = dict.fromkeys(name for _, found in recent for name in found)
        each = {name: [found[name] for _, found in recent if name in found] for name in names}
        steps = f"steps {recent[0][0]} to {recent[-1][0]}" if len(recent) > 1 else f"step {recent[0][0]}"
        lines[f"training, {steps}"] = {name: sum(x) / len(x) for name, x in each.items()}
    return lines


def _by_position(record: dict[str, Any], prefix: str) -> dict[str, float]:
    """A record's losses by position, by the names of their ranges; NaN for one that is not finite."""
    return {
        name.removeprefix(prefix): math.nan if x is None else x for name, x in record.items() if name.startswith(prefix)
    }


def _draw_by_position(axes: Any, lines: dict[str, dict[str, float]]) -> None:
    """The lines over all ranges that any of them has."""
    known = {name for line in lines.values() for name in line}
    for label, line in lines.items():
        ranges = [name for name in positions.names() if name in known]
        losses = [line.get(name, math.nan) for name in ranges]
        axes.plot(ranges, losses, "o" + (":" if label.startswith("training") else "-"), markersize=4, label=label)
    axes.set(xlabel="tokens of the document before", ylabel="nats per token", title="loss by position")
    axes.grid(alpha=0.3)
    axes.legend()


def _tensorboard_writer(folder: Path, start: int) -> Any:
    """TensorBoard's writer of a run. Earlier events of steps after `start` are not shown."""
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    return SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1 if start else 0)


def _wandb_run(config: LoggerConfig, folder: Path, settings: dict[str, Any]):
    import wandb

    run_id = _wandb_id(folder / WANDB_ID)
    try:
        return wandb.init(
            project=config.project, name=folder.name, id=run_id, resume="allow",
            mode=cast(Literal["offline", "online", "disabled"], config.mode),
            dir=str(folder), config=settings, settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
    except wandb.errors.Error as error:  # no API key, no network
        raise ConfigError(
            f"logger.mode={config.mode} logger.project={config.project}: wandb cannot start: {error}; "
            f"logger.mode=offline needs no API key and no network"
        ) from error


def _wandb_id(file: Path) -> str:
    """The id of the folder's wandb run, drawn when there is none. Raises ConfigError if the file holds no id."""
    if not os.path.lexists(file):
        write_atomically(file, secrets.token_hex(4))
    try:
        found = file.read_text(errors="replace").strip()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}; delete it to start a new wandb run") from error
    if not re.fullmatch(r"[\w.-]{1,128}", found, re.ASCII):
        raise ConfigError(f"{file} holds {found[:40]!r}, not the id of a wandb run: delete it to start a new wandb run")
    return found
