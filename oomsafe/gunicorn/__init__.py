"""gunicorn: ``-c python:oomsafe.gunicorn.conf``, or in a configuration file of one's own, as its last line::

import oomsafe.gunicorn

oomsafe.gunicorn.install(globals(), soft_limit="300MiB")

In the arbiter and in its workers: hooks.py, where to begin, is called in both, and says in which. In the arbiter alone: fleet.py (one
worker more, one less), dirty.py (its dirty workers). In a worker: workers.py (how each class ends), asyncio_workers.py, goaway.py
(HTTP/2). conf.py and chain.py put the hooks into a configuration, beside the user's own.
"""

from __future__ import annotations

from oomsafe.gunicorn.hooks import install

__all__ = ["install"]
