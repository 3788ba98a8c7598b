"""A recycled worker says at its end which of its objects have grown: by name where a name leads to them, else by type."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from serving import Server, until

from oomsafe.demo.server_process import environment

#: What the line at a worker's end is to name, once the pool knows what its workers have when they are ready.
WAYS = {
    "/named?6000": "; growing_apps.CACHE grew by ",
    "/attribute?6000": "; growing_apps.Registry.seen grew by ",
    "/instance?10000": "; growing_apps.STORE.waiting grew by ",
    "/cache?6000": "; the cache of growing_apps.computed (lru_cache without a bound) grew by ",
    "/closure?6000": " more objects of growing_apps.Remembered (",
    "/descriptors?10": " more open descriptors than when it was ready",
    "/threads?5": " more threads than when it was ready",
}


def retired(server: Server, *options: str) -> str:
    """What `oomsafe retired` prints of the server's pool."""
    argv = [sys.executable, "-m", "oomsafe", "retired", "--pool", str(server.pid), *options]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment(path=[]), check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def of_the_pool(server: Server) -> dict[str, Any]:
    """The same as data."""
    (pool,) = json.loads(retired(server, "--json"))["pools"]
    return pool


def named(server: Server, path: str, words: str) -> str:
    """Ask for this until a worker's line at its end says so; that line."""
    server.serving(2)

    def asked() -> list[str]:
        for _ in range(20):
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.get(path)
        return [line for line in server.lines("held at its end") if words in line]

    return until(asked, f"a line says {words}", 240, 0.0)[0]


@pytest.mark.parametrize("path", WAYS)
def test_what_grew_is_named(serve: Callable[..., Server], path: str) -> None:
    """In the line, and with its figures in what is remembered; what the app keeps in there is not."""
    server = serve("sync", 2, app="growing_apps:wsgi", soft_limit="70MiB", min_lifetime=0)

    line = named(server, path, WAYS[path])

    assert "secret" not in retired(server, "--json") + line


def test_under_uvicorn(serve_uvicorn: Callable[..., Server]) -> None:
    """The same."""
    path = "/named?6000"
    named(serve_uvicorn(app="growing_apps:asgi", workers=2, soft_limit="70MiB", min_lifetime=0), path, WAYS[path])


def test_the_verdict_names_what_keeps_it(serve: Callable[..., Server]) -> None:
    """A container that has grown in all of the last workers; and what is not known of the first ones is not said to be 0."""
    server = serve("sync", 2, app="growing_apps:wsgi", soft_limit="60MiB", min_lifetime=0)
    named(server, "/named?3000", WAYS["/named?6000"])

    def told() -> dict[str, Any] | None:
        for _ in range(20):
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.get("/named?3000")
        pool = of_the_pool(server)
        return pool if "growing_apps.CACHE grew in all of the last" in pool["verdict"]["help"] else None

    pool = until(told, "the verdict names it", 240, 0.0)

    assert pool["verdict"]["kind"] == "leak"
    assert pool["retired"][-1]["objects"]["containers"][0]["before"] is None or len(pool["retired"]) == 16
    grown = pool["retired"][0]["objects"]["containers"][0]
    assert (grown["name"], grown["kind"], grown["before"]) == ("growing_apps.CACHE", "dict", 0)
    assert f" {grown['name']} " in retired(server)
