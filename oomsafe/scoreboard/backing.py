"""The memory behind a scoreboard, and the file that leads to it: mode 0600, in a folder that only its user can enter.

A supervisor that may change to another user (root) can't trust its workers with the file itself: a worker that truncates
it, through any inherited descriptor, kills every process that has it mapped, by SIGBUS. There the memory is a
memfd that is sealed against truncation, and the file only names it, for readers::

    oomsafe memory of 812 4711 is 5        pid, start time, and the number of the descriptor in that process

If all processes of a pool run as one user, any of them may kill the others anyway: there the file is the memory.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import is_alive, may_become_another_user, start_time
from oomsafe.scoreboard import layout, places

#: The memfd's name in /proc/PID/fd.
MEMORY = "oomsafe-scoreboard"

_NAME_OF_MEMORY = b"oomsafe memory of %d %d is %d\n"
_NAMES_MEMORY = re.compile(rb"oomsafe memory of (\d{1,10}) (\d{1,20}) is (\d{1,7})\n")

#: The memory can neither grow nor shrink, and these seals can't be removed.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0

#: Linux 6.3: required if vm.memfd_noexec is 2; older kernels reject this flag.
_MFD_NOEXEC_SEAL = 8


@dataclass(frozen=True)
class Backing:
    """The memory and the file of a new scoreboard."""

    memory: int
    """The descriptor of its bytes."""
    file: int
    """The descriptor of the file on which its lock is taken; the same as `memory` if the file is the memory."""
    path: str | None
    """The path of the file; None: it has none, and only processes that inherit the descriptors have it."""
    text: bytes = b""
    """The name of the memory, if it is a memfd. The file contains it; without a file, the supervisor passes it on."""


def blank(slots: int, workers: int, server: str) -> tuple[int, bytearray]:
    """The size of a new scoreboard in bytes, and its header."""
    header = bytearray(layout.HEADER_SIZE)
    layout.IDENTITY.pack_into(header, 0, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
    layout.SUPERVISOR.pack_into(header, layout.SUPERVISOR_AT, os.getpid(), start_time() or 0, time.time())
    layout.POOL.pack_into(header, layout.POOL_AT, 0, workers, 1, -1, -1, server.encode()[:32])
    layout.HELD.pack_into(header, layout.HELD_AT, -1)
    return layout.HEADER_SIZE + slots * layout.SLOT_SIZE, header


def allocate(size: int, header: bytearray, room: int) -> tuple[Backing, list[str]]:
    """`size` bytes that are really allocated and start with `header`, and warnings to log.

    If possible it has room for `room` bytes: those beyond `size` are not allocated before enlarge(), and cost nothing.
    """
    warnings: list[str] = []
    memory = None
    try:
        memory = in_memory(size, header, room) if may_become_another_user() else None
    except OSError as error:
        warnings.append(
            f"no sealed memory can be created ({error}): a worker of another user could kill its supervisor by truncating the scoreboard"
        )
    pid, started = os.getpid(), start_time() or 0
    name = places.board_name(pid, started)
    text = b"" if memory is None else _NAME_OF_MEMORY % (pid, started, memory)
    folders = list(places.folders())
    for folder, following in zip(folders, [*folders[1:], "memory"], strict=False):
        try:
            file = _in_folder(folder, name, text, lambda fd: _fill(fd, size, header, room))
        except (ScoreboardError, OSError) as error:
            warnings.append(f"no scoreboard in {folder} ({error}): trying {following}")
        else:
            return Backing(file if memory is None else memory, file, os.path.join(folder, name), text), warnings
    warnings.append("the scoreboard is in memory only: `oomsafe status` can't see this pool")
    memory = in_memory(size, header, room) if memory is None else memory
    return Backing(memory, memory, None, _NAME_OF_MEMORY % (pid, started, memory)), warnings


def in_memory(size: int, header: bytearray, room: int) -> int:
    """The descriptor of such bytes without a file, in a memfd: no process that has it can truncate it. Raises OSError."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create(MEMORY, flags | _MFD_NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create(MEMORY, flags)
    try:
        os.fchmod(fd, 0o600)
        _fill(fd, size, header, room)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def in_folder(folder: str, size: int, header: bytearray) -> tuple[int, str]:
    """(descriptor, path) of a new scoreboard of this process, whose file is its memory. Raises ScoreboardError or OSError."""
    name = places.board_name(os.getpid(), start_time() or 0)
    return _in_folder(folder, name, b"", lambda fd: _fill(fd, size, header, size)), os.path.join(folder, name)


def _in_folder(folder: str, name: str, text: bytes, fill: Callable[[int], None]) -> int:
    folder_fd = places.open_folder(folder, create=True)
    unfinished = name + places.UNFINISHED
    try:
        places.sweep(folder_fd)
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder_fd)
        try:
            places.hold(fd)
            if text:
                os.write(fd, text)
            else:
                fill(fd)
            # it gets its name once it is complete; unlike rename, link does not replace another process's file
            os.link(unfinished, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd, follow_symlinks=False)
        except OSError:
            os.close(fd)
            raise
        finally:
            os.unlink(unfinished, dir_fd=folder_fd)
    finally:
        os.close(folder_fd)
    return fd


