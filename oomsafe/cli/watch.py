"""``oomsafe watch``: follows every pool, and prints, or passes to a command, each alert that begins or is over."""

from __future__ import annotations

import json
import math
import os
import select
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from oomsafe.cli.alert_command import AlertCommand, Message
from oomsafe.cli.watched_pools import Gone, Living, Pools, reading_of
from oomsafe.policy.alerts import TERMS, Event, Watch
from oomsafe.policy.text import without_controls
from oomsafe.scoreboard.places import can_hold_boards

if TYPE_CHECKING:
    from typing_extensions import Self

#: The version of the JSON object: raised when a field changes its meaning or is gone, not when one is added.
VERSION = 1

#: Seconds that running commands have when the watch is ended by a signal; a second signal kills them at once.
GRACE = 5.0

#: The least seconds between the end of one reading and the begin of the next.
BREATH = 0.05


def _seconds(_context: click.Context, _parameter: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("is not a number of seconds")
    return value


def _command(_context: click.Context, _parameter: click.Parameter, value: str | None) -> list[str] | None:
    """The words of a command that is there: a wrong name is not found out with the first alert."""
    if value is None:
        return None
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from error
    if not words:
        raise click.BadParameter("is empty")
    if shutil.which(words[0]) is None:
        raise click.BadParameter(f"{words[0]!r} is no command that can be run")
    return words


@click.command()
@click.option("--on-alert", "command", metavar="CMD", callback=_command, help="Run this for each event, without a shell.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 60), default=5.0, show_default=True, callback=_seconds, help="Seconds between two readings."
)
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="Watch only the pool with this scoreboard.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each event, also with --on-alert.")
def watch(command: list[str] | None, interval: float, path: str | None, as_json: bool) -> None:
    """Tell when a pool needs you: the alerts of the Prometheus rules, without Prometheus.

    Each event is an alert that begins to fire or is over. The command gets it as one JSON object on stdin; without one, a line is
    printed. Watches the pools of the user who runs it; for root, those of all users. With --scoreboard it ends with that pool: with 1 if
    the pool was killed, else with 0.
    """
    alert_command = AlertCommand(command, say) if command is not None else None
    printer = Printer(as_json) if as_json or command is None else None
    pools = Pools(path, say)
    with Signals() as signals:
        ended = Loop(pools, printer, alert_command, signals).run(interval, once=path is not None)
        if alert_command is not None:
            by_signal = ended is None
            alert_command.end(GRACE if by_signal else math.inf, signals.wait, lambda: signals.ended > by_signal)
        pools.close()
    raise SystemExit(ended or 0)


class Loop:
    """Looks, and passes on what has happened."""

    def __init__(self, pools: Pools, printer: Printer | None, command: AlertCommand | None, signals: Signals) -> None:
        self._pools, self._printer, self._command, self._signals = pools, printer, command, signals
        self._watch = Watch()
        self._failed = ""
        """Why the last reading failed; empty: it did not."""

    def run(self, interval: float, *, once: bool) -> int | None:
        """Until a signal ends it: then None. `once`: until the first pool has ended; returns 0 if that was in order, else 1."""
        first = True
        while not self._signals.ended:
            began = time.monotonic()
            gone, living = self._read()
            events = [
                event
                for pool in gone
                for event in self._watch.ended(pool.key, began, in_order=pool.in_order is not False, orphans=pool.orphans)
            ]
            for pool in living:
                events += self._watch.read(pool.key, reading_of(pool.view), began, new=pool.new)
            for event in events:
                self._pass_on(event, began)
            if once and gone:
                return int(gone[0].in_order is False)
            if first and not living:
                unseen = "" if can_hold_boards() else ", and no folder here is writable, so that a scoreboard is in memory only"
                say(f"no pool of this user is guarded by oomsafe now{unseen}: waiting for one (root sees those of all users)")
            first = False
            if self._printer is not None and self._printer.closed and self._command is None:
                return None
            self._rest(max(began + interval, time.monotonic() + BREATH))
        return None

    def _read(self) -> tuple[list[Gone], list[Living]]:
        failed, self._failed = self._failed, ""
        try:
            return self._pools.read()
        except OSError as error:  # no descriptor is left, say
            self._failed = str(error)
            if failed != self._failed:
                say(f"the pools can't be read now: {error}")
            return [], []

    def _pass_on(self, event: Event, now: float) -> None:
        record = record_of(event, now)
        if self._printer is not None:
            self._printer.show(event, record)
        if self._command is not None:
            what = f"{event.alert} of {event.pool}"
            self._command.put(
                Message(about=(event.pool, event.alert), what=what, body=json.dumps(record, allow_nan=False).encode() + b"\n")
            )

    def _rest(self, until: float) -> None:
        while not self._signals.ended and (left := until - time.monotonic()) > 0:
            pause = None
            if self._command is not None:
                self._command.tick()
                pause = self._command.pause
            self._signals.wait(left if pause is None else min(left, pause))


class Printer:
    """Prints events to stdout, until that is closed."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.closed = False
        """Whether nobody reads any more."""

    def show(self, event: Event, record: dict[str, Any]) -> None:
        """One line."""
        if self.closed:
            return
        if self._as_json:
            line = json.dumps(record, allow_nan=False)
        else:
            state = f"{record['state']} ({record['severity']})" if event.firing else record["state"]
            line = f"{time.strftime('%F %T', time.localtime(record['at']))} {event.pool}: {event.alert} {state}: {event.text}"
        try:
            print(line.encode(sys.stdout.encoding, "replace").decode(sys.stdout.encoding), flush=True)
        except BrokenPipeError:
            self.closed = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python still has for it, it writes at its end
        except (OSError, AttributeError, ValueError) as error:  # a full disk; started without a stdout
            say(f"an event can't be printed ({error}): {line}")


class Signals:
    """SIGTERM, SIGINT and SIGHUP end the watch; they and the end of a command end a wait. From its exit on, the process ignores them."""

    def __init__(self) -> None:
        self.ended = 0
        """How many signals have asked for the end."""
        self._ends: list[signal.Signals] = []

    def __enter__(self) -> Self:
        self._ours, theirs = socket.socketpair()
        self._theirs = theirs
        for end in (self._ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._end)
                self._ends.append(number)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def wait(self, seconds: float) -> None:
        """Wait for a signal, at most so long."""
        select.select([self._ours], [], [], seconds)
        with suppress(BlockingIOError):
            while self._ours.recv(4096):
                pass

    def _end(self, *_: object) -> None:
        self.ended += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in self._ends:
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        self._ours.close()
        self._theirs.close()


def record_of(event: Event, now: float) -> dict[str, Any]:
    """The JSON object of an event that happened at `now`, on the monotonic clock."""
    at = time.time()
    return {
        "version": VERSION,
        "alert": event.alert.value,
        "state": "firing" if event.firing else "resolved",
        "severity": TERMS[event.alert].severity,
        "host": without_controls(socket.gethostname()),
        "pool": {
            "name": event.pool.name,
            "server": event.pool.server,
            "supervisor": event.pool.supervisor,
            "scoreboard": event.pool.board,
        },
        "since": round(at - max(0.0, now - event.since), 3),
        "at": round(at, 3),
        "figures": event.figures,
        "text": event.text,
        "help": f"docs/alerts.md#{event.alert}",
    }


def say(text: str) -> None:
    """One line on stderr, if there is one."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(f"oomsafe: {without_controls(text)}", file=sys.stderr, flush=True)
