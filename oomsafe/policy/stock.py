"""What a process's memory is made of: used, kept by an allocator though it is free, or neither. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from oomsafe.policy.units import MIB, format_size

#: A part of less than this is not worth a word; and growth of less than this is none.
LEAST, GROWN = MIB // 2, 16 * MIB

_LINE = re.compile(r"^(?:# bytes in (allocated|available) blocks|(\d+) unused pools \* (\d+) bytes) += +([\d,]+)$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Pymalloc:
    """Python's own allocator, for blocks of up to 512 bytes. Sizes in bytes."""

    live: int
    """In blocks that are in use."""
    kept: int
    """Free, and not given back: a block that is in use holds the whole arena, 256 KiB, or 1 MiB since Python 3.10."""


@dataclass(frozen=True, kw_only=True)
class Malloc:
    """The C library's allocator (glibc, mallinfo2(3)). Sizes in bytes."""

    live: int
    """In blocks that are in use, those that were mapped by themselves too."""
    free: int
    """In free blocks, whether their pages are resident or not."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A process's resident memory by what it is. They add up to it. Sizes in bytes; None: this allocator can't be asked."""

    python_live: int | None = None
    """Python's objects of up to 512 bytes, in use."""
    python_kept: int | None = None
    """Free memory that pymalloc keeps: no trim gives it back."""
    malloc_live: int | None = None
    """Larger objects, and what C code has allocated, in use."""
    malloc_kept: int | None = None
    """Free memory that malloc kept, until it was trimmed."""
    malloc_stuck: int | None = None
    """Free memory that a trim could not give back, because blocks in use lie in the same pages. An upper bound: it may be `other`."""
    files: int = 0
    """Pages of mapped files: code, and data that is mapped."""
    shared: int = 0
    """Shared memory."""
    other: int = 0
    """Anonymous memory that no allocator knows of: stacks, and what C code has mapped."""

    @property
    def live(self) -> int | None:
        """What is in use, as far as allocators know; None: none can be asked."""
        known = [part for part in (self.python_live, self.malloc_live) if part is not None]
        return sum(known) if known else None

    @property
    def kept(self) -> int | None:
        """What is free and kept; None: no allocator can be asked."""
        known = [part for part in (self.python_kept, self.malloc_kept, self.malloc_stuck) if part is not None]
        return sum(known) if known else None

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) or 0 for field in fields(self))


def read_pymalloc(text: str) -> Pymalloc | None:
    """What sys._debugmallocstats() has printed; None: it has not printed these lines (PYTHONMALLOC=malloc, another Python)."""
    live = available = unused = None
    for kind, pools, size, total in _LINE.findall(text):
        if kind == "allocated":
            live = _number(total)
        elif kind == "available":
            available = _number(total)
        else:
            unused = int(pools) * int(size)
    return None if live is None or available is None or unused is None else Pymalloc(live=live, kept=available + unused)


def parts_of(anon: int, files: int, shared: int, trimmed: int | None, pymalloc: Pymalloc | None, malloc: Malloc | None) -> Parts:
    """The parts of a process that held `anon`, `files` and `shared` bytes before malloc was trimmed, which gave back `trimmed` of them.

    An allocator counts memory that was never touched, too. So where the figures are more than there is, free memory is what was not
    resident, and then live memory is what there is.
    """
    left = anon
    kept_by_malloc = None if trimmed is None else min(max(0, trimmed), left)
    left -= kept_by_malloc or 0
    live = [None if pymalloc is None else pymalloc.live, None if malloc is None else malloc.live]
    wanted = sum(size or 0 for size in live)
    if wanted > left:  # in proportion
        live = [None if size is None else size * left // wanted for size in live]
    left -= sum(size or 0 for size in live)
    kept_by_python = None if pymalloc is None else min(pymalloc.kept, left)
    left -= kept_by_python or 0
    stuck = None if malloc is None else min(malloc.free, left)
    left -= stuck or 0
    return Parts(
        python_live=live[0], python_kept=kept_by_python, malloc_live=live[1], malloc_kept=kept_by_malloc, malloc_stuck=stuck,
        files=files, shared=shared, other=left,
    )  # fmt: skip


#: Free memory from this share of a worker's growth on is what it grew by.
MOSTLY = 0.5


def stock_line(parts: Parts, fresh: int | None) -> str:
    """``215 MiB: in use 3.0 MiB of Python objects, 12.0 MiB of malloc; free but kept 1.2 MiB by Python, …``, for the log.

    `fresh`: the anonymous memory that the process held when it began to serve, in bytes; None: not known.
    """
    used = _named(parts, (("python_live", "by Python objects"), ("malloc_live", "by malloc")))
    kept = _named(
        parts, (("python_kept", "by Python"), ("malloc_kept", "by malloc until now"), ("malloc_stuck", "by malloc, between blocks in use"))
    )
    rest = _named(parts, (("files", "of files"), ("shared", "shared"), ("other", "that no allocator knows of")))
    pieces = [f"in use {used}" if used else "", f"free but kept {kept}" if kept else "", rest, _not_a_leak(parts, fresh)]
    return f"{format_size(parts.total)}: {'; '.join(piece for piece in pieces if piece)}"


def _named(parts: Parts, names: Iterable[tuple[str, str]]) -> str:
    sizes = ((getattr(parts, field), words) for field, words in names)
    return ", ".join(f"{format_size(size)} {words}" for size, words in sizes if size is not None and size >= LEAST)


def _not_a_leak(parts: Parts, fresh: int | None) -> str:
    grown = None if fresh is None else parts.total - parts.files - fresh
    if grown is None or parts.kept is None or grown < GROWN or parts.kept < MOSTLY * grown:
        return ""
    return f"{parts.kept / grown:.0%} of what it grew by is free memory that its allocators kept: that is no leak"


def _number(text: str) -> int:
    return int(text.replace(",", ""))
