"""The screen of ``oomsafe top``: a title, the lines of all pools, and a foot with the keys. The only file that imports Textual."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from oomsafe.cli import probe, recycle
from oomsafe.cli.orders import Outcome, called
from oomsafe.cli.pools import Found, none_found
from oomsafe.cli.top.lines import Line, Sort, detail, heading, lines_of, plain
from oomsafe.cli.top.observer import Observed, Observer, Worker
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import counted
from oomsafe.scoreboard.view import WorkerView

#: Seconds between two readings of what is shown.
EVERY = 1.0

#: Seconds for which the outcome of an order stands in the foot.
SAID_FOR = 10.0

#: The signals that end it, with the terminal as it was before.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Deed(NamedTuple):
    """What the operator may order for a worker, after a question."""

    verb: str
    order: Callable[[Found, WorkerView], Outcome]


#: Replace it; and have it find the line that leaks.
RECYCLE, TRACE = Deed("recycle", recycle.order), Deed("trace allocations of", probe.order)


class Key(NamedTuple):
    """What a key does."""

    keys: tuple[str, ...]
    """As Textual names them; the first is the one that is shown."""
    act: Callable[[Top], None]
    short: str
    """Its word in the foot; empty: it does not stand there."""
    long: str


#: Further than there are lines.
FAR = 1 << 20

KEYS = (
    Key(("q", "ctrl+c", "ctrl+q"), lambda top: top.end(), "quit", "quit"),
    Key(("s",), lambda top: top.sort(), "sort", "sort by the next of: used, % of limit, growth, time to limit, slot"),
    Key(("p", "space"), lambda top: top.pause(), "pause", "stop, or go on"),
    Key(("r",), lambda top: top.ask(RECYCLE), "recycle", "replace the marked worker, after a question"),
    Key(("t",), lambda top: top.ask(TRACE), "trace", "have the marked worker find the line that leaks (oomsafe probe), after a question"),
    Key(("question_mark", "h"), lambda top: top.explain(), "help", "show this, or the pools again"),
    Key(("up", "k"), lambda top: top.mark(-1), "", "mark the worker above"),
    Key(("down", "j"), lambda top: top.mark(1), "", "mark the worker below"),
    Key(("pageup",), lambda top: top.page(-1), "", "a screen up"),
    Key(("pagedown",), lambda top: top.page(1), "", "a screen down"),
    Key(("home", "g"), lambda top: top.mark(-FAR), "", "to the first worker"),
    Key(("end", "G"), lambda top: top.mark(FAR), "", "to the last worker"),
)

_SHOWN = {"question_mark": "?"}


class Chosen(NamedTuple):
    """A worker that the operator has marked."""

    path: str
    generation: int


class OneLine(Widget):
    """A line of text, which is made anew for each refresh."""

    def __init__(self, text: Callable[[int], Text], id: str) -> None:
        super().__init__(id=id)
        self._text = text

    def render(self) -> Text:
        """Textual asks for it."""
        text = self._text(self.size.width)
        text.truncate(self.size.width)
        return text


class Lines(ScrollView, can_focus=False):
    """All lines, of which only the visible ones are formatted."""

    def __init__(self, *, ascii_only: bool) -> None:
        super().__init__(id="lines")
        self._ascii_only = ascii_only
        self._now = time.time()
        self.lines: Sequence[Line] = ()
        self.chosen: Chosen | None = None

    def show(self, lines: Sequence[Line]) -> None:
        """Show these, with the mark where it was: on the same worker, wherever that stands now."""
        self.lines, self._now = lines, time.time()
        self.virtual_size = Size(self.size.width, len(lines))
        if self.marked is None:
            self.chosen = next((_id(line) for line in lines if line.worker is not None), self.chosen)  # the help has no workers
        self.refresh()

    @property
    def marked(self) -> int | None:
        """The number of the marked line; None: no worker is marked."""
        return next((at for at, line in enumerate(self.lines) if line.worker is not None and _id(line) == self.chosen), None)

    @property
    def shown(self) -> set[str]:
        """The scoreboards of the pools that are visible."""
        top = self.scroll_offset.y
        return {line.path for line in self.lines[top : top + max(1, self.size.height)]}

    def mark(self, by: int) -> None:
        """Mark the worker that is `by` workers further down, and scroll to it."""
        workers = [at for at, line in enumerate(self.lines) if line.worker is not None]
        if not workers:
            return
        before = self.marked
        place = workers.index(before) if before in workers else 0
        place = min(max(0, place + by), len(workers) - 1)
        self.chosen = _id(self.lines[workers[place]])
        top, height, at = self.scroll_offset.y, max(1, self.size.height), workers[place]
        if place == 0:
            top = 0  # with the title of its pool
        elif not top <= at < top + height:
            top = at - height + 1 if at >= top + height else at
        self.scroll_to(y=top, animate=False)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Textual asks for each visible line."""
        at, width = self.scroll_offset.y + y, self.size.width
        if at >= len(self.lines):
            return Strip.blank(width)
        line = self.lines[at]
        text = line.text(width, self._now, self._ascii_only)
        text.stylize_before(text.style)  # render() leaves a text's own style to its caller
        if line.worker is not None and _id(line) == self.chosen:
            text.append(" " * max(0, width - text.cell_len))
            text.stylize("reverse")
        text.truncate(width)
        # Textual 6.0 draws nothing for a segment without any style
        segments = [Segment(each.text, each.style or Style()) for each in text.render(self.app.console)]
        return Strip(segments, text.cell_len).adjust_cell_length(width)


