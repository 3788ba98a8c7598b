"""Metrics in text: what prometheus_client reads out of it is what was put in."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from oomsafe.metrics.exposition import OPENMETRICS, PLAIN, expose
from oomsafe.metrics.families import Family, Sample, families_of
from oomsafe.metrics.http_server import Request, parse
from oomsafe.metrics.prometheus import MemoryCollector
from oomsafe.policy.state import State
from oomsafe.scoreboard.layout import BOUNDS, Counters
from oomsafe.scoreboard.slot import Figures
from oomsafe.scoreboard.view import PoolView, WorkerView

ROUTES = {"GET /a/{b}": [5 << 20, *range(len(BOUNDS) + 1)], 'GET /"\\n\\\n': [0, 1, *[0] * len(BOUNDS)]}


def pool() -> PoolView:
    """With a figure of each kind."""
    figures = Figures(rss=100 << 20, anon=90 << 20, soft=300 << 20)
    totals = Counters()
    totals.work, totals.routes = 12, ROUTES
    worker = WorkerView(3, 1, 1, 1, State.SERVING, figures, published=1.0, measured=1.0, used=90 << 20, counters=Counters(), in_flight=[])
    return PoolView("test", 0, 0, 1.0, 2, 1, 1 << 30, 900 << 20, [worker], totals, 1.5, 200 << 20, 7, "memory.max", 'the "shop"\n')


def test_what_the_alerts_need() -> None:
    """The limits that are refused, what each hard limit is compared with, how many workers there should be, and who was found out."""
    counted = replace(pool(), metric="rss", refused=["hard_limit"], droppable=5, culprits={"other": 0, "GET /a": 3})

    samples = {(family.name, *sample.labels.values()): sample.value for family in families_of(counted) for sample in family.samples}

    assert {limit: samples["oomsafe_limit_refused", limit] for limit in ("soft_limit", "hard_limit", "max_lifetime")} == {
        "soft_limit": 0, "hard_limit": 1, "max_lifetime": 0
    }  # fmt: skip
    assert samples["oomsafe_worker_memory_bytes", "3", "held"] == samples["oomsafe_worker_memory_bytes", "3", "rss"]
    assert samples["oomsafe_workers_wanted",] == 2
    assert samples["oomsafe_pool_droppable_bytes",] == 5
    assert (samples["oomsafe_culprits", "GET /a"], samples["oomsafe_culprits", "other"]) == (3, 0)


def test_it_says_what_prometheus_client_would() -> None:
    """In both formats, sample by sample."""
    registry = CollectorRegistry()
    registry.register(MemoryCollector(pool))

    for accept, kind, ours, theirs in (
        ("", PLAIN, parse_plain, generate_latest(registry)),
        (
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5",
            OPENMETRICS,
            parse_open,
            generate_openmetrics(registry),
        ),
    ):
        found, body = expose(families_of(pool()), accept)

        assert found == kind
        assert list(ours(body.decode())) == list(ours(theirs.decode()))
        assert {sample.labels["route"] for family in ours(body.decode()) for sample in family.samples if "route" in sample.labels} == set(
            ROUTES
        )


@given(st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text()), st.floats() | st.integers(-(1 << 53), 1 << 53))
def test_any_label_and_figure_comes_back(labels: dict[str, str], value: float) -> None:
    """Law: whatever stands in a label, it ends neither it nor the line."""
    family = Family("x", "gauge", "Of any kind: \\ and\nmore.", [Sample("", labels, value)])

    (found,) = parse_plain(expose([family])[1].decode())

    (sample,) = found.samples
    assert sample.labels == labels
    assert math.isnan(value) if math.isnan(sample.value) else sample.value == float(value)


@given(st.binary() | st.from_regex(rb"[A-Z]{1,8} [!-~]{1,20} HTTP/1\.[01](\n[A-Za-z-]{1,8}: [ -~]{0,8}){0,4}", fullmatch=True))
def test_any_head_is_read_or_refused(head: bytes) -> None:
    """Law: a request, or None."""
    request = parse(head.replace(b"\n\n", b"\n"))

    assert request is None or isinstance(request, Request)
    assert request is None or all(name == name.lower().strip() for name in request.headers)
