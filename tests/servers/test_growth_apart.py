"""Requests beside each other: the one that makes the worker grow is told apart from those that wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import until

MIB = 1 << 20

WSGI = """
import time
from pathlib import Path

def work(grows):
    mine = []
    while grows and not Path("go").exists():
        time.sleep(0.01)
    for _ in range(grows):
        mine.append(b"x" * (1 << 20))
        time.sleep(0.001)
    while not Path("end").exists():
        time.sleep(0.01)
    return mine

def wsgi(environ, start_response):
    mine = work(200 if environ["PATH_INFO"] == "/grow" else 0)
    start_response("200 OK", [("Content-Length", "0")])
    return []
"""

STARLETTE = """
import asyncio
from pathlib import Path
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Route
from app_in_threads import work

class Kept(Response):
    mine = None  # what the request has grown by is there until its response is sent

def answer(grows):
    response = Kept()
    response.mine = work(grows)
    return response

def grow(request):
    return answer(200)

def wait(request):
    return answer(0)

async def grow_in_steps(request):
    mine = []
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    for _ in range(200):
        mine.append(b"x" * (1 << 20))
        await asyncio.sleep(0.001)
    while not Path("end").exists():
        await asyncio.sleep(0.01)
    response = Kept()
    response.mine = mine
    return response

async def wait_in_steps(request):
    while not Path("end").exists():
        await asyncio.sleep(0.01)
    return Response()

async def passing(request, call_next):
    return await call_next(request)

routes = [Route("/grow", grow), Route("/wait", wait), Route("/agrow", grow_in_steps), Route("/await", wait_in_steps)]
plain = Starlette(routes=routes)
based = Starlette(routes=routes, middleware=[Middleware(BaseHTTPMiddleware, dispatch=passing)])
"""

FILES = {"app_in_threads.py": WSGI, "app_in_pool.py": STARLETTE}


class Beside:
    """One request that grows by 200 MiB beside three that wait."""

    def __init__(self, server: Any, grow: str, waits: tuple[str, ...]) -> None:
        self.server = server
        self.deltas: dict[str, list[int]] = {}
        """What each response says of its growth, in bytes, by path."""
        self._grow, self._waits = grow, waits

    def run(self) -> None:
        """Until all are answered."""
        folder: Path = self.server.folder
        threads = [threading.Thread(target=self._get, args=(path,)) for path in (self._grow, *self._waits)]
        for thread in threads:
            thread.start()
        until(lambda: len(self._in_flight()) == 4, "they are in flight")
        self._publishes(2)
        (folder / "go").touch()
        until(lambda: self._worker().figures.rss > 200 * MIB, "it has grown")
        self._publishes(2)
        self.seen = {work.name: self._worker().grown(work) or 0 for work in self._in_flight()}
        (folder / "end").touch()
        for thread in threads:
            thread.join(20)
        for name in ("go", "end"):
            (folder / name).unlink()

    def _publishes(self, times: int) -> None:
        for _ in range(times):
            last = self._worker().published
            until(lambda last=last: self._worker().published != last, "it publishes")

    def _worker(self) -> Any:
        (worker,) = self.server.pool().workers
        return worker

    def _in_flight(self) -> list[Any]:
        return [work for worker in self.server.pool().workers for work in worker.in_flight]

    def _get(self, path: str) -> None:
        _, headers, _ = self.server.get(path)
        self.deltas.setdefault(path, []).append(int(headers["x-memory-delta"]))


def is_told_apart(beside: Beside, grow: str) -> None:
    """In what the scoreboard shows while they run, and on their responses."""
    (mine,) = beside.deltas.pop(grow)
    others = [delta for deltas in beside.deltas.values() for delta in deltas]
    assert mine > 180 * MIB
    assert len(others) == 3
    assert max(others) < 10 * MIB
    assert beside.seen.pop(f"GET {grow}") > 180 * MIB
    assert max(beside.seen.values()) < 20 * MIB


def test_threads_of_gunicorn(serve: Callable[..., Any]) -> None:
    """By what each thread has touched; by equal shares each would have 50 MiB."""
    server = serve("gthread", 1, settings="threads = 8", app="app_in_threads:wsgi", files=FILES, headers=True, soft_limit="8GiB").serving(1)
    beside = Beside(server, "/grow", ("/wait", "/wait", "/wait"))

    beside.run()

    is_told_apart(beside, "/grow")


@pytest.mark.parametrize("app", ["plain", "based"])
def test_plain_functions_under_starlette(serve_uvicorn: Callable[..., Any], app: str) -> None:
    """They run in anyio's threads; also below a middleware that gives the app a task of its own. One of the others is a coroutine."""
    server = serve_uvicorn(workers=1, app=f"app_in_pool:{app}", files=FILES, headers=True, soft_limit="8GiB").serving(1)
    beside = Beside(server, "/grow", ("/wait", "/wait", "/await"))

    beside.run()

    is_told_apart(beside, "/grow")


def test_coroutines(serve_uvicorn: Callable[..., Any]) -> None:
    """The first time it is not known who has grown; from then on each step is measured."""
    server = serve_uvicorn(workers=1, app="app_in_pool:plain", files=FILES, headers=True, soft_limit="8GiB").serving(1)
    Beside(server, "/agrow", ("/await", "/await", "/await")).run()
    beside = Beside(server, "/agrow", ("/await", "/await", "/await"))

    beside.run()

    is_told_apart(beside, "/agrow")
