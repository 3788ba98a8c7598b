"""Workers that have served their time: replaced by the clock, with nobody noticing."""

from __future__ import annotations

import re

import pytest
from celerying import Start
from clients import Load, Watch
from serving import Gunicorn, Server, until
from uvicorning import health_check
from versions import loses_none

#: Far above what a boot takes, on a machine that is shared.
LIFETIME = 5.0

LINE = re.compile(
    r"worker (?P<pid>\d+) \(slot \d+\) recycling: served for (?P<served>[\d.]+) s > max_lifetime (?P<own>[\d.]+) s( \(of 5 s, jitter\))?, "
    r"after (?P<work>\d+) (requests?|tasks?)$"
)


def states(server: Server) -> list[str]:
    """What each worker does at this moment."""
    return [worker.state.value for worker in server.pool().workers]


def recycled(server: Server, times: int) -> list[re.Match[str]]:
    """Wait for so many of its workers to go for their age; the line of each."""
    lines = server.wait_for("> max_lifetime", times, seconds=120)
    found = [line for text in lines if (line := LINE.search(text))]
    assert len(found) == len(lines), lines
    # it looks once a second
    assert all(float(line["own"]) * 0.99 <= float(line["served"]) for line in found), lines
    assert all(LIFETIME * 0.9 <= float(line["own"]) <= LIFETIME for line in found), lines
    return found


def serves_all_the_while(server: Server, workers: int = 2) -> None:
    """Under load, at least five of its workers go, each after another serves in its place, and no request is lost."""
    with Watch(lambda: (states(server), len(server.workers()))) as watch, Load(server, "/?") as load:
        recycled(server, 5)

    assert load.failed == []
    assert load.served > 100
    assert [seen for seen, _ in watch.seen if seen.count("serving") + seen.count("waiting") < workers] == []
    assert max(processes for _, processes in watch.seen) in (workers + 1, workers + 2)
    assert server.pool().unserved == 0
    until(
        lambda: server.pool().totals.by_reason["max_lifetime"] == len(server.lines("> max_lifetime")), "the scoreboard agrees with the log"
    )
    assert sum(server.pool().totals.recycles) == server.pool().totals.by_reason["max_lifetime"]


@pytest.mark.parametrize("worker_class", ["sync", "gthread", "asgi", "uvicorn_worker.UvicornWorker"])
def test_gunicorn_s_workers_are_replaced_by_the_clock(serve, worker_class):
    """The replacement first, and no request is lost; the line at boot says when."""
    loses_none(worker_class)
    gunicorn = serve(worker_class, soft_limit="1GiB", min_lifetime=0, max_lifetime="5s").serving()

    serves_all_the_while(gunicorn)

    assert "soft limit 1.0 GiB each, max_lifetime 5 s, budget" in gunicorn.log()


def test_uvicorn_s_workers_are_replaced_by_the_clock(serve_uvicorn):
    """The same, with the policy in the environment."""
    uvicorn = serve_uvicorn(*health_check(30), soft_limit="1GiB", min_lifetime="0s", max_lifetime="5s").serving()

    serves_all_the_while(uvicorn)


@pytest.mark.parametrize("worker_class", ["sync", "asgi"])
def test_an_idle_worker_is_replaced_by_the_clock(serve, worker_class):
    """The only one of its pool, too: another serves before it goes."""
    gunicorn = serve(worker_class, 1, soft_limit="1GiB", min_lifetime=0, max_lifetime="5s", settings="timeout = 60").serving(1)

    with Watch(lambda: states(gunicorn)) as watch:
        lines = recycled(gunicorn, 2)
        until(lambda: int(lines[1]["pid"]) not in gunicorn.workers(), "the second is gone", 10)

    assert [seen for seen in watch.seen if not {"serving", "waiting"} & set(seen)] == []
    assert [line["work"] for line in lines[:2]] == ["0", "0"]


@pytest.mark.parametrize("turns", [1, 2])
def test_no_more_than_max_unavailable_are_away_for_their_age(serve, turns):
    """All are of the same age, and may not have one more beside them: they wait for each other."""
    policy = {"soft_limit": "1GiB", "min_lifetime": 0, "jitter": 0, "max_lifetime": "5s", "max_unavailable": turns, "surge": False}
    gunicorn = serve("sync", 4, **policy).serving(4)

    with Watch(lambda: (states(gunicorn), len(gunicorn.workers()))) as watch, Load(gunicorn, "/slow?s=0.1", clients=2) as load:
        recycled(gunicorn, 8)

    assert load.failed == []
    away = [4 - seen.count("serving") - seen.count("waiting") for seen, _ in watch.seen]
    assert 1 <= max(away) <= turns  # how many are away together depends on whom the requests reach
    assert max(processes for _, processes in watch.seen) == 4


