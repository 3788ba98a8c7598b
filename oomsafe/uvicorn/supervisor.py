"""uvicorn's supervisor of several workers: its own, with a pool, and with replacements first."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from uvicorn.config import Config
from uvicorn.supervisors import multiprocess

from oomsafe.drain.uvicorn import log_with_uvicorn
from oomsafe.log import attempt, log
from oomsafe.scoreboard.seat import Seat
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.uvicorn.process import GuardedProcess
from oomsafe.uvicorn.reading import read_policy

#: Seconds between two looks at the pool; uvicorn's own loop turns every half second.
LOOK_EVERY = 0.1

#: Seconds after its grace period that a worker has to end.
PATIENCE = 10.0


class GuardedMultiprocess(multiprocess.Multiprocess):
    """Looks at the pool while uvicorn's loop waits. uvicorn sees no worker die that was told to.

    `arguments` and `more` are what uvicorn hands over to each of its processes, too: its sockets, in older versions also what
    they run.
    """

    keywords: ClassVar[Mapping[str, Any]] = {}
    """Of its policy."""

    def __init__(self, config: Config, *arguments: Any, **more: Any) -> None:
        super().__init__(config, *arguments, **more)
        log_with_uvicorn()
        self.should_exit = Ticking(self._tick)
        self._policy, warnings = read_policy(self.keywords)
        for warning in warnings:
            log.warning("%s", warning)
        self._arguments, self._more = arguments, more
        self._supervisor = Supervisor(self._policy, "uvicorn", self.processes_num, self)
        atexit.register(self._supervisor.close)
        self._seated: list[GuardedProcess] = []
        self._retiring: dict[GuardedProcess, float] = {}
        """Workers that uvicorn has forgotten, and until when they may drain."""
        # wherever uvicorn makes a process, it looks this name up; a class, as it was: others may ask what is one, or patch it
        GuardedProcess.enrol = self._enrol
        multiprocess.Process = GuardedProcess  # type: ignore[misc]

    def run(self) -> None:
        """Until its end; its process may run another one afterwards."""
        try:
            super().run()
        finally:
            atexit.unregister(self._supervisor.close)
            self._supervisor.close()

    # --- what supervisor/replacements.py asks for

    def spawn(self) -> int | None:
        """One more worker than wanted."""
        process = self._start()
        return None if process is None else process.seat.generation

    def shrink(self) -> None:
        """As many as wanted again: the ledger says how many that are, at the end of each look."""

    def may_surge(self) -> bool:
        """uvicorn's loop does nothing else meanwhile."""
        return not self.should_exit.is_set()

    # --- uvicorn's own

    def restart_all(self) -> None:
        """SIGHUP: uvicorn replaces all of them."""
        self._supervisor.change(self.processes_num, self._policy)
        super().restart_all()

    def keep_subprocess_alive(self) -> None:
        """Of those that uvicorn knows. One that can't be started (EAGAIN, ENOMEM, EMFILE) must not end those that serve."""
        self._outlive(super().keep_subprocess_alive)

    def handle_signals(self) -> None:
        """SIGTTIN and SIGHUP start workers, too."""
        self._outlive(super().handle_signals)

    def terminate_all(self) -> None:
        """At the end."""
        super().terminate_all()
        for process in self._forgotten():
            process.terminate()

    def join_all(self) -> None:
        """At the end."""
        super().join_all()
        for process in self._forgotten():
            process.join()

    # --- ours

    def _forgotten(self) -> list[GuardedProcess]:
        """Those that uvicorn does not know any more: who retires, and who it has lost (0.30 does when two die at once)."""
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
        """Run what may start a worker; what keeps it from being started is no reason to end the others."""
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
        attempt("tick", "uvicorn", self._look)

    def _look(self) -> None:
        if self._supervisor.capacity.workers != self.processes_num:  # SIGTTIN, SIGTTOU
            self._supervisor.change(self.processes_num)
        self._bury()
        for process in self._seated:
            self._supervisor.born_seat(process.seat.number, process.seat.generation, process.process.pid)
        self._supervisor.tick()
        self._retire()
        self.processes += [process for process in self._forgotten() if process not in self._retiring]
        self._pay()

    def _bury(self) -> None:
        """Who has died gives its slot back; one that never served is not for uvicorn to see, which would end the whole service."""
        for process in [process for process in self._seated if process.process.exitcode is not None]:
            pending = process.seat.generation in self._supervisor.pending
            failed = self._supervisor.release_seat(process.seat.number, process.seat.generation)
            self._seated.remove(process)
            process.known_dead = True
            self._retiring.pop(process, None)
            if (failed or pending) and process in self.processes and self._supervisor.serves:
                process.join()
                self.processes.remove(process)

    def _retire(self) -> None:
        """Who drains for a replacement that serves is uvicorn's no more: it must not bring up another for it."""
        victims, now = self._supervisor.victims, time.monotonic()
        for process in [p for p in self.processes if isinstance(p, GuardedProcess) and p.seat.generation in victims]:
            self._let_go(process)
        for process, deadline in list(self._retiring.items()):
            if now > deadline:
                self._retiring[process] = now + PATIENCE
                process.kill()

    def _pay(self) -> None:
        """Workers that died at boot are tried again, not at once; and what SIGTTOU or a reload has left over goes."""
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
    """An event whose waiting is not idle: uvicorn's loop waits on it."""

    def __init__(self, tick: Callable[[], None]) -> None:
        super().__init__()
        self._tick = tick

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, and tick meanwhile."""
        deadline = time.monotonic() + (timeout or 0)
        while not self.is_set() and (left := deadline - time.monotonic()) > 0:
            super().wait(min(LOOK_EVERY, left))
            if not self.is_set():
                self._tick()
        return self.is_set()
