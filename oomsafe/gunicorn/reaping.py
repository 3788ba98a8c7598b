"""In the arbiter: what gunicorn itself does to its workers, and with which status each of them ends. gunicorn tells its hooks neither."""

from __future__ import annotations

import os
import signal
from typing import Any

from oomsafe.log import attempt
from oomsafe.policy.ends import By
from oomsafe.supervisor.deaths import Ended

#: The most statuses and signals that are kept: of children that were no workers, nobody asks for them.
MOST = 256

#: The signals by which gunicorn has a worker end.
ORDERS = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGKILL)


class Reaping:
    """Wraps two methods of one arbiter, which go on doing what they did."""

    def __init__(self, server: Any) -> None:
        self._statuses: dict[int, tuple[int, int | None]] = {}
        """The status of each process that was reaped, and its greatest rss in bytes."""
        self._sent: dict[int, set[int]] = {}
        self._follow_signals(server)
        self._follow_statuses(server)

    def ended(self, worker: Any) -> Ended:
        """How this worker, which gunicorn has just reaped, ended. Call it once."""
        (status, peak), sent = self._statuses.pop(worker.pid, (None, None)), self._sent.pop(worker.pid, set())
        by = By.TIMEOUT if worker.aborted else By.ORDER if sent.intersection(ORDERS) else None
        return Ended(worker.pid, None if status is None else os.waitstatus_to_exitcode(status), by, signal.SIGKILL in sent, peak)

    def _follow_signals(self, server: Any) -> None:
        kill_worker = server.kill_worker

        def killing(pid: int, sig: int) -> Any:
            self._sent.setdefault(pid, set()).add(int(sig))
            _trim(self._sent)
            return kill_worker(pid, sig)

        server.kill_worker = killing

    def _follow_statuses(self, server: Any) -> None:
        """waitpid() returns the status once, and gunicorn drops it: so it is read over gunicorn's shoulder, only while it reaps."""
        reap_workers = server.reap_workers

        def reaping() -> Any:
            waitpid = os.waitpid

            def noting(pid: int, options: int) -> tuple[int, int]:
                peak = None
                if options & os.WNOHANG:
                    found, status, used = os.wait4(pid, options)
                    peak = used.ru_maxrss * 1024
                else:
                    found, status = waitpid(pid, options)
                if found:
                    self._statuses[found] = status, peak
                    _trim(self._statuses)
                return found, status

            os.waitpid = noting
            try:
                return reap_workers()
            finally:
                if os.waitpid is noting:
                    os.waitpid = waitpid

        server.reap_workers = reaping


def ended_by(reaping: Reaping | None, worker: Any) -> Ended | None:
    """How this worker ended; None: that can't be found out here, because gunicorn's methods could not be wrapped."""
    return None if reaping is None else attempt("how a worker ended", "gunicorn", lambda: reaping.ended(worker))


def _trim(known: dict[int, Any]) -> None:
    while len(known) > MOST:
        del known[next(iter(known))]
