"""Which line leaks, from what a tracer found alive: the app's line, not its libraries'; its routes; and bytes for each of their calls."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.policy.probe import ROWS, Alive, Endpoint, Frame, Report, Window, named_in, report_of

STDLIB = "/usr/lib/python3.13/"
PACKAGES = f"{STDLIB}site-packages/"
LIBRARY = (STDLIB, f"{PACKAGES}oomsafe/worker/")

VIEW = Frame("/srv/app/views.py", 20, "leak")
HELPER = Frame("/srv/app/kept.py", 5, "keep")
FLASK = Frame(f"{PACKAGES}flask/app.py", 900, "dispatch_request")
JSON = Frame(f"{STDLIB}json/decoder.py", 353, "raw_decode")
SQL = Frame(f"{PACKAGES}sqlalchemy/orm/loading.py", 70, "load")
IMPORT = Frame("<frozen importlib._bootstrap_external>", 940, "exec_module")
OURS = Frame(f"{PACKAGES}oomsafe/worker/meter.py", 400, "begin")

ENDPOINTS = [Endpoint("/srv/app/views.py", 18, 24, "GET /leak"), Endpoint("/srv/app/views.py", 30, 34, "GET /other")]


def window(**more: Any) -> Window:
    how: dict[str, Any] = {
        "pid": 812, "slot": 3, "at": 1000.0, "tool": "memray 1.20.0", "why": "60 s were over", "unit": "requests", "work": 1000,
        "seconds": 60.0, "in_flight": 0, "grown": None, "kept_free": None, "slower": None, **more,
    }  # fmt: skip
    return Window(**how)


def judged(*alive: Alive, calls: dict[str, int] | None = None, endpoints: list[Endpoint] = ENDPOINTS, **more: Any) -> Report:
    return report_of(window(**more), alive, endpoints, {"GET /leak": 100, "GET /other": 900} if calls is None else calls, LIBRARY)


@pytest.mark.parametrize(
    ("stack", "where"),
    [
        ((HELPER, VIEW, FLASK), "app/kept.py:5 in keep"),
        ((JSON, HELPER, VIEW, FLASK), "app/kept.py:5 in keep"),
        ((SQL, JSON, VIEW, FLASK), "app/views.py:20 in leak"),
        ((JSON, SQL, FLASK), "orm/loading.py:70 in load"),
        ((OURS, FLASK), "flask/app.py:900 in dispatch_request"),
        ((JSON,), "json/decoder.py:353 in raw_decode"),
    ],
)
def test_the_line_is_the_apps_own(stack: tuple[Frame, ...], where: str) -> None:
    """Else that of a package, else what there is."""
    assert judged(Alive(6_553_600, 100, stack)).rows[0].where == where


def test_an_app_that_is_installed_is_an_app() -> None:
    """Its endpoints say which package it is."""
    inside = Frame(f"{PACKAGES}shop/cart.py", 7, "add")
    endpoint = Endpoint(f"{PACKAGES}shop/api.py", 1, 9, "POST /cart")

    report = judged(Alive(1 << 20, 1, (JSON, SQL, inside, Frame(f"{PACKAGES}shop/api.py", 3), FLASK)), endpoints=[endpoint])

    assert report.rows[0].where == "shop/cart.py:7 in add"
    assert report.rows[0].routes == ("POST /cart",)


def test_bytes_are_for_each_call_of_its_route() -> None:
    """64 KiB of each of a hundred calls, among a thousand."""
    report = judged(Alive(6_553_600, 100, (HELPER, VIEW, FLASK)), Alive(900, 9, (Frame("/srv/app/views.py", 31, "other"), FLASK)))

    assert report.brief == "app/kept.py:5 in keep keeps 64.0 KiB a call of GET /leak"
    assert report.ruled_out == (
        "the next line keeps 900 B",
        "under the endpoints of the other routes that were called (1), nothing much is kept",
    )


def test_without_endpoints_they_are_for_each_request() -> None:
    """What no framework names."""
    report = judged(Alive(6_553_600, 100, (HELPER,)), endpoints=[], calls={})

    assert report.brief == "app/kept.py:5 in keep keeps 6.4 KiB a request"


def test_a_route_whose_calls_are_not_counted() -> None:
    """The table of routes was full."""
    report = judged(Alive(6_553_600, 100, (HELPER, VIEW)), calls={"GET /other": 900})

    assert report.brief == "app/kept.py:5 in keep keeps 6.4 KiB a request (under GET /leak)"


def test_a_helper_of_two_routes() -> None:
    """It is divided by the calls of both."""
    other = Frame("/srv/app/views.py", 31, "other")
    report = judged(Alive(1 << 20, 100, (HELPER, VIEW)), Alive(1 << 20, 100, (HELPER, other)))

    (row,) = report.rows
    assert row.routes == ("GET /leak", "GET /other")
    assert row.each == (2 << 20) / 1000


def test_a_method_that_was_not_called_is_not_named() -> None:
    """A view serves several."""
    endpoints = [*ENDPOINTS, Endpoint("/srv/app/views.py", 18, 24, "DELETE /leak")]

    assert judged(Alive(6_553_600, 100, (HELPER, VIEW)), endpoints=endpoints).rows[0].routes == ("GET /leak",)


def test_an_import_is_no_leak() -> None:
    """However much it has loaded."""
    report = judged(Alive(50 << 20, 9, (Frame("/srv/app/model.py", 1, "<module>"), IMPORT, VIEW)), Alive(6_553_600, 100, (HELPER, VIEW)))

    assert report.brief.startswith("app/kept.py:5")
    assert report.ruled_out[0] == "50.0 MiB were allocated by imports, which happen once"


@pytest.mark.parametrize(("size", "work"), [(60_000, 1000), (6_553_600, 1_000_000)])
def test_a_little_is_no_leak(size: int, work: int) -> None:
    """In all, or for each of very many requests."""
    report = judged(Alive(size, 100, (HELPER,)), endpoints=[], calls={}, work=work)

    assert report.first is None
    assert report.brief == ""
    assert named_in(report).startswith("no line keeps enough to be called a leak, most has app/kept.py:5 in keep: ")


def test_what_the_tracer_does_not_see_is_said() -> None:
    """Growth that is no memory in use, and work in flight."""
    report = judged(Alive(100_000, 1, (HELPER,)), grown=90 << 20, kept_free=80 << 20, in_flight=2)

    assert any(
        line.startswith("the process grew by 90.0 MiB in the window") and "80.0 MiB of free memory" in line for line in report.ruled_out
    )
    assert any(line.startswith("2 requests had not ended when this was counted") for line in report.ruled_out)


FRAMES = st.builds(
    Frame,
    st.sampled_from(["/srv/app/views.py", f"{PACKAGES}flask/app.py", f"{STDLIB}json/decoder.py", "<frozen abc>", "<string>", ""]),
    st.integers(0, 40),
    st.sampled_from(["", "leak", "\x1b[2J"]),
)
ALIVE = st.builds(Alive, st.integers(0, 1 << 40), st.none() | st.integers(1, 1000), st.lists(FRAMES, max_size=6).map(tuple))


@given(
    st.lists(ALIVE, max_size=40),
    st.integers(0, 10**6),
    st.dictionaries(st.sampled_from(["GET /leak", "GET /other"]), st.integers(0, 10**6)),
)
def test_laws(alive: list[Alive], work: int, calls: dict[str, int]) -> None:
    """Nothing is counted twice, and no text of the app's reaches a terminal as it is."""
    report = judged(*alive, calls=calls, work=work)

    assert report.alive == sum(one.size for one in alive)
    assert sum(row.size for row in report.rows) <= report.alive
    assert len(report.rows) <= ROWS
    own = [row for row in report.rows if not row.loads]
    assert [row.size for row in own] == sorted((row.size for row in own), reverse=True)
    assert named_in(report).isprintable()
