"""Starts uvicorn with our supervisor and servers, by replacing these classes in uvicorn's main module."""

from __future__ import annotations

import os
import sys
from typing import Any

from oomsafe.log import say_off
from oomsafe.policy.settings import READERS, is_off
from oomsafe.uvicorn.reading import read_policy


def run(app: Any, **options: Any) -> None:
    """uvicorn.run() with guarded workers. The keywords are uvicorn's and Policy's; `headers` is uvicorn's if it is a list.

    A setting that can't be right is reported in one line on stderr, and nothing starts.
    """
    policy = {
        name: options.pop(name) for name in list(options) if name in READERS and not (name == "headers" and isinstance(options[name], list))
    }
    _guard(policy).run(app, **options)


def main() -> None:
    """uvicorn's command line."""
    _guard({}).main()


def guard_server(module: Any) -> None:
    """For ``oomsafe run``: replace the Server of uvicorn.server, which was just imported as `module`, with a guarded one."""
    if is_off(os.environ):
        return
    from oomsafe.uvicorn.server import GuardedServer

    module.Server = GuardedServer


def guard_multiprocess(module: Any) -> None:
    """Likewise for the Multiprocess of uvicorn.supervisors.multiprocess. Raises ImportError for a uvicorn before 0.30."""
    if is_off(os.environ):
        return
    from oomsafe.uvicorn.supervisor import GuardedMultiprocess

    module.Multiprocess = GuardedMultiprocess


def _guard(keywords: dict[str, Any]) -> Any:
    """uvicorn's main module, with guarded classes unless oomsafe is off."""
    read_policy(keywords)  # reports a bad setting before anything is loaded
    try:
        from uvicorn import main as _  # noqa: F401  its module has the name of its function
    except ModuleNotFoundError:
        print("oomsafe: uvicorn is missing: pip install 'oomsafe[uvicorn]'", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    from oomsafe.uvicorn.server import GuardedServer
    from oomsafe.uvicorn.supervisor import GuardedMultiprocess

    module: Any = sys.modules["uvicorn.main"]
    if is_off(os.environ):
        say_off()
        return module
    # classes, because other code patches them (sse-starlette does), subclasses them, or calls isinstance()
    GuardedServer.keywords = GuardedMultiprocess.keywords = keywords
    module.Server, module.Multiprocess = GuardedServer, GuardedMultiprocess
    return module
