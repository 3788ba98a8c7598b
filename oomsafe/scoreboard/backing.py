"""The memory behind a scoreboard, and the file that tells where it is: 0600, in a folder of its user alone.

A supervisor that may change to another user (root) can't trust its workers with the file itself: who cuts
it short, by whatever descriptor it has inherited, kills with SIGBUS whoever has it mapped. Its memory is a
memfd that is sealed against that, and the file only names it, for readers::

    oomsafe memory of 812 4711 is 5        pid, start time, and the number of the descriptor in that process

Where all processes of a pool are of one user, any of them may kill the others anyway: there the file is the memory.
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

#: What memory is called in /proc/PID/fd.
MEMORY = "oomsafe-scoreboard"

_NAME_OF_MEMORY = b"oomsafe memory of %d %d is %d\n"
_NAMES_MEMORY = re.compile(rb"oomsafe memory of (\d{1,10}) (\d{1,20}) is (\d{1,7})\n")

#: Neither longer nor shorter, and so for ever.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0

#: Linux 6.3: asked for where vm.memfd_noexec is 2; older ones know no such flag.
_MFD_NOEXEC_SEAL = 8


@dataclass(frozen=True)
class Backing:
    """What a new scoreboard lies in."""

    memory: int
    """The descriptor of its bytes."""
    file: int
    """That of the file which its lock is taken on: the same, where the file is the memory."""
    path: str | None
    """The file's; None: it has none, and only who inherits the descriptors has it."""
    text: bytes = b""
    """What names the memory: the file says it, where it is not the memory itself, or where there is no file, the supervisor."""


def blank(slots: int, workers: int, server: str) -> tuple[int, bytearray]:
    """The bytes that a scoreboard takes, and those it begins with."""
    header = bytearray(layout.HEADER_SIZE)
    layout.IDENTITY.pack_into(header, 0, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
    layout.SUPERVISOR.pack_into(header, layout.SUPERVISOR_AT, os.getpid(), start_time() or 0, time.time())
    layout.POOL.pack_into(header, layout.POOL_AT, 0, workers, 1, -1, -1, server.encode()[:32])
    layout.HELD.pack_into(header, layout.HELD_AT, -1)
    return layout.HEADER_SIZE + slots * layout.SLOT_SIZE, header


def allocate(size: int, header: bytearray, room: int) -> tuple[Backing, list[str]]:
    """`size` bytes that are really there and begin with `header`, and what went wrong on the way.

    It has room for `room` bytes, if it may: those behind `size` are not there before enlarge(), and cost nothing.
    """
    warnings: list[str] = []
    memory = None
    try:
        memory = in_memory(size, header, room) if may_become_another_user() else None
    except OSError as error:
        warnings.append(
            f"no memory can be sealed ({error}): a worker of another user could end its supervisor by cutting the scoreboard short"
        )
    pid, started = os.getpid(), start_time() or 0
    name = places.board_name(pid, started)
    text = b"" if memory is None else _NAME_OF_MEMORY % (pid, started, memory)
    for folder in places.folders():
        try:
            file = _in_folder(folder, name, text, lambda fd: _fill(fd, size, header, room))
        except (ScoreboardError, OSError) as error:
            warnings.append(f"no scoreboard in {folder} ({error}): trying elsewhere")
        else:
            return Backing(file if memory is None else memory, file, os.path.join(folder, name), text), warnings
    warnings.append("the scoreboard is in memory only: `oomsafe status` can't see this pool")
    memory = in_memory(size, header, room) if memory is None else memory
    return Backing(memory, memory, None, _NAME_OF_MEMORY % (pid, started, memory)), warnings


def in_memory(size: int, header: bytearray, room: int) -> int:
    """The same without a file: its descriptor. Whoever has it can't cut it short."""
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


def _fill(fd: int, size: int, header: bytearray, room: int) -> None:
    with suppress(OSError):  # RLIMIT_FSIZE: then it can't grow
        os.ftruncate(fd, room)
    enlarge(fd, size)
    os.pwrite(fd, header, 0)


def enlarge(fd: int, size: int) -> None:
    """Have `size` bytes be there, within its room. Raises OSError where there is no memory for them."""
    # ftruncate promises pages that a full tmpfs does not have: writing to one is a SIGBUS
    os.posix_fallocate(fd, 0, size)


def join(path: str) -> tuple[Backing, mmap.mmap]:
    """In a spawned worker: its pool's memory, to be written to, by its path or by what names it. Raises ScoreboardError when it is none."""
    named = _NAMES_MEMORY.fullmatch(path.encode())
    if named is None:
        file, memory, size = _open(path, os.O_RDWR)
        return Backing(memory, file, path), mmap.mmap(memory, size)
    pid, started, number = map(int, named.groups())
    memory = _sealed_memory(pid, started, number, path.strip(), os.O_RDWR)
    return Backing(memory, memory, None), mmap.mmap(memory, _size(memory, path.strip()))


def open_to_read(path: str) -> tuple[int, int]:
    """(descriptor, slots) of another process's scoreboard, never to be mapped: it may be cut short. Raises ScoreboardError."""
    file, memory, size = _open(path, os.O_RDONLY)
    if memory != file:
        os.close(file)
    return memory, (size - layout.HEADER_SIZE) // layout.SLOT_SIZE


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
    """In bytes. Raises ScoreboardError when it is no scoreboard."""
    raw = os.pread(fd, layout.IDENTITY.size, 0)
    if len(raw) == layout.IDENTITY.size:
        magic, version, slots, slot_size = layout.IDENTITY.unpack(raw)
        size = layout.HEADER_SIZE + slots * layout.SLOT_SIZE
        known = (magic, version, slot_size) == (layout.MAGIC, layout.VERSION, layout.SLOT_SIZE)
        if known and size <= min(os.fstat(fd).st_size, layout.SIZE_MAX):
            return int(size)
    raise ScoreboardError(f"{path} is not a scoreboard of version {layout.VERSION}")


def _memory_of(file: int, path: str, flags: int) -> int:
    """The descriptor of the memory that this file names, or `file` where it is the memory. Raises ScoreboardError."""
    found = _NAMES_MEMORY.fullmatch(os.pread(file, 64, 0))
    if found is None:
        return file
    pid, started, number = map(int, found.groups())
    # only root makes such files, or who has CAP_SETUID: nobody else has root open what he has open. Its workers have inherited the
    # file and may write to it, but not name it
    named = os.path.basename(path) == places.board_name(pid, started)
    if not named or os.fstat(file).st_uid not in (0, os.geteuid()) or not is_alive(pid, started):
        raise ScoreboardError(f"{path} is not a scoreboard of a living supervisor of this user")
    return _sealed_memory(pid, started, number, path, flags)


def _sealed_memory(pid: int, started: int, number: int, path: str, flags: int) -> int:
    """The memory that this supervisor has under this descriptor, opened anew. Raises ScoreboardError."""
    where = f"/proc/{pid}/fd/{number}"
    try:
        # before it is opened: by now it may be a device, and opening one can have effects
        if not os.readlink(where).startswith(f"/memfd:{MEMORY} "):
            raise ScoreboardError(f"{path}: supervisor {pid} has lost the descriptor of its scoreboard: it can't be read any more")
        memory = os.open(where, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise ScoreboardError(
            f"{path}: the memory of supervisor {pid} can't be opened ({error.strerror}): it takes its user, and all of its capabilities"
        ) from error
    try:
        sealed = fcntl.fcntl(memory, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed or not is_alive(pid, started):
        os.close(memory)
        raise ScoreboardError(f"{path} is not a scoreboard of a living supervisor of this user")
    return memory
