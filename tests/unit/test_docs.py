"""What docs/how-it-works.md names is there."""

from __future__ import annotations

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

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
