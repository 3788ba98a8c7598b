"""Servers under ``oomsafe run`` that oomsafe does not recycle.

Their apps are measured; development servers stay unchanged. A line on stderr says so, so that no user believes that they are guarded.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from functools import wraps
from typing import Any

HYPERCORN = "its workers' memory is measured; it recycles them by --max-requests"

_said: set[str] = set()


def measure_hypercorn(module: Any) -> None:
    """`module` is hypercorn.utils: the app that it wraps for its protocol is measured, and sends memory headers.

    Quart imports this module even if another server serves it, so nothing is written before an app is wrapped.
    """
    wrap_app = module.wrap_app

    @wraps(wrap_app)
    def measured(app: Any, wsgi_max_body_size: int, mode: Any = None) -> Any:
        _say("hypercorn", HYPERCORN)
        mode = mode or ("asgi" if module.is_asgi(app) else "wsgi")
        return wrap_app(_measured(app, mode), wsgi_max_body_size, mode)

    module.wrap_app = measured


def announce_hypercorn(module: Any) -> None:
    """`module` is hypercorn.run, which runs in hypercorn's parent: spawned workers write no line, so the parent does."""
    run = module.run

    @wraps(run)
    def announced(*args: Any, **options: Any) -> Any:
        _say("hypercorn", HYPERCORN)
        return run(*args, **options)

    module.run = announced


def measure_granian(module: Any) -> None:
    """`module` is granian.server.mp: the app that each of its workers loads is measured."""
    module._asgi_call_wrap = _wrapping(module._asgi_call_wrap, "asgi")
    module._wsgi_call_wrap = _wrapping(module._wsgi_call_wrap, "wsgi")
    serve = module.MPServer.serve

    @wraps(serve)
    def announced(self: Any, *args: Any, **options: Any) -> Any:
        measured = str(getattr(self.interface, "value", self.interface)) != "rsgi"
        what = "its workers' memory is measured" if measured else "an RSGI app, its default (--interface), is not measured"
        _say("granian", f"{what}; it recycles its workers by --workers-max-rss, --workers-lifetime")
        return serve(self, *args, **options)

    module.MPServer.serve = announced


def leave_runserver(module: Any) -> None:
    """`module` is Django's runserver command. It stays unchanged, and a line says so."""
    handle = module.Command.handle

    @wraps(handle)
    def handled(self: Any, *args: Any, **options: Any) -> Any:
        if not os.environ.get("RUN_MAIN"):  # set in the process that its autoreloader starts
            _say("Django's runserver", "a development server; it is left alone")
        return handle(self, *args, **options)

    module.Command.handle = handled


def leave_werkzeug(module: Any) -> None:
    """`module` is werkzeug.serving, which `flask run` uses. It stays unchanged, and a line says so."""
    run_simple = module.run_simple

    @wraps(run_simple)
    def run(*args: Any, **options: Any) -> Any:
        if not os.environ.get("WERKZEUG_RUN_MAIN"):
            _say("Werkzeug's server", "a development server; it is left alone")
        return run_simple(*args, **options)

    module.run_simple = run


def _wrapping(wrap: Any, kind: str) -> Any:
    @wraps(wrap)
    def wrapping(callback: Any, *args: Any, **options: Any) -> Any:
        return wrap(_measured(callback, kind), *args, **options)

    return wrapping


def _measured(app: Any, kind: str) -> Any:
    """`app` in our middleware, or `app` itself if that fails."""
    try:
        if kind == "asgi":
            from oomsafe.asgi.middleware import MemoryMiddleware as Middleware
        else:
            from oomsafe.wsgi.middleware import MemoryMiddleware as Middleware  # type: ignore[assignment]
        return Middleware(app)
    except Exception as error:
        _say("this app", f"not measured: {type(error).__name__}: {error}")
        return app


def _say(what: str, fact: str) -> None:
    """Write to stderr, because no log is configured yet: once in this process, and not in processes that multiprocessing spawns."""
    if what in _said:
        return
    _said.add(what)
    spawned = multiprocessing.parent_process() is not None or getattr(multiprocessing.current_process(), "_inheriting", False)
    if not spawned:
        sys.stderr.write(f"oomsafe run: {what}: {fact} (pid {os.getpid()})\n")
