"""Prometheus metrics of a real pool: any worker answers for all, and counters never go backwards."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from exporting import Samples, exporter, samples_in, value
from exporting import scrape as scrape_at
from serving import Gunicorn, conf, until

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
    # two workers that meet at the list of names have one count its request under another, this once
    counted = sum(value(samples, "oomsafe_request_memory_growth_bytes_count", route=route) for route in ("unmatched", "other"))
    assert counted == value(samples, "oomsafe_requests_total")
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


DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def documented(page: Path, text: str) -> str:
    """The one block of Python on this page that holds `text`."""
    (code,) = [block for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S) if text in block]
    return str(code)


#: Serves what docs/metrics.md has, and beside it the app.
BOTH = """
import os
from prometheus_client import Gauge
import apps
from documented import ORDERS, metrics

LIVE = Gauge("shop_live", "Workers that serve.", multiprocess_mode="livesum")

def app(environ, start_response):
    if environ["PATH_INFO"] == "/metrics":
        return metrics(environ, start_response)
    ORDERS.inc()
    LIVE.set(1)
    return apps.wsgi(environ, start_response)
"""


def test_beside_the_multiprocess_mode_of_prometheus_client(serve: Callable[..., Gunicorn], tmp_path: Path) -> None:
    """As it is documented: one answer has the app's own counts, of workers that were recycled, too, and ours once; no file is ours."""
    folder = tmp_path / "multiprocess"
    folder.mkdir()
    hook = documented(DOCS, "mark_process_dead").replace('soft_limit="300MiB"', 'soft_limit="48MiB", min_lifetime=0, reclaim=False')
    gunicorn = serve(
        text=conf("sync", install=False) + hook,
        app="both:app",
        files={"documented.py": documented(DOCS, "MultiProcessCollector"), "both.py": BOTH},
        env={"PROMETHEUS_MULTIPROC_DIR": str(folder), "OOMSAFE_METRICS": "127.0.0.1:0"},
    ).serving()
    asked = 0
    while len(gunicorn.lines("recycling: ")) < 4:
        assert gunicorn.get("/leak?kib=1024")[0] == 200
        asked += 1
    recycled = sum(gunicorn.pool().totals.recycles)
    until(lambda: sum(gunicorn.pool().totals.recycles) >= 4 and sorted(gunicorn.workers())[2:], "four are gone and others there")
    gunicorn.serving()

    text = gunicorn.get("/metrics")[2].decode()
    samples = samples_in(text)  # which finds what is there twice

    assert recycled > 0
    assert value(samples, "shop_orders_total") == asked
    assert value(samples, "oomsafe_recycles_total", reason="soft_limit") >= 4
    assert value(samples, "oomsafe_workers", state="serving") == 2
    assert 0 <= value(samples, "shop_live") <= 2
    beside = scrape_at(exporter(gunicorn)[1])
    assert {name for name, _ in beside} == {name for name, _ in samples if name.startswith("oomsafe_")}
    kinds = {path.name.rpartition("_")[0] for path in folder.iterdir()}
    assert kinds <= {"counter", "gauge_livesum"}
    live = {int(path.stem.rpartition("_")[2]) for path in folder.glob("gauge_livesum_*")}
    assert live <= {worker.pid for worker in gunicorn.pool().workers}


DJANGO = """
from django.conf import settings
settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF="urls", SECRET_KEY="only a test", MIDDLEWARE=[])
from django.core.wsgi import get_wsgi_application
app = get_wsgi_application()
"""


@pytest.mark.parametrize(
    ("worker_class", "text", "files"),
    [
        ("sync", "DispatcherMiddleware", {}),
        ("uvicorn_worker.UvicornWorker", "add_route", {}),
        ("sync", "urlpatterns", {"app.py": DJANGO}),
    ],
    ids=["flask", "fastapi", "django"],
)
def test_mounted_as_the_readme_has_it(serve: Callable[..., Gunicorn], worker_class: str, text: str, files: dict[str, Any]) -> None:
    """At /metrics, not one step beside it."""
    code = documented(DOCS.parents[1] / "README.md", text)
    gunicorn = serve(worker_class, app="app:app", files={"urls.py" if files else "app.py": code, **files}, soft_limit="300MiB").serving()

    samples = scrape(gunicorn)

    assert value(samples, "oomsafe_workers", state="serving") == 2
