"""What oomsafe advise says, put into a fresh pool in a memory cgroup with an app that leaks: nothing is killed, refused or lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from serving import Gunicorn, until

from oomsafe.demo.load import Load
from oomsafe.demo.server_process import environment
from oomsafe.kernel.sandbox import Sandbox

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20

#: Each request leaks 256 KiB.
APP = "oomsafe.demo.app:app"

#: What stands before a generated file, for a test.
LOCAL = "control_socket_disable = True\nbind = '127.0.0.1:0'\n"

#: How far what is seen may be from what was foretold.
WITHIN = 0.3


def advise(*argv: str) -> str:
    """What it prints."""
    command = [sys.executable, "-m", "oomsafe.cli", "advise", *argv]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_pool_does_what_was_foretold(cgroup: Callable[..., Sandbox], serve: Callable[..., Gunicorn]) -> None:
    """A pool is measured under load, and another started with what was advised: no kernel kill, no limit refused, no request lost, and as
    many recycles for its requests as foretold."""
    first, second = cgroup(256 * MIB), cgroup(256 * MIB)
    measured = serve("sync", app=APP, soft_limit="60MiB", wrap=first.command).serving()
    asked = ["--pool", str(measured.pid), "--cpus", "1"]
    load = Load(measured.port, rate=20)
    load.start()
    try:
        until(lambda: measured.pool().totals.work >= 300, "it has been measured for long enough", 60)
        (found,) = json.loads(advise(*asked, "--json"))["advice"]
        text = advise(*asked, "--file", "gunicorn")
    finally:
        load.stop()
    measured.end()
    facts, advised = found["facts"], found["advice"]
    assert (advised["workers"], facts["source"][:8]) == (3, "cgroup v")
    assert "hard_limit=" in text

    server = serve(text=LOCAL + text, app=APP, wrap=second.command).serving(3)
    load = Load(server.port, rate=20)
    load.start()
    try:
        lines = server.wait_for(" recycling: ", times=6, seconds=240)
        # by then, workers have come to two lives each
        requests = load.requests
    finally:
        load.stop()

    assert (second.cgroup.oom_kills(), load.failures) == (0, {})
    assert not server.lines("is not used")
    assert all("soft limit" in line for line in lines)
    foretold = advised["recycles"] / 3600 / facts["rate"]
    assert len(lines[:6]) / requests == pytest.approx(foretold, rel=WITHIN)


@pytest.mark.parametrize("known", [True, False], ids=["its leak is known", "nothing is known of it"])
def test_from_given_figures_to_a_pool_that_survives_the_demos_load(
    cgroup: Callable[..., Sandbox], serve: Callable[..., Gunicorn], known: bool
) -> None:
    """100 MiB/s are leaked in 512 MiB. Who has no pool yet gives a worker's size, and pastes the file."""
    sandbox = cgroup(512 * MIB)
    figures = ["--memory", "512MiB", "--worker", "30MiB", "--app", APP]
    leak: list[str] = ["--supervisor", "30MiB", "--growth", "256KiB", "--rate", "400", "--balloon", "1MiB"] if known else []

    text = advise(*figures, *leak, "--file", "gunicorn")
    (workers,) = re.findall(r"^workers = (\d+)$", text, re.MULTILINE)
    server = serve(text=LOCAL + text, app=APP, wrap=sandbox.command).serving(int(workers))
    supervisor: Any = server.pid
    load = Load(server.port)
    load.start()
    try:
        server.wait_for(" recycling: ", times=8, seconds=120)
    finally:
        load.stop()

    assert (sandbox.cgroup.oom_kills(), load.failures) == (0, {})
    assert load.requests > 1000
    assert server.alive
    assert server.pool().supervisor == supervisor
