"""A fork that looks at its process: the process is as it was, whatever the fork finds, and whatever becomes of it."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oomsafe.kernel import forking
from oomsafe.kernel.forking import DONE, UNKNOWN, Fork, fork
from oomsafe.kernel.oom_score import read_score


def ended(one: Fork, seconds: float = 20.0) -> int:
    """Its status, once it has one."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status = one.status()
        if status is not None:
            return status
        time.sleep(0.005)
    raise AssertionError("it has not ended")


@pytest.fixture
def told() -> Iterator[socket.socket]:
    """This process's end of a socket that the fork has as well; closed by the fork, so that there is nothing to hear."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours


def tells(function: Callable[[], Any]) -> Any:
    """What `function` returns in the fork, which tells it through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "told")
        assert ended(fork(lambda: path.write_text(json.dumps(function())) and None, 20.0)) == DONE
        return json.loads(path.read_text())


class Loud:
    """Its finalizer writes to a socket, like that of a client that says goodbye."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def __del__(self) -> None:
        self._end.send(b"goodbye")


class Own(threading.local):
    """As libraries make them."""


@pytest.mark.parametrize("kind", [threading.local, Own])
def test_nothing_of_other_threads_is_destroyed(kind: type[threading.local]) -> None:
    """Python would destroy what they have in a threading.local, and its finalizers might write to sockets that both processes have."""
    ours, theirs = socket.socketpair()
    local, ready, over = kind(), threading.Event(), threading.Event()

    def other() -> None:
        local.connection = Loud(theirs)
        ready.set()
        over.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    ready.wait(60)
    try:
        assert ended(fork(lambda: None, 20.0)) == DONE
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(100)
    finally:
        over.set()
        thread.join()
    ours.setblocking(True)
    assert ours.recv(100) == b"goodbye"  # the thread has ended: that is the process's own
    ours.close()
    theirs.close()


def test_it_has_no_descriptors(told: socket.socket) -> None:
    """But for standard input, output and error, which are nobody's."""
    # one of them is the one that the folder itself is read by
    found = tells(lambda: [os.readlink(f"/proc/self/fd/{fd}") for fd in sorted(os.listdir("/proc/self/fd"))[:3]])

    assert found == ["/dev/null"] * 3
    assert len(tells(lambda: os.listdir("/proc/self/fd"))) <= 5
    with pytest.raises(BlockingIOError):
        told.recv(1)  # it is still open here


def test_it_is_to_be_killed_first() -> None:
    """And the process is not."""
    before = read_score()

    assert tells(read_score) == 1000
    assert read_score() == before


def test_signals_find_the_default_action(told: socket.socket) -> None:
    """Neither a handler of the application's runs in the fork, nor is its loop woken by the descriptor that both have."""
    called: list[int] = []
    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    before = signal.signal(signal.SIGTERM, lambda number, _: called.append(number))
    wakeup = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    try:
        one = fork(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(20))[0], 20.0)
        assert ended(one) == -signal.SIGTERM
        with pytest.raises(BlockingIOError):
            woken.recv(1)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        assert called == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert called == [signal.SIGTERM]
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        woken.close()
        wakes.close()


def test_a_signal_that_comes_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the whole group, before the fork has reset the handlers: it waits until then."""
    called: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: called.append(os.getpid()))
    fork_of_python = os.fork

    def early() -> int:
        pid = fork_of_python()
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)
        return pid

    monkeypatch.setitem(forking._quiet_fork.__globals__, "fork_of_python", early)
    try:
        assert ended(fork(lambda: time.sleep(20), 20.0)) == -signal.SIGTERM
        assert called == []
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected(monkeypatch: pytest.MonkeyPatch, collects: bool) -> None:
    """In the fork, whose finalizers would run there, not even by handlers of forks; the process goes on as it did."""
    fork_of_python = os.fork

    def noted() -> int:
        assert not gc.isenabled()
        return fork_of_python()

    monkeypatch.setitem(forking._quiet_fork.__globals__, "fork_of_python", noted)
    (gc.enable if collects else gc.disable)()
    try:
        assert tells(gc.isenabled) is False
        assert gc.isenabled() is collects
    finally:
        gc.enable()


def test_it_ends_by_its_alarm() -> None:
    """Whatever it hangs in."""
    assert ended(fork(lambda: time.sleep(60), 0.2)) == -signal.SIGALRM


def test_it_can_be_killed() -> None:
    """Twice, and after its end: nothing happens to another process then."""
    one = fork(lambda: time.sleep(60), 60.0)
    one.kill()
    one.kill()

    assert ended(one) == -signal.SIGKILL
    one.kill()
    assert one.status() == UNKNOWN


def test_what_fails_in_it_ends_it() -> None:
    """Without a word, and without what the process does at its own end."""

    def fails() -> None:
        raise KeyboardInterrupt

    assert ended(fork(fails, 20.0)) == 1


def test_an_application_that_reaps_its_children_itself() -> None:
    """By a handler of SIGCHLD, or by ignoring it: it is asked for this child alone, and it may be gone."""
    mine = subprocess.Popen(["true"])
    one = fork(lambda: None, 20.0)
    os.waitpid(one.pid, 0)

    assert one.status() == UNKNOWN
    assert mine.wait() == 0  # which was nobody else's


def test_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing has changed."""

    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setitem(forking._quiet_fork.__globals__, "fork_of_python", refused)

    with pytest.raises(OSError, match="temporarily"):
        fork(lambda: None, 20.0)
    assert gc.isenabled()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


#: With threads Python 3.12 and later warn of a fork.
WARNS = """
import os, threading, time
from oomsafe.kernel.forking import fork
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
while len(os.listdir("/proc/self/task")) < 2:
    time.sleep(0.01)
one = fork(lambda: None, 20.0)
while (status := one.status()) is None:
    time.sleep(0.01)
print(status, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("how", ["error", "error::DeprecationWarning", "always"])
def test_python_says_nothing(how: str) -> None:
    """Nor is anything raised, whatever is made of warnings."""
    ran = subprocess.run([sys.executable, "-W", how, "-c", WARNS], capture_output=True, text=True, timeout=60, check=False)

    assert (ran.stdout, ran.stderr) == ("0\n", "")


#: gevent replaces os.fork by a function that begins its hub anew in the fork, and its own hub reaps children.
GEVENT = """
from gevent import monkey
monkey.patch_all()
import gevent, os, time
from oomsafe.kernel.forking import fork
ran = []
def beside():
    while True:
        ran.append(os.getpid())
        gevent.sleep(0.01)
gevent.spawn(beside)
gevent.sleep(0.05)
one = fork(lambda: gevent.get_hub() and None, 20.0)
while (status := one.status()) is None:
    gevent.sleep(0.01)
before = len(ran)
gevent.sleep(0.05)
print(status, len(ran) > before, set(ran) == {os.getpid()}, flush=True)
os._exit(0)
"""


def test_under_gevent() -> None:
    """Its greenlets go on in the process, and not in the fork."""
    pytest.importorskip("gevent")
    ran = subprocess.run([sys.executable, "-c", GEVENT], capture_output=True, text=True, timeout=60, check=False)

    assert (ran.stdout, ran.stderr) == ("0 True True\n", "")
