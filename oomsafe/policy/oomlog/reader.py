"""The three stages, joined: the bytes of a log in, OOM events out."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime, timezone

from oomsafe.policy.oomlog.assemble import Assembler
from oomsafe.policy.oomlog.messages import MARKS, OPENERS, classify, row_of
from oomsafe.policy.oomlog.record import Event
from oomsafe.policy.oomlog.undress import Line, Undresser

#: Bytes that are looked at together, at least: if nothing there names the OOM killer, they are passed over whole.
BLOCK = 64 << 10

#: The longest line in bytes. The rest of a longer one is dropped.
LINE = 256 << 10

_OPENERS = tuple(opener.encode() for opener in OPENERS)
_MARKS = tuple(mark.encode() for mark in MARKS)
# indented JSON begins like this, the journal's export and verbose formats have these: there, every line counts
_RECORDS = re.compile(rb"\s{0,8}[\[{][ \t]{0,8}\r?\n|__REALTIME_TIMESTAMP=|__CURSOR=|[A-Z][a-z]{2} \d{4}-\d\d-\d\d [^\[\n]{1,40}\[s=")


def read_events(chunks: Iterable[bytes], boot: float | None = None) -> Iterator[Event]:
    """The OOM events in a log, in its order; each is given as soon as no second copy of it is to be expected.

    `chunks`: the log in pieces of any size. `boot`: when this kernel was booted, in seconds since 1970, for times that the log has only
    since boot. Whatever the input, no exception is raised, and the memory in use is bounded.
    """
    reader = _Reader()
    for block in blocks(chunks):
        reader.read(block)
        yield from (_dated(event, boot) for event in reader.assembler.take())
    reader.end()
    yield from (_dated(event, boot) for event in reader.assembler.finish())


def blocks(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Whole lines, together BLOCK bytes or more. A line that is longer than LINE is cut there."""
    held: list[bytes] = []
    size = 0
    skipping = False
    for chunk in chunks:
        for at in range(0, len(chunk), BLOCK):
            piece = chunk[at : at + BLOCK]
            if skipping:  # the rest of a line that is too long
                _, newline, piece = piece.partition(b"\n")
                skipping = not newline
            end = piece.rfind(b"\n") + 1
            if not end and size + len(piece) > LINE:
                whole = b"".join((*held, piece))
                yield whole[: max(LINE, whole.rfind(b"\n") + LINE)]
                held, size, skipping = [], 0, True
            elif end and size + end >= BLOCK:
                yield b"".join((*held, piece[:end]))
                held, size = [piece[end:]], len(piece) - end
            elif piece:
                held.append(piece)
                size += len(piece)
    yield b"".join(held)


class _Reader:
    """Passes over what says nothing, as early as possible: most of a log is none of ours."""

    def __init__(self) -> None:
        self.assembler = Assembler()
        self._undresser = Undresser()
        self._is_first = True

    def read(self, block: bytes) -> None:
        """A number of whole lines."""
        if self._is_first:
            self._undresser.in_records = _RECORDS.search(block, 0, 4096) is not None
            self._is_first = False
        if not self.assembler.wants_lines and not any(opener in block for opener in _OPENERS):
            self._undresser.skip()
            return
        block = block.replace(b"\0", b"\n") if b"\0" in block else block
        self.assembler.count(block.count(b"\n"))
        self._undresser.in_records |= b",ncfrag=" in block
        starts = None if self._undresser.in_records else _marked(block)
        at = 0
        while 0 <= at < len(block):
            if starts is not None and not self.assembler.tables:
                index = bisect_left(starts, at)
                if index == len(starts):
                    break
                at = starts[index]
            end = block.find(b"\n", at)
            self._line(block[at : min(end if end >= 0 else len(block), at + LINE)])
            at = end + 1 or -1

    def end(self) -> None:
        """A record may end with the log."""
        for line in self._undresser.flush():
            self._message(line)

    def _line(self, raw: bytes) -> None:
        for line in self._undresser.feed(raw.rstrip(b"\r").decode("utf-8", "replace")):
            self._message(line)

    def _message(self, line: Line) -> None:
        printer = line.printer
        table = self.assembler.tables.get(printer)
        if table is not None and (row := row_of(line.message, table.header)) is not None:
            self.assembler.row(printer, row)
        elif (message := classify(line.message)) is not None:
            self.assembler.add(line, message)
        else:
            self.assembler.stranger(printer)


def _marked(block: bytes) -> list[int]:
    """Where the lines begin that have one of MARKS. Twenty searches of a block are ten times as fast as twenty of each line."""
    starts = set()
    for mark in _MARKS:
        at = block.find(mark)
        while at >= 0:
            starts.add(block.rfind(b"\n", 0, at) + 1)
            end = block.find(b"\n", at)
            at = block.find(mark, end) if end >= 0 else -1
    return sorted(starts)


def _dated(event: Event, boot: float | None) -> Event:
    time = event.time
    if boot is None or time.iso is not None or time.uptime is None:
        return event
    try:
        iso = datetime.fromtimestamp(boot + time.uptime, timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return event
    return replace(event, time=replace(time, iso=iso))
