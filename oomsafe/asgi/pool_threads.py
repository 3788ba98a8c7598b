"""Which request each thread of anyio's pool works for: Starlette and FastAPI run plain functions there. Imported once a worker has grown.

Nothing of this costs a request anything: the frames that are there already tell it.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Collection
from types import CodeType, FrameType
from typing import Any

from oomsafe.http.carrier import KEY
from oomsafe.worker.meter import Work

#: The most frames of a stack that are walked.
DEEPEST = 400

#: Frames that have a request's `scope` in a local variable: our middleware's, and those of Starlette's routing, which runs in a task of its
#: own below a BaseHTTPMiddleware. Only these are read, because before Python 3.13, reading a frame's locals keeps them alive until it ends.
_HAVE_SCOPE = ("oomsafe/asgi/middleware.py", "starlette/routing.py")


def requests_in_pool_threads() -> dict[Work, int]:
    """The ident of the pool's thread in which each request's plain function runs now. Empty without anyio on asyncio."""
    run = _code_of_run()
    if run is None:
        return {}
    threads: dict[int, tuple[Any, int]] = {}
    for ident, frame in sys._current_frames().items():
        future = _future_of(frame, run)
        if future is not None:
            threads[id(future)] = (future, ident)
    found: dict[Work, int] = {}
    for loop in {future.get_loop() for future, _ in threads.values()}:
        for task in _tasks(loop):
            _, ident = threads.get(id(getattr(task, "_fut_waiter", None)), (None, 0))
            work = _work_of(task) if ident else None
            if work is not None:
                found[work] = ident
    return found


def _code_of_run() -> CodeType | None:
    backend = sys.modules.get("anyio._backends._asyncio")
    run = getattr(getattr(backend, "WorkerThread", None), "run", None)
    code = getattr(run, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _future_of(frame: FrameType | None, run: CodeType) -> Any:
    """The future that the thread with this innermost frame will set; None: it is no thread of the pool, or idle."""
    for _ in range(DEEPEST):
        if frame is None:
            return None
        if frame.f_code is run:
            if frame.f_trace is not None:
                return None  # a debugger writes the locals back
            found = frame.f_locals
            future = found.get("future")
            if type(found) is dict:  # before Python 3.13: a copy, which would keep what the thread works on alive
                found.clear()
            return future if asyncio.isfuture(future) else None
        frame = frame.f_back
    return None


def _tasks(loop: asyncio.AbstractEventLoop) -> Collection[Any]:
    try:
        return asyncio.all_tasks(loop)
    except RuntimeError:  # tasks come and go in the loop's thread meanwhile, too fast
        return ()


def _work_of(task: Any) -> Work | None:
    coroutine = task.get_coro()
    for _ in range(DEEPEST):
        frame = getattr(coroutine, "cr_frame", None)
        if frame is None:
            return None
        if frame.f_code.co_filename.replace("\\", "/").endswith(_HAVE_SCOPE):
            scope = frame.f_locals.get("scope")
            work = scope.get(KEY) if isinstance(scope, dict) else None
            if isinstance(work, Work):
                return work
        coroutine = coroutine.cr_await
    return None
