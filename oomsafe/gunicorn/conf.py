"""A gunicorn configuration without a file: ``gunicorn -c python:oomsafe.gunicorn.conf app:app``.

The policy comes from OOMSAFE_ variables. gunicorn accepts only one configuration, so the one that it
would have found by itself, ./gunicorn.conf.py (or $OOMSAFE_GUNICORN_CONF), is loaded here first.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def _found() -> dict[str, Any]:
    """The names that the user's own configuration defines."""
    path = os.environ.get("OOMSAFE_GUNICORN_CONF") or os.path.join(os.getcwd(), "gunicorn.conf.py")
    if os.path.exists(path):
        return {name: value for name, value in runpy.run_path(path, run_name="__config__").items() if not name.startswith("__")}
    if os.environ.get("OOMSAFE_GUNICORN_CONF"):
        print(f"oomsafe: OOMSAFE_GUNICORN_CONF={path!r} does not exist", file=sys.stderr)
        raise SystemExit(1)
    return {}


globals().update(_found())

# imported only now, because the user's configuration may have defined any name
from oomsafe.gunicorn.hooks import install as _install  # noqa: E402

_install(globals())
