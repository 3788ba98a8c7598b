"""gunicorn: ``-c python:oomsafe.gunicorn.conf``, or as the last lines of your own configuration file::

import oomsafe.gunicorn

oomsafe.gunicorn.install(globals(), soft_limit="300MiB")

Start with hooks.py: it runs in the arbiter and in its workers, and each hook says in which. In the arbiter: fleet.py (one
worker more or less); in the dirty arbiter and its workers: dirty.py. In a worker: workers.py (how each class ends), asyncio_workers.py,
goaway.py (HTTP/2). conf.py and chain.py put the hooks into a configuration, beside the user's own.
"""

from __future__ import annotations

from oomsafe.gunicorn.hooks import install

__all__ = ["install"]
