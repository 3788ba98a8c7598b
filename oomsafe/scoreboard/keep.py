"""Small notes that outlive every process: files in a folder that only this user can enter, each written completely or not at all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator

from oomsafe.errors import ScoreboardError
from oomsafe.scoreboard import places

#: The name of the notes' folder, inside $OOMSAFE_STATE or the first usable of places.folders().
FOLDER = "notes"

#: Seconds after which a note no longer matters.
OLD = 24 * 3600.0

#: The greatest length of a note in bytes.
LONGEST = 4096


class Keep:
    """Notes by key. Every method raises OSError, or ScoreboardError if no folder is usable."""

    def __init__(self, folder: str | None = None) -> None:
        """`folder` None: $OOMSAFE_STATE, which may outlive a container, else where scoreboards lie."""
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        """The note; None if there is none."""
        folder = self._open()
        try:
            fd = os.open(_name(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return None
        finally:
            os.close(folder)
        try:
            return os.read(fd, LONGEST)
        finally:
            os.close(fd)

    def set(self, key: str, note: bytes) -> None:
        """Write a note, atomically replacing an existing one."""
        folder = self._open()
        new = f"{_name(key)}.{os.getpid()}"
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
            try:
                os.write(fd, note)
            finally:
                os.close(fd)
            os.rename(new, _name(key), src_dir_fd=folder, dst_dir_fd=folder)
        finally:
            os.close(folder)

    def delete(self, key: str) -> None:
        """Remove a note, if there is one."""
        folder = self._open()
        try:
            os.unlink(_name(key), dir_fd=folder)
        except FileNotFoundError:
            pass  # there is none
        finally:
            os.close(folder)

    def sweep(self) -> None:
        """Remove the notes that are too old to matter."""
        folder = self._open()
        try:
            for name in os.listdir(folder):
                try:
                    if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > OLD:
                        os.unlink(name, dir_fd=folder)
                except OSError:
                    pass  # another process removed it first
        finally:
            os.close(folder)

    def _open(self) -> int:
        last: Exception = ScoreboardError("no folder for notes")
        for folder in self._folders():
            try:
                os.close(places.open_folder(folder, create=True))
                return places.open_folder(os.path.join(folder, FOLDER), create=True)
            except (ScoreboardError, OSError) as error:
                last = error
        raise last

    def _folders(self) -> Iterator[str]:
        given = self._folder or os.environ.get("OOMSAFE_STATE")
        if given:
            yield given
        if not self._folder:
            yield from places.folders()


def _name(key: str) -> str:
    """The file name for a key, hashed because strangers may choose keys."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:40]
