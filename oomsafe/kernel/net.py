"""What the kernel does with connections queued at a listener that closes, and which process listens where."""

from __future__ import annotations

import os
from collections.abc import Iterator

from oomsafe.kernel.files import read_bytes, read_int

#: The state of a listening socket in /proc/net/tcp (TCP_LISTEN in include/net/tcp_states.h).
_LISTENS = b"0A"

#: The most processes whose descriptors are searched.
_PROCESSES_MAX = 20_000


def migrates_requests(proc: str = "/proc") -> bool | None:
    """Whether connections queued at one SO_REUSEPORT listener go to another when it closes (net.ipv4.tcp_migrate_req, Linux 5.14).

    None if it can't be read.
    """
    setting = read_int(f"{proc}/sys/net/ipv4/tcp_migrate_req")
    return None if setting is None else setting != 0


def who_listens(port: int, proc: str = "/proc") -> int | None:
    """The pid of a process that listens on this TCP port, at any address; None: not known, for example another user's process."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port, proc)}
    if sockets:
        for pid in filter(str.isdigit, os.listdir(proc)[:_PROCESSES_MAX]):
            if not sockets.isdisjoint(_open_in(f"{proc}/{pid}/fd")):
                return int(pid)
    return None


def _open_in(folder: str) -> Iterator[str]:
    """The targets of a process's descriptors; none for another user's process."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            yield os.readlink(f"{folder}/{name}")
        except OSError:
            pass  # closed in the meantime


def _listening(port: int, proc: str) -> Iterator[int]:
    """The inodes of the sockets (proc(5), /proc/net/tcp: local address in hexadecimal, state, inode)."""
    for table in ("tcp", "tcp6"):
        for line in (read_bytes(f"{proc}/self/net/{table}") or b"").splitlines()[1:]:
            words = line.split()
            if len(words) > 9 and words[3] == _LISTENS and words[1].endswith(b":%04X" % port) and words[9].isdigit():
                yield int(words[9])
