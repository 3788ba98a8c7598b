"""`oomsafe doctor` beside real servers: whom it names first is whom the kernel kills, and what it warns of happens."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from needs import need
from privileges import opened_to_others
from serving import Gunicorn, until

from oomsafe.kernel.sandbox import Sandbox

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20
LIMIT = 300 * MIB

DOCTOR = (sys.executable, "-m", "oomsafe", "doctor")

Serve = Callable[..., Gunicorn]
MakeCgroup = Callable[..., Sandbox]


def ask(*argv: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OOMSAFE_")} | env
    return subprocess.run([*prefix, *DOCTOR, *argv], capture_output=True, text=True, timeout=60, env=environ, check=False)


def seen(pid: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What it knows of the pool of this supervisor, and what it finds of it."""
    record = json.loads(ask("--json").stdout)
    (pool,) = (pool for pool in record["facts"]["pools"] if pool["supervisor"]["pid"] == pid)
    return pool, [finding for finding in record["findings"] if f"supervisor {pid})" in finding["about"]]


def preloaded(cgroup: MakeCgroup, serve: Serve, **more: Any) -> tuple[Gunicorn, Sandbox]:
    """Two workers, and a master that outweighs each, in a cgroup of 300 MiB."""
    sandbox = cgroup(LIMIT)
    settings, env = "preload_app = True\n", {"BALLAST_MIB": "150"}
    gunicorn = serve("sync", 2, app="ballast:wsgi", settings=settings, env=env, wrap=sandbox.command, **more)
    gunicorn.wait_for("Booting worker", 2)
    return gunicorn, sandbox


def hog(gunicorn: Gunicorn) -> None:
    """A request that takes memory until the kernel kills."""
    with pytest.raises((OSError, http.client.HTTPException)):
        gunicorn.get("/hog")


def test_a_guarded_pool(cgroup: MakeCgroup, serve: Serve) -> None:
    """Nothing to change about its scores; a worker is first, and is killed."""
    gunicorn, sandbox = preloaded(cgroup, serve, soft_limit="280MiB")
    gunicorn.serving(2)

    pool, findings = seen(gunicorn.pid)

    assert (pool["guarded"], pool["server"], pool["reckoned"]["wanted"]) == (True, "gunicorn sync", 2)
    assert [finding["code"] for finding in findings if finding["severity"] == "danger"] == []
    ranking = pool["rankings"][0]
    assert (ranking["total"], ranking["unseen"]) == (LIMIT, False)
    assert {one["pid"] for one in ranking["order"][:2]} == set(gunicorn.workers())

    hog(gunicorn)
    until(lambda: sandbox.cgroup.oom_kills() == 1, "a kill")
    assert gunicorn.process.poll() is None


def test_a_pool_without_a_guard(cgroup: MakeCgroup, serve: Serve) -> None:
    """It is found by its command line; the danger that is named happens: the kernel takes the master."""
    gunicorn, _ = preloaded(cgroup, serve, install=False)
    until(lambda: len(gunicorn.workers()) == 2, "two workers")

    pool, findings = seen(gunicorn.pid)

    assert (pool["guarded"], pool["server"], len(pool["workers"])) == (False, "gunicorn", 2)
    assert pool["rankings"][0]["order"][0]["pid"] == gunicorn.pid
    (danger,) = (finding for finding in findings if finding["code"] == "supervisor-first")
    assert danger["change"] == ["oomsafe run -- (before the command that starts it)"]

    hog(gunicorn)
    until(lambda: gunicorn.process.poll() is not None, "the master is gone")


@pytest.mark.parametrize("width", ["40", "80"])
def test_for_a_person(cgroup: MakeCgroup, serve: Serve, width: str) -> None:
    """The worst first, without colour in a pipe, in any width."""
    gunicorn, _ = preloaded(cgroup, serve, install=False)
    until(lambda: len(gunicorn.workers()) == 2, "two workers")

    ended = ask(COLUMNS=width, NO_COLOR="1")

    assert ended.returncode == 1
    assert ended.stdout.startswith("oomsafe doctor: ") and "\x1b" not in ended.stdout
    flat = " ".join(ended.stdout.split())
    assert flat.index("DANGER: ") < flat.index("What is here")
    assert f"supervisor {gunicorn.pid}" in flat and "docs/doctor.md#supervisor-first" in flat
    assert ended.stderr == "" or "is not a scoreboard of version" in ended.stderr


def test_a_reader_that_has_seen_enough() -> None:
    """`| head -1` ends it without a word."""
    with subprocess.Popen(DOCTOR, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("oomsafe doctor: ")
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def test_another_user(tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> None:
    """What may not be read is left out, or said; never a traceback."""
    need(os.geteuid() == 0, "only root can become another user")
    gunicorn = serve("sync", 2, soft_limit="500MiB").serving(2)
    folder = tmp_path_factory.mktemp("opened")
    prefix = (*opened_to_others(folder), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

    ended = ask("--json", prefix=prefix, HOME="/nowhere")

    record = json.loads(ended.stdout)
    assert ended.returncode in (0, 1) and "Traceback" not in ended.stderr
    pools = {pool["supervisor"]["pid"]: pool for pool in record["facts"]["pools"]}
    # its scoreboard is closed to others, and its workers' names are not
    assert (pools[gunicorn.pid]["guarded"], pools[gunicorn.pid]["reckoned"]) == (True, None)
    assert pools[gunicorn.pid]["program"]["malloc"] == ""
    assert record["facts"]["raises_only"] is True
