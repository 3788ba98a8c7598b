"""Prometheus metrics of a real pool: any worker answers for all, and counters never go backwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from exporting import Samples, samples_in, value
from serving import Gunicorn, until

APP = """
from apps import {inner} as inner
from oomsafe.metrics.prometheus import metrics_app

def wsgi(environ, start_response):
    return (metrics_app if environ["PATH_INFO"] == "/metrics" else inner)(environ, start_response)

async def asgi(scope, receive, send):
    await (metrics_app if scope.get("path") == "/metrics" else inner)(scope, receive, send)
"""


def scrape(gunicorn: Gunicorn) -> Samples:
    status, headers, body = gunicorn.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    return samples_in(body.decode())


@pytest.fixture
def measured(serve: Callable[..., Gunicorn]) -> Callable[..., Gunicorn]:
    def start(worker_class: str, **policy: object) -> Gunicorn:
        kind = "wsgi" if worker_class in ("sync", "gthread", "gevent") else "asgi"
        settings = f"import pathlib; pathlib.Path('measured.py').write_text({APP.format(inner=kind)!r})"
        return serve(worker_class, app=f"measured:{kind}", settings=settings, **policy).serving()

    return start


@pytest.mark.parametrize("worker_class", ["sync", "gevent", "asgi", "uvicorn_worker.UvicornWorker"])
def test_any_worker_answers_for_the_whole_pool(measured: Callable[..., Gunicorn], worker_class: str) -> None:
    """Requests to one worker are counted by whichever worker is asked."""
    gunicorn = measured(worker_class, soft_limit="1GiB")
    pids = {int(gunicorn.get("/pid")[2]) for _ in range(20)}

    samples = until(lambda: (found := scrape(gunicorn)) and value(found, "oomsafe_requests_total") >= 20 and found, "20 are counted")

    assert value(samples, "oomsafe_workers", state="serving") == 2
    assert value(samples, "oomsafe_worker_limit_bytes", worker="0", kind="soft") <= 1 << 30
    for slot, pid in ((str(worker.slot), worker.pid) for worker in gunicorn.pool().workers):
        assert value(samples, "oomsafe_worker_memory_bytes", worker=slot, kind="rss") > 5 << 20, pid
    assert value(samples, "oomsafe_request_memory_growth_bytes_count", route="unmatched") == value(samples, "oomsafe_requests_total")
    assert pids <= {worker.pid for worker in gunicorn.pool().workers}


def test_counters_outlive_their_workers(measured: Callable[..., Gunicorn]) -> None:
    """Over recycles and a SIGKILL, no counter of the pool ever falls."""
    gunicorn = measured("sync", soft_limit="48MiB", min_lifetime=0, reclaim=False)
    before = scrape(gunicorn)
    names = [key for key in before if key[0].endswith(("_total", "_count", "_sum", "_bucket"))]

    # which worker is handed a request is the kernel's choice: so many as it takes for recycles between the kills
    for round_ in range(600):
        if round_ >= 120 and value(before, "oomsafe_recycles_total", reason="soft_limit") >= 2:
            break
        gunicorn.get("/leak?kib=1024")
        if round_ in (20, 60, 100):
            # one that is ending already would not be missed
            serving = until(lambda: [worker.pid for worker in gunicorn.pool().workers if worker.state == "serving"], "one serves")
            os.kill(serving[0], signal.SIGKILL)
            gunicorn.wait_for("SIGKILL", times=round_ // 40 + 1)
        after = scrape(gunicorn)
        fallen = {name: (before[name], after[name]) for name in names if after[name] < before[name]}
        assert fallen == {}
        before = after

    assert value(before, "oomsafe_recycles_total", reason="soft_limit") >= 2
    assert len(gunicorn.lines("recycling:")) >= value(before, "oomsafe_recycles_total", reason="soft_limit")


def test_growth_is_a_histogram_with_the_leak_in_its_sum(measured: Callable[..., Gunicorn]) -> None:
    """Forty requests that keep 1 MiB each are forty samples above 256 KiB, and 40 MiB in the sum."""
    gunicorn = measured("sync", soft_limit="1GiB")
    for _ in range(40):
        gunicorn.get("/leak?kib=1024")

    name = "oomsafe_request_memory_growth_bytes"

    def grown() -> tuple[float, float]:
        """How many samples are above 256 KiB (the scrapes themselves are not), and the sum."""
        samples = scrape(gunicorn)
        small = value(samples, f"{name}_bucket", route="unmatched", le=str(float(256 << 10)))
        return value(samples, f"{name}_count", route="unmatched") - small, value(samples, f"{name}_sum", route="unmatched")

    until(lambda: grown()[0] >= 38, "the leaking requests of both workers are counted")

    assert 38 << 20 <= grown()[1] <= 60 << 20
