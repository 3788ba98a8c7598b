"""A recycled worker says at its end what its memory was: what leaks is in use, and what an allocator keeps is not called a leak."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from serving import Server, until

from oomsafe.demo.server_process import environment

#: What each way is to be: the part that holds most, in the words of the line, and whether the line denies a leak.
WAYS = {
    "/dicts?300000": ("by Python objects", False),
    "/blobs?90": ("by malloc", False),
    "/small?450000": ("by Python", True),
    "/blocks?150000": ("by malloc, between blocks in use", True),
}


def biggest(line: str) -> str:
    """The words of the part of anonymous memory that holds most."""
    sizes = re.findall(r"([\d.]+) ([KMG])iB (by [a-zA-Z ,]+?)(?:, (?=\d)|;|$)", line.partition("held at its end")[2])
    return max((float(size) * 1024 ** "KMG".index(unit), words) for size, unit, words in sizes)[1]


def ends(server: Server, path: str) -> str:
    """Have a worker grow above its limit by one request; its line at its end."""
    server.serving(2)
    server.get(path)
    until(lambda: server.lines("recycling: "), "one is recycled")
    (line,) = server.wait_for("held at its end")[:1]
    assert line.partition(" held at its end")[0].rpartition("worker ")[2] in server.lines("recycling: ")[0]
    return line


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_gunicorn(serve: Callable[..., Server], worker_class: str, path: str) -> None:
    """What it was, by its allocators."""
    judged(ends(serve(worker_class, 2, app="keeping_apps:wsgi", soft_limit="80MiB", min_lifetime=0), path), path)


@pytest.mark.parametrize("path", WAYS)
def test_uvicorn(serve_uvicorn: Callable[..., Server], path: str) -> None:
    """The same."""
    judged(ends(serve_uvicorn(app="keeping_apps:asgi", workers=2, soft_limit="80MiB", min_lifetime=0), path), path)


def judged(line: str, path: str) -> None:
    """As the table says."""
    part, denies = WAYS[path]
    assert re.fullmatch(part, biggest(line)), line
    assert ("that is no leak" in line) is denies, line


def verdict(server: Server) -> dict[str, Any]:
    """What `oomsafe retired` says of the server's pool."""
    argv = [sys.executable, "-m", "oomsafe", "retired", "--json", "--pool", str(server.pid)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment(path=[]), check=False)
    assert ended.returncode == 0, ended.stderr
    (pool,) = json.loads(ended.stdout)["pools"]
    return pool


def grows(server: Server, path: str, kind: str, never: str = "") -> dict[str, Any]:
    """Ask for this until the pool's judgement is that, and was not `never`; the pool as it then is."""
    server.serving(2)

    def asked() -> dict[str, Any] | None:
        for _ in range(20):
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.get(path)
        pool = verdict(server)
        assert pool["verdict"]["kind"] != never, pool["verdict"]
        return pool if pool["verdict"]["kind"] == kind else None

    return until(asked, f"it is {kind}", 120, 0.0)


#: One request's dicts: 3000 of them, each with its int and its place in the list.
EACH = 3000 * (184 + 32 + 8)


def test_a_leak_is_judged_from_several_lives(serve: Callable[..., Server]) -> None:
    """It rises with the requests: by how much is right within a quarter; nothing else is ever said on the way."""
    server = serve("sync", 2, app="keeping_apps:wsgi", soft_limit="60MiB", min_lifetime=0)

    pool = grows(server, "/dicts?3000", "leak")

    assert 0.75 <= pool["verdict"]["each"] / EACH <= 1.25, pool["verdict"]
    assert len(pool["retired"]) >= 3
    assert all(one["work"] > 10 and one["points"] for one in pool["retired"])


def test_a_cache_whose_bound_is_never_reached_is_not_a_leak(serve: Callable[..., Server]) -> None:
    """Although what is in use rises with the requests until the worker is recycled for it, again and again; what it would hold is said."""
    server = serve("sync", 2, app="keeping_apps:wsgi", soft_limit="60MiB", min_lifetime=0)

    pool = grows(server, "/thumbnails?20", "cache", never="leak")

    assert "the cache of keeping_apps.thumbnail (lru_cache of 50 000)" in pool["verdict"]["why"]
    full = re.search(r"about (\d+) MiB when it is full", pool["verdict"]["help"])
    assert full is not None and 850 <= int(full[1]) <= 1050, pool["verdict"]  # 50 000 of 20 KB


@pytest.mark.parametrize("path", ["/small?450000", "/blocks?150000"])
def test_what_is_kept_is_not_a_leak(serve_uvicorn: Callable[..., Server], path: str) -> None:
    """Nor is what was needed at once."""
    server = serve_uvicorn(app="keeping_apps:asgi", workers=2, soft_limit="80MiB", min_lifetime=0)

    pool = grows(server, path, "kept")

    assert ("Python's allocator" in pool["verdict"]["why"]) is path.startswith("/small")


@pytest.mark.parametrize(
    ("path", "right"), [("/model?60", {"needed"}), ("/late?60", {"needed"}), ("/cache?10", {"cache", "needed", "kept"})]
)
@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_what_is_no_leak(serve: Callable[..., Server], worker_class: str, path: str, right: set[str]) -> None:
    """A model that the first request loads, or a later one; a cache up to its bound, which on a fast machine is full at once.

    Beside a cache of large values malloc really keeps about as much, because each of several threads has an arena of its own. In workers
    that are replaced by the clock. Nothing else is ever said on the way.
    """
    server = serve(worker_class, 2, app="keeping_apps:wsgi", soft_limit="500MiB", min_lifetime=0, max_lifetime="4s").serving(2)
    kinds = set()

    def told() -> bool:
        for _ in range(50):
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.get(path)
        kinds.add(verdict(server)["verdict"]["kind"])
        return bool(kinds & right)

    until(told, "it is judged", 90, 0.0)
    assert kinds <= {"unknown", *right}


def test_not_at_a_shutdown(serve: Callable[..., Server]) -> None:
    """A deploy is not delayed by it."""
    server = serve("sync", 2, app="keeping_apps:wsgi", soft_limit="500MiB").serving(2)
    server.get("/dicts?1000")
    server.stop() if hasattr(server, "stop") else server.process.terminate()
    server.process.wait(20)

    assert server.lines("held at its end") == []
