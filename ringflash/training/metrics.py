"""Metrics: a record per step, to metrics.jsonl, wandb, TensorBoard and the progress bar."""

from __future__ import annotations

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

from ringflash.errors import ConfigError, check_choice
from ringflash.files import write_atomically, write_figure, writing

FILE = "metrics.jsonl"
WANDB_ID = "wandb-id"
HELD_OUT = "held_out_"  # and the name of a value
BY_POSITION, HELD_OUT_BY_POSITION = "loss/", "held_out_loss/"  # and a range of positions, in names of values
HELD_OUT_BY_SOURCE = "held_out_loss_of/"  # and a source
LINE_INTERVAL = 10.0  # seconds between two lines of progress in a log
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
        check_choice("logger.mode", self.mode, MODES)
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
