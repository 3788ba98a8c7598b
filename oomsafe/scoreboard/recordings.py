"""Where the reports and recordings of probes lie: on disk, never in memory, in a folder that only their user can enter."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.filesystem import lies_in_memory
from oomsafe.scoreboard import places

#: The folder's name, inside $OOMSAFE_STATE or one of _folders().
FOLDER = "probes"

#: The files of so many probes are kept.
KEPT = 16

#: Bytes that must be free on the disk: a recording has some MiB at most, but who fills the disk hurts others.
FREE = 256 << 20

#: The longest report that is read, in bytes.
LONGEST = 1 << 20

_NAME = re.compile(r"probe-\d{1,10}-\d{1,20}\.(json|bin)")

REPORT, RECORDING = ".json", ".bin"


class Recordings:
    """The files of one probe. Raises ScoreboardError if there is no folder on a disk that has room."""

    def __init__(self, pid: int, number: int) -> None:
        """`number` tells the probes of one pid apart."""
        self._stem = f"probe-{pid}-{number}"
        self._folder = _usable()
        _sweep(self._folder)

    @property
    def report(self) -> str:
        """The path of the report."""
        return os.path.join(self._folder, self._stem + REPORT)

    @property
    def recording(self) -> str:
        """The path of the recording."""
        return os.path.join(self._folder, self._stem + RECORDING)

    def new_recording(self) -> str:
        """Make the recording's file, empty, and return its path: it must not be there yet. Raises OSError."""
        os.close(os.open(self.recording, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        return self.recording

    def write(self, record: dict[str, Any]) -> str:
        """Write the report, completely or not at all, and return its path. Raises OSError."""
        unfinished = f"{self.report}.new"
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(record, file, allow_nan=False)
            os.rename(unfinished, self.report)
        except OSError:
            with suppress(OSError):
                os.unlink(unfinished)
            raise
        return self.report

    def forget_recording(self) -> None:
        """Remove the recording, if there is one."""
        with suppress(OSError):
            os.unlink(self.recording)


def read_report(path: str) -> dict[str, Any]:
    """The report at `path`, which a worker may have made up. Raises ScoreboardError if it can't be one."""
    fd = open_probe_file(path, REPORT)
    with os.fdopen(fd, "rb") as file:
        text = file.read(LONGEST + 1)
    try:
        record = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ScoreboardError(f"{path} is no report of a probe")
    return record


def open_probe_file(path: str, suffix: str) -> int:
    """A descriptor for reading. Raises ScoreboardError if it is not a file of a probe's name, of its folder's owner and his alone."""
    if not os.path.isabs(path) or not _NAME.fullmatch(os.path.basename(path)) or not path.endswith(suffix):
        raise ScoreboardError("a probe's report does not lie where the scoreboard says")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        found, folder = os.fstat(fd), os.lstat(os.path.dirname(path))
    except OSError as error:
        raise ScoreboardError(f"{path}: {error.strerror}") from error
    private = not stat.S_IMODE(found.st_mode) & 0o077 and not stat.S_IMODE(folder.st_mode) & 0o077
    if not stat.S_ISREG(found.st_mode) or not stat.S_ISDIR(folder.st_mode) or found.st_uid != folder.st_uid or not private:
        os.close(fd)
        raise ScoreboardError(f"{path} is not a private file of its folder's owner")
    return fd


def _folders() -> Iterator[str]:
    """The candidates, best first."""
    given = os.environ.get("OOMSAFE_STATE")
    if given:
        yield given
    name = f"oomsafe-{os.geteuid()}"
    temporary = None
    with suppress(OSError):
        temporary = tempfile.gettempdir()
    for parent in (os.environ.get("XDG_STATE_HOME"), "/var/tmp", temporary):  # noqa: S108  what is made in it is 0700, and checked
        if parent and os.path.isabs(parent) and os.path.isdir(parent):
            yield os.path.join(parent, name)


def _usable() -> str:
    problems: list[str] = []
    for folder in _folders():
        try:
            os.close(places.open_folder(folder, create=True))
            path = os.path.join(folder, FOLDER)
            os.close(places.open_folder(path, create=True))
            if lies_in_memory(path):
                problems.append(f"{folder} is no disk, but memory")
                continue
            found = os.statvfs(path)
            if found.f_bavail * found.f_frsize < FREE:
                problems.append(f"{folder}: the disk is almost full")
                continue
            return path
        except (ScoreboardError, OSError) as error:
            problems.append(str(error))
    raise ScoreboardError("; ".join(problems) or "no folder on a disk is writable: set OOMSAFE_STATE")


def _sweep(folder: str) -> None:
    """Keep the newest files only. A probe has two."""
    with suppress(OSError):
        paths = [os.path.join(folder, name) for name in os.listdir(folder) if _NAME.match(name)]
        files = [(os.lstat(path).st_mtime, path) for path in paths]
        for _, path in sorted(files, reverse=True)[2 * KEPT :]:
            with suppress(OSError):
                os.unlink(path)
