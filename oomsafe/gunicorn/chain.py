"""Combine two hooks into one: gunicorn takes one function for each hook, and checks its number of parameters."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

Hook = Callable[..., None]
Failed = Callable[[str, Exception], None]

#: The attribute in which a chained hook keeps the user's own, so that installing twice does not chain twice.
THEIRS = "oomsafe_theirs"


def chain(ours: Hook, theirs: Any, *, first: bool, failed: Failed) -> Any:
    """`ours` and `theirs` as one hook of the same arity; `first`: ours runs first.

    An exception of ours goes to `failed`, never to gunicorn. An exception of theirs goes where it always
    went, after ours has run. `theirs` may be None, or text, which gunicorn also accepts
    ("module.function"). A hook of theirs that gunicorn would refuse is returned unchanged, so that gunicorn refuses it.
    """
    theirs = getattr(theirs, THEIRS, theirs)
    arity = len(inspect.signature(ours).parameters)
    if isinstance(theirs, str):
        theirs = _imported(theirs)
    if theirs is not None and not _takes(theirs, arity):
        return theirs

    def both(*arguments: Any) -> None:
        if first:
            _guarded(ours, failed, *arguments)
        try:
            if theirs is not None:
                theirs(*arguments)
        finally:
            if not first:
                _guarded(ours, failed, *arguments)

    hook = _with_arity(both, arity)
    setattr(hook, THEIRS, theirs)
    return hook


def is_ours(hook: Any) -> bool:
    """Whether this is what chain() makes."""
    return hasattr(hook, THEIRS)


def _guarded(hook: Hook, failed: Failed, *arguments: Any) -> None:
    try:
        hook(*arguments)
    except Exception as error:
        failed(hook.__name__, error)


def _with_arity(function: Hook, arity: int) -> Hook:
    """gunicorn counts parameters, and ``*arguments`` counts as one."""
    # these parameters look superfluous, but gunicorn counts them
    by_arity: dict[int, Hook] = {
        1: lambda server: function(server),  # noqa: PLW0108
        2: lambda server, worker: function(server, worker),  # noqa: PLW0108
        3: lambda server, new, old: function(server, new, old),  # noqa: PLW0108
    }
    return by_arity[arity]


def _takes(hook: Any, arity: int) -> bool:
    """Whether gunicorn would accept `hook`: it must be callable, with exactly `arity` parameters."""
    try:
        parameters = inspect.signature(hook).parameters.values()
        return callable(hook) and sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) == arity
    except (TypeError, ValueError):
        return False


def _imported(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return name  # gunicorn will report what is wrong with it
