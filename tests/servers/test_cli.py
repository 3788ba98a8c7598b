"""The command line as a real process: status of a real pool, the demo, and what is said when something is missing."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from needs import a_cgroup_can_be_made, need
from serving import CLASSES, Gunicorn, until
from versions import has_class, loses_none

from oomsafe.demo.app import LEAK
from oomsafe.kernel.process import start_time
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout

OOMSAFE = [sys.executable, "-m", "oomsafe.cli"]
HANGING = "import time\ndef wsgi(environ, start_response): time.sleep(30)"
KEYS = ["server", "worker_class", "seconds", "requests", "failed", "recycles", "soft_limit_bytes", "peak_worker_rss_bytes"]


#: Bytes of mapped files that a worker of the demo may have beside its memory: Python, and a server's libraries.
FILES = 32 << 20


def run(*argv: str, env: dict[str, str] | None = None, wrap: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    environ = {**{k: v for k, v in os.environ.items() if not k.startswith("OOMSAFE_")}, **(env or {})}
    return subprocess.run([*wrap, *OOMSAFE, *argv], capture_output=True, text=True, timeout=120, env=environ, check=False)


def test_status_shows_a_pool_from_outside(serve: Callable[..., Gunicorn]) -> None:
    """Every worker with its limit, for a person and for a machine."""
    # below a GiB, so that a worker's part of it, which jitter makes smaller, is written in MiB whatever the jitter is
    gunicorn = serve("sync", soft_limit="900MiB").serving()
    board = gunicorn.pool()

    ended = run("status", "--json")

    pools = json.loads(ended.stdout)["pools"]
    (pool,) = [pool for pool in pools if pool["supervisor"] == gunicorn.pid]
    assert ended.returncode == 0
    assert {worker["pid"] for worker in pool["workers"]} == {worker.pid for worker in board.workers}
    assert all(worker["figures"]["soft"] <= 900 << 20 for worker in pool["workers"])
    assert not any(pool["totals"]["recycles"].values())
    for more in ({}, {"COLUMNS": "140"}, {"PYTHONIOENCODING": "ascii"}, {"NO_COLOR": "1", "TERM": "xterm-256color"}):
        text = run("status", "--scoreboard", gunicorn.pool_path(), env=more).stdout
        rows = [line for line in text.splitlines() if re.match(r" +\d+  serving +[\d.]+ MiB +\d[\d.]+ MiB ", line)]
        assert {int(row.split()[0]) for row in rows} == {worker.pid for worker in board.workers}
        assert max(map(len, text.splitlines())) <= int(more.get("COLUMNS", 80))
        assert "\x1b" not in text


def test_status_shows_what_is_in_flight_and_lets_no_client_write_to_the_terminal(serve: Callable[..., Gunicorn]) -> None:
    """The path of a request in flight is shown, made printable."""
    settings = f"import pathlib; pathlib.Path('hanging.py').write_text({HANGING!r})"
    gunicorn = serve("sync", app="hanging:wsgi", settings=settings, soft_limit="1GiB").serving()
    connection = gunicorn.connect()
    connection.request("GET", "/%1b%5d0;owned%07")

    def names() -> list[str]:
        pools = json.loads(run("status", "--json").stdout)["pools"]
        return [work["name"] for pool in pools for worker in pool["workers"] for work in worker["in_flight"] if "owned" in work["name"]]

    assert until(names, "the request is in flight") == ["GET /?]0;owned?"]
    assert "\x1b]0;" not in run("status").stdout
    connection.close()


def test_status_without_a_pool(tmp_path: Path) -> None:
    """It says so, and exits with 1; a file that is no scoreboard is named."""
    fake = tmp_path / "board"
    fake.write_bytes(bytes(8192))

    ended = run("status", "--scoreboard", str(fake))

    assert ended.returncode == 1
    assert "is not a scoreboard" in ended.stderr
    assert "Traceback" not in ended.stderr


def evil_board(slots: int, server: bytes) -> bytes:
    """A scoreboard that a user has written to hurt root: markup, no numbers, and writers that are in the middle for ever."""
    header = bytearray(layout.HEADER_SIZE)
    layout.IDENTITY.pack_into(header, 0, layout.MAGIC, layout.VERSION, slots, layout.SLOT_SIZE)
    layout.SUPERVISOR.pack_into(header, layout.SUPERVISOR_AT, os.getpid(), start_time() or 0, math.nan)
    layout.POOL.pack_into(header, layout.POOL_AT, 1, -5, -5, -5, -5, server)
    slot = bytearray(b"\xff" * layout.SLOT_SIZE)
    layout.write_state(memoryview(slot), 0, State.SERVING)
    layout.OWNER.pack_into(slot, layout.OWNER_AT, os.getpid(), start_time() or 0, 1, math.nan)
    layout.CELL.pack_into(slot, layout.CELLS_AT, 9, math.inf, 1, b"[/x]\x1b[2J\x07", 1)
    return bytes(header) + bytes(slot) * slots


def test_root_reads_other_users_boards(tmp_path: Path) -> None:
    """They are written by others: none crashes it, none holds it up, none takes its memory, none writes to its terminal."""
    need(os.geteuid() == 0, "only root sees another user's")
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(3)]
    folder, foreign = tmp_path / "oomsafe-12345", tmp_path / "oomsafe-54321"
    paths = [folder / f"{sleeper.pid}-{start_time(sleeper.pid)}.board" for sleeper in sleepers]
    for made in (folder, foreign):
        made.mkdir(mode=0o700)
    paths[0].write_bytes(evil_board(40, b"[/x][red]\x1b]0;owned\x07"))
    paths[1].write_bytes(evil_board(350_000, b"big")[: layout.HEADER_SIZE])
    os.truncate(paths[1], layout.HEADER_SIZE + 350_000 * layout.SLOT_SIZE)
    paths[2].write_text(f"oomsafe memory of {sleepers[2].pid} {start_time(sleepers[2].pid)} is 0\n")
    (foreign / paths[0].name).write_bytes(evil_board(1, b"made by another"))
    for path in (folder, *paths):
        os.chown(path, 12345, 12345)
    env = {"TMPDIR": str(tmp_path), "COLUMNS": "160"}

    try:
        table, record = run("status", env=env), run("status", "--json", env=env)
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()

    assert (table.returncode, record.returncode) == (0, 0)
    assert "[/x][red]?]0;owned?" in table.stdout
    assert "\x1b" not in table.stdout + table.stderr
    pools = json.loads(record.stdout, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))["pools"]
    (evil,) = [pool for pool in pools if "owned" in pool["server"]]
    assert (len(evil["workers"]), evil["limit"], evil["created"]) == (40, None, 0.0)
    assert f"{paths[1]} is not a scoreboard" in record.stderr
    assert f"{paths[2]} is not a scoreboard" in record.stderr
    assert "made by another" not in record.stdout
    assert "Traceback" not in table.stderr + record.stderr


@pytest.mark.parametrize("worker_class", [*CLASSES, "uvicorn"])
@pytest.mark.xdist_group("demo")
def test_demo_recycles_and_loses_nothing(worker_class: str) -> None:
    """The promise of the README, for each class of gunicorn's, and for uvicorn."""
    has_class(worker_class)
    loses_none(worker_class)
    which = ["--server", "uvicorn"] if worker_class == "uvicorn" else ["--worker-class", worker_class]
    ended = run("demo", "--json", "--seconds", "8", *which)

    result = json.loads(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(result) == [*KEYS, "supervisor_survived"]
    assert result["worker_class"] == worker_class
    assert result["requests"] > 1000
    assert (result["failed"], result["supervisor_survived"]) == (0, True)
    # beside other tests a replacement takes its time to boot, and the worker serves until then
    assert result["recycles"] >= 1
    assert result["peak_worker_rss_bytes"] <= 2 * result["soft_limit_bytes"]


@pytest.mark.xdist_group("demo")
def test_demo_without_oomsafe_shows_the_kernel_kill() -> None:
    """The other half of the demo: in a memory cgroup, the kernel kills workers and requests are lost."""
    need(a_cgroup_can_be_made(), "a memory cgroup can't be made")

    ended = run("demo", "--without", "--seconds", "12", env={"COLUMNS": "200"})

    assert ended.returncode == 0, ended.stderr
    assert "was sent SIGKILL" in ended.stdout
    assert "the kernel's OOM killer took" in ended.stdout


@pytest.mark.xdist_group("demo")
def test_demo_of_a_leak_finds_its_line() -> None:
    """By what the pool has found: the line is where the demo's app keeps it, and the bytes are those of a request."""
    ended = run("demo", "--leak", "--json")

    result = json.loads(ended.stdout)
    text = (Path(__file__).parents[2] / "oomsafe" / "demo" / "app.py").read_text().splitlines()
    number = next(number for number, line in enumerate(text, 1) if "_cache.append(" in line)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (result["verdict"], result["failed"]) == ("leak", 0)
    assert result["line"] == f"demo/app.py:{number} in _leak keeps 256 KiB a request"
    assert 0.9 <= result["bytes_per_request"] / LEAK <= 1.1


@pytest.mark.xdist_group("demo")
def test_demo_of_kept_memory_says_that_nothing_leaks() -> None:
    """And what helps."""
    ended = run("demo", "--fragment", env={"COLUMNS": "200"})

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Nothing leaks: " in ended.stdout
    assert "of the growth is free memory that Python's allocator keeps." in ended.stdout
    assert "What helps: have the work hold less at a time" in ended.stdout
    assert "traces its allocations" not in ended.stdout


# not gthread: there a balloon has neighbours in its own worker (docs/hard-limit.md)
@pytest.mark.parametrize("worker_class", [*(name for name in CLASSES if name != "gthread"), "uvicorn"])
@pytest.mark.xdist_group("demo")
def test_demo_of_a_balloon_refuses_it_and_nothing_else(worker_class: str) -> None:
    """Each request for 2 GiB gets 503; all others, and every worker that they are in, go on."""
    has_class(worker_class)
    which = ["--server", "uvicorn"] if worker_class == "uvicorn" else ["--worker-class", worker_class]
    ended = run("demo", "--balloon", "--json", "--seconds", "8", *which)

    result = json.loads(ended.stdout)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert list(result) == [*KEYS, "supervisor_survived", "hard_limit_bytes", "balloons", "refused", "killed"]
    assert result["worker_class"] == worker_class
    assert result["requests"] > 500
    assert (result["failed"], result["killed"], result["supervisor_survived"]) == (0, 0, True)
    assert result["refused"] == result["balloons"] >= 3
    # mapped files are not in the limit
    assert result["peak_worker_rss_bytes"] <= 1.05 * result["hard_limit_bytes"] + FILES


@pytest.mark.xdist_group("demo")
def test_demo_of_a_balloon_without_oomsafe_shows_the_kernel_kill() -> None:
    """In a memory cgroup the balloon costs a worker each time, and with it the requests beside it."""
    need(a_cgroup_can_be_made(), "a memory cgroup can't be made")

    ended = run("demo", "--balloon", "--without", "--seconds", "10", env={"COLUMNS": "200"})

    assert ended.returncode == 0, ended.stderr
    assert "was sent SIGKILL" in ended.stdout
    killed, failed = re.findall(r"^(?:  killed by SIGKILL|  failed) +(\d+)", ended.stdout, re.MULTILINE)[::-1]
    assert int(killed) >= 3
    assert int(failed) >= 1
    assert f"took {killed} workers, and with them {failed} good requests" in ended.stdout


def test_demo_of_a_balloon_needs_something_that_stops_it() -> None:
    """Neither a cgroup nor a hard limit: it is refused before any server starts. With a hard limit alone it shows the same."""
    need(os.geteuid() == 0 and a_cgroup_can_be_made(), "only root hides memory cgroups from a process")
    hidden = ["unshare", "--mount", "sh", "-c", 'umount --recursive --lazy /sys/fs/cgroup && exec "$0" "$@"']

    without = run("demo", "--balloon", "--without", "--seconds", "2", wrap=hidden)
    limited = run("demo", "--balloon", "--json", "--seconds", "6", "--worker-class", "sync", wrap=hidden)
    celery = run("demo", "--balloon", "--server", "celery")

    assert (without.returncode, without.stdout) == (1, "")
    assert without.stderr.endswith("Error: a balloon of 2 GiB needs a limit, and there is none here: a memory cgroup needs root\n")
    assert limited.returncode == 0, limited.stdout + limited.stderr
    assert json.loads(limited.stdout)["refused"] >= 2
    assert celery.returncode == 2
    assert "--balloon only works with gunicorn and uvicorn" in celery.stderr


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_a_missing_extra_is_named(tmp_path: Path, missing: str) -> None:
    """Without click or rich, one line says what to install."""
    (tmp_path / f"{missing}.py").write_text(f"raise ModuleNotFoundError('No module named {missing}', name={missing!r})")

    ended = run("status", env={"PYTHONPATH": str(tmp_path)})

    assert ended.returncode == 2
    assert ended.stderr == f"oomsafe: the command line needs {missing}: pip install 'oomsafe[cli]'\n"
