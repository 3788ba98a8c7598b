"""How Celery's event loop is notified of a child's end, in each kind of Celery and kernel. With a real child, and a hub of the test's."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.concurrency.asynpool import AsynPool

from oomsafe.celery.pool import GuardedAsynPool


@pytest.fixture
def child() -> Iterator[Any]:
    """A child that lives until the test ends, as billiard's process object has it."""
    ends, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        os.read(ends, 1)
        os._exit(0)
    os.close(ends)
    sentinel = os.open("/dev/null", os.O_RDONLY)
    yield SimpleNamespace(pid=pid, exitcode=None, _popen=SimpleNamespace(sentinel=sentinel))
    os.close(sentinel)
    os.close(held)
    os.waitpid(pid, 0)


@pytest.fixture
def hub() -> Any:
    """As kombu's: `readers` has what is watched."""
    readers: dict[int, Any] = {}
    return SimpleNamespace(readers=readers, add_reader=lambda fd, *call: readers.update({fd: call}), remove=readers.pop)


def kind(fd: int) -> str:
    """Of a descriptor; empty if it is closed."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@pytest.fixture
def pool() -> Any:
    """As far as it is needed here."""
    return object.__new__(GuardedAsynPool)


def test_the_end_itself_is_watched(pool: Any, child: Any, hub: Any) -> None:
    """Once: after a lost connection the same descriptor is watched again. Celery closes it."""
    pool._track_child_process(child, hub)
    (fd,) = hub.readers
    assert "pidfd" in kind(fd)

    hub.readers.clear()
    pool._track_child_process(child, hub)
    assert list(hub.readers) == [fd]

    pool._untrack_child_process(child, hub)
    assert (hub.readers, kind(fd)) == ({}, "")


@pytest.mark.parametrize("waited_for", [False, True])
def test_else_celery_watches_its_pipe(pool: Any, child: Any, hub: Any, monkeypatch: pytest.MonkeyPatch, waited_for: bool) -> None:
    """Where the kernel gives no pidfd, or another process may have the pid by now."""
    if waited_for:
        child.exitcode = 0
    else:
        monkeypatch.setattr(os, "pidfd_open", lambda pid: (_ for _ in ()).throw(OSError(errno.ENOSYS, "not here")))

    pool._track_child_process(child, hub)

    assert [kind(fd) for fd in hub.readers] == ["/dev/null"]
    pool._untrack_child_process(child, hub)


def test_a_celery_that_watches_something_else(pool: Any, child: Any, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left open, and nothing is closed that is not ours."""
    monkeypatch.setattr(AsynPool, "_track_child_process", lambda self, proc, hub: hub.add_reader(proc._popen.sentinel))
    before = os.listdir("/proc/self/fd")

    pool._track_child_process(child, hub)

    assert os.listdir("/proc/self/fd") == before
    assert list(hub.readers) == [child._popen.sentinel]
    assert child._sentinel_poll is None
