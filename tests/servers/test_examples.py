"""Every example, started as its README says and exercised over its own routes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from serving import Gunicorn, until

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(serve: Callable[..., Gunicorn]) -> Callable[[str], Gunicorn]:
    def start(name: str) -> Gunicorn:
        folder = EXAMPLES / name
        argv = ["-c", str(folder / "oomsafe.conf.py"), "--chdir", str(folder), "-b", "127.0.0.1:0", "--no-control-socket"]
        return serve(argv=argv, app="app:app").serving()

    return start


@pytest.mark.parametrize(
    ("name", "leak", "route"),
    [
        ("gunicorn_flask", "/leak/1024", "/leak/<int:kib>"),
        ("gunicorn_uvicorn_fastapi", "/leak/1024", "/leak/{kib}"),
        ("gunicorn_uvicorn_fastapi", "/threaded-leak/1024", "/threaded-leak/{kib}"),
    ],
)
def test_example_recycles_its_leaking_workers(example: Callable[[str], Gunicorn], name: str, leak: str, route: str) -> None:
    """One client after the other, all are answered, workers are recycled, and the metrics name the route."""
    gunicorn = example(name)
    assert gunicorn.get("/")[0] == 200

    asked = 0

    def recycled() -> int:
        nonlocal asked
        asked += 1
        status, headers, _ = gunicorn.get(leak)
        assert status == 200
        assert int(headers["x-memory-rss"]) > 10 << 20
        return sum(gunicorn.pool().totals.recycles)

    until(recycled, "a worker is recycled", 60)
    metrics = until(lambda: f'route="{route}"' in (text := metrics_of(gunicorn)) and text, "the route is in the metrics")

    assert 'oomsafe_recycles_total{reason="soft_limit"}' in metrics
    assert asked > 30
    assert gunicorn.process.poll() is None


def metrics_of(gunicorn: Gunicorn) -> str:
    # Starlette redirects a mount without a slash at its end
    return gunicorn.get("/metrics/")[2].decode()


def test_every_example_is_tested() -> None:
    """A new example wants a row above."""
    assert {path.name for path in EXAMPLES.iterdir() if path.is_dir()} == {"gunicorn_flask", "gunicorn_uvicorn_fastapi"}
