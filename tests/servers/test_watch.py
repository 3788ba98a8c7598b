"""`oomsafe watch` as a real process, beside real pools: what is passed on, and what can't hurt it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from celerying import CeleryWorker
from dirtying import dirty, dirty_pool
from serving import APPS, Gunicorn, until
from uvicorning import Uvicorn
from watching import WATCH, Watching, events_in, follows, script, wait_until_followed

from oomsafe.demo.server_process import ServerProcess, environment
from oomsafe.scoreboard.places import board_of

Serve = Callable[..., Gunicorn]
Watcher = Callable[..., Watching]


@pytest.fixture
def watching(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Watcher]:
    """watching("--on-alert", "..."): a watch, ended with the test."""
    started: list[Watching] = []
    with ExitStack() as stack:

        def start(*argv: str) -> Watching:
            started.append(stack.enter_context(Watching(tmp_path, *argv)))
            return started[-1]

        yield start
        for watch in started:
            request.node.add_report_section("teardown", f"output of watch {watch.pid}", watch.log())


@pytest.mark.parametrize("json", [False, True], ids=["text", "json"])
def test_a_pool_whose_supervisor_is_killed(serve: Serve, watching: Watcher, json: bool) -> None:
    """It is reported, and the watch of this one pool ends with 1."""
    gunicorn = serve("sync", soft_limit="1GiB", name="shop").serving()
    path = gunicorn.pool_path()
    watch = watching("--scoreboard", path, *(["--json"] if json else [])).follows(gunicorn.pid)

    gunicorn.signal(signal.SIGKILL)

    assert watch.process.wait(20) == 1
    if json:
        (event,) = watch.events()
        assert (event["version"], event["alert"], event["state"], event["severity"]) == (1, "pool_gone", "firing", "critical")
        assert event["pool"] == {"name": "shop", "server": "gunicorn sync", "supervisor": gunicorn.pid, "scoreboard": path}
        assert event["help"] == "docs/alerts.md#pool_gone"
    else:
        (line,) = watch.log().splitlines()
        assert f" shop (supervisor {gunicorn.pid}): pool_gone firing (critical): its supervisor has ended and not in order" in line


def test_a_pool_that_ends_in_order_is_no_event(serve: Serve, watching: Watcher) -> None:
    """And the watch of it ends with 0."""
    gunicorn = serve("sync", soft_limit="1GiB").serving()
    watch = watching("--scoreboard", gunicorn.pool_path()).follows(gunicorn.pid)

    assert gunicorn.stop() == 0

    assert watch.process.wait(20) == 0
    assert watch.log() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_however_gunicorn_is_ended(serve: Serve, watching: Watcher, number: int) -> None:
    """Also at once, by SIGINT and SIGQUIT; and so are its dirty workers, which are a pool of their own."""
    gunicorn = dirty(serve, soft_limit="1GiB")
    watch = watching("--json").follows(gunicorn.pid)
    arbiter = dirty_pool(gunicorn).supervisor
    watch.follows(arbiter)

    gunicorn.signal(number)
    gunicorn.ended()

    stopped = serve("sync", 1, soft_limit="1GiB").serving(1)
    watch.follows(stopped.pid)  # so it has looked twice since
    assert [event for pid in (gunicorn.pid, arbiter) for event in events_in(watch.log(), pid)] == []


def test_however_uvicorn_is_ended(serve_uvicorn: Callable[..., Uvicorn], watching: Watcher) -> None:
    """Its parent ends itself by the signal that it has got."""
    uvicorn = serve_uvicorn(soft_limit="1GiB").serving()
    watch = watching("--scoreboard", uvicorn.pool_path()).follows(uvicorn.pid)

    uvicorn.signal(signal.SIGTERM)

    assert watch.process.wait(20) == 0
    assert watch.log() == ""


def test_however_celery_is_ended(celery: Callable[..., CeleryWorker], watching: Watcher) -> None:
    """Warmly."""
    node = celery(soft_limit="1GiB").ready()
    path = until(lambda: board_of(node.pid), "it has a scoreboard")
    watch = watching("--scoreboard", path).follows(node.pid)

    node.process.terminate()

    assert watch.process.wait(30) == 0
    assert watch.log() == ""


def test_the_end_of_a_single_process_is_not_known(watching: Watcher, tmp_path: Path) -> None:
    """uvicorn ends itself by the signal that it has got, without its atexit functions: that is no event."""
    (tmp_path / "single.py").write_text("import apps\nfrom oomsafe.asgi import MemoryMiddleware\napp = MemoryMiddleware(apps.asgi)\n")
    with ServerProcess(
        [sys.executable, "-m", "uvicorn", "single:app", "--port", "0"], tmp_path, environment(path=[APPS, tmp_path])
    ) as server:
        server.wait_for("Uvicorn running on")
        path = until(lambda: board_of(server.pid), "it has a scoreboard")
        watch = watching("--scoreboard", path).follows(server.pid)

        server.process.terminate()

        assert watch.process.wait(20) == 0
    assert watch.log() == ""


def test_pools_come_and_go(serve: Serve, watching: Watcher) -> None:
    """Those that begin later are watched, too: one ends in order, one is killed."""
    watch = watching("--json")
    # of names of their own: what takes the place of a pool that is gone, and goes too, is not told again, and other tests kill pools
    stopped, killed = (serve("sync", 1, soft_limit="1GiB", name=name).serving(1) for name in ("stopped", "killed"))
    for gunicorn in (stopped, killed):
        watch.follows(gunicorn.pid)

    stopped.stop()
    killed.signal(signal.SIGKILL)

    events = until(lambda: events_in(watch.log(), killed.pid), "it is told")
    watch.process.terminate()
    assert watch.process.wait(10) == 0
    assert [event["alert"] for event in events] == ["pool_gone"]
    assert events_in(watch.log(), stopped.pid) == []
    assert "Traceback" not in watch.log()


def test_the_command_gets_an_object_and_a_failure_of_it_is_a_line(serve: Serve, watching: Watcher, tmp_path: Path) -> None:
    """Nothing else is printed; the watch waits for the command before it ends with its pool; and no name gets to the terminal as it is."""
    gunicorn = serve("sync", soft_limit="1GiB", settings=r"proc_name = 'shop\x1b[2J'").serving()
    command = script(tmp_path, "notify", "cat > got.new; sleep 0.5; mv got.new got; echo 'no route' >&2; exit 7")
    watch = watching("--scoreboard", gunicorn.pool_path(), "--on-alert", command).follows(gunicorn.pid)

    gunicorn.signal(signal.SIGKILL)

    assert watch.process.wait(20) == 1
    (event,) = events_in((tmp_path / "got").read_text())
    assert (event["alert"], event["pool"]["name"]) == ("pool_gone", "shop?[2J")
    expected = (
        f"oomsafe: the alert command ({command}) for pool_gone of shop?[2J (supervisor {gunicorn.pid}) ended with status 7: no route\n"
    )
    assert expected == watch.log()


def test_a_hanging_command_blocks_neither_the_watch_nor_its_end(serve: Serve, watching: Watcher, tmp_path: Path) -> None:
    """The first hangs; the second is run all the same; a second SIGTERM ends all of it at once."""
    # only for these pools: those of other tests may have so many events that no more commands are run
    hangs = 'if grep -q -f pools "event-$$.new"; then mv "event-$$.new" "event-$$"; exec sleep 600; fi'
    command = script(tmp_path, "hang", f'cat > "event-$$.new"; {hangs}')
    pools = [serve("sync", 1, soft_limit="1GiB", name=name).serving(1) for name in ("hangs", "hangs-too")]
    (tmp_path / "pools").write_text("".join(f'"supervisor": {gunicorn.pid},\n' for gunicorn in pools))
    watch = watching("--on-alert", command)

    def passed_on(gunicorn: Gunicorn) -> list[Path]:
        return [path for path in tmp_path.glob("event-*[0-9]") if events_in(path.read_text(), gunicorn.pid)]

    for gunicorn in pools:
        watch.follows(gunicorn.pid)
        gunicorn.signal(signal.SIGKILL)
        until(lambda gunicorn=gunicorn: passed_on(gunicorn), "it is passed on")
    commands = [int(path.name.partition("-")[2]) for gunicorn in pools for path in passed_on(gunicorn)]

    watch.process.terminate()
    until(lambda: watch.process.poll() is not None or watch.process.terminate(), "it has ended", 4)  # a signal or two, and more

    assert watch.process.returncode == 0
    # other tests' pools may be gone meanwhile, too
    assert [len(watch.lines(f"(supervisor {gunicorn.pid}) was ended with the watch")) for gunicorn in pools] == [1, 1]
    assert [pid for pid in commands if os.path.exists(f"/proc/{pid}/exe")] == []
    assert "Traceback" not in watch.log()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_without_a_pool_it_waits_until_a_signal_ends_it(watching: Watcher, tmp_path: Path, number: int) -> None:
    """What can't be read is said once."""
    watch = watching("--scoreboard", str(tmp_path / "none"))
    watch.wait_for("oomsafe: no pool of this user is guarded by oomsafe now")

    watch.process.send_signal(number)

    assert watch.process.wait(10) == 0
    assert len(watch.lines("none: No such file or directory")) == 1
    assert len(watch.log().splitlines()) == 2


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--on-alert", "no-such-command-here x"), "'no-such-command-here' is no command that can be run"),
        (("--on-alert", "sh -c 'x"), "No closing quotation"),
        (("--on-alert", " "), "is empty"),
        (("--interval", "nan"), "is not a number of seconds"),
        (("--interval", "0"), "0.1<=x<=60"),
    ],
)
def test_what_can_not_be_meant_is_refused_at_once(argv: tuple[str, ...], said: str) -> None:
    """Not with the first alert."""
    ended = subprocess.run([sys.executable, "-m", "oomsafe.cli", "watch", *argv], capture_output=True, text=True, check=False, timeout=60)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("with_command", [False, True], ids=["alone", "with a command"])
