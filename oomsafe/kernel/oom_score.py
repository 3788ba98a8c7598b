"""oom_score_adj: which process the kernel kills first. It is inherited across fork and exec (proc(5))."""

from __future__ import annotations

import os

from oomsafe.errors import ScoreRefused
from oomsafe.kernel.files import read_int
from oomsafe.policy.victims import clamp_score


def read_score(pid: int | str = "self", proc: str = "/proc") -> int | None:
    """A process's oom_score_adj, -1000 to 1000; None if it can't be read."""
    return read_int(f"{proc}/{pid}/oom_score_adj")


def write_score(score: int, pid: int | str = "self", proc: str = "/proc") -> int | None:
    """Set a process's oom_score_adj, and return the value that the kernel then reports (None if it can't be read).

    Any process may raise its user's scores; only CAP_SYS_RESOURCE allows a value below the one last set with CAP_SYS_RESOURCE
    (fs/proc/base.c, __set_oom_adj). Raises ScoreRefused.
    """
    path = f"{proc}/{pid}/oom_score_adj"
    try:
        # os.write, because a file object would swallow EACCES until it is closed
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(score).encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise ScoreRefused(_explained(score, pid, read_score(pid, proc), error)) from error
    return read_score(pid, proc)


def raise_score(by: int, proc: str = "/proc") -> None:
    """Raise this process's oom_score_adj by `by`, to 1000 at most; do nothing if it can't be read. Raises ScoreRefused."""
    present = read_score(proc=proc)
    if present is not None and by:
        write_score(clamp_score(present + by), proc=proc)


def _explained(score: int, pid: int | str, present: int | None, error: OSError) -> str:
    whose = "this process" if pid == "self" else f"process {pid}"
    if isinstance(error, PermissionError):
        why = (
            "lowering it needs CAP_SYS_RESOURCE"
            if present is not None and score < present
            else "its /proc files belong to root (it changed its user without an exec)"
        )
    else:
        why = os.strerror(error.errno) if error.errno else str(error)
    return f"oom_score_adj of {whose} stays {present}: {score} was refused, {why}"
