"""The processes of a session: everything that a server has started, orphans included. Linux only: elsewhere none are found."""

from __future__ import annotations

import os

from oomsafe.kernel.process import stat_of


def session_of(pid: int, proc: str = "/proc") -> int:
    """The session of a running process (proc(5), stat field 6); 0 if it has ended, also for a zombie."""
    words = stat_of(pid, proc)
    return int(words[3]) if len(words) > 3 and words[0] not in (b"Z", b"X") else 0


def in_session(session: int, proc: str = "/proc") -> set[int]:
    """The pids of the running processes of a session."""
    try:
        names = os.listdir(proc)
    except OSError:
        return set()
    return {pid for pid in map(int, filter(str.isdigit, names)) if session_of(pid, proc) == session}
