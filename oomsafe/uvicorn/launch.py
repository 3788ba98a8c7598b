"""Starts uvicorn with a supervisor and servers of ours: the names under which its main module makes them are replaced."""

from __future__ import annotations

import sys
from typing import Any

from oomsafe.policy.settings import READERS
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


def _guard(keywords: dict[str, Any]) -> Any:
    """uvicorn's main module, which makes from now on what is guarded."""
    read_policy(keywords)  # what can't be right is said before anything is loaded
    try:
        from uvicorn import main as _  # noqa: F401  its module has the name of its function
    except ModuleNotFoundError:
        print("oomsafe: uvicorn is missing: pip install 'oomsafe[uvicorn]'", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    from oomsafe.uvicorn.server import GuardedServer
    from oomsafe.uvicorn.supervisor import GuardedMultiprocess

    module: Any = sys.modules["uvicorn.main"]
    # classes: others patch them (sse-starlette does), subclass them, or ask what is one of them
    GuardedServer.keywords = GuardedMultiprocess.keywords = keywords
    module.Server, module.Multiprocess = GuardedServer, GuardedMultiprocess
    return module
