"""The replacement first: who is brought up, who may then go, and what else may happen meanwhile."""

from __future__ import annotations

import os
import re
import signal
from contextlib import closing
from pathlib import Path

import pytest
from clients import Load, Watch
from needs import need
from serving import ASGI_CLASSES, CLASSES, WSGI_CLASSES, Gunicorn, board_of, until
from surging import SLOW_LEAK, big, held, states, surging, waiting
from versions import loses_none

from oomsafe.kernel.process import children_of
from oomsafe.scoreboard.board import Scoreboard


def replaced(gunicorn: Gunicorn, workers: int) -> None:
    """The schedule still works: one more is taken over its limit, and the pool is as many as before without it."""
    pid = waiting(gunicorn)
    gunicorn.wait_for(f"worker {pid} (slot ")
    until(lambda: pid not in gunicorn.workers(), "it is gone")
    assert len(gunicorn.serving(workers).workers()) == workers


@pytest.mark.parametrize("worker_class", CLASSES)
def test_never_are_fewer_than_wanted_there_to_serve_nor_more_than_twice_as_many(serve, worker_class):
    """Whatever is recycled: a replacement serves before its worker goes."""
    loses_none(worker_class)
    gunicorn = big(serve, worker_class, sustain=0)

    with Watch(lambda: (states(gunicorn), len(gunicorn.workers()))) as watch, Load(gunicorn, SLOW_LEAK) as load:
        gunicorn.wait_for(" recycling: ", times=3, seconds=60)

    assert load.failed == []
    assert [seen for seen, _ in watch.seen if seen["serving"] + seen["waiting"] < 2] == []
    assert max(processes for _, processes in watch.seen) in (3, 4)


@pytest.mark.parametrize("policy", [{"surge": False}, {"budget": "1MiB"}], ids=["surge=False", "no headroom"])
def test_workers_drain_first_where_there_may_not_be_one_more(serve, policy):
    """Never are there more processes than workers; that memory is too short for more is said once."""
    loses_none("gthread")
    gunicorn = big(serve, sustain=0, **policy)

    with Watch(lambda: len(gunicorn.workers())) as watch, Load(gunicorn, SLOW_LEAK) as load:
        gunicorn.wait_for(" recycling: ", times=3, seconds=60)

    assert load.failed == []
    assert max(watch.seen) == 2
    assert len(gunicorn.lines("workers drain first")) == ("budget" in policy)
    gunicorn.serving()


@pytest.mark.parametrize("worker_class", ["gthread", "uvicorn_worker.UvicornWorker"])
@pytest.mark.parametrize(("name", "workers"), [("TTIN", 3), ("TTOU", 1), ("HUP", 2)])
def test_a_signal_in_the_middle_of_it_leaves_the_number_of_workers_right(serve, worker_class, name, workers):
    """One more than before, one less, all of them new: and the schedule goes on."""
    gunicorn = big(serve, worker_class)
    before = set(gunicorn.workers())
    file, _ = surging(gunicorn)
    assert gunicorn.pool().workers_wanted == 2

    gunicorn.signal(signal.Signals[f"SIG{name}"])
    gunicorn.wait_for(f"Handling signal: {name.lower()}")
    file.unlink()

    if name == "HUP":
        until(lambda: not before & set(gunicorn.workers()), "all workers are new")
    gunicorn.serving(workers)
    replaced(gunicorn, workers)
    assert gunicorn.pool().workers_wanted == workers
    assert not gunicorn.lines("next try in")


def test_a_new_master_in_the_middle_of_it_has_its_own_workers(serve):
    """USR2, and TERM to the old master."""
    gunicorn = big(serve)
    file, _ = surging(gunicorn)

    gunicorn.signal(signal.SIGUSR2)
    gunicorn.wait_for("Listening at: ", 2)
    file.unlink()
    new = next(pid for pid in gunicorn.workers() if board_of(pid))
    board = Scoreboard.open(board_of(new) or "")
    until(lambda: [worker.state for worker in board.read().workers] == ["serving"] * 2, "the new workers serve")
    assert gunicorn.stop() == 0

    until(lambda: gunicorn.session() == {new, *children_of(new)}, "all of the old ones are gone")
    assert len(children_of(new)) == 2
    assert gunicorn.get("/")[0] == 200
    board.close()


