"""A pool's name: its user's, else what its server knows; at boot, in status and in the metrics."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from celerying import Start
from serving import Gunicorn, until
from uvicorning import Uvicorn

from oomsafe.scoreboard.places import board_of

METRICS = """
from oomsafe.metrics.prometheus import metrics_app as wsgi
"""


def named(server: Any, *, workers: int = 2) -> str:
    """What `oomsafe status` calls its pool, for a machine; for a person, and at boot, it has the same name."""
    asked = [sys.executable, "-m", "oomsafe.cli", "status", "--scoreboard", until(lambda: board_of(server.pid), "it has a scoreboard")]
    told = subprocess.run([*asked, "--json"], capture_output=True, text=True, check=True, timeout=60)
    (pool,) = json.loads(told.stdout)["pools"]
    name = str(pool["name"])
    text = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout
    assert text.startswith(f"{name} · {pool['server']} · supervisor {server.pid}" if name else f"{pool['server']} · ")
    assert f"oomsafe guards {workers} workers{f' ({name})' if name else ''}: soft limit" in server.log()
    return name


@pytest.mark.parametrize(
    ("settings", "policy", "expected"),
    [
        pytest.param("", {}, "apps:wsgi", id="the app"),
        pytest.param("proc_name = 'the shop'", {}, "the shop", id="proc_name"),
        pytest.param("proc_name = 'the shop'", {"name": "the new shop"}, "the new shop", id="keyword"),
        pytest.param("proc_name = 'x\\x1b[2J' + 99 * '\u00fc'", {}, "x?[2J" + 29 * "\u00fc", id="hostile"),
    ],
)
def test_gunicorn(serve: Callable[..., Gunicorn], settings: str, policy: dict[str, str], expected: str) -> None:
    """gunicorn's own name for it is made printable, and shortened to 64 bytes."""
    assert named(serve(settings=settings, **policy).serving()) == expected


def test_one_that_cannot_be_right(serve: Callable[..., Gunicorn]) -> None:
    """One line on stderr; gunicorn does not start."""
    gunicorn = serve(env={"OOMSAFE_NAME": "x\x1b[2J"})

    assert gunicorn.ended() != 0
    assert gunicorn.lines("OOMSAFE_NAME=")[0] == (
        "oomsafe: OOMSAFE_NAME='x\\x1b[2J' is not a name of printable characters; a correct example: OOMSAFE_NAME=\"shop\""
    )


def test_metrics_have_it(serve: Callable[..., Gunicorn]) -> None:
    """In a metric of its own, to be joined."""
    gunicorn = serve(app="measured:wsgi", files={"measured.py": METRICS}, name='a "shop"').serving()

    text = gunicorn.get("/")[2].decode()

    assert 'oomsafe_pool_info{name="a \\"shop\\"",server="gunicorn sync"} 1.0' in text


def test_uvicorn(serve_uvicorn: Callable[..., Uvicorn]) -> None:
    """The app's import path."""
    assert named(serve_uvicorn().serving()) == "uvicorn_apps:asgi"


def test_celery(celery: Start) -> None:
    """The node's hostname."""
    node = celery(argv=("-n", "shop@%h"))
    node.ready()

    assert named(node) == f"shop@{socket.gethostname()}"
