"""A module imports only from its own floor and those below it, and each package's docstring lists its files."""

import ast
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (  # files and packages of ringflash, from the lowest up; those of a row do not import each other
    ("errors", "docstrings", "intervals", "load_balance", "partial"),
    ("mask", "offload", "files", "kernels"),
    ("layout",),
    ("ring", "fused", "data"),
    ("models",),
    ("distributed",),
    ("generate",),
    ("evaluation",),
    ("training",),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
PARTS = {
    part: sorted((ROOT / "ringflash").glob(f"{part}.py")) or sorted((ROOT / "ringflash" / part).rglob("*.py"))
    for part in FLOOR
}


def imported(path: Path) -> set[str]:
    """The parts of ringflash that a file imports, except for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = node.module == "ringflash"
            modules |= {f"ringflash.{name.name}" for name in node.names} if whole else {node.module or ""}
    return {module.split(".")[1] for module in modules if module.startswith("ringflash.")}


@pytest.mark.parametrize("part", FLOOR)
def test_a_part_imports_from_the_floors_below_it_alone(part):
    assert PARTS[part]
    others = {(path.name, other) for path in PARTS[part] for other in imported(path) - {part}}
    assert [(name, other) for name, other in others if FLOOR[other] >= FLOOR[part]] == []


@pytest.mark.parametrize(
    "package", [path.parent for path in sorted((ROOT / "ringflash").rglob("*/__init__.py"))], ids=lambda path: path.name
)
def test_the_docstring_of_a_package_lists_its_files(package):
    listed = re.findall(r"[\w*]+", ast.get_docstring(ast.parse((package / "__init__.py").read_text())) or "")
    files = [path.stem for path in package.glob("*.py") if path.stem != "__init__"]
    assert [file for file in files if not any(fnmatch(file, pattern) for pattern in listed)] == []


def test_every_part_has_a_floor():
    parts = {
        path.stem for path in (ROOT / "ringflash").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert parts - {"__init__"} == FLOOR.keys()
