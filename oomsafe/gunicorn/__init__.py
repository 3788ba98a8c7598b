"""gunicorn: ``-c python:oomsafe.gunicorn.conf``, or in a configuration file of one's own, as its last line::

import oomsafe.gunicorn

oomsafe.gunicorn.install(globals(), soft_limit="300MiB")
"""

from __future__ import annotations

from oomsafe.gunicorn.hooks import install

__all__ = ["install"]
