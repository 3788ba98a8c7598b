"""One worker more, one worker less: gunicorn's arbiter, as supervisor/replacements.py wants it."""

from __future__ import annotations

from typing import Any


class GunicornFleet:
    """Changes gunicorn's own number of workers by deltas only: SIGTTIN, SIGTTOU and its control socket write it too."""

    def __init__(self, server: Any) -> None:
        self.extra = 0
        """How many more workers gunicorn has been told to have than its user wants."""
        self._server = server

    @property
    def wanted(self) -> int:
        """How many workers gunicorn's user wants."""
        return int(self._server.num_workers) - self.extra

    def spawn(self) -> int | None:
        """Fork one more; in the child, this does not return."""
        pid = self._server.spawn_worker()
        slot = getattr(self._server.WORKERS.get(pid), "oomsafe_slot", None)
        if slot is None:
            return None  # it could not be forked; or it has no slot, and gunicorn ends the one worker that is too many
        # only now that it is there: gunicorn would fork the missing one by itself
        self.extra += 1
        self._server.num_workers += 1
        return int(slot.generation)

    def shrink(self) -> None:
        """The number as it was: before gunicorn looks, or it would fork one for the worker that is gone."""
        if self.extra:
            self.extra -= 1
            self._server.num_workers -= 1

    def forget(self) -> None:
        """gunicorn has set its number anew (SIGHUP, SIGWINCH)."""
        self.extra = 0

    def may_surge(self) -> bool:
        """Not beside another arbiter (SIGUSR2), nor after SIGWINCH has sent all workers away."""
        return not (self._server.reexec_pid or self._server.master_pid) and self.wanted > 0
