"""``oomsafe explain``: the OOM killer's reports in a kernel log, each one explained."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from typing import IO

import click

from oomsafe.cli.kill_record import VERSION, record_of
from oomsafe.cli.kill_text import event_text
from oomsafe.cli.output import Out, until_closed
from oomsafe.errors import KernelLogError
from oomsafe.kernel.kernel_log import boot_time, journal, ring_buffer
from oomsafe.policy.oomlog.reader import read_events
from oomsafe.policy.text import without_controls
from oomsafe.policy.why_killed import Account, account_of

#: Bytes that are read at once.
PIECE = 1 << 18

#: What the journal's own files, and gzipped ones, begin with.
JOURNAL_MAGIC, GZIP_MAGIC = b"LPKSHHRH", b"\x1f\x8b"

UNREADABLE = 2


@click.command()
@click.argument("path", metavar="[FILE | -]", required=False)
@click.option("--journal", "from_journal", is_flag=True, help="Read the systemd journal, earlier boots too.")
@click.option("--dmesg", "from_dmesg", is_flag=True, help="Read the kernel's ring buffer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/explain.md).")
def explain(path: str | None, from_journal: bool, from_dmesg: bool, as_json: bool) -> None:
    """Explain each kill of the kernel's OOM killer in a log: which limit, who was killed, who held
    what, why this process, who would have been killed without the scores, and what to do.

    FILE may be of any kind: dmesg, syslog, journalctl, JSON of a cloud's logger, also gzipped. Without
    FILE it is standard input, or the kernel's ring buffer if that is a terminal. Exits with 0 if there
    was a kill, with 1 if there was none, and with 2 if the log can't be read.
    """
    if sum((path is not None, from_journal, from_dmesg)) > 1:
        raise click.UsageError("give one of FILE, --journal and --dmesg")
    if path is None and not from_journal and not from_dmesg:
        from_dmesg = sys.stdin is None or sys.stdin.isatty()
    pieces = journal() if from_journal else ring_buffer() if from_dmesg else _file(path or "-")
    boot = boot_time() if from_dmesg else None
    found = False
    try:
        with until_closed(), closing(pieces):
            accounts = map(account_of, read_events(pieces, boot))
            found = _print_json(accounts) if as_json else _print_text(accounts)
    except KernelLogError as error:
        print(f"oomsafe explain: {without_controls(str(error))}", file=sys.stderr)
        raise SystemExit(UNREADABLE) from None
    if not found and not as_json:
        print("no kill of the kernel's OOM killer is in this log", file=sys.stderr)
    raise SystemExit(0 if found else 1)


def _print_text(accounts: Iterable[Account]) -> bool:
    """Returns whether there was any."""
    console = Out(highlight=False)
    ascii_only = not console.encoding.lower().startswith("utf")
    width, found = console.width, False
    for account in accounts:
        if found:
            print()
        found = True
        text = event_text(account, width, ascii_only=ascii_only)
        if console.is_terminal:
            # its lines are as wide as they may be: nothing is to wrap or crop them
            console.print(text, soft_wrap=True)
        else:  # ten times as fast, for a log with thousands of kills
            sys.stdout.write(f"{text.plain}\n")
    return found


def _print_json(accounts: Iterable[Account]) -> bool:
    """One object, written event by event: a log may have more than fit in memory. Returns whether there was any."""
    sys.stdout.write(f'{{"version": {VERSION}, "events": [')
    found = False
    try:
        for account in accounts:
            sys.stdout.write(", " * found + json.dumps(record_of(account), allow_nan=False))
            found = True
    finally:
        # also if the rest can't be read: what is there can be parsed
        sys.stdout.write("]}\n")
    return found


def _file(path: str) -> Generator[bytes, None, None]:
    """The file in pieces, unzipped if it is gzipped. Raises KernelLogError."""
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            yield from _pieces(sys.stdin.buffer, name)
            return
        with open(path, "rb", buffering=PIECE) as file:
            yield from _pieces(file, name)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, BrokenPipeError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise KernelLogError(f"{name} can't be read: {reason}") from None


def _pieces(file: IO[bytes], name: str) -> Iterator[bytes]:
    first = file.read(PIECE)
    if first.startswith(JOURNAL_MAGIC):
        raise KernelLogError(f"{name} is a file of the journal's own: journalctl --file {name} -k | oomsafe explain")
    if first.startswith(GZIP_MAGIC):
        if not file.seekable():
            raise KernelLogError(f"{name} is gzipped: pipe it through zcat")
        file.seek(0)
        with gzip.open(file) as unzipped:
            while piece := unzipped.read(PIECE):
                yield piece
        return
    while first:
        yield first
        first = file.read(PIECE)