def test_a_dry_run_replaces_nobody(serve):
    """It says once for each worker what it would do."""
    gunicorn = serve("sync", soft_limit="1GiB", min_lifetime=0, max_lifetime="2s", dry_run=True).serving()
    before = set(gunicorn.workers())

    gunicorn.wait_for("would be recycled (dry run): served for", 2)

    assert set(gunicorn.workers()) == before
    assert states(gunicorn) == ["serving"] * 2


@pytest.mark.parametrize("text", ["6", "5s"], ids=["no unit", "below min_lifetime"])
def test_a_lifetime_that_can_not_be_right_starts_nothing(serve, text):
    """One line on stderr, with a correct example."""
    gunicorn: Gunicorn = serve("sync", soft_limit="1GiB", env={"OOMSAFE_MAX_LIFETIME": text})

    assert gunicorn.ended() != 0

    (line,) = gunicorn.lines("oomsafe: ")
    assert re.search(r"MAX_LIFETIME='6' has no unit \(s, m, h or d\); a correct example: OOMSAFE_MAX_LIFETIME=\"6h\"$", line) or (
        line == "oomsafe: max_lifetime='5 s' is not above min_lifetime=10 s; a correct example: max_lifetime=\"6h\""
    )


def test_a_single_process_says_so(serve_uvicorn):
    """Nothing would restart it: a line at boot, one more when its time is over, and it serves on."""
    uvicorn = serve_uvicorn(workers=1, soft_limit="1GiB", min_lifetime=0, max_lifetime="2s").up()

    uvicorn.wait_for("should be recycled, and nothing here can: served for ", seconds=30)

    assert "max_lifetime 2 s" in uvicorn.wait_for("oomsafe guards this process")[0]
    assert "above its soft limit, or past its max_lifetime, it logs a warning" in uvicorn.log()
    assert uvicorn.get("/")[0] == 200


@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_celery_s_children_are_replaced_by_the_clock(celery: Start, broker: str) -> None:
    """Between two tasks, one child at a time; each task runs once, and its result comes back."""
    node = celery(broker, soft_limit="1GiB", min_lifetime=0, max_lifetime="5s").ready()

    with Watch(lambda: [worker.state.value for worker in node.pool().workers]) as watch:
        results = node.ask(TASKS, seconds=120)

    assert results == list(range(400))
    assert len(node.lines("> max_lifetime")) >= 5
    assert all(LINE.search(line) for line in node.lines(" recycling: "))
    assert sorted(int(run.split()[0]) for run in (node.folder.parent / "runs").read_text().splitlines()) == results
    after_boot = watch.seen[next(i for i, seen in enumerate(watch.seen) if seen.count("serving") == 2) :]
    assert {2 - seen.count("serving") for seen in after_boot} == {0, 1}
    assert node.process.poll() is None


#: For some twenty seconds, with late acknowledgement: what a child's end would interrupt comes again.
TASKS = """
results = [proj.slow.delay(number, 0.1) for number in range(400)]
result = [r.get(timeout=100) for r in results]
"""


def test_an_idle_celery_child_is_replaced_by_the_clock(celery: Start) -> None:
    """No task comes, and both go."""
    node = celery(soft_limit="1GiB", min_lifetime=0, max_lifetime="5s").ready()
    before = set(node.children())

    until(lambda: not before & set(node.children()) and len(node.children()) >= 2, "both are new", 40)

    assert node.ask("result = proj.slow.delay(7, 0).get(timeout=30)") == 7


def test_a_celery_child_by_hand_is_replaced_by_the_clock(celery: Start) -> None:
    """With stock Celery's pool around it."""
    env = {"BY_HAND": "1", "OOMSAFE_SOFT_LIMIT": "1GiB", "OOMSAFE_MIN_LIFETIME": "0", "OOMSAFE_MAX_LIFETIME": "3s"}
    node = celery(install=False, env=env).ready()

    results = node.ask(TASKS, seconds=120)

    assert results == list(range(400))
    assert len(node.lines("> max_lifetime")) >= 5
    assert sorted(int(run.split()[0]) for run in (node.folder.parent / "runs").read_text().splitlines()) == results
    assert "max_lifetime 3 s, recycled between two tasks" in node.log()
