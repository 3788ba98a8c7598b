"""Fixtures that all rooms share: real servers, ended with all their processes, their logs shown when the test fails."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from brokers import RabbitMQ, Redis, rabbitmq_binary, redis_binary
from celerying import CeleryWorker, Start
from certificates import Certificate
from needs import need
from serving import Gunicorn, Server, app_for, conf
from uvicorning import Uvicorn
from versions import has_class

Serve = Callable[..., Gunicorn]
Started = Callable[[Callable[[Path], Server]], Any]


@pytest.fixture
def started(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Started]:
    """Start a server in a folder of its own: started(lambda folder: Gunicorn(folder, ...))."""
    servers: list[Server] = []
    with ExitStack() as stack:

        def start(make: Callable[[Path], Server]) -> Server:
            folder = tmp_path / f"server-{len(servers)}"
            folder.mkdir()
            servers.append(make(folder))
            return stack.enter_context(servers[-1])

        yield start
        for server in servers:
            # shown with the failure of the call, which has its own report behind it by now
            request.node.add_report_section("teardown", f"log of {type(server).__name__} {server.pid}", server.log())
    left = [path for server in servers for path in _boards(server.pid)]
    for path in left:
        os.unlink(path)


@pytest.fixture
def serve(started: Started) -> Serve:
    """Start gunicorn: serve("gthread", soft_limit="64MiB"), as conf(); serve(text=..., app=..., argv=..., env=..., files=...)."""

    def start(
        worker_class: str = "sync", workers: int = 2, *, text: str | None = None, app: str | None = None, settings: str = "",
        install: bool = True, argv: Any = (), env: dict[str, str] | None = None, prefix: Any = (), wrap: Any = list,
        files: Any = (), **policy: object,
    ) -> Gunicorn:  # fmt: skip
        has_class("asgi" if "asgi" in argv else worker_class)
        configuration = conf(worker_class, workers, settings=settings, install=install, **policy) if text is None else text

        def make(folder: Path) -> Gunicorn:
            _write(folder, files)
            return Gunicorn(folder, configuration, app or app_for(worker_class), argv=argv, env=env, prefix=prefix, wrap=wrap)

        gunicorn: Gunicorn = started(make)
        return gunicorn

    return start


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """For a server that speaks TLS."""
    return Certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def serve_uvicorn(started: Started) -> Callable[..., Uvicorn]:
    """Start uvicorn with 2 workers: serve_uvicorn("--loop", "uvloop", soft_limit="64MiB", app=..., start=..., env=..., files=...)."""

    def start(*argv: str, workers: int = 2, app: str = "uvicorn_apps:asgi", files: Any = (), **more: Any) -> Uvicorn:
        def make(folder: Path) -> Uvicorn:
            _write(folder, files)
            return Uvicorn(folder, app, *(["--workers", str(workers)] if app else []), *argv, **more)

        uvicorn: Uvicorn = started(make)
        return uvicorn

    return start


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """One for all tests here."""
    need(redis_binary() is not None, "redis-server is not installed")
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """One for all tests here."""
    need(rabbitmq_binary() is not None, "rabbitmq-server is not installed")
    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture
def celery(redis: Redis, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start a node: celery("redis", soft_limit="100MiB"); `env`, `argv` and `conf` besides; `queue` is one that another node has."""
    nodes: list[CeleryWorker] = []

    def start(
        broker: str = "redis", *, env: dict[str, str] | None = None, argv: tuple[str, ...] = (), conf: dict[str, Any] | None = None,
        install: bool = True, queue: str | None = None, wrap: Any = list, **policy: object,
    ) -> CeleryWorker:  # fmt: skip
        environ = {**({"POLICY": json.dumps(policy)} if install else {}), **(env or {})}
        url = {
            "redis": lambda: redis.url(0),
            "rabbitmq": lambda: request.getfixturevalue("rabbitmq").url,
            "filesystem": lambda: "filesystem://",
        }[broker]()
        folder = tmp_path / f"node-{len(nodes)}"
        folder.mkdir()
        # tests share the broker
        queue = queue or f"q{os.getpid()}-{id(tmp_path)}-{len(nodes)}"
        settings = {"task_default_queue": queue, **(conf or {})}
        nodes.append(CeleryWorker(folder, url, redis.url(1), shared=tmp_path, env=environ, argv=argv, conf=settings, wrap=wrap))
        return nodes[-1]

    yield start
    for node in nodes:
        node.end()
        request.node.add_report_section("teardown", f"log of node {node.pid}", node.log())


def _write(folder: Path, files: Any) -> None:
    for name, content in dict(files).items():
        (folder / name).write_text(content)


def _boards(pid: int) -> list[str]:
    folder = f"/dev/shm/oomsafe-{os.geteuid()}"
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [f"{folder}/{name}" for name in names if name.startswith(f"{pid}-")]
