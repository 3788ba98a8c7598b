"""Which line leaks: from what an allocation tracer found alive at the end of a window, and where it was allocated. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from oomsafe.policy.text import without_controls
from oomsafe.policy.units import KIB, MIB, counted, format_size, one_of

#: The window if nobody says otherwise, and the longest that may be asked for: pieces of work, and seconds.
WORK, SECONDS = 2000, 60.0
MOST_WORK, MOST_SECONDS = 1_000_000, 3600.0

#: Free memory that the pool and its worker must have for a tracer, in bytes: memray's own code and tables are about 20 MiB.
ROOM = 64 * MIB
OWN_ROOM = 24 * MIB

#: Rows that a report has at most, and stacks of each.
ROWS, STACKS, FRAMES = 20, 3, 40

#: A line that keeps less than this in all, or less than this for each piece of work, is no finding.
LEAST, LEAST_EACH = 64 * KIB, 64

#: Folders of installed packages.
PACKAGES = ("site-packages/", "dist-packages/")

#: What Python's import machinery is called in a stack.
IMPORTS = "<frozen importlib"


class Frame(NamedTuple):
    """One level of a stack."""

    file: str
    line: int
    function: str = ""
    """Empty: the tracer does not know it."""


class Alive(NamedTuple):
    """What was allocated in the window with this stack and is still alive at its end."""

    size: int
    """Bytes."""
    blocks: int | None
    """Allocations; None: not known."""
    stack: tuple[Frame, ...]
    """The innermost frame first; the outermost may be missing."""


class Endpoint(NamedTuple):
    """The code that a route calls: the lines of one function."""

    file: str
    first: int
    last: int
    route: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of code, and what it has allocated that is still alive."""

    file: str
    line: int
    function: str
    size: int
    """Bytes."""
    count: int | None
    """Allocations; None: not known."""
    routes: tuple[str, ...]
    """The routes under whose endpoints its stacks pass; empty: none is known."""
    calls: int | None
    """How often these routes were called in the window; None: not known."""
    each: float
    """Bytes for each call of its routes; where these or their calls are not known, for each piece of work in the window."""
    loads: bool
    """Whether it was allocated by an import: that happens once."""
    stacks: tuple[tuple[Frame, ...], ...]
    """The stacks that keep most."""

    @property
    def where(self) -> str:
        """``app.py:42 in leak``; printable."""
        name = without_controls("/".join(self.file.split("/")[-2:]))
        return f"{name}:{self.line}" + (f" in {without_controls(self.function)}" if self.function else "")


@dataclass(frozen=True, kw_only=True)
class Window:
    """What a tracer has seen. Sizes in bytes; None: not known."""

    pid: int
    slot: int
    at: float
    """When it ended, in seconds since 1970."""
    tool: str
    """memray or tracemalloc, with its version."""
    why: str
    """Why it ended: a sentence without its full stop."""
    unit: str
    """What is counted as work, in the plural."""
    work: int
    """Pieces of work that ended in it."""
    seconds: float
    in_flight: int
    """Pieces of work that had not ended when what is alive was counted: what they hold looks like a leak."""
    grown: int | None
    """What the process grew by in it, without file pages."""
    kept_free: int | None
    """Free memory that its allocators kept at the end."""
    slower: float | None
    """The processor time of a piece of work in the window over that before it; None: there was too little work before it."""
    tracer: int | None = None
    """What the tracer itself needed."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of a window."""

    window: Window
    rows: tuple[Row, ...]
    """What keeps most first; at most ROWS."""
    alive: int
    """What was found alive in all, in bytes."""
    ruled_out: tuple[str, ...]
    """What the growth is not; sentences without their full stops."""

    @property
    def first(self) -> Row | None:
        """The line that leaks most; None: none keeps enough to be called a leak."""
        return next((row for row in self.rows if not row.loads and _is_finding(row)), None)

    @property
    def brief(self) -> str:
        """``app.py:42 in leak keeps 64.0 KiB a call of GET /leak``; empty: no line was found."""
        row = self.first
        return "" if row is None else f"{row.where} keeps {keeps(row, self.window.unit)}"


def keeps(row: Row, unit: str) -> str:
    """``64.0 KiB a call of GET /leak``."""
    size = format_size(round(row.each))
    if row.calls is None:
        routes = f" (under {_some(row.routes)})" if row.routes else ""
        return f"{size} a {one_of(unit)}{routes}"
    return f"{size} a call of {_some(row.routes)}"


def _some(routes: Sequence[str]) -> str:
    named = [without_controls(route) for route in routes[:2]]
    return " and ".join(named) + (f" and {len(routes) - 2} more routes" if len(routes) > 2 else "")


