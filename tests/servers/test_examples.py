"""Every example, started as its README says and exercised over its own routes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import ENDING_WITH_US, Gunicorn, Server, until
from uvicorning import Uvicorn
from versions import names_routes, no_control_socket

from oomsafe.scoreboard.places import board_of

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(serve: Callable[..., Gunicorn], serve_uvicorn: Callable[..., Uvicorn]) -> Callable[..., Server]:
    def start(name: str, *more: str, app: str = "app:app") -> Server:
        folder = EXAMPLES / name
        if name.startswith("uvicorn_"):
            (command,) = re.findall(r"^    (OOMSAFE_.*) python -m oomsafe.uvicorn", (folder / "README.md").read_text(), re.M)
            env = dict(variable.split("=") for variable in command.split())
            return serve_uvicorn("--app-dir", str(folder), *more, app=app, env=env).serving()
        argv = ["-c", str(folder / "oomsafe.conf.py"), "--chdir", str(folder), "-b", "127.0.0.1:0"]
        return serve(argv=[*argv, *no_control_socket(), *more], app=app).serving()

    return start


@pytest.mark.parametrize(
    ("command", "leak", "route"),
    [
        ("gunicorn_flask", "/leak/1024", "GET /leak/<int:kib>"),
        ("gunicorn_uvicorn_fastapi", "/leak/1024", "GET /leak/{kib}"),
        ("gunicorn_uvicorn_fastapi", "/threaded-leak/1024", "GET /threaded-leak/{kib}"),
        ("uvicorn_starlette", "/leak/1024", "GET /leak/{kib:int}"),
        ("uvicorn_starlette --loop asyncio", "/threaded-leak/1024", "GET /threaded-leak/{kib:int}"),
        ("gunicorn_django", "/leak/1024", "GET /leak/<int:kib>"),
        ("gunicorn_django -k asgi", "/async-leak/1024", "GET /async-leak/<int:kib>"),
        ("gunicorn_django -k uvicorn_worker.UvicornWorker", "/leak/1024", "GET /leak/<int:kib>"),
    ],
)
def test_example_recycles_its_leaking_workers(example: Callable[..., Server], command: str, leak: str, route: str) -> None:
    """One client after the other, all are answered, workers are recycled, and the metrics name the route."""
    if "starlette" in command:
        names_routes()
    server = example(*command.split(), app=app_of(command))
    assert server.get("/")[0] == 200

    asked = 0

    def recycled() -> int:
        nonlocal asked
        asked += 1
        status, headers, _ = server.get(leak)
        assert status == 200
        assert int(headers["x-memory-rss"]) > 10 << 20
        return sum(server.pool().totals.recycles)

    until(recycled, "a worker is recycled", 60)
    metrics = until(lambda: f'route="{route}"' in (text := metrics_of(server)) and text, "the route is in the metrics")

    assert 'oomsafe_recycles_total{reason="soft_limit"}' in metrics
    assert asked > 30
    assert server.process.poll() is None


@pytest.mark.parametrize(
    ("command", "stream"),
    [
        ("gunicorn_django", "stream"),
        ("gunicorn_django -k asgi", "async-stream"),
        ("gunicorn_django -k uvicorn_worker.UvicornWorker", "async-stream"),
    ],
)
def test_django_is_counted_once(example: Callable[..., Server], command: str, stream: str) -> None:
    """By the middleware that gunicorn's adapter puts round it, under the pattern that Django knows; a stream until its end."""
    gunicorn = example(*command.split(), app=app_of(command))
    connection = gunicorn.connect()
    try:
        connection.request("GET", f"/{stream}/20")
        response = connection.getresponse()
        assert response.read(2) == b"0\n"
        until(lambda: in_flight(gunicorn) == [f"GET /{stream}/20"], "the stream is in flight")
        rest = response.read()
    finally:
        connection.close()
    statuses = [gunicorn.get(path)[0] for path in ("/report/1", "/report/2", "/nothing")]

    assert (rest, statuses) == (b"".join(b"%d\n" % number for number in range(1, 20)), [200, 200, 404])
    asked = 0

    def counted() -> dict[str, int]:
        nonlocal asked
        asked += 1
        gunicorn.get("/")  # an idle sync worker publishes when its select ends, after 15 s, one that serves every second
        return routes(gunicorn)

    expected = {f"GET /{stream}/<int:parts>": 1, "GET /report/<int:mib>": 2, "unmatched": 1}
    until(lambda: {name: n for name, n in counted().items() if name != "GET /"} == expected, f"counted: {expected}")
    until(lambda: in_flight(gunicorn) == [], "nothing is in flight")
    assert until(lambda: counted().get("GET /"), "the root has a name as well") <= asked


def app_of(command: str) -> str:
    """What the example's README has gunicorn serve."""
    if not command.startswith("gunicorn_django"):
        return "app:app"
    return "app:asgi" if "-k" in command else "app:wsgi"


def in_flight(server: Server) -> list[str]:
    return [piece.name for worker in server.pool().workers for piece in worker.in_flight]


def routes(server: Server) -> dict[str, int]:
    return {name: sum(row[1:]) for name, row in server.pool().totals.routes.items() if sum(row[1:])}


def metrics_of(server: Server) -> str:
    # Starlette redirects a mount without a slash at its end
    return server.get("/metrics/")[2].decode()


class Hypercorn(Server):
    """The example's hypercorn, guarded by the adapter in its one file."""

    LISTENS = "Running on "

    def __init__(self, folder: Path, **policy: object) -> None:
        env = {f"OOMSAFE_{name.upper()}": str(value) for name, value in policy.items()}
        script = EXAMPLES / "hypercorn_starlette" / "guarded.py"
        options = ["--workers", "2", "--bind", "127.0.0.1:0"]
        super().__init__(folder, [*ENDING_WITH_US, sys.executable, str(script), f"{script.parent / 'app.py'}:app", *options], env)

    def workers(self, master: int | None = None) -> list[int]:
        """Without multiprocessing's resource tracker."""
        return [worker.pid for worker in self.pool().workers]


def test_an_adapter_in_a_page(tmp_path: Path) -> None:
    """Of hypercorn: its workers are measured, scored, seen, and recycled one after the other, as CONTRIBUTING.md has it."""
    with Hypercorn(tmp_path, soft_limit="80MiB", min_lifetime=0) as hypercorn:
        hypercorn.serving()
        before = hypercorn.workers()
        scores = [int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (hypercorn.pid, *before)]

        def three() -> bool:
            try:
                return hypercorn.get("/leak/1024")[0] == 200 and len(hypercorn.lines(" recycling: ")) >= 3
            except ConnectionError:  # hypercorn's worker that ends drops what came just then, as its README says
                return False

        until(three, "three are recycled", 60)
        hypercorn.serving()

        assert [score - scores[0] for score in scores[1:]] == [300, 300]
        assert set(hypercorn.workers()).isdisjoint(before)
        assert sum(hypercorn.pool().totals.recycles) == len(hypercorn.lines(" recycling: "))
        assert not hypercorn.lines("oomsafe failed")
        assert not hypercorn.lines("Traceback")
        board = board_of(hypercorn.pid)
        assert board is not None
        assert hypercorn.stop() == 0
        assert not Path(board).exists()


def test_every_example_is_tested() -> None:
    """A new example wants a row above; Celery's is in test_celery_example.py."""
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == {
        "celery_redis", "gunicorn_django", "gunicorn_flask", "gunicorn_uvicorn_fastapi", "hypercorn_starlette",
        "uvicorn_starlette",
    }  # fmt: skip
