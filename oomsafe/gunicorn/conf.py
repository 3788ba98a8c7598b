"""A gunicorn configuration without a file: ``gunicorn -c python:oomsafe.gunicorn.conf app:app``.

The policy comes from OOMSAFE_ variables. gunicorn takes one configuration only, so the one that it
would have found by itself, ./gunicorn.conf.py, or $OOMSAFE_GUNICORN_CONF, is loaded here first.
"""

from __future__ import annotations

import os
import runpy
import sys

from oomsafe.gunicorn.hooks import install

_path = os.environ.get("OOMSAFE_GUNICORN_CONF") or os.path.join(os.getcwd(), "gunicorn.conf.py")
if os.path.exists(_path):
    globals().update({k: v for k, v in runpy.run_path(_path, run_name="__config__").items() if not k.startswith("__")})
elif "OOMSAFE_GUNICORN_CONF" in os.environ:
    print(f"oomsafe: OOMSAFE_GUNICORN_CONF={_path!r} does not exist", file=sys.stderr)
    raise SystemExit(1)

install(globals())
