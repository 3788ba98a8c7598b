"""Brokers and Celery nodes for the tests here: real ones, ended with all their processes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celerying import CeleryWorker, Redis, Start
from needs import need
from rabbitmq import RabbitMQ, server_binary


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """One for all tests here."""
    need(shutil.which("redis-server") is not None, "redis-server is not installed")
    server = Redis(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """One for all tests here."""
    need(server_binary() is not None, "rabbitmq-server is not installed")
    server = RabbitMQ(tmp_path_factory.mktemp("rabbitmq"))
    yield server
    server.stop()


@pytest.fixture
def celery(redis: Redis, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Start]:
    """Start a node: celery("redis", soft_limit="100MiB"); `env`, `argv` and `conf` besides; `queue` is one that another node has."""
    nodes: list[CeleryWorker] = []

    def start(
        broker: str = "redis", *, env: dict[str, str] | None = None, argv: tuple[str, ...] = (), conf: dict[str, Any] | None = None,
        install: bool = True, queue: str | None = None, **policy: object,
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
        nodes.append(CeleryWorker(folder, url, redis.url(1), shared=tmp_path, env=environ, argv=argv, conf=settings))
        return nodes[-1]

    yield start
    for node in nodes:
        node.__exit__()
        request.node.add_report_section("teardown", f"log of node {node.pid}", node.log())
