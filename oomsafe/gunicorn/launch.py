"""For ``oomsafe run``: guards every arbiter that starts in this process, however it is configured."""

from __future__ import annotations

from functools import wraps
from typing import Any

from oomsafe.gunicorn.chain import is_ours
from oomsafe.gunicorn.hooks import install
from oomsafe.log import attempt

#: gunicorn's first version that is known to work.
LOWEST = (21, 2)


def guard_arbiter(module: Any) -> None:
    """Put our hooks into each configuration before an arbiter reads it, at its start and at each reload. `module` is gunicorn.arbiter.

    A custom application (BaseApplication) has no configuration file, and its options are only final at that point. Raises ImportError
    if gunicorn is too old.
    """
    import gunicorn

    if gunicorn.version_info < LOWEST:
        raise ImportError(f"gunicorn {gunicorn.__version__} is older than {'.'.join(map(str, LOWEST))}")
    setup = module.Arbiter.setup

    @wraps(setup)
    def guarded(self: Any, app: Any) -> None:
        attempt("hooking gunicorn", "gunicorn", lambda: _hook(app.cfg))
        setup(self, app)

    module.Arbiter.setup = guarded


def _hook(cfg: Any) -> None:
    """Install our hooks, unless the user's configuration has done so itself."""
    before = {name: setting.get() for name, setting in cfg.settings.items()}
    if any(is_ours(value) for value in before.values()):
        return
    after = dict(before)
    install(after)
    for name, hook in after.items():
        if name in before and hook is not before[name]:
            cfg.set(name, hook)
