"""For ``oomsafe run``: each node that starts in this process is guarded, whichever app it is of."""

from __future__ import annotations

from functools import wraps
from typing import Any

from oomsafe.celery.installation import Installed, install
from oomsafe.log import attempt

#: Celery's first version that is known to work.
LOWEST = (5, 3)


def guard_node(module: Any) -> None:
    """`module` is celery.worker.worker. A node's app is installed on right before the node is put together.

    Raises ImportError for a Celery that is too old.
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
    """What the app has installed by itself stays as it is."""
    if not isinstance(getattr(app, "oomsafe", None), Installed):
        install(app)
