"""uvicorn's supervisor, guarded: its signals leave the right number of workers, and each death is answered as it should be."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from serving import until
from uvicorning import health_check

#: What is asked for while a replacement boots, and how many workers there are to be then.
DURING_A_SURGE = [("SIGHUP", 2), ("SIGTTIN", 3), ("SIGTTOU", 1)]

#: A file that has boots fail, and what is then in the log.
FAILURES = {
    "import-fails": "No module named 'there_is_no_such_module'",
    "lifespan-fails": "there is a file lifespan-fails",
    "hangs-and-fails": "hangs and fails",
}

#: Boots are slow under test, and uvicorn would kill who does not answer meanwhile.
PATIENT = health_check(30)


#: A worker over its limit waits for its replacement: it has grown by little, and not a moment ago.
POLICY = {"soft_limit": "112MiB", "min_lifetime": 0, "jitter": 0, "reclaim": False, "sustain": 2}


def over_its_limit(uvicorn):
    """Have one worker go over its limit; its pid."""
    pid = uvicorn.workers()[0]
    uvicorn.grow(pid, 114)
    return pid


def settled(uvicorn, workers):
    """Wait until exactly so many serve, and nobody else is left."""
    until(lambda: len(uvicorn.serving(workers).workers()) == workers, f"{workers} processes", 40)
    return set(uvicorn.workers())


def test_workers_are_known_and_die_before_their_supervisor(serve_uvicorn):
    """By their names and their scores; SIGTERM ends them all, and nothing is left."""
    uvicorn = serve_uvicorn(soft_limit="200MiB").serving()
    path = Path(f"/dev/shm/oomsafe-{os.geteuid()}/{uvicorn.pid}-{uvicorn.pool().supervisor_started}.board")
    score = {pid: int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in (uvicorn.pid, *uvicorn.workers())}
    names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in uvicorn.workers()}

    assert all(score[pid] >= min(score[uvicorn.pid] + 300, 1000) for pid in uvicorn.workers())
    assert all(re.fullmatch(r"oomsafe-w\d-[0-9a-f]+", name) for name in names), names
    assert (len(names), path.exists()) == (2, True)
    assert (uvicorn.stop(), path.exists()) == (0, False)
    until(lambda: not uvicorn.session(), "nobody is left")


def test_signals_change_the_number(serve_uvicorn):
    """One more, one less, all of them anew."""
    uvicorn = serve_uvicorn(*PATIENT, soft_limit="200MiB").serving()
    first = settled(uvicorn, 2)

    uvicorn.signal(signal.SIGTTIN)
    three = settled(uvicorn, 3)
    wanted = until(lambda: uvicorn.pool().workers_wanted == 3, "the pool wants three")
    uvicorn.signal(signal.SIGTTOU)
    two = settled(uvicorn, 2)
    uvicorn.signal(signal.SIGHUP)
    until(lambda: not two & set(uvicorn.workers()), "all are replaced", 40)

    assert wanted
    assert first < three
    assert two < three
    assert not settled(uvicorn, 2) & three
    assert uvicorn.get("/")[0] == 200


@pytest.mark.parametrize(("name", "workers"), DURING_A_SURGE)
def test_signals_while_a_replacement_boots(serve_uvicorn, name, workers):
    """The worker over its limit goes, and exactly as many as are wanted stay."""
    uvicorn = serve_uvicorn(*PATIENT, **POLICY).serving()
    (uvicorn.folder / "slow").write_text("1")
    before = set(uvicorn.workers())
    leaker = over_its_limit(uvicorn)
    until(lambda: [w.state for w in uvicorn.pool().workers].count("starting") == 1, "its replacement boots")

    uvicorn.signal(getattr(signal, name))
    uvicorn.wait_for(f"Received {name}")

    until(lambda: leaker not in uvicorn.workers(), "the worker over its limit goes", 40)
    if name == "SIGHUP":
        until(lambda: not before & set(uvicorn.workers()), "all are replaced", 40)
    settled(uvicorn, workers)
    assert uvicorn.lines("oomsafe failed") == []


def test_sigterm_while_a_replacement_boots(serve_uvicorn):
    """Ends that one too."""
    uvicorn = serve_uvicorn(**POLICY).serving()
    (uvicorn.folder / "slow").write_text("1")
    over_its_limit(uvicorn)
    until(lambda: [w.state for w in uvicorn.pool().workers].count("starting") == 1, "its replacement boots")

    assert uvicorn.stop() == 0
    until(lambda: not uvicorn.session(), "nobody is left")


def test_a_killed_worker_is_replaced(serve_uvicorn):
    """And its slot is given to another."""
    uvicorn = serve_uvicorn(soft_limit="200MiB").serving()
    gone = uvicorn.pool().workers[0]

    os.kill(gone.pid, signal.SIGKILL)
    until(lambda: gone.pid not in uvicorn.workers(), "it is gone")

    now = settled(uvicorn, 2)
    workers = uvicorn.pool().workers
    assert {worker.pid for worker in workers} == now
    assert sorted(worker.slot for worker in workers) == [0, 1]
    assert max(worker.generation for worker in workers) == 3
    assert uvicorn.lines("it had not answered in time") == []


def test_who_kills_a_worker_that_hangs_is_told(serve_uvicorn):
    """It is uvicorn's health check, and nobody should take it for an OOM kill."""
    uvicorn = serve_uvicorn(*health_check(1), soft_limit="200MiB").serving()
    gone = uvicorn.pool().workers[0]

    os.kill(gone.pid, signal.SIGSTOP)

    uvicorn.wait_for(
        f"worker {gone.pid} (slot {gone.slot}) was ended by its server, because it had not answered in time (ended by SIGKILL)"
    )
    until(lambda: gone.pid not in uvicorn.workers(), "it is gone")
    assert len(settled(uvicorn, 2)) == 2


