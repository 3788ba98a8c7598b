"""The third stage: puts messages together to events.

Each printer has its own open report: two loggers' copies of one report, and two machines in one file, don't mix (Line.source and .host).
The kernel prints one report at a time, with other messages in between. Of a burst it prints only the first ten in 5 s whole, and of the
others the ``Killed process`` line. So each piece may be missing, at the beginning, in the middle and at the end.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from oomsafe.policy.oomlog.messages import (
    Chosen,
    Fact,
    Gap,
    Group,
    Header,
    Invoked,
    LimitOf,
    Message,
    NoKillable,
    Panic,
    Running,
    Summary,
)
from oomsafe.policy.oomlog.record import Event, Killed, Left, Row, Time
from oomsafe.policy.oomlog.undress import Line

#: Line.printer.
Printer = tuple[str, str | None]

#: Printers with an open report, at most; of one more the report that is open for the longest ends.
PRINTERS = 16

#: Rows of a table that are kept; of more, those that may have been chosen.
ROWS = 20_000

#: Rows of all tables that are kept at a time, and events that wait for a second copy.
ALL_ROWS, WAITING = 60_000, 64

#: Events that a later copy is recognised by.
KNOWN = 4096

#: A report ends after so many lines, or seconds of the kernel's clock, without its ``Killed process``. A serial console takes a second for
#: ten lines.
LINES, SECONDS = 100_000, 600.0

#: A table ends after so many lines that are none of its rows.
STRANGERS = 1_000

#: Processes that die with the victim, kept for one event.
ALSO = 1_000


@dataclass
class _Table:
    """A table while it is read."""

    header: Header
    strangers: int = 0
    """Lines since the last row that are none."""


@dataclass
class _Report:
    """A report while it is read."""

    first: Line
    facts: dict[str, Any] = field(default_factory=dict)
    header: Header | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    rows_left_out: int = 0
    killed: Killed | None = None
    also_killed: dict[int, Killed] = field(default_factory=dict)
    lines: int = 0
    """The number of the line that it began with."""

    def event(self) -> Event:
        first, chosen = self.first, self.facts.pop("chosen_message", "")
        said = f"{self.killed.message if self.killed else ''} {chosen}"
        facts = self.facts
        if facts.get("is_memcg") is None:
            facts["is_memcg"] = True if "cgroup" in said or "memory" in facts else False if "Out of memory" in said else None
        if "oom_kill_allocating_task" in said:
            facts["allocating_task"] = True
        return Event(
            time=Time(text=first.when, iso=first.iso, uptime=first.uptime),
            host=first.host,
            rows=tuple(self.rows.values()),
            rows_left_out=self.rows_left_out,
            has_table=self.header is not None,
            killed=_with_page_tables_in_kb(self.killed, self.rows) if self.killed else None,
            also_killed=tuple(self.also_killed.values()),
            **facts,
        )


class Assembler:
    """Messages in the order of the log; `take` gives the events that are complete, in the order in which they ended."""

    def __init__(self) -> None:
        self._open: OrderedDict[Printer, _Report] = OrderedDict()
        self._waiting: deque[Event] = deque()
        self._known: OrderedDict[tuple[Any, ...], Time] = OrderedDict()
        self._lines = 0
        self.tables: dict[Printer, _Table] = {}
        """The tables that are being read, by Line.printer. While there is one, any line may be a row."""

    @property
    def wants_lines(self) -> bool:
        """Whether a report is open: then the next lines may belong to it, even if they don't name the OOM killer."""
        return any(report.killed is None for report in self._open.values())

    def row(self, printer: Printer, row: Row) -> None:
        """A row of the table that this printer is at."""
        report, self.tables[printer].strangers = self._open[printer], 0
        report.rows[row.pid] = row
        if len(report.rows) > ROWS:
            biggest = sorted(report.rows.values(), key=_weight, reverse=True)[: ROWS // 2]
            report.rows_left_out += len(report.rows) - len(biggest)
            report.rows = {one.pid: one for one in biggest}

    def count(self, lines: int) -> None:
        """So many lines have been read, of any kind."""
        self._lines += lines
        for key in [key for key, report in self._open.items() if report.killed is None and self._lines - report.lines > LINES]:
            self._end(key)

    def stranger(self, printer: Printer) -> None:
        """A line that says nothing about an OOM kill."""
        table = self.tables.get(printer)
        if table is not None:
            table.strangers += 1
            if table.strangers >= STRANGERS:
                del self.tables[printer]

    def add(self, line: Line, message: Message) -> None:
        """A message that says something."""
        key = line.printer
        report = self._open.get(key)
        if report is not None and not isinstance(message, Left) and not _is_near(report.first.uptime, line.uptime):
            self._end(key)  # the rest of that report is lost
            report = None
        if isinstance(message, Left):
            self._left(message)
        elif isinstance(message, (Gap, Running)):
            if report is not None and report.killed is None:
                self._aside(report, message)
        elif isinstance(message, Invoked):
            self._invoked(key, line, report, message)
        elif isinstance(message, Killed):
            self._killed(key, line, report, message)
        elif isinstance(message, Group):
            self._group(key, line, report, message)
        else:
            self._piece(key, line, report, message)

    def take(self) -> Iterator[Event]:
        """The events that are complete, without those that still wait for a second copy."""
        while len(self._waiting) > WAITING or sum(len(event.rows) for event in self._waiting) > ALL_ROWS:
            yield self._waiting.popleft()

    def finish(self) -> Iterator[Event]:
        """The rest, at the end of the log."""
        for key in list(self._open):
            self._end(key)
        yield from self._waiting
        self._waiting.clear()

    def _begin(self, key: Printer, line: Line, **facts: Any) -> _Report:
        self._end(key)
        report = self._open[key] = _Report(line, facts, lines=self._lines)
        if len(self._open) > PRINTERS:
            self._end(next(iter(self._open)))
        return report

    def _end(self, key: Printer) -> None:
        self.tables.pop(key, None)
        report = self._open.pop(key, None)
        if report is None:
            return
        event = report.event()
        # a lone `usage` line, or a table of some other report (SysRq-t), is no OOM kill
        if event.killed or event.chosen_pid or event.invoker or event.constraint or event.no_killable or event.panic:
            self._keep(event)

    def _keep(self, event: Event) -> None:
        mark = _mark(event)
        before = self._known.get(mark)
        if before is None or not _same_time(before, event.time):
            self._known[mark] = event.time
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
            self._waiting.append(event)
            return
        for at, other in enumerate(self._waiting):  # a copy: the one that says more stays
            if _mark(other) == mark and _same_time(other.time, event.time):
                if _content(event) > _content(other):
                    self._waiting[at] = event
                return

    def _invoked(self, key: Printer, line: Line, report: _Report | None, message: Invoked) -> None:
        facts = {"invoker": message.comm, "invoker_score_adj": message.score_adj, "order": message.order}
        if report is not None and report.killed is None and report.facts == facts and not report.rows:
            return  # the same line twice
        self._begin(key, line, **facts)

    def _piece(self, key: Printer, line: Line, report: _Report | None, message: Message) -> None:
        """A part of a report, other than its beginning and its end."""
        if report is None or report.killed is not None:
            if not isinstance(message, (Fact, Header)) and report is not None and _repeats(report, message):
                return
            report = self._begin(key, line, gaps=not isinstance(message, Chosen))
        facts = report.facts
        if isinstance(message, Fact):
            facts.setdefault(message.field, message.value)
        elif isinstance(message, Header):
            report.header = message
            self.tables[key] = _Table(message)
        elif isinstance(message, Summary):
            self.tables.pop(key, None)
            facts |= {"constraint": message.constraint, "is_memcg": message.is_memcg, "oom_memcg": message.oom_memcg}
            facts |= {"task_memcg": message.task_memcg, "chosen_pid": message.pid, "chosen_comm": message.comm}
        elif isinstance(message, LimitOf):
            facts |= {"is_memcg": True, "oom_memcg": message.oom_memcg, "task_memcg": message.task_memcg}
        elif isinstance(message, Chosen):
            self.tables.pop(key, None)
            facts |= {"chosen_pid": message.pid, "chosen_comm": message.comm, "chosen_score": message.score}
            facts["chosen_message"] = message.message
        elif isinstance(message, NoKillable):
            facts["no_killable"] = True
            self._end(key)
        elif isinstance(message, Panic):
            facts["panic"] = message.why
            self._end(key)

    def _killed(self, key: Printer, line: Line, report: _Report | None, message: Killed) -> None:
        if report is not None and report.killed is not None:
            if report.facts.get("group"):
                if message.pid != report.killed.pid and len(report.also_killed) < ALSO:
                    report.also_killed[message.pid] = message
                return
            if report.killed == message:
                return  # the same line twice
            report = None
        if report is None or not _fits(report, message):
            report = self._begin(key, line)
        report.killed = message
        self.tables.pop(key, None)
        self._open.move_to_end(key)

    def _group(self, key: Printer, line: Line, report: _Report | None, message: Group) -> None:
        if report is None:
            report = self._begin(key, line, gaps=True)
        report.facts["group"] = message.path

    def _left(self, message: Left) -> None:
        """The reaper is another thread, and comes later: its line belongs to the last victim with this pid."""
        for report in self._open.values():
            if report.killed is not None and report.killed.pid == message.pid:
                report.facts.setdefault("left", message)

    def _aside(self, report: _Report, message: Gap | Running) -> None:
        if isinstance(message, Gap):
            report.facts["gaps"] = True
        elif message.comm == report.facts.get("invoker"):
            report.facts.setdefault("invoker_thread", message.pid)
            report.facts.setdefault("kernel", message.kernel)


def _weight(row: Row) -> int:
    """What may make it the victim: its memory, or its score, in a unit in which few processes have more memory."""
    return (row.rss or 0) + (row.swapents or 0) + 10_000 * (row.oom_score_adj or 0)


def _is_near(begin: float | None, now: float | None) -> bool:
    """Whether a line can belong to a report that began then; a clock that goes back is another boot."""
    return begin is None or now is None or 0 <= now - begin < SECONDS


def _fits(report: _Report, killed: Killed) -> bool:
    """Whether the victim can be that of this report; else the report's own ``Killed`` line is lost."""
    if "chosen_pid" in report.facts and "constraint" in report.facts:
        return bool(report.facts["chosen_pid"] == killed.pid)
    if report.rows and not report.rows_left_out and not report.facts.get("gaps"):
        return killed.pid in report.rows or "chosen_pid" in report.facts
    return True


def _with_page_tables_in_kb(killed: Killed, rows: dict[int, Row]) -> Killed:
    """The first kernels that print pgtables (5.4) print bytes, and call them kB."""
    row = rows.get(killed.pid)
    size = killed.pgtables or 0
    held = (killed.anon or 0) + (killed.file or 0) + (killed.shmem or 0)
    if size and (row.pgtables_bytes == size >> 10 if row and row.pgtables_bytes else size > max(held, 1 << 20)):
        return replace(killed, pgtables=size >> 10)
    return killed


def _repeats(report: _Report, message: Message) -> bool:
    """Whether a report that has its victim has had this line before: the same line twice."""
    if isinstance(message, (Summary, Chosen)):
        return bool(report.facts.get("chosen_pid") == message.pid and report.facts.get("chosen_comm") == message.comm)
    return isinstance(message, LimitOf) and report.facts.get("oom_memcg") == message.oom_memcg


def _mark(event: Event) -> tuple[Any, ...]:
    """What two copies of one report have in common, whatever logger printed them."""
    killed = event.killed
    if killed is not None and killed.total_vm is not None:
        return killed.pid, killed.comm, killed.total_vm, killed.anon, killed.file, killed.shmem
    who = (killed.pid, killed.comm) if killed else (event.chosen_pid, event.chosen_comm, event.invoker, event.panic)
    # without figures only its time makes it one of its kind
    return *who, event.time.uptime if event.time.uptime is not None else event.time.text


def _same_time(one: Time, other: Time) -> bool:
    """Whether two copies can be of one report, as far as the kernel's clock tells; two loggers' wall clocks can't be compared."""
    if one.uptime is None or other.uptime is None:
        return True
    return abs(one.uptime - other.uptime) < 1


def _content(event: Event) -> tuple[int, int, int, bool]:
    """How much an event says."""
    given = sum(value is not None for value in (event.invoker, event.constraint, event.memory, event.task_memcg, event.left))
    return len(event.rows), given, len(event.also_killed), event.time.iso is not None
