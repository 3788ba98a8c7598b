"""A gevent worker each of whose connections has to wait for its greenlet's turn, as on a busy hub."""

from __future__ import annotations

import gevent
from gunicorn.workers.ggevent import GeventWorker


class SlowStart(GeventWorker):
    """gunicorn's, but slower."""

    def handle(self, *connection: object) -> None:
        """After it was accepted, and some time before gunicorn looks at it."""
        gevent.sleep(0.3)
        super().handle(*connection)
