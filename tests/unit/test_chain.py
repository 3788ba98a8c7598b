"""gunicorn's hooks: ours and the user's own, and what happens when either fails."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from gunicorn import util
from gunicorn.config import Config

from oomsafe.gunicorn import hooks
from oomsafe.gunicorn.chain import THEIRS, chain
from oomsafe.gunicorn.hooks import install

HOOKS = {
    "on_starting": 1,
    "on_reload": 1,
    "nworkers_changed": 3,
    "pre_fork": 2,
    "post_fork": 2,
    "post_worker_init": 1,
    "worker_abort": 1,
    "worker_exit": 2,
    "child_exit": 2,
    "on_exit": 1,
}
DIRTY_HOOKS = {"on_dirty_starting": 1, "dirty_post_fork": 2, "dirty_worker_init": 1, "dirty_worker_exit": 2}


def fails(hook: str, error: Exception) -> None:
    """Where ours must not end up."""
    raise AssertionError(hook) from error


def ours_of(arity: int, calls: list[Any]) -> Any:
    """A hook of ours that notes its arguments."""
    return {
        1: lambda a: calls.append(("ours", a)),
        2: lambda a, b: calls.append(("ours", a, b)),
        3: lambda a, b, c: calls.append(("ours", a, b, c)),
    }[arity]


def theirs_of(arity: int, calls: list[Any]) -> Any:
    """One of the user's."""
    return {
        1: lambda server: calls.append(("theirs", server)),
        2: lambda server, worker: calls.append(("theirs", server, worker)),
        3: lambda server, new, old: calls.append(("theirs", server, new, old)),
    }[arity]


@pytest.mark.parametrize("first", [True, False], ids=["ours-first", "theirs-first"])
@pytest.mark.parametrize("arity", [1, 2, 3])
def test_both_are_called(arity: int, first: bool) -> None:
    """In their order, with the same arguments, and gunicorn counts the same number of parameters."""
    calls: list[Any] = []
    arguments = tuple(range(arity))

    hook = chain(ours_of(arity, calls), theirs_of(arity, calls), first=first, failed=fails)
    hook(*arguments)

    both = [("ours", *arguments), ("theirs", *arguments)]
    assert (both if first else both[::-1]) == calls
    assert arity == util.get_arity(hook)


@pytest.mark.parametrize("arity", [1, 2, 3])
def test_ours_alone(arity: int) -> None:
    """Most configurations define no hook."""
    calls: list[Any] = []

    chain(ours_of(arity, calls), None, first=True, failed=fails)(*range(arity))

    assert [("ours", *range(arity))] == calls


class Callable2:
    """A hook that is an object."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def __call__(self, server: Any, worker: Any) -> None:
        self.calls.append(("theirs", server, worker))


TAKEN_BY_GUNICORN = {
    "function": lambda calls: lambda a, b: calls.append(("theirs", a, b)),
    "default": lambda calls: lambda a, b=None: calls.append(("theirs", a, b)),
    "object": Callable2,
    "method": lambda calls: Callable2(calls).__call__,
    "and-more": lambda calls: lambda a, b, *more: calls.append(("theirs", a, b)),
    "keyword-only": lambda calls: lambda a, b, *, log=None: calls.append(("theirs", a, b)),
    "keywords": lambda calls: lambda a, b, **more: calls.append(("theirs", a, b)),
}


@pytest.mark.parametrize("kind", TAKEN_BY_GUNICORN)
def test_whatever_gunicorn_takes_is_chained(kind: str) -> None:
    """A hook that gunicorn accepts does not switch ours off."""
    calls: list[Any] = []
    theirs = TAKEN_BY_GUNICORN[kind](calls)
    Config().set("pre_fork", theirs)

    chain(ours_of(2, calls), theirs, first=True, failed=fails)(1, 2)

    assert calls == [("ours", 1, 2), ("theirs", 1, 2)]


@pytest.mark.parametrize("theirs", [lambda: None, lambda a: None, lambda a, b, c: None, 5, "no.such.module", "os.no_such", "plain"])
def test_what_gunicorn_refuses_is_left_for_it(theirs: Any) -> None:
    """The user gets gunicorn's own message, about their own hook."""
    left = chain(ours_of(2, []), theirs, first=True, failed=fails)

    assert left is theirs
    with pytest.raises(TypeError):
        Config().set("pre_fork", left)


