"""uvicorn: ``python -m oomsafe.uvicorn app:app --workers 4`` with all of uvicorn's own options, or::

import oomsafe.uvicorn

oomsafe.uvicorn.run("app:app", workers=4, soft_limit="300MiB")

Start with launch.py. In the parent: launch.py, reading.py (the policy) and supervisor.py. In a worker: process.py (how it starts)
and server.py.
"""

from __future__ import annotations

from oomsafe.uvicorn.launch import run

__all__ = ["run"]
