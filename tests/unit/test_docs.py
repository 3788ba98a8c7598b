"""What docs/how-it-works.md names is there, and each line of docs/run.md is one that is run."""

from __future__ import annotations

import re
import sys
from functools import reduce
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "how-it-works.md").read_text()
NAMED = sorted(set(re.findall(r"`([A-Za-z_.]+)`\s\(([a-z_/]+)\.py\)", PAGE)))
ROOMS = sorted(path.parent.name for path in (Path(__file__).parents[2] / "oomsafe").glob("*/__init__.py"))


def test_it_names_something() -> None:
    """Each step from the end of work to the decision, and what the supervisor does."""
    assert len(NAMED) >= 15


@pytest.mark.parametrize(("name", "file"), NAMED, ids=lambda part: part)
def test_what_it_names_is_there(name: str, file: str) -> None:
    """A function, a class or a method, in the file that is said."""
    module = import_module(f"oomsafe.{file.replace('/', '.')}")

    assert callable(reduce(getattr, name.split("."), module))


def test_each_room_is_there() -> None:
    """In the table of rooms; and each says of itself who runs it, and where to begin."""
    table = PAGE.partition("## Rooms")[2].partition("## Words")[0]

    assert sorted(re.findall(r"`([a-z]+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.count("|") > 2))) == ROOMS


RUN = (Path(__file__).parents[2] / "docs" / "run.md").read_text().partition("## Your application's launcher")[2].partition("## How")[0]
LINES = re.findall(r"`([^`]*oomsafe run -- [^`]+)`", RUN)


def test_there_are_lines_to_write() -> None:
    """One for each application, at least."""
    assert len(LINES) >= 20


@pytest.mark.parametrize("line", LINES)
def test_each_line_to_write_is_run(line: str) -> None:
    """By `make test-apps`, with more options."""
    wanted = line.replace("oomsafe run --", "{oomsafe}").split()

    assert any(all(word in rest for word in wanted) for rest in (iter(app.command.split()) for app in _applications().values()))


def _applications() -> dict[str, Any]:
    """The table of tools/apps."""
    spec = spec_from_file_location("table_of_applications", Path(__file__).parents[2] / "tools" / "apps" / "apps.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return dict(module.APPS)
