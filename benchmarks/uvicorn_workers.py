"""UvicornWorker with its event loop named; uvicorn-worker itself takes uvloop wherever it is installed."""

from __future__ import annotations

from typing import Any, ClassVar

from uvicorn_worker import UvicornWorker


class AsyncioWorker(UvicornWorker):
    """On asyncio's own loop."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {**UvicornWorker.CONFIG_KWARGS, "loop": "asyncio"}


class UvloopWorker(UvicornWorker):
    """On uvloop."""

    CONFIG_KWARGS: ClassVar[dict[str, Any]] = {**UvicornWorker.CONFIG_KWARGS, "loop": "uvloop"}
