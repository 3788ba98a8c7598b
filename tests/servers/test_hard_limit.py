"""A hard limit holds while a request runs: the one that asks for too much gets 503, its worker and all others go on."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from typing import Any

import pytest
from serving import ASGI_CLASSES, CLASSES, until
from versions import loses_none

MIB = 1 << 20
LIMIT = 300 * MIB
LIMITS: dict[str, Any] = {"hard_limit": "300MiB", "soft_limit": "280MiB"}
REFUSED = " has asked for more memory than its hard limit 300 MiB leaves in "
BODY = b"This request needs more memory than one request may have here.\n"
KINDS = ("small", "huge", "dict", "text")


def is_refused(server: Any, path: str) -> None:
    """With 503, soon."""
    status, headers, body = server.get(path)
    assert (status, body) == (503, BODY), path
    assert headers["retry-after"] == "10"


def goes_on(server: Any, peak: float = 1.05) -> str:
    """The worker has never held more, has given it back, and serves. Returns its pid."""
    most, now, pid = server.get("/peak")[2].decode().split()
    assert int(most) <= LIMIT * peak
    assert int(now) < LIMIT / 2
    return str(pid)


def soft_value(pid: int) -> str:
    """Of the RLIMIT_DATA of a process, in bytes."""
    with open(f"/proc/{pid}/limits") as limits:
        return next(line.split()[3] for line in limits if line.startswith("Max data size"))


@pytest.mark.parametrize("worker_class", CLASSES)
def test_gunicorn_answers_503_and_goes_on(serve: Callable[..., Any], worker_class: str) -> None:
    """In whatever way a request balloons; a line says which, where, and what the limit was."""
    app = f"limited_apps:{'asgi' if worker_class in ASGI_CLASSES else 'wsgi'}"
    server = serve(worker_class, 1, app=app, **LIMITS).serving(1)
    pid = goes_on(server)

    for kind in KINDS:
        is_refused(server, f"/{kind}")
        assert server.get("/hello")[2] == b"hello"

    assert goes_on(server) == pid
    assert len(server.wait_for(REFUSED, times=len(KINDS))) == len(KINDS)
    assert f"GET /small{REFUSED}balloon (servers/limited_apps.py:" in server.log()
    until(lambda: server.pool().totals.aborts_by_reason["hard_limit"] == len(KINDS), "they are counted")
    assert server.lines(" recycling: ") == []


@pytest.mark.parametrize("app", ["asgi", "starlette", "fastapi", "django_asgi"])
def test_uvicorn_answers_503_and_goes_on(serve_uvicorn: Callable[..., Any], app: str) -> None:
    """Whatever a framework would have made of it."""
    server = serve_uvicorn(workers=1, app=f"limited_apps:{app}", **LIMITS).serving(1)
    pid = goes_on(server)

    for kind in KINDS:
        is_refused(server, f"/{kind}")
    if app in ("starlette", "fastapi"):
        is_refused(server, "/sync/small")

    assert goes_on(server, 1.1) == pid
    assert server.get("/broken")[0] == 500 if app != "asgi" else True


@pytest.mark.parametrize("app", ["flask", "django_wsgi"])
def test_frameworks_that_answer_500_by_themselves(serve: Callable[..., Any], app: str) -> None:
    """Their 500 for a MemoryError becomes 503; any other 500 stays."""
    server = serve("sync", 1, app=f"limited_apps:{app}", **LIMITS).serving(1)

    for kind in KINDS:
        is_refused(server, f"/{kind}")

    goes_on(server)
    assert server.get("/broken")[0] == 500


@pytest.mark.parametrize("app", ["wsgi", "asgi"])
def test_a_response_that_has_begun_is_cut(serve: Callable[..., Any], app: str) -> None:
    """Nobody takes a part for the whole; before the first part, there is still a 503."""
    server = serve("asgi" if app == "asgi" else "gthread", 1, app=f"limited_apps:{app}", **LIMITS).serving(1)

    with pytest.raises((http.client.HTTPException, ConnectionError)):
        server.get("/parts-late")
    if app == "wsgi":
        is_refused(server, "/parts-early")

    assert "its response had begun, so the connection is closed" in server.log()
    goes_on(server)


def test_who_catches_it_goes_on(serve: Callable[..., Any]) -> None:
    """An app's own way of dealing with it is its own; and what the app starts has no limit of ours."""
    server = serve("sync", 1, app="limited_apps:wsgi", **LIMITS).serving(1)

    assert server.get("/caught")[2] == b"went on"
    assert server.get("/limit")[2] == b"unlimited"
    assert server.lines(REFUSED) == []