def report_of(
    window: Window, alive: Iterable[Alive], endpoints: Sequence[Endpoint], calls: Mapping[str, int], library: Sequence[str]
) -> Report:
    """The findings, from what is alive at the end of the window.

    `calls`: by route, how often it was called in the window. `library`: the folders of code that is nobody's own: Python's own modules,
    and the tracer's. A line of these is reported as the line of the app, or of another package, that called it.
    """
    by_file: dict[str, list[Endpoint]] = {}
    for endpoint in endpoints:
        by_file.setdefault(endpoint.file, []).append(endpoint)
    found: dict[tuple[str, int], list[tuple[Frame, Alive]]] = {}
    total = 0
    for one in alive:
        total += one.size
        if one.stack:
            site = _site(one.stack, library, by_file)
            found.setdefault((site.file, site.line), []).append((site, one))
    rows = [_row(stacks[0][0], [one for _, one in stacks], by_file, calls, window.work) for stacks in found.values()]
    rows.sort(key=lambda row: (row.loads, -row.size))
    return Report(window=window, rows=tuple(rows[:ROWS]), alive=total, ruled_out=tuple(_ruled_out(window, rows, calls, total)))


def _site(stack: Sequence[Frame], library: Sequence[str], by_file: Mapping[str, Sequence[Endpoint]]) -> Frame:
    """The innermost line of the app's own code; if there is none, of the package that an endpoint is in; else of any package."""
    outside = [frame for frame in stack if not _is_library(frame.file, library)]
    own = next((frame for frame in outside if _package(frame.file) is None), None)
    if own is not None:
        return own
    packages = {_package(file) for file in by_file}
    within = next((frame for frame in outside if _package(frame.file) in packages), None)
    return within or (outside or stack)[0]


def _is_library(file: str, library: Sequence[str]) -> bool:
    """Whether it is nobody's code. Installed packages lie inside of the folder of Python's own modules."""
    if file.startswith("<frozen"):
        return True
    return any(file.startswith(folder) and _package(file[len(folder) :]) is None for folder in library)


def _package(file: str) -> str | None:
    """The folder, or the file, of the installed package that this file belongs to; None: it is not in one."""
    for folder in PACKAGES:
        before, found, inside = file.partition(folder)
        if found:
            return before + found + inside.partition("/")[0]
    return None


def _row(
    site: Frame, stacks: Sequence[Alive], by_file: Mapping[str, Sequence[Endpoint]], calls: Mapping[str, int], work: int
) -> Row:  # fmt: skip
    largest = sorted(stacks, key=lambda one: -one.size)
    size = sum(one.size for one in stacks)
    routes: dict[str, None] = {}
    for one in largest:
        for frame in one.stack:
            here = by_file.get(frame.file, ())
            routes.update(dict.fromkeys(endpoint.route for endpoint in here if endpoint.first <= frame.line <= endpoint.last))
    # a route that was not called can't have allocated anything: the endpoint has other routes
    named = tuple(route for route in routes if calls.get(route)) or tuple(routes)
    known = [calls[route] for route in named if route in calls]
    times = sum(known) if named and len(known) == len(named) else None
    return Row(
        file=site.file, line=site.line, function=site.function, size=size,
        count=None if any(one.blocks is None for one in stacks) else sum(one.blocks or 0 for one in stacks),
        routes=named, calls=times or None, each=size / (times or max(1, work)),
        loads=sum(one.size for one in stacks if any(frame.file.startswith(IMPORTS) for frame in one.stack)) > size / 2,
        stacks=tuple(one.stack[:FRAMES] for one in largest[:STACKS]),
    )  # fmt: skip


def _is_finding(row: Row) -> bool:
    return row.size >= LEAST and row.each >= LEAST_EACH


def _ruled_out(window: Window, rows: Sequence[Row], calls: Mapping[str, int], alive: int) -> Iterable[str]:
    """What the growth is not."""
    loaded = sum(row.size for row in rows if row.loads)
    if loaded >= LEAST:
        yield f"{format_size(loaded)} were allocated by imports, which happen once"
    others = [row for row in rows if not row.loads][1:]
    if rows and not others:
        yield "no other line keeps anything"
    elif others:
        yield f"the next line keeps {format_size(others[0].size)}"
    blamed = {route for row in rows if not row.loads and row.size >= LEAST for route in row.routes}
    innocent = [route for route, times in calls.items() if times and route not in blamed]
    if blamed and innocent:
        yield f"under the endpoints of the other routes that were called ({len(innocent)}), nothing much is kept"
    grown, kept = window.grown, window.kept_free
    if grown is not None and grown >= MIB and alive < grown / 2:
        rest = f", {format_size(kept)} of free memory that the allocators keep among it" if kept and kept >= MIB else ""
        yield (
            f"the process grew by {format_size(grown)} in the window, and of what was traced only {format_size(alive)} are alive: "
            f"the rest is no memory in use that this tracer sees{rest}"
        )
    if window.in_flight:
        yield (
            f"{counted(window.in_flight, window.unit)} had not ended when this was counted: "
            f"lines that keep no more than so many calls use at a time may be theirs"
        )


def named_in(report: Report) -> str:
    """The one line about the whole probe, for the log."""
    window = report.window
    slower = "" if window.slower is None else f", {window.slower:.1f} times as dear"
    over = f"{counted(window.work, window.unit)} in {window.seconds:.0f} s with {window.tool}{slower}; it ended because {window.why}"
    row = report.first
    if row is not None:
        return f"{report.brief}; {format_size(row.size)} of that are alive after {over}"
    most = next((each for each in report.rows if not each.loads), None)
    what = (
        "nothing is kept" if most is None else f"no line keeps enough to be called a leak, most has {most.where}: {format_size(most.size)}"
    )
    return f"{what}; after {over}"