@pytest.mark.parametrize(("fails", "surge"), [*((fails, "on") for fails in FAILURES), ("lifespan-fails", "off")])
def test_a_service_whose_boots_fail_serves_on(serve_uvicorn, fails, surge):
    """The supervisor and at least one worker; boots are tried again with growing pauses, until one succeeds."""
    uvicorn = serve_uvicorn(*PATIENT, **POLICY, surge=surge).serving()
    fault = uvicorn.folder / fails
    fault.write_text("")
    before = set(uvicorn.workers())
    leaker = over_its_limit(uvicorn)
    uvicorn.wait_for(f"worker {leaker} (slot " if surge == "off" else "a replacement died before it served", seconds=40)
    uvicorn.wait_for(FAILURES[fails], times=2, seconds=60)

    serving = {worker.pid for worker in uvicorn.pool().workers if worker.state in ("serving", "waiting")}
    assert serving == (before if surge == "on" else before - {leaker})
    assert uvicorn.process.poll() is None
    assert uvicorn.get("/")[0] == 200
    if surge == "on":
        tries = uvicorn.wait_for("next try in", times=2)[:2]
        assert re.findall(r"next try in (\d+) s \(it was for slot [01];", "\n".join(tries)) == ["1", "2"]
    fault.unlink()
    until(lambda: leaker not in uvicorn.workers(), "the worker over its limit goes", 60)
    settled(uvicorn, 2)
    assert uvicorn.lines("oomsafe failed") == []


@pytest.mark.parametrize("fails", [None, "lifespan-fails"])
def test_a_worker_that_drains_for_long_is_replaced_by_then(serve_uvicorn, fails):
    """It has grown to far over its limit, and has a request in flight. If its replacement fails to boot, it serves until another does."""
    uvicorn = serve_uvicorn(*PATIENT, **{**POLICY, "sustain": 0}).serving()
    leaker = uvicorn.workers()[0]
    slow, held = uvicorn.connect_to(leaker), uvicorn.folder / "request-held"
    held.touch()
    slow.request("GET", "/held")
    until(lambda: uvicorn.worker(leaker).figures.in_flight == 1, "it is in flight")
    if fails:
        (uvicorn.folder / fails).touch()
    uvicorn.grow(leaker, 180)
    if fails:
        uvicorn.wait_for(FAILURES[fails], times=2, seconds=40)
        assert not uvicorn.lines(f"worker {leaker} (slot ")
        (uvicorn.folder / fails).unlink()
    uvicorn.wait_for(f"worker {leaker} (slot ", seconds=40)

    until(lambda: sorted(worker.state for worker in uvicorn.pool().workers) == ["draining", "serving", "serving"], "its replacement serves")
    held.unlink()
    assert slow.getresponse().read() == b"/held?"
    until(lambda: leaker not in uvicorn.workers(), "it is gone")
    settled(uvicorn, 2)
    assert uvicorn.lines("oomsafe failed") == []
