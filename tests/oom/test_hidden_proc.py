"""Where only processes are seen in /proc (systemd's ProcSubset=pid): everything starts, and the cgroup's limit is found."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from celerying import Start
from clients import Load
from needs import need
from serving import until

from oomsafe.kernel.sandbox import Sandbox

pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

Wrap = Callable[[list[str]], list[str]]


def hidden(command: list[str]) -> list[str]:
    """`command` in a mount namespace whose /proc has neither meminfo nor vmstat nor sys (Linux 5.8)."""
    return ["unshare", "-m", "/bin/sh", "-c", 'mount -t proc -o subset=pid proc /proc && exec "$0" "$@"', *command]


@pytest.fixture
def sandbox(cgroup: Any) -> Sandbox:
    """Of 600 MiB, on a machine where /proc can be hidden."""
    shown = subprocess.run(hidden(["cat", "/proc/meminfo"]), capture_output=True, text=True, check=False)
    need("No such file" in shown.stderr, "no /proc that shows only processes can be mounted")
    made: Sandbox = cgroup(600 * MIB)
    return made


@pytest.mark.parametrize("server", ["gunicorn", "uvicorn"])
def test_a_server_starts_and_recycles(sandbox: Sandbox, request: pytest.FixtureRequest, server: str) -> None:
    """With the cgroup's limit; one line says what is not known."""
    policy = {"soft_limit": "160MiB", "min_lifetime": 0, "jitter": 0, "wrap": lambda command: sandbox.command(hidden(command))}
    if server == "gunicorn":
        pool = request.getfixturevalue("serve")("gthread", 2, **policy).serving(2)
    else:
        pool = request.getfixturevalue("serve_uvicorn")(**policy).serving(2)

    assert pool.lines("oomsafe guards 2 workers")[0].count(f"budget 540 MiB of 600 MiB (cgroup v{sandbox.cgroup.version} ") == 1
    assert len(pool.lines("/proc/meminfo can't be read")) == 1
    with Load(pool, "/leak?kib=1024&s=0.02", clients=2) as load:
        pool.wait_for(" recycling: ", seconds=60)
    assert (sandbox.cgroup.oom_kills(), load.failed, pool.lines("Traceback")) == (0, [], [])


def test_celery_starts_and_recycles(sandbox: Sandbox, celery: Start) -> None:
    """The same of a node's children."""
    node = celery(soft_limit="100MiB", jitter=0, min_lifetime=0, wrap=lambda command: sandbox.command(hidden(command))).ready()
    assert f"budget 540 MiB of 600 MiB (cgroup v{sandbox.cgroup.version} " in node.lines("oomsafe guards 2 workers")[0]

    node.ask("result = [proj.leak.delay(number, 20 << 10).get(timeout=30) for number in range(10)]")

    until(lambda: node.lines(" recycling: "), "a child is recycled")
    assert (sandbox.cgroup.oom_kills(), node.lines("Traceback")) == (0, [])


def test_no_proc_at_all(serve: Callable[..., Any]) -> None:
    """A chroot without it: nothing is known, and it serves."""
    need(os.geteuid() == 0, "only root mounts")
    bare = ["unshare", "-m", "/bin/sh", "-c", 'mount -t tmpfs none /proc && exec "$0" "$@"']
    app = "def wsgi(environ, start_response):\n    start_response('200 OK', [('Content-Length', '0')])\n    return []\n"
    gunicorn = serve("sync", 1, app="bare:wsgi", files={"bare.py": app}, wrap=lambda command: [*bare, *command])

    gunicorn.wait_for("Booting worker")
    assert gunicorn.get("/")[0] == 200

    assert "supervisor unknown" in gunicorn.lines("oomsafe guards 1 worker")[0]
    assert gunicorn.lines("Traceback") == []
