"""A probe: this worker traces its allocations for a window, and tells which lines of code keep memory.

The worker is slower meanwhile, by half where it allocates little, and by a lot where it does nothing else. So the window is bounded by
work and by time, and the tracing ends at once if memory gets short, or if a piece of work takes far too long with it. Afterwards the
worker is replaced, as for its age. What is alive is counted when it has finished its work, so that no work in flight looks like a leak.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.allocators import take_stock
from oomsafe.log import attempt, failed, log
from oomsafe.policy.probe import OWN_ROOM, Alive, Endpoint, Report, Window, named_in, report_of
from oomsafe.policy.probed import Stage
from oomsafe.policy.units import MIB, counted, format_size, one_of
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.recordings import Recordings
from oomsafe.worker.meter import Meter
from oomsafe.worker.tracers import CanNotTraceError, Memray, Tracemalloc, Tracer, library, real

if TYPE_CHECKING:
    from oomsafe.scoreboard.header import Header

#: Seconds between two checks of a thread beside the work.
CHECK_EVERY = 0.1

#: Seconds before the tracer starts in which the price of a piece of work without it is measured, or until JUDGED_AFTER of them are done.
BEFORE = 1.0

#: Seconds that a piece of work may take while everything is slower; a server that waits longer would end the worker.
PATIENCE = 10.0

#: Work may become so many times as dear as it was; judged after so many pieces of it.
SLOWER, JUDGED_AFTER = 12.0, 20

#: Bytes that the tracer's own tables may hold: reading them takes several times as much for a moment.
TABLES = 16 * MIB

#: Seconds for which it traces on after its window, until its worker has finished its work.
TRACES_ON = 30.0

#: Seconds that a process which nothing replaces waits for a moment with no work in flight.
MOMENT = 5.0

#: The share of the pool's budget that must be free while a worker is probed.
HEADROOM = 0.02


class Probe:
    """One window of one worker. `follow()` and `finish()` are called in the worker's own threads, never at once."""

    def __init__(
        self,
        meter: Meter,
        who: str,
        slot: int,
        generation: int,
        unit: str,
        header: Header | None,
        endpoints: Callable[[], Iterable[Endpoint]],
        work: int,
        seconds: float,
    ) -> None:
        """`who` names the worker in the log; `header` None: nobody is told but the log. `endpoints` is called at the end."""
        self._meter, self._who, self._slot, self._generation, self._unit, self._header = meter, who, slot, generation, unit, header
        self._endpoints = endpoints
        self._wanted, self._seconds = work, seconds
        self._tracer: Tracer | None = None
        self._with = ""
        """The tracer, and why not the other one."""
        self._files: Recordings | None = None
        self._began_at = time.monotonic()
        """When it was ordered; once it traces, since when."""
        self._before = (meter.counters.work, time.process_time())
        self._price: float | None = None
        self._calls: dict[str, int] = {}
        self._held = 0
        self._work = 0
        self._cpu = 0.0
        self.why = ""
        """Why the window is over; empty: it is not."""
        self._over_at = 0.0
        self._stopped = False
        """Whether the tracer was stopped before what is alive could be counted."""
        self.finished = False
        self._ending = real("_thread", "allocate_lock")()

    def follow(self, now: float, room: int | None) -> None:
        """Start the tracer when that is due. Called about once a second; `room`: bytes left up to the soft limit, None: there is none."""
        known = now - self._began_at >= BEFORE or self._meter.counters.work - self._before[0] >= JUDGED_AFTER
        if self._tracer is None and not self.finished and known:
            if room is not None and room < OWN_ROOM:
                self._fail(f"{format_size(max(0, room))} left up to its soft limit: a tracer needs {format_size(OWN_ROOM)}")
            else:
                self._start()

    @property
    def waits_for_replacement(self) -> bool:
        """Whether the window is over, and this worker should be replaced."""
        return bool(self.why) and not self.finished

    @property
    def slows(self) -> bool:
        """Whether it has traced, so that this worker should not stay."""
        return self._tracer is not None

    def is_its_moment(self, now: float) -> bool:
        """Whether what is alive should be counted now, in a process that nothing replaces."""
        return self.waits_for_replacement and (not self._meter.in_flight or now - self._over_at > MOMENT)

    def _start(self) -> None:
        work, cpu = self._meter.counters.work, time.process_time()
        done = work - self._before[0]
        self._price = (cpu - self._before[1]) / done if done >= JUDGED_AFTER / 4 else None
        problems = []
        try:
            self._files = Recordings(os.getpid(), self._generation)
        except ScoreboardError as error:
            problems.append(f"no recording can be made: {error}")
        files = self._files
        tracers: list[Tracer] = [Memray(files.new_recording)] if files is not None else []
        for tracer in [*tracers, Tracemalloc()]:
            try:
                self._held = self._meter.held
                tracer.start()
            except CanNotTraceError as error:
                problems.append(str(error))
                continue
            self._tracer = tracer
            break
        else:
            self._fail("; ".join(problems))
            return
        self._with = tracer.name + (f" ({'; '.join(problems)})" if problems else "")
        self._calls = dict(self._counts())
        self._work, self._cpu, self._began_at = self._meter.counters.work, time.process_time(), time.monotonic()
        until = f"until {counted(self._wanted, self._unit)} or {self._seconds:.0f} s"
        log.info("%s traces its allocations with %s, %s: it is slower meanwhile, and is replaced afterwards", self._who, self._with, until)
        self._tell(Stage.TRACES, f"traces with {tracer.name}, {until}")
        real("_thread", "start_new_thread")(self._watch, ())

    def _watch(self) -> None:
        """In a thread beside the work: end the window. It takes no lock of the app's or of logging, which gevent may have replaced."""
        sleep = real("time", "sleep")
        while not self.finished and not self._stopped:
            sleep(CHECK_EVERY)
            try:
                self._check(time.monotonic())
            except Exception:
                self._end("the check of its window failed", at_once=True)

    def _check(self, now: float) -> None:
        meter = self._meter
        done, seconds = meter.counters.work - self._work, now - self._began_at
        if self.why:
            if now - self._over_at > TRACES_ON:
                self._stop()
            return
        oldest = meter.oldest(now)
        if done >= self._wanted:
            self._end(f"{counted(done, self._unit)} were enough")
        elif seconds >= self._seconds:
            self._end(f"{self._seconds:.0f} s were over")
        elif oldest is not None and now - max(self._began_at, now - oldest) > PATIENCE:
            self._end(f"a {one_of(self._unit)} took more than {PATIENCE:.0f} s with it", at_once=True)
        elif self._header is not None and self._header.held_share > 1 - HEADROOM:
            self._end("the pool's memory got short", at_once=True)
        elif (self._tracer.memory or 0) > TABLES if self._tracer is not None else False:
            self._end(f"the tracer's tables hold more than {format_size(TABLES)}")
        elif self._price and done >= JUDGED_AFTER and (slower := (time.process_time() - self._cpu) / done / self._price) > SLOWER:
            self._end(f"{self._unit} became {slower:.0f} times as dear")

    def _end(self, why: str, at_once: bool = False) -> None:
        """The window is over; `at_once`: the process must be as fast as before now, and not only when it has finished its work."""
        if not self.why:
            self._over_at = time.monotonic()
            self.why = why
            self._tell(Stage.ENDS, why)
            self._meter.publish_at = 0.0  # so that the worker checks itself soon
        if at_once:
            self._stop()

    def _stop(self) -> None:
        if self._ending.acquire(blocking=False):
            self._stopped = True
            if self._tracer is not None:
                self._tracer.stop()
            self._ending.release()

    def finish(self, ends: bool) -> None:
        """Count what is alive, and tell what was found. `ends`: this process does nothing else any more."""
        if self.finished or self._tracer is None:
            if not self.finished:
                self._fail("the worker left before the tracing had begun")
            return
        if not self.why:
            self._end("the worker was recycled")
        self.finished = True
        with self._ending:
            gc.collect()
            ended, in_flight = time.monotonic(), self._meter.in_flight
            window = self._window(ended, in_flight)
            try:
                alive: list[Alive] = list(self._tracer.alive())
                parts = take_stock() if ends else None  # now that no tracer stands between Python and its allocator
            except Exception as error:
                self._tracer.stop()
                self._tell_failure(f"what was traced can't be read ({error})" if isinstance(error, CanNotTraceError) else f"{error!r}")
                return
        if not window.work:
            self._tell_failure(f"it got no {self._unit} in the {window.seconds:.0f} s that it was traced")
            return
        calls = {route: times for route, count in self._counts() if (times := count - self._calls.get(route, 0)) > 0}
        endpoints = attempt("the endpoints of routes", "the server", lambda: list(self._endpoints())) or []
        window = replace(window, kept_free=None if parts is None else parts.kept)
        report = report_of(window, alive, endpoints, calls, library())
        self._publish(report)

    def _window(self, ended: float, in_flight: int) -> Window:
        meter, tracer = self._meter, self._tracer
        assert tracer is not None
        done = meter.counters.work - self._work
        price = (time.process_time() - self._cpu) / done if done else None
        return Window(
            pid=os.getpid(), slot=self._slot, at=time.time(), tool=self._with, why=self.why, unit=self._unit, work=done,
            seconds=ended - self._began_at, in_flight=in_flight, grown=meter.held - self._held if meter.rss_known else None,
            kept_free=None, slower=price / self._price if price is not None and self._price else None, tracer=tracer.memory,
        )  # fmt: skip

    def _publish(self, report: Report) -> None:
        path = ""
        if self._files is not None:
            try:
                path = self._files.write(record_of(report, self._recording()))
            except (OSError, ValueError) as error:
                log.warning("%s: the report of its probe can't be written: %s", self._who, error)
        level = logging.WARNING if report.first else logging.INFO
        log.log(level, "%s was probed: %s%s", self._who, named_in(report), f"; {path}" if path else "")
        if report.first is not None:
            self._tell(Stage.DONE, report.brief, path)
        else:
            self._tell(Stage.NOTHING, "no line keeps enough to be called a leak", path)

    def _recording(self) -> str | None:
        return self._files.recording if self._files is not None and isinstance(self._tracer, Memray) else None

    def _fail(self, why: str) -> None:
        """It ends before it has traced anything."""
        self.finished = True
        self._tell_failure(why)

    def _tell_failure(self, why: str) -> None:
        log.warning("%s is not probed: %s", self._who, why)
        self._tell(Stage.FAILED, why)

    def _tell(self, stage: Stage, text: str, path: str = "") -> None:
        try:
            if self._header is not None:
                self._header.note_probe(os.getpid(), self._generation, stage, text, path)
        except Exception as error:
            failed("telling of a probe", "the server", error)

    def _counts(self) -> Iterable[tuple[str, int]]:
        """How often each route was called so far."""
        rows = list(self._meter.counters.routes.items())
        return [(route, sum(row[1:])) for route, row in rows if route not in (layout.UNMATCHED, layout.OTHER)]


def record_of(report: Report, recording: str | None) -> dict[str, Any]:
    """A report as JSON data; docs/probe.md says what is in it."""
    rows = []
    for row in report.rows:
        stacks = [[frame._asdict() for frame in stack] for stack in row.stacks]
        rows.append(asdict(row) | {"where": row.where, "stacks": stacks})
    found: Mapping[str, Any] = {"brief": report.brief, "line": named_in(report), "alive": report.alive, "ruled_out": list(report.ruled_out)}
    return {"version": 1, "window": asdict(report.window), **found, "rows": rows, "recording": recording}
