"""uvicorn's own supervisor of several workers, extended by a pool in which replacements come first."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from uvicorn.config import Config
from uvicorn.supervisors import multiprocess

from oomsafe.drain.uvicorn import log_with_uvicorn
from oomsafe.log import attempt, log
from oomsafe.policy.ends import By
from oomsafe.scoreboard.seat import Seat
from oomsafe.uvicorn.process import TICK_EVERY, GuardedProcess
from oomsafe.uvicorn.reading import name_of, read_policy

if TYPE_CHECKING:
    from oomsafe.supervisor.supervisor import Supervisor

#: Seconds that a worker has to end after its grace period.
PATIENCE = 10.0


class GuardedMultiprocess(multiprocess.Multiprocess):
    """Ticks while uvicorn's loop waits. uvicorn does not notice the death of a worker that was ordered to drain.

    `arguments` and `more` are what uvicorn also passes to each of its processes: its sockets and, in older versions, the
    function that they run.
    """

    keywords: ClassVar[Mapping[str, Any]] = {}
    """The keywords of the policy."""

    def __init__(self, config: Config, *arguments: Any, **more: Any) -> None:
        # here: below `oomsafe run` each worker imports this module, for it is spawned and imports uvicorn's main
        from oomsafe.supervisor.supervisor import Supervisor

        super().__init__(config, *arguments, **more)
        log_with_uvicorn()
        self.should_exit = Ticking(self._tick, self._watch_room)
        self._policy, warnings = read_policy(self.keywords)
        for warning in warnings:
            log.warning("%s", warning)
        self._arguments, self._more = arguments, more
        self._supervisor: Supervisor = Supervisor(self._policy, "uvicorn", self.processes_num, self, name=name_of(config))
        atexit.register(self._supervisor.close)
        self._seated: list[GuardedProcess] = []
        self._retiring: dict[GuardedProcess, float] = {}
        """Workers that uvicorn no longer knows, and until when they may drain."""
        # uvicorn looks this name up wherever it creates a process; it stays a class, because other code may patch it or call isinstance()
        GuardedProcess.enrol, GuardedProcess.tick, GuardedProcess.watch = self._enrol, self._tick_while_asking, self._watch_room
        multiprocess.Process = GuardedProcess  # type: ignore[misc]

    def run(self) -> None:
        """Run until the end; the process may run another supervisor afterwards."""
        try:
            super().run()
        finally:
            atexit.unregister(self._supervisor.close)
            self._supervisor.close()

    # --- the Fleet of supervisor/replacements.py

    def spawn(self) -> int | None:
        """Start one more worker than wanted."""
        process = self._start()
        return None if process is None else process.seat.generation

    def shrink(self) -> None:
        """Do nothing: the number of workers is derived from the supervisor's ledger at the end of each tick."""

    def may_surge(self) -> bool:
        """Whether uvicorn is not shutting down: its loop does nothing else during a tick."""
        return not self.should_exit.is_set()

    # --- uvicorn's own methods

    def restart_all(self) -> None:
        """SIGHUP: uvicorn replaces all workers."""
        self._supervisor.change(self.processes_num, self._policy)
        super().restart_all()

    def keep_subprocess_alive(self) -> None:
        """uvicorn's health check. A worker that can't be started (EAGAIN, ENOMEM, EMFILE) must not end those that serve."""
        self._outlive(super().keep_subprocess_alive)

    def handle_signals(self) -> None:
        """SIGTTIN and SIGHUP start workers, too."""
        self._outlive(super().handle_signals)

    def terminate_all(self) -> None:
        """At the end: also terminate the workers that uvicorn no longer knows."""
        super().terminate_all()
        for process in self._forgotten():
            process.terminate()

    def join_all(self) -> None:
        """At the end: also join the workers that uvicorn no longer knows."""
        super().join_all()
        for process in self._forgotten():
            process.join()

    # --- our own

    def _forgotten(self) -> list[GuardedProcess]:
        """The workers that uvicorn no longer knows: those that retire, and those that it has lost (0.30, when two die at once)."""
        return [process for process in self._seated if process not in self.processes]

    def _enrol(self, process: GuardedProcess) -> Seat:
        seat = self._supervisor.seat(self._supervisor.reserve())
        self._seated.append(process)
        return seat

    def _start(self) -> GuardedProcess | None:
        started: list[GuardedProcess] = []

        def start() -> None:
            process = GuardedProcess(self.config, *self._arguments, **self._more)
            process.start()
            started.append(process)

        self._outlive(start)
        self.processes += started
        return started[0] if started else None

    def _outlive(self, starting: Callable[[], None]) -> None:
        """Call `starting`, which may start a worker; if that fails while others serve, they must not end."""
        try:
            starting()
        except OSError as error:
            if not self._supervisor.serves:
                raise
            missing = next((process for process in self._seated if process.pid is None), None)
            if missing is not None:
                self._seated.remove(missing)
            number, generation = (None, None) if missing is None else (missing.seat.number, missing.seat.generation)
            self._supervisor.not_started(number, generation, error)

    def _tick(self) -> None:
        attempt("tick", "uvicorn", self._update)

    def _tick_while_asking(self) -> None:
        """uvicorn is in the middle of its list of workers, so none may be taken out of it; more may be put at its end."""
        attempt("tick", "uvicorn", self._watch)

    def _watch(self) -> None:
        for process in self._seated:
            self._supervisor.born_seat(process.seat.number, process.seat.generation, process.process.pid)
        self._supervisor.tick()

    def _watch_room(self) -> float:
        """Between two ticks; returns the seconds until this is due again."""
        return self._supervisor.watch()

    def _update(self) -> None:
        if self._supervisor.capacity.workers != self.processes_num:  # SIGTTIN, SIGTTOU
            self._supervisor.change(self.processes_num)
        self._bury()
        self._watch()
        self._retire()
        self.processes += [process for process in self._forgotten() if process not in self._retiring]
        self._adjust()

    def _bury(self) -> None:
        """Release the slots of dead workers. Hide a worker that never served from uvicorn, which would end the whole service."""
        from oomsafe.supervisor.deaths import Ended  # here, as in __init__()

        for process in [process for process in self._seated if process.process.exitcode is not None]:
            pending = process.seat.generation in self._supervisor.pending
            ended = Ended(process.process.pid or 0, process.process.exitcode, process.ended_by, process.was_killed)
            failed = self._supervisor.release_seat(process.seat.number, process.seat.generation, ended)
            self._seated.remove(process)
            process.known_dead = True
            self._retiring.pop(process, None)
            if (failed or pending) and process in self.processes and self._supervisor.serves:
                process.join()
                self.processes.remove(process)

    def _retire(self) -> None:
        """Hide workers whose replacement serves from uvicorn, so that it does not start another for them; kill those that are overdue."""
        victims, now = self._supervisor.victims, time.monotonic()
        for process in [p for p in self.processes if isinstance(p, GuardedProcess) and p.seat.generation in victims]:
            self._let_go(process)
        for process, deadline in list(self._retiring.items()):
            if now > deadline:
                self._retiring[process] = now + PATIENCE
                process.ended_by = By.GRACE
                process.kill()

    def _adjust(self) -> None:
        """Start the workers that are missing, though not at once after one died at boot; end the extra ones after SIGTTOU or a reload."""
        wanted = self.processes_num + len(self._supervisor.pending)
        while len(self.processes) < wanted and not self._supervisor.boot_pause and self._start() is not None:
            pass
        while len(self.processes) > wanted and len(self.processes) > 1:
            self._let_go(next((p for p in self.processes if p.process.exitcode is not None), self.processes[0]))

    def _let_go(self, process: Any) -> None:
        self.processes.remove(process)
        if process in self._seated:
            self._supervisor.tell_to_drain(process.seat.number, process.seat.generation)
            self._retiring[process] = time.monotonic() + self._policy.grace_period + PATIENCE


class Ticking(threading.Event):
    """An event that ticks while it waits: uvicorn's loop waits on it. `watch` is called in between, as often as it returns seconds."""

    def __init__(self, tick: Callable[[], None], watch: Callable[[], float]) -> None:
        super().__init__()
        self._tick = tick
        self._watch = watch

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for at most `timeout` seconds, and tick meanwhile."""
        deadline = time.monotonic() + (timeout or 0)
        while not self.is_set() and (left := deadline - time.monotonic()) > 0:
            self._wait(min(TICK_EVERY, left))
            if not self.is_set():
                self._tick()
        return self.is_set()

    def _wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.is_set() and (left := until - time.monotonic()) > 0:
            super().wait(min(left, self._watch()))
