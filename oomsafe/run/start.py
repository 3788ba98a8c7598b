"""In each Python process below ``oomsafe run``: waits until a server's module is imported, and has it patched then.

Imported at the start of every such process, so nothing here may be slow, import slow modules, or fail.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing typing for it would cost milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Found = Callable[[str, ModuleType], None]

#: Set by ``oomsafe run`` to its own pid, which is also the pid of the command.
RUN = "OOMSAFE_RUN"

#: The modules to wait for, and our function that is called with the module once it has been imported.
SERVERS = {
    "gunicorn.arbiter": "oomsafe.gunicorn.launch:guard_arbiter",
    "uvicorn.server": "oomsafe.uvicorn.launch:guard_server",
    "uvicorn.supervisors.multiprocess": "oomsafe.uvicorn.launch:guard_multiprocess",
    "celery.worker.worker": "oomsafe.celery.launch:guard_node",
    "hypercorn.run": "oomsafe.run.servers:announce_hypercorn",
    "hypercorn.utils": "oomsafe.run.servers:measure_hypercorn",
    "granian.server.mp": "oomsafe.run.servers:measure_granian",
    "django.core.management.commands.runserver": "oomsafe.run.servers:leave_runserver",
    "werkzeug.serving": "oomsafe.run.servers:leave_werkzeug",
    "opentelemetry.instrumentation.auto_instrumentation": "oomsafe.run.environment:stay_first",
}

_started = False


def start() -> None:
    """Start waiting for the modules. A second call changes nothing."""
    global _started
    if _started or not os.environ.get(RUN):
        return
    _started = True
    sys.meta_path.insert(0, Finder(SERVERS, _patch))


class Finder:
    """For sys.meta_path: calls `found` with each module of `names` right after it was executed, before its importer continues."""

    def __init__(self, names: dict[str, str], found: Found) -> None:
        self._names = names
        self._found = found
        self._finding: set[str] = set()

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec from another finder, changed so that we notice when the module has been executed; None for all other modules."""
        if name not in self._names or name in self._finding:
            return None
        self._finding.add(name)
        try:
            for finder in list(sys.meta_path):
                find = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find(name, path, target) if find is not None and finder is not self else None
                if spec is not None:
                    self._notice(name, spec)
                    return spec
        finally:
            self._finding.discard(name)
        return None

    def _notice(self, name: str, spec: ModuleSpec) -> None:
        """Cover one method of the loader, for one call. The loader is not replaced, because it also provides sources and resources."""
        loader = spec.loader
        execute = getattr(loader, "exec_module", None)

        def executing(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)
            if execute is not None:
                execute(module)
            self._found(name, module)

        try:
            vars(loader)["exec_module"] = executing
        except TypeError as error:
            say_unguarded(name, error)


def _patch(name: str, module: ModuleType) -> None:
    """Have an imported module patched. A failure does not disturb the import; the server is then not guarded, and a line says so."""
    try:
        from importlib import import_module

        where, _, function = SERVERS[name].partition(":")
        getattr(import_module(where), function)(module)
    except Exception as error:
        say_unguarded(name, error)


def say_unguarded(name: str, error: Exception) -> None:
    """Write that to stderr, because no log is configured yet."""
    server = name.partition(".")[0]
    sys.stderr.write(f"oomsafe run: {server} is not guarded here (pid {os.getpid()}): {type(error).__name__}: {error}\n")
