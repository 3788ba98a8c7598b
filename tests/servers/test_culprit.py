"""Who made a worker grow: the line about its end names the route that leaks, and nobody where that is not sure."""

from __future__ import annotations

import pytest
from clients import Load
from serving import CLASSES
from versions import loses_none


@pytest.mark.parametrize("worker_class", CLASSES)
def test_gunicorn_names_who_leaks_and_not_who_waits(serve, worker_class):
    """By equal shares of what grew while several were in flight, the one that waits would have had most of it."""
    loses_none(worker_class)
    gunicorn = serve(worker_class, soft_limit="160MiB", min_lifetime=0).serving()

    names_the_leak(gunicorn, slow="0.02" if worker_class == "sync" else "0.4")


def test_uvicorn_names_who_leaks_and_not_who_waits(serve_uvicorn):
    """As gunicorn's asyncio classes."""
    names_the_leak(serve_uvicorn(soft_limit="200MiB", min_lifetime=0).serving())


def names_the_leak(server, slow="0.4"):
    """Six recycles name it; none names another, and few name nobody: what a worker does in its first second may not tell enough."""
    with Load(server, f"/slow?s={slow}", clients=4), Load(server, "/leak?kib=200", clients=4) as load:
        server.wait_for("; GET /leak keeps about ", times=6, seconds=120)

    assert load.failed == []
    others = [line for line in server.lines(" recycling: ") if "; GET /leak keeps about " not in line]
    assert [line for line in others if not line.endswith(" requests")] == []
    assert len(others) <= 2
    # by path, because no framework tells its route: such a one counts as other
    assert server.pool().culprits["other"] >= 3
