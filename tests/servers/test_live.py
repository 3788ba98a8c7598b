"""What is shown of a worker is what the kernel says of it, also while it is inside of one long request."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from serving import Gunicorn, until

from oomsafe.kernel.process import rss_of
from oomsafe.policy.units import MIB

APP = """
import os, time
from oomsafe.metrics.prometheus import metrics_app

KEPT = []

def wsgi(environ, start_response):
    if environ["PATH_INFO"] == "/metrics":
        return metrics_app(environ, start_response)
    while environ["PATH_INFO"] == "/grow" and not os.path.exists("enough"):
        KEPT.append(b"x" * (1 << 20))
        time.sleep(0.05)
    start_response("200 OK", [])
    return [b""]
"""


@pytest.fixture
def growing(serve: Callable[..., Gunicorn]) -> Iterator[Gunicorn]:
    """Two sync workers, one of which grows by up to 20 MiB a second inside one request, until a file is there."""
    gunicorn = serve("sync", app="growing:wsgi", files={"growing.py": APP}, soft_limit="8GiB").serving()
    request = threading.Thread(target=gunicorn.get, args=("/grow",))
    request.start()
    yield gunicorn
    os.kill(gunicorn.pid, signal.SIGCONT)
    (gunicorn.folder / "enough").touch()
    request.join(20)


def grower(gunicorn: Gunicorn) -> tuple[int, int]:
    """(pid, slot) of the worker that is inside of it."""

    def found() -> list[tuple[int, int]]:
        return [(w.pid, w.slot) for w in gunicorn.pool().workers if any(work.name == "GET /grow" for work in w.in_flight)]

    return until(found, "the request is in flight")[0]


def blind(gunicorn: Gunicorn) -> None:
    """Its supervisor stands still: nothing is new on its scoreboard."""
    os.kill(gunicorn.pid, signal.SIGSTOP)


def resident(pid: int) -> int:
    """What the kernel says."""
    return rss_of(pid) or pytest.fail("it has ended")


def test_status_shows_what_the_kernel_shows(growing: Gunicorn) -> None:
    """Within a tenth of what /proc says right before and right after; and the growth of the request, which is nearly all of it."""
    pid, _ = grower(growing)
    began, path = resident(pid), growing.pool_path()
    blind(growing)
    for grown in (60, 120):
        until(lambda grown=grown: resident(pid) > began + grown * MIB, "it grows", 60)
        before = resident(pid)
        command = [sys.executable, "-m", "oomsafe.cli", "status", "--json", "--scoreboard", path]
        (pool,) = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)["pools"]
        after = resident(pid)

        (shown,) = [worker for worker in pool["workers"] if worker["pid"] == pid]
        assert 0.9 * before <= shown["figures"]["rss"] <= 1.1 * after
        assert shown["measured"] > shown["published"] + 1
        assert shown["used"] - shown["figures"]["baseline"] == pytest.approx(shown["figures"]["rss"] - began, abs=16 * MIB)
        assert shown["in_flight"][0]["grown"] == pytest.approx(shown["figures"]["rss"] - began, abs=16 * MIB)


def test_metrics_rise_with_it(growing: Gunicorn) -> None:
    """As another worker tells them, within a tenth of what /proc says."""
    pid, slot = grower(growing)
    blind(growing)
    began = resident(pid)
    for grown in (60, 120):
        until(lambda grown=grown: resident(pid) > began + grown * MIB, "it grows", 60)
        before = resident(pid)
        answer = growing.get("/metrics")[2].decode()
        told = re.search(rf'^oomsafe_worker_memory_bytes{{kind="rss",worker="{slot}"}} (.+)$', answer, re.MULTILINE)

        assert told is not None, answer
        assert 0.9 * before <= float(told[1]) <= 1.1 * resident(pid)


def test_the_supervisor_follows_it(growing: Gunicorn) -> None:
    """On the scoreboard, too, it rises again and again, while the worker itself says nothing."""
    pid, _ = grower(growing)
    published = growing.worker(pid).published
    risen = [growing.worker(pid)]
    for _ in range(3):
        until(lambda: (growing.worker(pid).measured or 0) > (risen[-1].measured or 0), "the supervisor has looked")
        risen.append(growing.worker(pid))

    assert {worker.published for worker in risen} == {published}
    sizes = [worker.figures.rss or 0 for worker in risen]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= 3