def test_whoever_reads_its_output_may_go(serve: Serve, tmp_path: Path, with_command: bool) -> None:
    """A pipe that is closed ends it without a word when there is something to print; with a command it goes on."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)
    got = tmp_path / "got"
    more = ("--json", "--on-alert", script(tmp_path, "notify", f"cat >> {got}")) if with_command else ()
    reads, writes = os.pipe()
    with subprocess.Popen([*WATCH, *more], stdout=writes, stderr=subprocess.PIPE) as watch:
        os.close(writes)
        os.close(reads)
        # what there is to print of another test's pool ends it before
        followed = follows(watch.pid, gunicorn.pid)
        until(lambda: watch.poll() is not None or followed(), "it has read its scoreboard, or has ended", pause=0.01)

        gunicorn.signal(signal.SIGKILL)

        if with_command:
            until(lambda: got.exists() and events_in(got.read_text(), gunicorn.pid), "it is passed on")
            watch.terminate()
        assert watch.wait(20) == 0
        assert watch.stderr is not None
        assert b"Traceback" not in (errors := watch.stderr.read())
        assert b"Broken pipe" not in errors


def test_with_neither_output_nor_errors_open(serve: Serve, tmp_path: Path) -> None:
    """As a careless daemon starts it."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)
    path, got = gunicorn.pool_path(), tmp_path / "got"
    command = script(tmp_path, "notify", f"cat > {got}; exit 3")
    argv = ["/bin/sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *WATCH, "--json", "--on-alert", command, "--scoreboard", path]
    with subprocess.Popen(argv) as watch:
        wait_until_followed(watch.pid, gunicorn.pid)
        gunicorn.signal(signal.SIGKILL)

        assert watch.wait(20) == 1
    assert len(events_in(got.read_text())) == 1
