"""The processes of a session: what a server has started, whoever of them has lost its parent. Linux only: elsewhere none can be seen."""

from __future__ import annotations

import os

from oomsafe.kernel.files import read_bytes


def session_of(pid: int, proc: str = "/proc") -> int:
    """The session of a process that runs (proc(5), stat field 6); 0 for one that has ended, as a zombie has."""
    words = (read_bytes(f"{proc}/{pid}/stat") or b"").rpartition(b") ")[2].split()
    return int(words[3]) if len(words) > 3 and words[0] not in (b"Z", b"X") else 0


def in_session(session: int, proc: str = "/proc") -> set[int]:
    """The pids of a session's processes that run."""
    try:
        names = os.listdir(proc)
    except OSError:
        return set()
    return {pid for pid in map(int, filter(str.isdigit, names)) if session_of(pid, proc) == session}
