"""Servers as the demo, the tests and the benchmarks start them: watched, and ended with all that they have started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, answers, environment, free_ports, until
from oomsafe.kernel.session import in_session, session_of

Start = Callable[..., ServerProcess]

#: Has a child that hears no SIGTERM, as a worker may that has lost its supervisor; {own}: nor does it itself.
STUBBORN = """
import os, signal, time
hears = signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    signal.signal(signal.SIGTERM, {own})
    print("is up", os.environ.get("MINE"), flush=True)
while True:
    time.sleep(60)
"""
DEAF, HEARING = STUBBORN.format(own="signal.SIG_IGN"), STUBBORN.format(own="hears")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a Python script, which ends with the test."""
    with ExitStack() as stack:

        def run(script: str, **environ: str) -> ServerProcess:
            command = [sys.executable, "-c", script]
            return stack.enter_context(ServerProcess(command, tmp_path, {**environment(), **environ}))

        yield run


@pytest.mark.parametrize("script", [DEAF, HEARING], ids=["deaf", "hearing"])
def test_it_ends_with_all_that_it_has_started(start: Start, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Also what hears no SIGTERM, and what is an orphan by then."""
    monkeypatch.setattr(ServerProcess, "GRACE", 0.3)
    server = start(script, MINE="yes")
    assert server.wait_for("is up") == ["is up yes"]
    (child,) = server.workers()
    assert server.session() == {server.pid, child}

    server.end()

    assert (server.alive, server.process.returncode) == (False, -signal.SIGKILL if script == DEAF else -signal.SIGTERM)
    assert session_of(child) == 0
    server.end()  # once more is nothing more


def test_each_signal_has_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first is not heard, it is asked in other words."""
    monkeypatch.setattr(ServerProcess, "ENDS", (signal.SIGTERM, signal.SIGUSR1))  # SIGQUIT is ignored below a shell's &
    monkeypatch.setattr(ServerProcess, "GRACE", 1.0)
    with ServerProcess([sys.executable, "-c", DEAF], tmp_path, environment()) as server:
        server.wait_for("is up")

    assert server.process.returncode == -signal.SIGUSR1


def test_what_is_waited_for_in_vain(start: Start) -> None:
    """Its end is not waited for as if it might still come, and the log is shown."""
    server = start("import sys; print('no database'); sys.exit(3)")

    with pytest.raises(RuntimeError, match=r"ended with 3 before: it serves\nno database"):
        server.until(lambda: False, "it serves", 60)
    with pytest.raises(RuntimeError, match="not within 0 s: 1 lines 'serves'"):
        server.wait_for("serves", seconds=0)
    assert server.find_pool() is None


def test_a_session_that_is_anothers(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel gives pids again: nobody else is ended."""
    server = start(HEARING)
    server.wait_for("is up")
    with monkeypatch.context() as here:
        here.setattr(server, "_started", 1)

        assert server.session() == set()
    assert len(server.session()) == 2


def test_a_zombie_does_not_run(start: Start) -> None:
    """It is still in its session, and nothing is left to be ended."""
    server = start("")
    until(lambda: os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT), "it has ended")

    assert (session_of(server.pid), in_session(server.pid)) == (0, set())


def test_who_starts_it_is_killed(tmp_path: Path) -> None:
    """Then nobody ends it, and the kernel does."""
    code = f"""
import os, sys
from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess
server = ServerProcess([*ENDING_WITH_US, sys.executable, "-c", {HEARING!r}], {str(tmp_path)!r}, os.environ)
server.wait_for("is up")
print(server.pid, *server.workers(), flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid, child = map(int, done.stdout.split())
    try:
        assert ENDING_WITH_US
        until(lambda: session_of(pid) == 0, "it has ended")
    finally:
        os.kill(child, signal.SIGKILL)


def test_what_it_is_told_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither our settings nor the servers' own; and what is imported from where."""
    for name in ("OOMSAFE_SOFT_LIMIT", "GUNICORN_CMD_ARGS", "UWSGI_X", "PYTHONPATH", "KEPT"):
        monkeypatch.setenv(name, "theirs")

    plain, without = environment(), environment("UWSGI_", path=[Path("/a"), Path("/b")])

    assert {"OOMSAFE_SOFT_LIMIT", "GUNICORN_CMD_ARGS"} & plain.keys() == set()
    assert (plain["UWSGI_X"], plain["KEPT"], plain["PYTHONPATH"]) == ("theirs",) * 3
    assert (without.get("UWSGI_X"), without["PYTHONPATH"]) == (None, os.pathsep.join(["/a", "/b", "theirs"]))


def test_ports() -> None:
    """Different ones, where nobody listens."""
    ports = free_ports(3)

    assert len(set(ports)) == 3
    assert not any(map(answers, ports))
