"""``oomsafe run`` without a server: the command's environment, and who is told that a module has been imported."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from oomsafe.policy.settings import READERS, is_off, load_policy
from oomsafe.run import servers
from oomsafe.run.environment import PATH, environment_for, stay_first
from oomsafe.run.start import SERVERS, Finder, start


@pytest.mark.parametrize(
    ("before", "given", "after"),
    [
        ({}, None, [PATH]),
        ({"PYTHONPATH": ""}, "", [PATH]),
        ({"PYTHONPATH": "/a:/b"}, "/a:/b", [PATH, "/a", "/b"]),
        ({"PYTHONPATH": "/a::/b"}, None, [PATH, "/a", "", "/b"]),
        ({"PYTHONPATH": "/a"}, "/wrapper:/a", [PATH, "/a", "/wrapper"]),
        ({}, "/wrapper", [PATH, "/wrapper"]),
        ({"PYTHONPATH": f"/a:{PATH}"}, None, [PATH, "/a"]),
    ],
)
def test_the_commands_python_path(before: dict[str, str], given: str | None, after: list[str]) -> None:
    """Ours is first, once; an empty entry is the current folder; what a wrapper took out for its own children is there again."""
    environ = environment_for({**before, "HOME": "/h"}, {"OOMSAFE_BUDGET": "1GiB"}, given)

    assert environ["PYTHONPATH"].split(os.pathsep) == after
    assert (environ["HOME"], environ["OOMSAFE_BUDGET"], environ["OOMSAFE_RUN"]) == ("/h", "1GiB", str(os.getpid()))


def test_ours_stays_first_when_another_wrapper_becomes_its_command() -> None:
    """It puts itself first right before."""
    became: list[tuple[str, ...]] = []
    module = SimpleNamespace(environ={"PYTHONPATH": f"/otel:/cwd:{PATH}"}, execl=lambda *command: became.append(command))

    stay_first(module)
    module.execl("/bin/gunicorn", "gunicorn")

    assert (module.environ["PYTHONPATH"], became) == (f"{PATH}:/otel:/cwd", [("/bin/gunicorn", "gunicorn")])


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of modules that a Finder has told of; it waits for watched_one and watched_two, which are there."""
    for name in ("watched_one", "watched_two", "other"):
        (tmp_path / f"{name}.py").write_text("done = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    told: list[str] = []

    def tell(name: str, module: ModuleType) -> None:
        assert module.done
        told.append(name)

    finder = Finder({"watched_one": "", "watched_two": "", "watched_missing": ""}, tell)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    yield told
    for name in ("watched_one", "watched_two", "other"):
        sys.modules.pop(name, None)


def test_a_module_is_told_of_when_it_has_been_executed(found: list[str]) -> None:
    """Once; its loader is Python's own, and whole again."""
    module = importlib.import_module("watched_one")
    importlib.import_module("other")
    importlib.import_module("watched_one")

    assert found == ["watched_one"]
    assert module.__spec__ is not None
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"
    assert "exec_module" not in vars(module.__spec__.loader)
    importlib.reload(module)
    assert found == ["watched_one"] * 2


def test_one_that_is_looked_for_and_not_imported_is_not_told_of(found: list[str]) -> None:
    """find_spec() asks, and nothing is executed."""
    assert importlib.util.find_spec("watched_two") is not None
    assert importlib.util.find_spec("watched_missing") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("watched_missing")
    assert found == []


@pytest.mark.parametrize("function", SERVERS.values())
def test_what_is_to_be_called_is_there(function: str) -> None:
    """By name, for it is imported only then."""
    module, _, name = function.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    ("interface", "said"),
    [("asgi", "its workers' memory is measured; "), ("rsgi", "an RSGI app, its default (--interface), is not measured; ")],
)
def test_granian_is_told_of_when_it_serves(interface: str, said: str, monkeypatch: Any, capsys: Any) -> None:
    """Not when it is imported; RSGI apps are no ASGI apps, and are left as they are."""
    monkeypatch.setattr(servers, "_said", set())

    class MPServer:
        def __init__(self) -> None:
            self.interface = SimpleNamespace(value=interface)

        def serve(self, target: str) -> str:
            return target

    module = SimpleNamespace(_asgi_call_wrap=None, _wsgi_call_wrap=None, MPServer=MPServer)
    module._asgi_call_wrap = module._wsgi_call_wrap = lambda callback, state: (callback, state)
    servers.measure_granian(module)
    assert capsys.readouterr().err == ""

    assert [MPServer().serve("app:app") for _ in range(2)] == ["app:app"] * 2

    line = f"oomsafe run: granian: {said}it recycles its workers by --workers-max-rss, --workers-lifetime (pid {os.getpid()})\n"
    assert capsys.readouterr().err == line


def test_without_the_command_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has our folder on his path by accident."""
    monkeypatch.delenv("OOMSAFE_RUN", raising=False)
    before = list(sys.meta_path)
    start()
    assert sys.meta_path == before


@pytest.mark.parametrize(("text", "off"), [("", False), ("0", False), ("off", False), ("1", True), ("Yes", True), ("really", True)])
def test_turned_off(text: str, off: bool) -> None:
    """Then nothing that is wrong with the settings keeps anything from starting."""
    environ = {"OOMSAFE_DISABLE": text, "OOMSAFE_SOFT_LIMIT": "12GiB"}
    assert is_off(environ) is off
    if off:
        assert load_policy({**environ, "OOMSAFE_BUDGET": "nonsense"}, {})[0].soft_limit == "auto"


def test_a_variable_that_a_keyword_overrides_is_said() -> None:
    """Unless both say the same."""
    environ = {"OOMSAFE_SOFT_LIMIT": "300MiB", "OOMSAFE_SURGE": "no"}
    policy, (warning,) = load_policy(environ, {"soft_limit": "200MiB", "surge": False})

    assert policy.soft_limit == 200 << 20
    assert warning.startswith("OOMSAFE_SOFT_LIMIT does nothing")
    assert set(READERS) >= {"soft_limit", "surge"}
