"""Kernels that are compiled without a GPU: what a compiling process prints, and the machine code that it reads.

They are compiled in a separate process, because kernels that were imported under TRITON_INTERPRET cannot be.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def reports(module: str, triton: Path | None = None) -> list[dict[str, Any]]:
    """What `python -m module` prints, one JSON object per line. triton: a folder with another version."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # which takes a tenth of the time
    if triton is not None:
        environment["PYTHONPATH"] = str(triton)
    command = [sys.executable, "-m", module]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def resources(compiled: Any) -> dict[str, int]:
    """Registers of a thread and bytes of its stack."""
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", _read_by("cuobjdump", "-res-usage", compiled))[0]
    return {"registers": int(registers), "stack": int(stack)}


def machine_code(compiled: Any) -> str:
    """The machine code, disassembled."""
    return _read_by("nvdisasm", "-c", compiled)


def _read_by(tool: str, option: str, compiled: Any) -> str:
    """What one of Triton's NVIDIA tools prints of a compiled kernel."""
    spec = find_spec("triton")
    assert spec is not None
    tools = Path(str(spec.origin)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / tool, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
