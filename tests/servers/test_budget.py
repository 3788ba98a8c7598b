"""A pool above its budget recycles workers that are all below their soft limits; and does not where that can't help."""

from __future__ import annotations

import pytest
from clients import Load
from serving import until

POLICY = {"soft_limit": "300MiB", "min_lifetime": 0, "jitter": 0, "reclaim": False}

#: What the line about a worker that goes for the budget says.
FOR_BUDGET = " recycling: by its supervisor's order, for the pool's budget: "


def start(serve, serve_uvicorn, kind: str, **policy: object):
    """Four workers with this policy."""
    if kind == "uvicorn":
        return serve_uvicorn(workers=4, app="apps:asgi", **POLICY, **policy).serving(4)
    return serve(kind, 4, **POLICY, **policy).serving(4)


@pytest.mark.parametrize("kind", ["sync", "uvicorn"])
def test_workers_below_their_limits_go_until_the_pool_is_within_its_budget(serve, serve_uvicorn, kind: str) -> None:
    """Four of 150 MiB, each of which may hold 300, and a budget of 500 for all: two have to go, one after the other."""
    server = start(serve, serve_uvicorn, kind, budget="500MiB")
    before = set(server.workers())
    with Load(server, "/leak?kib=0&s=0.01", clients=2) as load:
        until(lambda: grow(server, 150), "enough of them have grown", 40, pause=0)
        server.wait_for(FOR_BUDGET)
        until(lambda: (server.pool().held or 0) < (500 << 20), "it is within its budget")
        server.serving(4)

    assert load.failed == []
    gone = len(before - set(server.workers()))
    assert 1 <= gone <= 3
    assert server.pool().totals.by_reason == {
        "soft_limit": 0, "hard_limit": 0, "replaced": 0, "max_lifetime": 0, "killed": 0, "operator": 0, "probed": 0,
        "budget": len(server.lines(FOR_BUDGET)),
    }  # fmt: skip
    assert len(server.lines(" > budget 500 MiB: the worker in slot ")) == len(server.lines(FOR_BUDGET))
    assert not server.lines("recycling does not help")


def grow(server, mib: int) -> bool:
    """One request that has its worker hold so much. Whether the pool has recycled one for it."""
    assert server.get(f"/fill?mib={mib}")[0] == 200
    return bool(server.lines(FOR_BUDGET))


@pytest.mark.parametrize("kind", ["sync", "uvicorn"])
def test_fresh_workers_above_the_budget_are_said_once_and_left_alone(serve, serve_uvicorn, kind: str) -> None:
    """Recycling them would never end."""
    server = start(serve, serve_uvicorn, kind, budget="30MiB")
    before = set(server.workers())

    (line,) = server.wait_for("and recycling does not help: with 4 workers fresh from their boot it would hold ")
    for _ in range(8):
        server.get("/leak?kib=2048")
    until(lambda: sum(w.counters.work for w in server.pool().workers) >= 8, "they have published that")

    assert " > budget 30.0 MiB, " in line
    assert set(server.workers()) == before
    assert len(server.lines("and recycling does not help")) == 1
    assert not server.lines("recycling:")


def test_a_dry_run_says_who_would_go(serve, serve_uvicorn) -> None:
    """And nobody goes."""
    server = start(serve, serve_uvicorn, "sync", budget="300MiB", dry_run=True)
    before = set(server.workers())

    until(lambda: server.get("/fill?mib=150")[0] == 200 and server.lines("would be recycled (dry run): it has "), "it is said", 40)

    assert set(server.workers()) == before
    assert not server.lines("recycling:")
    assert server.pool().totals.by_reason["budget"] >= 1
