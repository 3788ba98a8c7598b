"""One worker more, one worker less: gunicorn's arbiter as the Fleet of supervisor/replacements.py."""

from __future__ import annotations

from typing import Any


class GunicornFleet:
    """Changes gunicorn's number of workers only by increments, because SIGTTIN, SIGTTOU and its control socket change it too."""

    def __init__(self, server: Any) -> None:
        self.extra = 0
        """How many more workers than its user wants gunicorn currently has to keep."""
        self._server = server

    @property
    def wanted(self) -> int:
        """How many workers gunicorn's user wants."""
        return int(self._server.num_workers) - self.extra

    def spawn(self) -> int | None:
        """Fork one more worker and return its generation, or None; in the child, this does not return."""
        pid = self._server.spawn_worker()
        slot = getattr(self._server.WORKERS.get(pid), "oomsafe_slot", None)
        if slot is None:
            return None  # it could not be forked; or it has no slot, and gunicorn ends the extra worker
        # only after the fork, because gunicorn would fork a missing worker by itself
        self.extra += 1
        self._server.num_workers += 1
        return int(slot.generation)

    def shrink(self) -> None:
        """Reduce the number again. Call it before gunicorn counts its workers, or it forks one for the worker that is gone."""
        if self.extra:
            self.extra -= 1
            self._server.num_workers -= 1

    def forget(self) -> None:
        """gunicorn has reset its number of workers (SIGHUP, SIGWINCH)."""
        self.extra = 0

    def may_surge(self) -> bool:
        """False while there is another arbiter (SIGUSR2), and after SIGWINCH has ended all workers."""
        return not (self._server.reexec_pid or self._server.master_pid) and self.wanted > 0