@pytest.mark.parametrize("name", ["TERM", "QUIT"])
def test_all_end_in_the_middle_of_it(serve, name):
    """Also the one that boots."""
    gunicorn = big(serve)
    file, _ = surging(gunicorn)

    gunicorn.signal(signal.Signals[f"SIG{name}"])
    file.unlink()

    assert gunicorn.ended() == 0
    assert gunicorn.session() == set()


def test_winch_in_the_middle_of_it_sends_all_away(serve):
    """None comes back until TTIN wants one."""
    gunicorn = big(serve, settings="def when_ready(server):\n    server.cfg.set('daemon', True)  # else WINCH does nothing\n")
    file, _ = surging(gunicorn)

    gunicorn.signal(signal.SIGWINCH)
    gunicorn.wait_for("graceful stop of workers")
    file.unlink()
    until(lambda: not gunicorn.workers(), "all are gone")
    for times in (1, 2):
        gunicorn.signal(signal.SIGUSR1)  # when the second is seen, gunicorn has counted its workers after the first
        gunicorn.wait_for("Handling signal: usr1", times)

    assert gunicorn.workers() == []
    gunicorn.signal(signal.SIGTTIN)
    assert len(gunicorn.serving(1).workers()) == 1


@pytest.mark.parametrize(
    ("worker_class", "how"),
    [*((worker_class, "broken") for worker_class in WSGI_CLASSES), *((worker_class, "fails") for worker_class in ASGI_CLASSES)],
)
def test_a_replacement_that_fails_to_boot_is_tried_again_later(serve, worker_class, how):
    """The app raises, or its lifespan's startup fails: the worker over its limit serves on, and so does gunicorn."""
    loses_none(worker_class)
    gunicorn = big(serve, worker_class)
    (gunicorn.folder / how).touch()
    with Load(gunicorn, "/leak?kib=0&s=0.02", clients=2) as load:
        pid = waiting(gunicorn)
        tries = gunicorn.wait_for("a replacement died before it served: the worker over its limit stays; next try in ", 2)
        assert pid in gunicorn.workers()
        (gunicorn.folder / how).unlink()
        until(lambda: pid not in gunicorn.workers(), "it is replaced")
        gunicorn.serving()

    assert load.failed == []
    assert re.findall(r"next try in (\d+) s \(it was for slot [01];", "\n".join(tries[:2])) == ["1", "2"]


@pytest.mark.parametrize(("worker_class", "how"), [("sync", "broken"), ("asgi", "fails")])
def test_a_pool_without_replacements_recycles_nobody_while_boots_fail(serve, worker_class, how):
    """The first is gone when that is seen; the other stays, above its limit as it is."""
    gunicorn = big(serve, worker_class, surge=False)
    (gunicorn.folder / how).touch()
    with Load(gunicorn, "/leak?kib=0&s=0.02", clients=2) as load:
        assert gunicorn.get("/fill?mib=241")[0] == 200
        gunicorn.wait_for("exited with code 1", 2)
        pid = waiting(gunicorn)
        gunicorn.wait_for("exited with code 1", 3)
        assert pid in gunicorn.workers()
        (gunicorn.folder / how).unlink()
        until(lambda: pid not in gunicorn.workers(), "it is replaced")
        gunicorn.serving()

    assert load.failed == []
    assert len(gunicorn.lines(" recycling: ")) == 2


