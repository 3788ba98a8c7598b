"""For ``oomsafe run``: guard each node that starts in this process, whatever its app."""

from __future__ import annotations

from functools import wraps
from typing import Any

from oomsafe.celery.installation import Installed, install
from oomsafe.log import attempt

#: The lowest version of Celery that is known to work.
LOWEST = (5, 3)


def guard_node(module: Any) -> None:
    """`module` is celery.worker.worker. Calls install() with a node's app right before the node is set up.

    Raises ImportError if Celery is too old.
    """
    import celery

    if celery.VERSION < LOWEST:
        raise ImportError(f"celery {celery.__version__} is older than {'.'.join(map(str, LOWEST))}")
    setup = module.WorkController.setup_instance

    @wraps(setup)
    def guarded(self: Any, *args: Any, **options: Any) -> Any:
        attempt("installing", "Celery", lambda: _install(self.app))
        return setup(self, *args, **options)

    module.WorkController.setup_instance = guarded


def _install(app: Any) -> None:
    """If the app has called install() itself, that stays as it is."""
    if not isinstance(getattr(app, "oomsafe", None), Installed):
        install(app)
