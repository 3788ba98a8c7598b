"""A gunicorn configuration without a file: ``gunicorn -c python:oomsafe.gunicorn.conf app:app``.

The policy comes from OOMSAFE_ variables. gunicorn accepts only one configuration, so the one that it
would have found by itself, ./gunicorn.conf.py, or what $OOMSAFE_GUNICORN_CONF says as gunicorn's -c
would (a path, file:PATH, python:MODULE), is loaded here first.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def _found() -> dict[str, Any]:
    """The names that the user's own configuration defines."""
    given = os.environ.get("OOMSAFE_GUNICORN_CONF", "")
    if given.startswith("python:"):
        return _without_dunders(vars(_module(given, given.removeprefix("python:"))))
    path = given.removeprefix("file:") or os.path.join(os.getcwd(), "gunicorn.conf.py")
    if os.path.exists(path):
        return _without_dunders(runpy.run_path(path, run_name="__config__"))
    if given:
        raise _refused(given, "does not exist")
    return {}


def _module(given: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name and not name.startswith(f"{error.name}."):
            raise  # it is there, and itself imports what is not
    except (ValueError, TypeError):  # an empty name, a relative one
        pass
    raise _refused(given, "can't be imported: there is no such module")


def _refused(given: str, why: str) -> SystemExit:
    print(f"oomsafe: OOMSAFE_GUNICORN_CONF={given!a} {why}", file=sys.stderr)
    return SystemExit(1)


def _without_dunders(names: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in names.items() if not name.startswith("__")}


globals().update(_found())

# imported only now, because the user's configuration may have defined any name
from oomsafe.gunicorn.hooks import install as _install  # noqa: E402

_install(globals())