def test_a_hook_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn takes "module.function" as well."""
    calls: list[Any] = []
    module = types.ModuleType("someones_hooks")
    module.starting = theirs_of(1, calls)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "someones_hooks", module)

    chain(ours_of(1, calls), "someones_hooks.starting", first=True, failed=fails)("server")

    assert calls == [("ours", "server"), ("theirs", "server")]


@pytest.mark.parametrize("first", [True, False], ids=["ours-first", "theirs-first"])
def test_what_ours_raises_never_gets_out(first: bool) -> None:
    """It is handed to `failed` with the hook's name, and theirs is called."""
    calls: list[Any] = []

    def on_starting(server: Any) -> None:
        raise ZeroDivisionError

    hook = chain(on_starting, theirs_of(1, calls), first=first, failed=lambda *what: calls.append(what[0]))
    hook("server")

    assert sorted(calls, key=str) == [("theirs", "server"), "on_starting"]


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("first", [True, False], ids=["ours-first", "theirs-first"])
def test_what_theirs_raises_goes_where_it_always_went(first: bool, error: type[BaseException]) -> None:
    """After ours has run."""
    calls: list[Any] = []

    def theirs(server: Any) -> None:
        raise error

    with pytest.raises(error):
        chain(ours_of(1, calls), theirs, first=first, failed=fails)("server")

    assert calls == [("ours", "server")]


def test_installed_twice() -> None:
    """Theirs and ours are each called once, however often a configuration installs."""
    calls: list[Any] = []
    namespace: dict[str, Any] = {"post_fork": theirs_of(2, calls)}

    for _ in range(3):
        install(namespace)
    namespace["post_fork"]("server", "worker")

    assert calls == [("theirs", "server", "worker")]
    assert getattr(getattr(namespace["post_fork"], THEIRS), THEIRS, None) is None


def test_gunicorn_takes_them_all() -> None:
    """Each passes gunicorn's own check; those of dirty workers came with gunicorn 25."""
    namespace: dict[str, Any] = {}

    install(namespace, soft_limit="300MiB")

    assert set(namespace) == {*HOOKS, *DIRTY_HOOKS}
    config = Config()
    for name, arity in {**HOOKS, **DIRTY_HOOKS}.items():
        if name in config.settings or name in HOOKS:
            config.set(name, namespace[name])
        assert arity == util.get_arity(namespace[name])


@pytest.mark.parametrize("policy", [{"soft_limit": "300"}, {"soft_limt": "300MiB"}, {"headers": "short\r\n\x1b"}], ids=str)
def test_a_setting_that_can_not_be_right(policy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """One line on stderr, no traceback, exit code 1."""
    with pytest.raises(SystemExit) as ended:
        install({}, **policy)

    err = capsys.readouterr().err
    assert ended.value.code == 1
    assert err.startswith("oomsafe: ")
    assert err.endswith("\n")
    assert err[:-1].isprintable()


def test_a_reload_with_a_bad_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """The service stays up with the policy that it has."""
    namespace: dict[str, Any] = {}
    install(namespace, soft_limit="300MiB")
    config = types.SimpleNamespace(worker_class_str="sync")
    namespace["on_starting"](types.SimpleNamespace(cfg=config, num_workers=2, log=None))
    plugin = hooks._plugin
    assert plugin is not None
    policy = plugin.policy

    install(namespace, soft_limit="300")

    assert "(the policy stays as it was)" in capsys.readouterr().err
    assert hooks._plugin is plugin
    assert plugin.policy is policy
    assert plugin._supervisor is not None
    plugin._supervisor.close()
