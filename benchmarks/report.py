"""The report of a benchmark: the card, a table, JSON and a plot."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEADER = ("case", "pass", "kernel", "ms", "p20..p80", "TFLOP/s", "% peak", "ratio", "ns/Mpair", "error")


@dataclass(frozen=True)
class Row:
    """One kernel on one case in one direction ("both" if neither is timed).

    status: "timed", "absent" (it does not take part), "failed" (it raised) or "WRONG". reason: why it is not timed.
    ratio: relative to the baseline's speed. ns_per_million_pairs: for one query head. error: the worst relative error
    against float64, in the small version and in rows at full size.
    """

    case: str
    direction: str
    kernel: str
    status: str
    reason: str | None = None
    timing: Timing | None = None
    tflops: float | None = None
    percent_of_peak: float | None = None
    ratio: float | None = None
    ns_per_million_pairs: float | None = None
    error: float | None = None


# -- the card


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions of peers in separate packages; peers in torch have torch's version."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def card(device: torch.device, peers: dict[str, str], commit: str | None) -> dict[str, str]:
    """GPU, driver, versions, date and commit; for anything unknown, the reason."""
    facts = {"device": device_name(device)}
    if device.type == "cuda":
        facts["driver"], facts["power limit"] = _nvidia_smi(device)
        facts["CUDA"] = str(torch.version.cuda)
        facts["cuDNN"] = str(torch.backends.cudnn.version())
    facts["torch"] = torch.__version__
    facts["triton"] = _triton_version()
    facts |= peers
    facts["date"] = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts["commit"] = commit or _git_commit()
    return facts


def card_line(facts: dict[str, str]) -> str:
    """The card in one line."""
    return "; ".join(f"{name} {value}" for name, value in facts.items())


def signature(facts: dict[str, str]) -> str:
    """Device, version, date and commit of a picture."""
    return f"{facts['device']}, torch {facts['torch']}, {facts['date']}, {facts['commit']}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or "CPU" and the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads != 1)}"


def slug(device: torch.device) -> str:
    """The device in a file's name: "h100-80gb-hbm3", "cpu"."""
    if device.type == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().removeprefix("nvidia ")).strip("-")


def _triton_version() -> str:
    try:
        import triton
    except ImportError as error:
        return f"not importable ({error})"
    return triton.__version__


def _nvidia_smi(device: torch.device) -> tuple[str, str]:
    query = [
        "nvidia-smi",
        f"--id={device.index or 0}",
        "--query-gpu=driver_version,power.limit",
        "--format=csv,noheader",
    ]
    answer = _output(query)
    driver, _, power = answer.partition(", ")
    return driver, power or driver


def _git_commit() -> str:
    """The short hash, with "+changes" if the checkout differs from it."""
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit if commit.startswith("unknown") or not changed else f"{commit}+changes"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__} from {command[0]})"


# -- the table


def table(rows: Iterable[Row], baseline: str, header: bool = True) -> str:
    """Aligned columns; a row that was not timed has its reason instead of numbers."""
    lines = []
    if header:
        lines.append(_line([*HEADER[:7], f"x {baseline.split()[-1]}", *HEADER[8:]]))
        lines.append("-" * len(lines[0]))
    return "\n".join([*lines, *map(_formatted, rows)])


def _formatted(row: Row) -> str:
    if row.timing is None:
        return f"{row.case:<28} {row.direction:<9} {row.kernel:<20} {row.status}: {row.reason}"
    return _line(
        [
            row.case, row.direction, row.kernel, f"{row.timing.ms:.3f}", f"{row.timing.p20:.3f}..{row.timing.p80:.3f}",
            *map(_number, (row.tflops, row.percent_of_peak, row.ratio, row.ns_per_million_pairs)),
            "-" if row.error is None else f"{row.error:.1e}",
        ]
    )  # fmt: skip


def _number(x: float | None) -> str:
    """Four digits: "673.2", "0.9132", "851.4", "1.234e+07"."""
    return "-" if x is None else f"{x:#.4g}"


def _line(cells: Sequence[str]) -> str:
    widths = (-28, -9, -20, 9, 19, 8, 7, 8, 9, 8)
    return " ".join(f"{cell:<{-w}}" if w < 0 else f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))


def error_line(error: Exception) -> str:
    """The kind of an error and the first line of its message, for a row's reason."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


# -- the files


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write to a temporary file and rename it, so that an interrupted run leaves the last complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(contents, indent=1) + "\n")
    aside.rename(path)


def drawn(draw: Callable[..., None], file: Path, *what: Any) -> str | None:
    """Draw `what` in the picture beside a JSON file. Returns None, or the reason if matplotlib is missing."""
    try:
        draw(file.with_suffix(".png"), *what)
    except ImportError as missing:
        return str(missing)
    return None


def print_written(file: Path, undrawn: str | None) -> None:
    """Print which files a benchmark has written. undrawn: None, or why there is no plot."""
    print(f"wrote {file}" + (f"; no plot: {undrawn}" if undrawn else f" and {file.with_suffix('.png').name}"))


def as_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as a JSON array's objects."""
    return [asdict(row) for row in rows]


def summary(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, float | str]]]:
    """TFLOP/s, or the status, by case, direction and kernel."""
    found: dict[str, dict[str, dict[str, float | str]]] = {}
    for row in rows:
        value = row.status if row.tflops is None else round(row.tflops, 4 if row.tflops < 1 else 1)
        found.setdefault(row.case, {}).setdefault(row.direction, {})[row.kernel] = value
    return found


def bars(axes: Any, groups: Sequence[str], heights: dict[str, dict[str, float]], form: str) -> None:
    """A bar per group and series, of these heights by series and group, each with its height in a format."""
    width = 0.85 / max(1, len(heights))
    for i, (series, by_group) in enumerate(heights.items()):
        places = [groups.index(group) + (i - (len(heights) - 1) / 2) * width for group in by_group]
        drawn = axes.bar(places, [*by_group.values()], width, label=series, color=f"C{i}")
        axes.bar_label(drawn, fmt=form, fontsize=6, rotation=90, padding=2)
    axes.set_xticks(range(len(groups)), [group.replace(" ", "\n", 1) for group in groups], fontsize=8)
    axes.margins(y=0.15)
    axes.grid(axis="y", alpha=0.3)


def plot(path: Path, rows: Sequence[Row], title: str) -> None:
    """Bars of TFLOP/s by case and kernel, forward above backward."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if row.tflops is not None]
    cases = list(dict.fromkeys(row.case for row in timed))
    figure = Figure(figsize=(max(7.0, 1.7 * len(cases) + 1), 7.5), layout="constrained")
    for axes, direction in zip(figure.subplots(2, 1, sharex=True), ("forward", "backward"), strict=True):
        speeds: dict[str, dict[str, float]] = {row.kernel: {} for row in timed}
        for row in timed:
            if row.direction == direction and row.tflops is not None:
                speeds[row.kernel][row.case] = row.tflops
        bars(axes, cases, speeds, "%.3g")
        axes.set_ylabel(f"{direction}, TFLOP/s")
    figure.axes[0].legend(fontsize=7, ncols=max(1, len(speeds)), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