def test_what_an_error_tracker_has_read_is_let_go(serve: Callable[..., Any]) -> None:
    """Before Python 3.13 each frame keeps a copy of what it has read."""
    server = serve("sync", 1, app="limited_apps:wsgi", **LIMITS).serving(1)

    is_refused(server, "/reported")

    goes_on(server)


def test_an_upload_that_is_read_at_once(serve_uvicorn: Callable[..., Any]) -> None:
    """A GiB in one body."""
    server = serve_uvicorn(workers=1, app="limited_apps:asgi", **LIMITS).serving(1)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    part = bytes(MIB)
    try:
        connection.request("POST", "/upload", (part for _ in range(1024)), headers={"Content-Length": str(1024 * MIB)})
    except (BrokenPipeError, ConnectionResetError):
        pass  # it is answered before it has been sent
    assert connection.getresponse().status == 503
    connection.close()
    goes_on(server)


def test_neighbours_in_threads(serve: Callable[..., Any]) -> None:
    """While one request after the other balloons in big pieces, those beside it in the same worker are answered."""
    loses_none("gthread")  # it is recycled meanwhile
    server = serve("gthread", 1, settings="threads = 8", app="limited_apps:wsgi", min_lifetime="10m", **LIMITS).serving(1)
    failed: list[Any] = []
    ended = threading.Event()

    def innocent() -> None:
        while not ended.is_set():
            status, _, body = server.get("/hello")
            if (status, body) != (200, b"hello"):
                failed.append((status, body))

    threads = [threading.Thread(target=innocent) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        is_refused(server, "/huge")
        is_refused(server, "/slow")
    ended.set()
    for thread in threads:
        thread.join()

    assert failed == []
    goes_on(server, 1.1)


def test_late_threads_start(serve_uvicorn: Callable[..., Any]) -> None:
    """Those of anyio's pool, up to 40 with 8 MiB of address space each, in what the limit leaves: 32 requests at once."""
    server = serve_uvicorn(workers=1, app="limited_apps:starlette", hard_limit="150MiB", soft_limit="140MiB").serving(1)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(server.get("/sync/hello")[2])) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert answers == [b"hello"] * 32


def test_dry_run_refuses_nothing(serve: Callable[..., Any]) -> None:
    """It only measures."""
    server = serve("sync", 1, app="limited_apps:wsgi", dry_run=True, **LIMITS).serving(1)

    assert soft_value(server.workers()[0]) == "unlimited"


def test_the_limit_follows_what_the_worker_holds(serve: Callable[..., Any]) -> None:
    """The kernel's figure is set again while the worker rests."""
    server = serve("sync", 1, app="limited_apps:wsgi", **LIMITS).serving(1)
    pid = server.workers()[0]

    before = soft_value(pid)
    assert int(before) < LIMIT * 1.3
    is_refused(server, "/text")  # leaves memory that the allocator keeps
    until(lambda: soft_value(pid) != before, "it has followed")
    is_refused(server, "/small")
    goes_on(server)


def test_an_application_s_own_limit_stays(serve: Callable[..., Any]) -> None:
    """Where it is lower; a line says so."""
    text = "import resource\ndef post_fork(server, worker):\n    resource.setrlimit(resource.RLIMIT_DATA, (200 << 20, -1))\n"
    server = serve("sync", 1, app="limited_apps:wsgi", settings=text, **LIMITS).serving(1)

    server.wait_for("this application has set its own RLIMIT_DATA, 200 MiB, which is lower than what the hard limit 300 MiB comes to")
    assert soft_value(server.workers()[0]) == str(200 << 20)
    is_refused(server, "/small")


def test_auto(serve: Callable[..., Any]) -> None:
    """What is left when all others are at their soft limits."""
    server = serve("sync", 2, app="limited_apps:wsgi", hard_limit="auto", soft_limit="200MiB").serving(2)

    (line,) = server.wait_for("oomsafe guards 2 workers")
    assert ", hard limit " in line
    assert " (auto), budget " in line
