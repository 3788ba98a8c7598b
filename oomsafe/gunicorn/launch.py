"""For ``oomsafe run``: each arbiter is guarded that starts in this process, however its configuration came about."""

from __future__ import annotations

from functools import wraps
from typing import Any

from oomsafe.gunicorn.chain import is_ours
from oomsafe.gunicorn.hooks import install
from oomsafe.log import attempt

#: gunicorn's first version that is known to work.
LOWEST = (21, 2)


def guard_arbiter(module: Any) -> None:
    """`module` is gunicorn.arbiter. Before an arbiter reads its configuration, at its start and at each reload, our hooks are in it.

    An application of one's own (BaseApplication) has no configuration file, and its options are final only here. Raises ImportError
    for a gunicorn that is too old.
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
    """What the user's configuration has installed by itself stays as it is."""
    before = {name: setting.get() for name, setting in cfg.settings.items()}
    if any(is_ours(value) for value in before.values()):
        return
    after = dict(before)
    install(after)
    for name, hook in after.items():
        if name in before and hook is not before[name]:
            cfg.set(name, hook)
