"""Who imports whom among tests and benchmarks: import-linter sees the package alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("benchmarks", "tests")


def modules(*rooms: str) -> dict[str, Path]:
    """Each file of these rooms by the name that it is imported by."""
    return {".".join(path.relative_to(ROOT / room).with_suffix("").parts): path for room in rooms for path in (ROOT / room).rglob("*.py")}


def imported(path: Path) -> set[str]:
    """What a file names in an import, wherever that stands: under TYPE_CHECKING and in functions, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


def test_no_circle() -> None:
    """No file imports itself, by whatever way round."""
    files = modules(*ROOMS)
    try:
        TopologicalSorter({name: imported(path) & files.keys() for name, path in files.items()}).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def test_benchmarks_need_no_tests() -> None:
    """Tests are about benchmarks, and not the other way round; what both start servers with is in oomsafe/demo."""
    tests = modules("tests").keys()

    assert {name: found for name, path in modules("benchmarks").items() if (found := imported(path) & tests)} == {}
