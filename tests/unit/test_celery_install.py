"""install() in any order with the app's configuration, and the prefork pool by any of its names. Nodes are made, not started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from celery import Celery
from celery.app.base import PendingConfiguration
from celery.concurrency import prefork, solo, thread

import oomsafe.celery
from oomsafe.celery.consumer import Node
from oomsafe.celery.pool import TaskPool
from oomsafe.celery.single_process import runs_in_one_process

CONF = {"broker_url": "memory://", "worker_prefetch_multiplier": 7}
IN_CAPITALS = {f"CELERY_{name.upper()}": value for name, value in CONF.items()}


@pytest.fixture
def conf_module(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with CONF."""
    module = ModuleType("celeryconfig_of_a_test")
    vars(module).update(CONF)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("CELERYCONFIG_OF_A_TEST", module.__name__)
    return module.__name__


@pytest.fixture
def app() -> Iterator[Celery]:
    """One that nobody has configured."""
    app = Celery("of_a_test", set_as_current=False)
    yield app
    app.close()


CONFIGURED = {
    "by an object": lambda app, _: app.config_from_object(CONF),
    "by an object, at once": lambda app, _: app.config_from_object(CONF, force=True),
    "by an object with a namespace": lambda app, _: app.config_from_object(IN_CAPITALS, namespace="CELERY"),
    "by a module": lambda app, name: app.config_from_object(name),
    "by the environment": lambda app, _: app.config_from_envvar("CELERYCONFIG_OF_A_TEST"),
    "by defaults": lambda app, _: app.add_defaults(CONF),
    "by defaults, late": lambda app, _: app.add_defaults(lambda: CONF),
    "by an update": lambda app, _: app.conf.update(CONF),
    "by a default for worker_pool": lambda app, _: app.conf.update(CONF, worker_pool="processes"),
}  # fmt: skip


def made(app: Celery, **options: Any) -> Any:
    """A node of this app."""
    return app.WorkController(app=app, concurrency=1, **options)


@pytest.mark.parametrize("first", [True, False], ids=["installed first", "configured first"])
@pytest.mark.parametrize("configure", CONFIGURED.values(), ids=CONFIGURED)
def test_install_in_any_order(app: Celery, configure: Callable[[Celery, str], Any], first: bool, conf_module: str) -> None:
    """The node's pool is ours, its steps are there, and its configuration is the user's own."""
    for step in (oomsafe.celery.install, lambda app: configure(app, conf_module))[:: 1 if first else -1]:
        step(app)
    app.finalize()

    node = made(app)

    assert type(node.pool) is TaskPool
    assert node.consumer.oomsafe_node.enabled
    assert isinstance(node.consumer.oomsafe_node, Node)
    assert app.conf.worker_prefetch_multiplier == 7


def test_install_does_not_end_the_lazy_configuration(app: Celery) -> None:
    """What is read of the app's conf only when somebody needs it is not read by us."""
    read: list[str] = []
    app.on_configure.connect(lambda **_: read.append("configured"), weak=False)

    oomsafe.celery.install(app, soft_limit="300MiB")

    assert not read
    assert not app.configured
    assert isinstance(app.conf.maps[1] if len(app.conf.maps) > 1 else app.conf.maps[0], PendingConfiguration)


def test_who_only_sends_tasks_loads_nothing_of_a_node() -> None:
    """No supervisor, no scoreboard, no guard: install() is called in web applications, too."""
    code = (
        "import sys, celery, oomsafe.celery; oomsafe.celery.install(celery.Celery('of_a_test')); "
        "import celery.worker.control as control; assert 'memory' in control.Panel.meta; print(*sys.modules)"
    )

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    loaded = {".".join(name.split(".")[:2]) for name in ran.stdout.split() if name.startswith("oomsafe.")}
    assert loaded & {"oomsafe.supervisor", "oomsafe.scoreboard", "oomsafe.worker", "oomsafe.kernel"} == set()


@pytest.mark.parametrize("pool", ["prefork", "processes", "celery.concurrency.prefork:TaskPool", prefork.TaskPool])
@pytest.mark.parametrize("way", ["pool", "pool_cls", "conf"])
def test_the_prefork_pool_by_any_name_is_ours(app: Celery, pool: Any, way: str) -> None:
    """Given to the node, or in the conf, which is read when the node starts."""
    oomsafe.celery.install(app)
    app.conf.update(CONF)
    if way == "conf":
        app.conf.worker_pool = pool

    node = made(app, **({} if way == "conf" else {way: pool}))

    assert type(node.pool) is TaskPool


class DerivedPrefork(prefork.TaskPool):  # type: ignore[misc]
    """Of somebody else."""


class DerivedSolo(solo.TaskPool):  # type: ignore[misc]
    """Of somebody else."""


class DerivedFromOurs(TaskPool):
    """As the line asks for."""


@pytest.mark.parametrize(
    ("pool", "said"), [(DerivedPrefork, True), (DerivedSolo, False), (DerivedFromOurs, False), (thread.TaskPool, False), ("prefork", False)]
)
def test_a_pool_that_nothing_guards_is_named(app: Celery, pool: Any, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    """In one line, when the node starts, with the way out; it is left as it is."""
    oomsafe.celery.install(app)
    app.conf.update(CONF)
    node = made(app, pool=pool)

    (step,) = (step for step in node.steps if step.name == "oomsafe.PoolChoice")
    step.start(node)

    lines = [record.getMessage() for record in caplog.records if "does not guard" in record.getMessage()]
    assert bool(lines) is said
    if said:
        assert type(node.pool) is pool
        assert f"its pool is {__name__}:DerivedPrefork, so" in lines[0]
        assert "derive that pool from oomsafe.celery.pool:TaskPool" in lines[0]


def test_a_derived_pool_of_one_process_is_one() -> None:
    """It is measured as the one that it is derived from."""
    assert runs_in_one_process(DerivedSolo(1))
    assert not runs_in_one_process(DerivedPrefork(1))
