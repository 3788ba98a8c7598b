"""Small kernel files, read completely or not at all. A file that vanishes or holds garbage is None; garbage is logged once."""

from __future__ import annotations

import logging
import os

from oomsafe.log import once

#: Bytes that one read asks for, which are allocated for a moment: of a file in one piece (status has 1500), and of any file.
ONE_PIECE, PIECES = 4096, 65536


def read_bytes(path: str) -> bytes | None:
    """The content of a kernel file; None if it can't be read."""
    return _read(path, PIECES, in_pieces=True)


def read_record(path: str) -> bytes | None:
    """read_bytes() of a file that the kernel writes in one piece: one system call less, because a read that is not full was the last.

    Such files are a process's status, stat, statm and oom_score_adj, and those of one number (fs/seq_file.c, single_open;
    fs/libfs.c, simple_read_from_buffer). A file of many records (smaps, mountinfo) comes in pieces of any length.
    """
    return _read(path, ONE_PIECE, in_pieces=False)


def _read(path: str, size: int, *, in_pieces: bool) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # not os.read: a detector of blocking calls reports it, although a file that the kernel generates never blocks
        content = piece = os.pread(fd, size, 0)
        while piece and (in_pieces or len(piece) == size):
            piece = os.pread(fd, size, len(content))
            content += piece
        return content
    except OSError:  # ESRCH: the process went away between open and read
        return None
    finally:
        os.close(fd)


def read_text(path: str) -> str | None:
    """The content of a kernel file as text, with bytes that are not UTF-8 replaced; None if it can't be read."""
    raw = read_bytes(path)
    return None if raw is None else raw.decode("utf-8", "replace")


def read_int(path: str) -> int | None:
    """The one number in a kernel file; None if it can't be read, or is not a number, which is logged once for each file."""
    raw = read_record(path)
    return None if raw is None else as_int(path, raw.decode("utf-8", "replace"))


def as_int(path: str, text: str) -> int | None:
    """The same, of a file at `path` whose text has been read."""
    try:
        return int(text)
    except ValueError:
        once(path, logging.WARNING, "%s holds %r where a number was expected: the figure is left out", path, text[:40])
        return None


def read_keyed(path: str, factor: int = 1) -> dict[str, int]:
    """Lines of ``key value`` or ``key: value kB`` as a table, each value times `factor`; other lines are ignored."""
    table: dict[str, int] = {}
    for line in (read_text(path) or "").splitlines():
        words = line.replace(":", " ", 1).split()
        if len(words) >= 2 and words[1].isdecimal():
            table[words[0]] = int(words[1]) * factor
    return table
