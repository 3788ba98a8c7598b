"""uvicorn: ``python -m oomsafe.uvicorn app:app --workers 4`` with all of uvicorn's own options, or::

import oomsafe.uvicorn

oomsafe.uvicorn.run("app:app", workers=4, soft_limit="300MiB")
"""

from __future__ import annotations

from oomsafe.uvicorn.launch import run

__all__ = ["run"]
