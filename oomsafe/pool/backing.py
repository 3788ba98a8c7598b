"""The memory behind a scoreboard: a file of its user alone, 0600 in a 0700 folder, or nothing but memory."""

from __future__ import annotations

import mmap
import os
import stat
import time

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import start_time
from oomsafe.pool import layout, places


def blank(slots: int, workers: int, server: str) -> tuple[int, bytearray]:
    """The bytes that a scoreboard takes, and those it begins with."""
    header = bytearray(layout.HEADER_SIZE)
    layout.IDENTITY.pack_into(header, 0, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
    layout.SUPERVISOR.pack_into(header, layout.SUPERVISOR_AT, os.getpid(), start_time() or 0, time.time())
    layout.POOL.pack_into(header, layout.POOL_AT, 0, workers, 1, -1, -1, server.encode()[:32])
    return layout.HEADER_SIZE + slots * layout.SLOT_SIZE, header


def allocate(size: int, header: bytearray) -> tuple[int, str | None, list[str]]:
    """A descriptor of `size` bytes that are really there and begin with `header`, its path, and what went wrong on the way."""
    warnings: list[str] = []
    name = places.board_name(os.getpid(), start_time() or 0)
    for folder in places.folders():
        try:
            return _in_folder(folder, name, size, header), os.path.join(folder, name), warnings
        except (ScoreboardError, OSError) as error:
            warnings.append(f"no scoreboard in {folder} ({error}): trying elsewhere")
    warnings.append("the scoreboard is in memory only: `oomsafe status` can't see this pool")
    return in_memory(size, header), None, warnings


def in_memory(size: int, header: bytearray) -> int:
    """The same without a file: only who inherits the descriptor can have it."""
    fd = os.memfd_create("oomsafe-scoreboard")
    _fill(fd, size, header)
    return fd


def _in_folder(folder: str, name: str, size: int, header: bytearray) -> int:
    folder_fd = places.open_folder(folder, create=True)
    unfinished = name + places.UNFINISHED
    try:
        places.sweep(folder_fd)
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
        try:
            places.hold(fd)
            _fill(fd, size, header)
            # it gets its name when it is whole; unlike rename, link takes nobody else's
            os.link(unfinished, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd, follow_symlinks=False)
        except OSError:
            os.close(fd)
            raise
        finally:
            os.unlink(unfinished, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    return fd


def _fill(fd: int, size: int, header: bytearray) -> None:
    # ftruncate would promise pages that a full tmpfs does not have: writing to one is a SIGBUS
    os.posix_fallocate(fd, 0, size)
    os.pwrite(fd, header, 0)


def open_file(path: str, *, writing: bool) -> tuple[int, mmap.mmap]:
    """A descriptor and a mapping of another process's scoreboard. Raises ScoreboardError when it is none."""
    try:
        fd = os.open(path, (os.O_RDWR if writing else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ScoreboardError(f"{path}: {error.strerror}") from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or os.geteuid() not in (found.st_uid, 0):
            raise ScoreboardError(f"{path} is not a scoreboard of this user")
        protection = mmap.PROT_READ | mmap.PROT_WRITE if writing else mmap.PROT_READ
        memory = mmap.mmap(fd, found.st_size, prot=protection) if found.st_size >= layout.HEADER_SIZE else None
        if memory is None or not _is_board(memory, found.st_size):
            raise ScoreboardError(f"{path} is not a scoreboard of version {layout.VERSION}")
        return fd, memory
    except ScoreboardError:
        os.close(fd)
        raise


def _is_board(memory: mmap.mmap, size: int) -> bool:
    magic, version, slots, slot_size = layout.IDENTITY.unpack_from(memory)
    fits = layout.HEADER_SIZE + slots * layout.SLOT_SIZE <= size
    return bool(magic == layout.MAGIC and version == layout.VERSION and slot_size == layout.SLOT_SIZE and fits)