def _fill(fd: int, size: int, header: bytearray, room: int) -> None:
    with suppress(OSError):  # RLIMIT_FSIZE: then the scoreboard can't grow
        os.ftruncate(fd, room)
    enlarge(fd, size)
    os.pwrite(fd, header, 0)


def enlarge(fd: int, size: int) -> None:
    """Allocate `size` bytes, within its room. Raises OSError if there is no memory for them."""
    # ftruncate promises pages that a full tmpfs does not have: writing to one raises SIGBUS
    os.posix_fallocate(fd, 0, size)


def join(path: str) -> tuple[Backing, mmap.mmap]:
    """In a spawned worker: map its pool's memory for writing. `path` is the file's, or the memory's name. Raises ScoreboardError."""
    named = _NAMES_MEMORY.fullmatch(path.encode())
    if named is None:
        file, memory, size = _open(path, os.O_RDWR)
        return Backing(memory, file, path), mmap.mmap(memory, size)
    pid, started, number = map(int, named.groups())
    memory = _sealed_memory(pid, started, number, path.strip(), os.O_RDWR)
    return Backing(memory, memory, None), mmap.mmap(memory, _size(memory, path.strip()))


def open_to_read(path: str) -> tuple[int, int]:
    """(descriptor, slots) of another process's scoreboard. Never map it, because it may be truncated. Raises ScoreboardError."""
    file, memory, size = _open(path, os.O_RDONLY)
    if memory != file:
        os.close(file)
    return memory, _slots(size)


def open_to_order(path: str) -> int:
    """The descriptor of another process's scoreboard, for writing to its mailbox. Never map it. Raises ScoreboardError."""
    file, memory, _ = _open(path, os.O_RDWR)
    if memory != file:
        os.close(file)
    return memory


def slots_of(fd: int, path: str) -> int:
    """How many slots the scoreboard has that is open under `fd`. Raises ScoreboardError, which names `path`, when it is none."""
    try:
        return _slots(_size(fd, path))
    except OSError as error:
        raise ScoreboardError(f"{path}: {error.strerror}") from error


def _slots(size: int) -> int:
    return (size - layout.HEADER_SIZE) // layout.SLOT_SIZE


def _open(path: str, flags: int) -> tuple[int, int, int]:
    file = memory = places.open_board(path, flags)
    try:
        memory = _memory_of(file, path, flags)
        return file, memory, _size(memory, path)
    except (ScoreboardError, OSError) as error:
        for fd in {file, memory}:
            os.close(fd)
        raise ScoreboardError(str(error)) from error


def _size(fd: int, path: str) -> int:
    """The size in bytes of a scoreboard. Raises ScoreboardError if it is none."""
    raw = os.pread(fd, layout.IDENTITY.size, 0)
    if len(raw) == layout.IDENTITY.size:
        magic, version, slots, slot_size = layout.IDENTITY.unpack(raw)
        size = layout.HEADER_SIZE + slots * layout.SLOT_SIZE
        known = (magic, version, slot_size) == (layout.MAGIC, layout.VERSION, layout.SLOT_SIZE)
        if known and size <= min(os.fstat(fd).st_size, layout.SIZE_MAX):
            return int(size)
    raise ScoreboardError(f"{path} is not a scoreboard of version {layout.VERSION}")


def _memory_of(file: int, path: str, flags: int) -> int:
    """The descriptor of the memory that this file names, or `file` if the file is the memory. Raises ScoreboardError."""
    found = _NAMES_MEMORY.fullmatch(os.pread(file, 64, 0))
    if found is None:
        return file
    pid, started, number = map(int, found.groups())
    # only root, or a process with CAP_SETUID, makes such files: no other user may make root open one of his descriptors. The workers have
    # inherited the file and may write to it, but they can't choose its name
    named = os.path.basename(path) == places.board_name(pid, started)
    if not named or os.fstat(file).st_uid not in (0, os.geteuid()) or not is_alive(pid, started):
        raise ScoreboardError(f"{path} is not a scoreboard of a living supervisor of this user")
    return _sealed_memory(pid, started, number, path, flags)


def _sealed_memory(pid: int, started: int, number: int, path: str, flags: int) -> int:
    """A new descriptor of the memory that the supervisor has under descriptor `number`. Raises ScoreboardError."""
    where = f"/proc/{pid}/fd/{number}"
    try:
        # checked before it is opened: by now it may be a device, and opening one can have side effects
        if not os.readlink(where).startswith(f"/memfd:{MEMORY} "):
            raise ScoreboardError(f"{path}: supervisor {pid} has lost the descriptor of its scoreboard, which can no longer be read")
        memory = os.open(where, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ScoreboardError(
            f"{path}: the memory of supervisor {pid} can't be opened ({error.strerror}): that needs its user and all of its capabilities"
        ) from error
    try:
        sealed = fcntl.fcntl(memory, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed or not is_alive(pid, started):
        os.close(memory)
        raise ScoreboardError(f"{path} is not a scoreboard of a living supervisor of this user")
    return memory
