"""The servers on this machine that have workers: those that oomsafe guards, and those that it does not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from oomsafe.kernel.process import children_of, parent_of
from oomsafe.kernel.program import argv_of

#: Servers that have a supervisor and workers, by the name of the program.
SERVERS = ("gunicorn", "uvicorn", "celery", "hypercorn", "granian", "uwsgi")

#: What a process calls itself where setproctitle is installed, and what Celery's do.
TITLES = {"gunicorn:": "gunicorn", "[celeryd:": "celery", "uwsgi": "uwsgi"}

#: At most this many processes are asked for their command line.
MOST = 20_000


@dataclass(frozen=True)
class Server:
    """One that was found by its command line."""

    name: str
    supervisor: int
    workers: tuple[int, ...]


def server_of(argv: Sequence[str]) -> str | None:
    """Which server a command line starts; None: none of SERVERS."""
    if not argv:
        return None
    title = next((name for start, name in TITLES.items() if argv[0].startswith(start)), None)
    if title is not None:
        return title
    # python -m gunicorn, /venv/bin/python /venv/bin/gunicorn, gunicorn
    for at, word in enumerate(argv[:3]):
        name = os.path.basename(word)
        if name in SERVERS and (at == 0 or argv[at - 1] == "-m" or _is_python(argv[0])):
            return name if name != "celery" or "worker" in argv[at + 1 :] else None
    return None


def _is_python(word: str) -> bool:
    return os.path.basename(word).startswith(("python", "pypy"))


def servers(proc: str = "/proc") -> Iterator[Server]:
    """Those with workers, whose parent is not one of them. A helper of multiprocessing is no worker."""
    try:
        pids = sorted(int(name) for name in os.listdir(proc) if name.isdecimal())[:MOST]
    except OSError:
        return
    named = {pid: name for pid in pids if (name := server_of(argv_of(pid, proc))) is not None}
    for pid, name in named.items():
        parent = parent_of(pid, proc)
        if parent is not None and named.get(parent[0]) == name:
            continue
        workers = tuple(child for child in children_of(pid, proc) if not _is_helper(argv_of(child, proc)))
        if workers:
            yield Server(name, pid, workers)


def _is_helper(argv: Sequence[str]) -> bool:
    return any("multiprocessing.resource_tracker" in word or "multiprocessing.forkserver" in word for word in argv)