class Top(App[int]):
    """The app. `only`: the one scoreboard that it shows; None: all."""

    CSS = """
    Screen { background: ansi_default; color: ansi_default; layout: vertical; overflow: hidden; }
    OneLine { height: 1; background: ansi_default; color: ansi_default; }
    Lines { height: 1fr; background: ansi_default; color: ansi_default; overflow: hidden; scrollbar-size: 0 0; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [Binding(key, f"press('{key}')", show=False, priority=True) for keys in KEYS for key in keys.keys]  # noqa: RUF012

    def __init__(self, only: str | None = None) -> None:
        # the terminal's own colours, and none of them where NO_COLOR is set
        super().__init__(ansi_color=True)
        self._observer = Observer(only)
        self._lines = Lines(ascii_only=not (sys.stdout.encoding or "").lower().startswith("utf"))
        self._pools: list[Observed] | None = None
        """None: nothing has been read yet."""
        self._sort = Sort.USED
        self._paused = self._explains = self._reads = False
        self._asked: tuple[Deed, Found, WorkerView] | None = None
        """What the operator is asked about."""
        self._said: tuple[str, float] = ("", 0.0)

    def run_to_its_end(self) -> int:
        """Run until the operator or a signal ends it. Returns the exit status."""
        self.run(mouse=False)  # so that the terminal's own selection works
        return self.return_code or self.return_value or 0

    def compose(self) -> ComposeResult:
        """Textual asks for the parts of the screen."""
        yield OneLine(self._title, "title")
        yield OneLine(lambda width: Text() if self._explains else heading(width), "heading")
        yield self._lines
        yield OneLine(self._detail, "detail")
        yield OneLine(self._foot, "foot")

    def on_mount(self) -> None:
        """Read from here on."""
        for number in ENDING:
            asyncio.get_running_loop().add_signal_handler(number, self.exit, 128 + number)
        self.set_interval(EVERY, self._tick)
        self._tick()

    def on_resize(self, _: events.Resize) -> None:
        """Other columns fit."""
        self._draw()

    def on_key(self, event: events.Key) -> None:
        """The answer to a question."""
        if self._asked is not None:
            event.stop()
            self._answer(event.key)

    # reading

    def _tick(self) -> None:
        if self._paused:
            self._refresh_lines()  # what the foot says has its time
        elif not self._reads:
            self._reads = True
            self.run_worker(self._read(), exit_on_error=True)

    async def _read(self) -> None:
        """In a thread, because a scoreboard that is being written is read again for a while, and keys must not wait for that."""
        try:
            shown = set() if self._explains else self._lines.shown
            self._pools = await asyncio.to_thread(self._observer.observe, shown)
        except Exception as error:  # the screen stays, and the next round may succeed
            self._say(f"the pools can't be read: {without_controls(repr(error))}")
        finally:
            self._reads = False
        self._draw()

    def _draw(self) -> None:
        if self._explains:
            self._lines.show(_help_lines())
        elif self._pools:
            self._lines.show(lines_of(self._pools, self._sort))
        else:
            self._lines.show([Line("", plain("reading ..." if self._pools is None else none_found()))])
        self._refresh_lines()

    def _refresh_lines(self) -> None:
        for part in self.query(OneLine):
            part.refresh()

    def _title(self, width: int) -> Text:
        pools = self._pools or []
        workers = sum(len(each.workers) for each in pools)
        count = f"oomsafe top  {counted(len(pools), 'pools')}, {counted(workers, 'workers')}"
        parts = [count, f"by {self._sort.value}", "PAUSED" if self._paused else ""]
        return Text("  ".join(part for part in parts if part), "bold")

    def _detail(self, width: int) -> Text:
        worker, pool = self._marked()
        if worker is None or pool is None or self._explains:
            return Text()
        return detail(worker, pool.pool.unit or "requests", width, time.time())

    def _marked(self) -> tuple[Worker | None, Found | None]:
        """The worker that is marked, and its pool; None: there is none, or it can't be ordered."""
        at = self._lines.marked
        line = None if at is None else self._lines.lines[at]
        if line is None:
            return None, None
        return line.worker, next((each.found for each in self._pools or [] if each.path == line.path), None)

    def _foot(self, width: int) -> Text:
        line, until = self._said
        if self._asked is not None:
            deed, found, worker = self._asked
            return Text(f"{deed.verb} {called(found.pool, worker)}? y/n", "bold reverse")
        if line and time.monotonic() < until:
            return Text(line, "bold")
        return Text("  ".join(f"{_name(key)} {key.short}" for key in KEYS if key.short), "dim")

    def _say(self, line: str) -> None:
        self._said = line, time.monotonic() + SAID_FOR
        self._draw()

    # the keys

    def action_press(self, key: str) -> None:
        """One of KEYS was pressed."""
        if self._asked is not None and key != "ctrl+c":
            self._answer(key)
        else:
            next(each.act for each in KEYS if key in each.keys)(self)

    def end(self) -> None:
        """Quit."""
        self.exit(0)

    def sort(self) -> None:
        """Sort by the next figure."""
        self._sort = self._sort.following
        self._draw()

    def pause(self) -> None:
        """Stop reading, or go on."""
        self._paused = not self._paused
        self._draw()

    def explain(self) -> None:
        """Show the keys, or the pools again."""
        self._explains = not self._explains
        self._lines.scroll_to(y=0, animate=False)
        self._draw()

    def mark(self, by: int) -> None:
        """Mark the worker that is `by` workers further down."""
        self._lines.mark(by)
        self._refresh_lines()

    def page(self, pages: int) -> None:
        """Mark the worker a screen further down, or up."""
        self.mark(pages * max(1, self._lines.size.height - 1))

    def ask(self, deed: Deed) -> None:
        """Ask whether that is to be done with the marked worker."""
        worker, found = self._marked()
        if worker is None or found is None:
            self._say("no worker is marked")
        else:
            self._asked = deed, found, worker.view
            self._draw()

    def _answer(self, key: str) -> None:
        """`y` gives the order; any other key does not."""
        asked, self._asked = self._asked, None
        if asked is None or key.lower() != "y":
            self._say("nothing is done")
            return
        deed, found, worker = asked
        self._say(f"{deed.verb} {called(found.pool, worker)}: asking its supervisor ...")
        self.run_worker(self._order(*asked))

    async def _order(self, deed: Deed, found: Found, worker: WorkerView) -> None:
        outcome = await asyncio.to_thread(deed.order, found, worker)
        self._say(outcome.line)


def _id(line: Line) -> Chosen | None:
    return None if line.worker is None else Chosen(line.path, line.worker.view.generation)


def _name(key: Key) -> str:
    return _SHOWN.get(key.keys[0], key.keys[0])


def _help_lines() -> list[Line]:
    return [Line("", plain(f" {_name(key):<9} {key.long}")) for key in KEYS]
