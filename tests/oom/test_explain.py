"""``oomsafe explain`` after a real kill in a memory cgroup, from what the kernel has really printed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from clients import Load
from needs import need

from oomsafe.errors import KernelLogError
from oomsafe.kernel.kernel_log import ring_buffer

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20
EXPLAIN = [sys.executable, "-m", "oomsafe.cli", "explain"]


def explained(*argv: str, log: bytes | None = None) -> list[dict[str, Any]]:
    """The events of `oomsafe explain --json`."""
    ended = subprocess.run([*EXPLAIN, "--json", *argv], input=log, capture_output=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    return list(json.loads(ended.stdout)["events"])


@pytest.fixture
def kernel_log() -> None:
    """The ring buffer can be read here."""
    try:
        next(ring_buffer(), None)
    except KernelLogError as error:
        need(False, str(error))


def test_a_kill_in_a_cgroup(kernel_log: None, cgroup: Any) -> None:
    """A hog without a score dies beside a small process with one: the figures are those of the cgroup and of the wait status."""
    sandbox = cgroup(100 * MIB)
    hold = "import sys; open('/proc/self/oom_score_adj', 'w').write('200'); held = b'x' * (10 << 20); print('holds', flush=True); input()"
    small = subprocess.Popen(sandbox.command([sys.executable, "-c", hold]), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert small.stdout is not None
        assert small.stdout.readline() == b"holds\n"
        until = time.monotonic() + 60
        while True:
            hog = subprocess.Popen(sandbox.command([sys.executable, "-c", "b'x' * (150 << 20)"]))
            pid, status, usage = os.wait4(hog.pid, 0)
            hog.returncode = status
            assert (pid, os.WTERMSIG(status)) == (hog.pid, signal.SIGKILL)
            # after ten reports in 5 s, also of other tests' kills, the kernel prints only the last line of one
            (*_, last) = [event for event in explained("--dmesg") if event["victim"] and event["victim"]["pid"] == hog.pid]
            if last["processes"] or time.monotonic() > until:
                break
    finally:
        small.kill()
        small.communicate()
    path = f"/{sandbox.cgroup.path.rsplit('/', 1)[1]}"

    dmesg = subprocess.run(["dmesg"], capture_output=True, check=True).stdout
    for events in (explained(log=dmesg), explained("--dmesg")):
        # a pid may have been another's before, in a report of which little was printed
        of_pid = [event for event in events if event["victim"] and event["victim"]["pid"] == hog.pid]
        (event,) = [event for event in of_pid if path in (event["cgroup"]["path"] or "")]

        victim, cgroup_of = event["victim"], event["cgroup"]
        assert (event["outcome"], event["scope"], cgroup_of["memory_limit"]) == ("killed", "cgroup", 100 * MIB)
        assert 90 * MIB < cgroup_of["memory_usage"] <= 100 * MIB
        assert (victim["uid"], victim["oom_score_adj"], victim["slot"]) == (0, 0, None)
        # of a child it begins at what its parent held at most, which may be more
        assert 80 * MIB < victim["anon"] + victim["file"] + victim["shmem"] < usage.ru_maxrss * 1024 + 2 * MIB
        rows = {row["pid"]: row for row in event["processes"]}
        assert set(rows) == {hog.pid, small.pid}
        assert rows[small.pid]["oom_score_adj"] == 200
        assert event["processes"][0]["pid"] == hog.pid
        assert event["without_scores"]["is_victim"]
        assert (event["page_size"], event["page_size_is_assumed"]) == (os.sysconf("SC_PAGE_SIZE"), False)
    assert event["time"]["iso"] is not None


def test_a_worker_that_the_kernel_kills(kernel_log: None, cgroup: Any, serve: Any, tmp_path: Path) -> None:
    """gunicorn without a limit of oomsafe's in a cgroup: the worker is named with its slot, and one line of text says so."""
    sandbox = cgroup(200 * MIB)
    gunicorn = serve("sync", 2, min_lifetime=0, soft_limit="4GiB", budget="4GiB", dry_run=False, wrap=sandbox.command)
    gunicorn.serving(2)
    with Load(gunicorn, "/leak?kib=4096", clients=2):
        gunicorn.wait_for("SIGKILL", seconds=60)
    pids = {int(pid) for line in gunicorn.lines("was sent SIGKILL") for pid in re.findall(r"pid:(\d+)", line)}

    events = [event for event in explained("--dmesg") if event["victim"] and event["victim"]["pid"] in pids]

    assert events
    assert all(event["victim"]["slot"] is not None for event in events)
    # after ten reports in 5 s the kernel prints only the last line of one
    whole = [event for event in events if event["processes"]]
    assert all(any("worker" in sentence or "process" in sentence for sentence in event["advice"]) for event in whole)
    dmesg = subprocess.run(["dmesg"], capture_output=True, check=True).stdout
    text = subprocess.run(EXPLAIN, input=dmesg, capture_output=True, check=True, timeout=60).stdout.decode()
    assert f"a worker of oomsafe's (slot {events[-1]['victim']['slot']})" in " ".join(text.split())
