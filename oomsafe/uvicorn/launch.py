"""Starts uvicorn with a supervisor and servers of ours: the names under which its main module makes them are replaced."""

from __future__ import annotations

import os
import sys
from typing import Any

from oomsafe.log import say_off
from oomsafe.policy.settings import READERS, is_off
from oomsafe.uvicorn.reading import read_policy


def run(app: Any, **options: Any) -> None:
    """uvicorn.run() with guarded workers. Keywords are uvicorn's and Policy's; a list as `headers` is uvicorn's.

    A setting that can't be right is one line on stderr, and nothing starts.
    """
    policy = {name: options.pop(name) for name in list(options) if name in READERS and not isinstance(options[name], list)}
    _guard(policy).run(app, **options)


def main() -> None:
    """uvicorn's command line."""
    _guard({}).main()


def guard_server(module: Any) -> None:
    """For ``oomsafe run``: `module` is uvicorn.server, just imported; its Server, and uvicorn's, is one that is guarded."""
    if is_off(os.environ):
        return
    from oomsafe.uvicorn.server import GuardedServer

    module.Server = GuardedServer


def guard_multiprocess(module: Any) -> None:
    """The same of uvicorn.supervisors.multiprocess and its Multiprocess. Raises ImportError for a uvicorn before 0.30."""
    if is_off(os.environ):
        return
    from oomsafe.uvicorn.supervisor import GuardedMultiprocess

    module.Multiprocess = GuardedMultiprocess


def _guard(keywords: dict[str, Any]) -> Any:
    """uvicorn's main module, which makes from now on what is guarded; as it was, when oomsafe is off."""
    read_policy(keywords)  # what can't be right is said before anything is loaded
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
    # classes: others patch them (sse-starlette does), subclass them, or ask what is one of them
    GuardedServer.keywords = GuardedMultiprocess.keywords = keywords
    module.Server, module.Multiprocess = GuardedServer, GuardedMultiprocess
    return module
