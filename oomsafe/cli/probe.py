"""``oomsafe probe``: have one worker of a running pool trace its allocations, and show which line leaks."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import click
from rich.text import Text

from oomsafe.cli.labelled import NARROWEST, labelled
from oomsafe.cli.orders import NOT_ORDERED, UNANSWERED, OrderError, Outcome, called, give, pool_of
from oomsafe.cli.output import Out, until_closed
from oomsafe.cli.pools import Found, find_pools
from oomsafe.errors import ScoreboardError
from oomsafe.policy.probe import MOST_SECONDS, MOST_WORK, SECONDS, WORK
from oomsafe.policy.probed import Probed, Stage
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import format_size
from oomsafe.scoreboard.mailbox import Answer, order_probe
from oomsafe.scoreboard.recordings import RECORDING, open_probe_file, read_report
from oomsafe.scoreboard.view import PoolView, WorkerView

#: Seconds between two checks of how far the probe is, and for which it may go on after its window: the worker finishes its work first.
CHECK_EVERY, AFTERWARDS = 0.2, 120.0

#: Rows that are shown, and stacks of the first.
ROWS, STACK = 8, 12

NO_LINE = 4


@click.command()
@click.option("--pool", "name", metavar="NAME", help="The pool's name, or its supervisor's pid.")
@click.option("--worker", "pid", type=click.IntRange(min=1), metavar="PID", help="This worker; else the supervisor chooses one.")
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="The pool with this scoreboard.")
@click.option("--requests", "work", type=click.IntRange(1, MOST_WORK), default=WORK, show_default=True, help="End after so much work.")
@click.option("--seconds", type=click.FloatRange(1, MOST_SECONDS), default=SECONDS, show_default=True, help="End after so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON (docs/probe.md).")
@click.option("--html", type=click.Path(dir_okay=False), metavar="FILE", help="Also write memray's flame graph: it has source lines.")
@click.option("--last", is_flag=True, help="Show the last report of the pool; order nothing.")
def probe(
    name: str | None, pid: int | None, path: str | None, work: int, seconds: float, as_json: bool, html: str | None, last: bool
) -> None:
    """Find the line of code that leaks: one worker of a running pool traces its allocations for a while.

    It is slower meanwhile, the others are not, and it is replaced afterwards without losing a request. Uses memray if it is installed where
    the pool runs (pip install 'oomsafe[probe]'), else tracemalloc. Only for the pool's own user and root. Exits with 0 if a line was
    found, 4 if none keeps memory, 1 if the probe was refused or failed, 3 without an answer.
    """
    try:
        found = pool_of(path, pid, name)
        probed = found.pool.probed if last else _probe(found, pid, work, seconds)
        if probed is None:
            raise OrderError("no worker of this pool was probed yet")
        report = _report_of(probed)
        with until_closed():
            if as_json:
                print(json.dumps(report, allow_nan=False))
            else:
                console = Out(highlight=False)
                console.print(report_text(report, console.width, probed.path), soft_wrap=True)
        if html is not None:
            _write_html(report, html)
        raise SystemExit(0 if report.get("brief") else NO_LINE)
    except (OrderError, ScoreboardError) as error:
        print(f"oomsafe: {without_controls(str(error))}", file=sys.stderr)
        raise SystemExit(getattr(error, "status", NOT_ORDERED)) from None


def _probe(found: Found, pid: int | None, work: int, seconds: float) -> Probed:
    worker = next((each for each in found.pool.workers if each.pid == pid), None)
    outcome = order(found, worker, work, seconds)
    if outcome.status:
        raise OrderError(outcome.line, outcome.status)
    return _wait_for(found, found.pool.probed, seconds)


def order(found: Found, worker: WorkerView | None, work: int = WORK, seconds: float = SECONDS) -> Outcome:
    """Order this worker to trace its allocations; None: one that the supervisor chooses. As give()."""
    pool = found.pool
    if pool.is_single_process:
        return Outcome(NOT_ORDERED, "this process has no supervisor of oomsafe's: call oomsafe.probe() in it")
    words = {
        Answer.ORDERED: Outcome(0, f"{'one worker' if worker is None else called(pool, worker)} is to trace its allocations"),
        Answer.BUSY: Outcome(NOT_ORDERED, "a worker of this pool is probed already: see oomsafe probe --last"),
        Answer.SHORT: Outcome(
            NOT_ORDERED, "no worker of this pool has room for a tracer's memory now, up to its soft limit and the pool's budget"
        ),
        Answer.DRY_RUN: Outcome(NOT_ORDERED, "the pool is in a dry run: nothing is done"),
    }
    who = pool.name or pool.server if worker is None else called(pool, worker)
    return give(partial(order_probe, found.path, worker, work, seconds), pool, who, words)


def _wait_for(found: Found, before: Probed | None, seconds: float) -> Probed:
    """Wait until the probe is over; what happens meanwhile is shown on stderr, where that is a terminal."""
    until = time.monotonic() + seconds + AFTERWARDS
    shown = None
    while time.monotonic() < until:
        pools = find_pools([found.path], routes=False)
        if not pools:
            raise OrderError("the pool has ended")
        now = pools[0].pool.probed
        if now is not None and (before is None or now.at > before.at):
            if now.stage.is_over:
                if now.stage is Stage.FAILED:
                    raise OrderError(f"worker {now.pid}: {now.text}")
                return now
            shown = _show(pools[0].pool, now, shown)
        time.sleep(CHECK_EVERY)
    raise OrderError(f"the probe has not ended within {seconds + AFTERWARDS:.0f} s", UNANSWERED)


class _Shown(NamedTuple):
    stage: Stage
    text: str


def _show(pool: PoolView, now: Probed, shown: _Shown | None) -> _Shown:
    one = _Shown(now.stage, now.text)
    if one != shown and sys.stderr.isatty():
        worker: WorkerView | None = next((each for each in pool.workers if each.pid == now.pid), None)
        slot = "" if worker is None else f" (slot {worker.slot})"
        what = now.text if now.stage is Stage.TRACES else f"{now.text}; it finishes its work, and is replaced"
        print(f"worker {now.pid}{slot}: {what}", file=sys.stderr)
    return one


def _report_of(probed: Probed) -> dict[str, Any]:
    if probed.stage is Stage.FAILED:
        raise OrderError(f"worker {probed.pid}: {probed.text}")
    if not probed.stage.is_over:
        raise OrderError(f"worker {probed.pid} is still at it: {probed.text}")
    if not probed.path:
        raise OrderError(f"{probed.text}; its report could not be written: see the log of worker {probed.pid}")
    return read_report(probed.path)


def report_text(report: dict[str, Any], width: int, path: str) -> Text:
    """A report for people. It comes from a file that a worker wrote: whatever it has, it must not break this."""
    width = max(NARROWEST, width)
    window = report.get("window")
    window = window if isinstance(window, dict) else {}
    brief = _text(report.get("brief"))
    lines = labelled("", brief or "no line keeps enough to be called a leak", width, "bold", indent=0)
    work, seconds, pid, slot = (f"{_number(window.get(name)):.0f}" for name in ("work", "seconds", "pid", "slot"))
    over = f"{work} {_text(window.get('unit'))} in {seconds} s of worker {pid} (slot {slot}), with {_text(window.get('tool'))}"
    over += f"; it ended because {_text(window.get('why'))}"
    lines += labelled("", over, width, indent=0)
    rows = [row for row in _list(report.get("rows")) if isinstance(row, dict)]
    if rows:
        lines.append(Text(""))
        lines.append(Text(f"{'alive':>10}  line", style="bold"))
    for row in rows[:ROWS]:
        routes = ", ".join(map(_text, _list(row.get("routes"))[:2])) or ("an import" if row.get("loads") else "")
        under = f"  ← {routes}" if routes else ""
        figures = f"{format_size(round(_number(row.get('size')))):>10}  "
        lines += labelled(figures, f"{_text(row.get('where'))}{under}", width, indent=len(figures))
    first = next((row for row in rows if not row.get("loads")), None)
    stacks = _list(first.get("stacks")) if first is not None and brief else []
    if stacks:
        lines.append(Text(""))
        lines.append(Text("the first line's stack, innermost first", style="bold"))
        for frame in _list(stacks[0])[:STACK]:
            if isinstance(frame, dict):
                function = _text(frame.get("function"))
                named = f" in {function}" if function else ""
                lines += labelled("", f"{_text(frame.get('file'))}:{_number(frame.get('line')):.0f}{named}", width, indent=2)
    ruled = [_text(each) for each in _list(report.get("ruled_out"))[:8]]
    if ruled:
        lines.append(Text(""))
        for each in ruled:
            lines += labelled("", f"- {each}", width, indent=0)
    lines.append(Text(""))
    lines += labelled("", f"report: {without_controls(path)}", width, indent=0)
    return Text("\n").join(lines)


def _text(value: object) -> str:
    return without_controls(value[:1000]) if isinstance(value, str) else ""


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e18 else 0.0


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _write_html(report: dict[str, Any], html: str) -> None:
    """memray's own flame graph of what is alive. For its user's eyes alone: it has lines of the app's source."""
    recording = report.get("recording")
    if not isinstance(recording, str):
        raise OrderError("--html needs a recording of memray's, and this probe has used tracemalloc: pip install 'oomsafe[probe]'")
    fd = open_probe_file(recording, RECORDING)
    if os.fstat(fd).st_uid != os.geteuid():
        os.close(fd)
        raise OrderError(f"{recording} belongs to user {os.stat(recording).st_uid}: run --html --last as that user")
    os.close(fd)
    old = os.umask(0o077)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "memray", "flamegraph", "--leaks", "-f", "-o", html, recording],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    finally:
        os.umask(old)
    if ended.returncode != 0:
        said = (ended.stderr or ended.stdout).strip().splitlines()
        raise OrderError(f"memray could not draw it: {said[-1] if said else ended.returncode}")
    if stat.S_IMODE(os.stat(html).st_mode) & 0o077:  # it was there before
        os.chmod(html, 0o600)
    print(f"flame graph: {without_controls(html)}", file=sys.stderr)
