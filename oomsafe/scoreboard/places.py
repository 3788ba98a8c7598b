"""Where scoreboards lie: a folder that only its owner can enter, never reached through a symbolic link."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from itertools import islice

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import children_of, is_alive

#: Memory that every user may use.
SHM = "/dev/shm"  # noqa: S108  what is made in it is 0700, and checked before use

_NAME = re.compile(r"(\d{1,10})-(\d{1,20})\.board")
_FOLDER = re.compile(r"oomsafe-(\d{1,10})")

#: At most this many entries of a folder are examined, because its owner may have filled it.
ENTRIES_MAX = 4096

_TURN = re.compile(r"(\d+)-(\d+)\.turn")

#: The suffix of a board's name until it has its header, so that no reader finds an incomplete one.
UNFINISHED = ".new"


def folders() -> Iterator[str]:
    """The candidate folders, best first: in memory, in the runtime folder, in the folder for temporary files, where these exist."""
    name = f"oomsafe-{os.geteuid()}"
    for parent in (SHM, os.environ.get("XDG_RUNTIME_DIR"), _temporary()):
        if parent and os.path.isabs(parent) and os.path.isdir(parent):
            yield os.path.join(parent, name)


def _temporary() -> str | None:
    """The folder for temporary files; None if no folder is writable, which Python finds out by trying."""
    try:
        return tempfile.gettempdir()
    except OSError:
        return None


def can_hold_boards() -> bool:
    """Whether one of these folders is writable, or could be created."""
    return any(os.access(path if os.path.isdir(path) else os.path.dirname(path), os.W_OK) for path in folders())


def open_folder(path: str, create: bool) -> int:
    """A descriptor of the folder `path`, which only this user can enter. Raises ScoreboardError.

    Where all users may write, another user may have made `path` first, or a link in its
    place: a folder that is not ours, or is open to others, is not used.
    """
    try:
        if create:
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                pass  # an earlier pool made it: checked below
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise ScoreboardError(f"{path}: {error.strerror}") from error
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(fd)
        raise ScoreboardError(f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):04o}: not used")
    return fd


def board_name(pid: int, started: int) -> str:
    """The name of the scoreboard's file of the supervisor with this pid and start time."""
    return f"{pid}-{started}.board"


def turn_name(parent: int, started: int) -> str:
    """The name of the file whose lock is the turn among the workers of `parent`, which is not a supervisor of ours."""
    return f"{parent}-{started}.turn"


def living_boards() -> list[str]:
    """The scoreboards of this user's pools whose supervisor is alive; for root, those of all users."""
    found = []
    for path in _all_folders():
        try:
            with os.scandir(path) as entries:
                names = sorted(entry.name for entry in islice(entries, ENTRIES_MAX))
        except OSError:  # it is missing, or not ours
            continue
        for name in names:
            match = _NAME.fullmatch(name)
            if match and is_alive(int(match[1]), int(match[2])):
                found.append(os.path.join(path, name))
    return found


def open_board(path: str, flags: int) -> int:
    """A descriptor of the scoreboard's file `path` of this user, or for root of any user. Raises ScoreboardError.

    If the folder's name contains a user, the folder and the file must belong to that user.
    """
    folder, name = os.path.split(path)
    match = _FOLDER.fullmatch(os.path.basename(folder))
    nofollow = os.O_NOFOLLOW if match else 0
    folder_fd = -1
    try:
        folder_fd = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | nofollow)
        within = os.fstat(folder_fd)
        if match and within.st_uid != int(match[1]):
            raise ScoreboardError(f"{path} is not used: its folder belongs to user {within.st_uid}")
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder_fd)
        found = os.fstat(fd)
        owner = within.st_uid if match else found.st_uid
        if not stat.S_ISREG(found.st_mode) or found.st_uid != owner or os.geteuid() not in (owner, 0):
            os.close(fd)
            raise ScoreboardError(f"{path} is not a scoreboard of this user")
    except OSError as error:
        raise ScoreboardError(f"{path}: {error.strerror}") from error
    finally:
        if folder_fd >= 0:
            os.close(folder_fd)
    return fd


def board_of(supervisor: int) -> str | None:
    """The path of the scoreboard of the supervisor with this pid; None while there is none."""
    return next((path for path in living_boards() if os.path.basename(path).startswith(f"{supervisor}-")), None)


def supervisor_of(path: str) -> int:
    """The pid of the supervisor whose scoreboard lies there: one of living_boards()."""
    return int(os.path.basename(path).partition("-")[0])


def boards_beside(supervisor: int) -> list[str]:
    """The scoreboards of the pools whose supervisors are children of `supervisor`."""
    children = set(children_of(supervisor))
    return [path for path in living_boards() if supervisor_of(path) in children]


def hold(fd: int, shared: bool = False) -> None:
    """Mark this file's pool as alive while this process or a fork of it lives (flock(2): a lock of the open file, which forks share).

    The pid in the name is not enough, because containers may share the folder but not their pids. `shared`: other processes hold the
    lock too.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        pass  # the file system has no such locks: sweep() can't get one either, and keeps the file


def sweep(folder: int) -> None:
    """Remove what killed supervisors left behind."""
    for name in os.listdir(folder):
        match = _NAME.fullmatch(name.removesuffix(UNFINISHED)) or _TURN.fullmatch(name)
        # this process's own is left over, too, where nobody holds it: from before an exec
        if match and (int(match[1]) == os.getpid() or not is_alive(int(match[1]), int(match[2]))):
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=folder)
                finally:
                    os.close(fd)
            except OSError:
                pass  # another process holds it, or has removed it first


def _all_folders() -> list[str]:
    mine = list(folders())
    if os.geteuid() != 0:
        return mine
    parents = {os.path.dirname(path) for path in mine}
    return sorted({entry.path for parent in parents for entry in os.scandir(parent) if _is_its_owners(entry)} | set(mine))


def _is_its_owners(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder that belongs to the user in its name: any user may have made one of that name first."""
    match = _FOLDER.fullmatch(entry.name)
    try:
        found = entry.stat(follow_symlinks=False) if match else None
    except OSError:  # it was removed meanwhile
        return False
    return match is not None and found is not None and stat.S_ISDIR(found.st_mode) and found.st_uid == int(match[1])