@pytest.mark.parametrize("worker_class", [worker_class for worker_class in CLASSES if worker_class != "sync"])
def test_a_worker_that_drains_for_long_is_replaced_by_then(serve, worker_class):
    """The only one has grown to far over its limit, and has a request in flight: others are answered meanwhile."""
    loses_none(worker_class)
    gunicorn = big(serve, worker_class, workers=1, sustain=0)
    (pid,) = gunicorn.workers()
    file = gunicorn.folder / "request-held"
    file.touch()
    with closing(gunicorn.connect()) as slow:
        slow.request("GET", "/held")
        until(lambda: gunicorn.worker(pid).figures.in_flight == 1, "it is in flight")
        assert gunicorn.get("/fill?mib=330")[0] == 200
        gunicorn.wait_for(f"worker {pid} (slot ")

        until(lambda: states(gunicorn) == {"draining": 1, "serving": 1}, "its replacement serves")
        assert int(gunicorn.get("/pid")[2]) != pid
        assert gunicorn.pool().workers_wanted == 1
        file.unlink()
        assert slow.getresponse().read() == b"/held?"

    until(lambda: pid not in gunicorn.workers(), "it is gone")
    until(lambda: states(gunicorn) == {"serving": 1}, "and nobody else has come")
    assert len(gunicorn.lines(" recycling: ")) == len(gunicorn.lines(" (slot ")) - len(gunicorn.lines(" held at its end ")) == 1


def test_a_replacement_that_fails_while_its_worker_drains_is_tried_again(serve):
    """Not at once, and the worker that drains is left in peace."""
    gunicorn = big(serve, "gthread", workers=2, sustain=0)
    pid = gunicorn.workers()[0]
    file, broken = gunicorn.folder / "request-held", gunicorn.folder / "broken"
    file.touch()
    broken.touch()
    with closing(gunicorn.connect()) as slow:
        slow.request("GET", "/held")
        (pid,) = until(lambda: [worker.pid for worker in gunicorn.pool().workers if worker.figures.in_flight == 1], "it is in flight")
        until(lambda: asked(gunicorn, pid, "/fill?mib=330"), "it has grown")
        gunicorn.wait_for("a broken deploy", 2, seconds=40)
        broken.unlink()

        until(lambda: states(gunicorn) == {"draining": 1, "serving": 2}, "its replacement serves")
        file.unlink()
        assert slow.getresponse().read() == b"/held?"

    until(lambda: states(gunicorn) == {"serving": 2} and len(gunicorn.workers()) == 2, "it is gone, and reaped")


def test_who_is_worst_goes_first(serve):
    """Also when the other has waited for longer."""
    gunicorn = big(serve)
    file = held(gunicorn)
    first = waiting(gunicorn)
    (second,) = {worker.pid for worker in gunicorn.pool().workers if worker.state == "serving"}
    until(lambda: asked(gunicorn, second, "/fill?mib=245"), "the other has more")
    until(lambda: states(gunicorn)["waiting"] == 2, "it waits, too")
    until(lambda: (gunicorn.worker(second).figures.rss or 0) >= 245 << 20, "that it has more is seen")

    file.unlink()

    ordered = until(gunicorn.ordered, "one is ordered to go")
    assert ordered == [second]
    gunicorn.wait_for(f"worker {second} (slot ")
    gunicorn.wait_for(f"worker {first} (slot ")


def asked(gunicorn: Gunicorn, pid: int, path: str) -> bool:
    """Ask this worker, if it is the one who takes the connection."""
    with closing(gunicorn.connect()) as connection:
        connection.request("GET", "/pid")
        if int(connection.getresponse().read()) != pid:
            return False
        connection.request("GET", path)
        return connection.getresponse().read() == path.encode()


def test_a_worker_of_another_user_is_replaced_too(serve):
    """It may not wake the arbiter, which looks by itself."""
    need(os.geteuid() == 0, "root, to become somebody else")
    # gunicorn 21.2 has the worker import it as nobody, who may not read a Python of root's
    gunicorn = big(serve, settings="import hashlib\nuser = 'nobody'\ngroup = 'nogroup'\npreload_app = True")
    pid = waiting(gunicorn)
    assert Path(f"/proc/{pid}").stat().st_uid != 0

    gunicorn.wait_for(f"worker {pid} (slot ")
    until(lambda: pid not in gunicorn.workers(), "it is gone")

    gunicorn.serving()
    assert not gunicorn.lines("ERROR")
