"""Where and as whom: /dev/shm that can't be used, an unprivileged user, and the master's threads."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest
from needs import need
from privileges import READ_ONLY, TINY, adj, may_mount, opened_to_others, read_only_everywhere
from serving import CLASSES, Gunicorn, board_of, until
from uvicorning import Uvicorn

from oomsafe.scoreboard.board import Scoreboard


def recycle_one(gunicorn: Gunicorn) -> None:
    """Take a worker over its limit, and see another one in its place."""
    before = set(gunicorn.workers())
    recycles = len(gunicorn.lines(" recycling: "))
    assert gunicorn.get("/fill?mib=104")[0] == 200
    gunicorn.wait_for(" recycling: ", recycles + 1)
    until(lambda: len(gunicorn.workers()) == 2 and set(gunicorn.workers()) != before, "a new worker")
    until(lambda: gunicorn.get("/")[0] == 200, "it serves")


@pytest.mark.parametrize(("mount", "why"), [(TINY, "No space left"), (READ_ONLY, "Read-only file system")])
def test_an_unusable_dev_shm_is_named_and_another_folder_used(serve, tmp_path, mount, why):
    """Full, or read-only: the scoreboard lies in the folder for temporary files, and workers are recycled."""
    need(may_mount(), "no mount namespace with a /dev/shm of its own can be made here")
    prefix = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    env = {"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": ""}
    gunicorn = serve(soft_limit="100MiB", min_lifetime=0, prefix=prefix, env=env)
    gunicorn.wait_for("Booting worker", 2)
    (warning,) = gunicorn.lines("no scoreboard in /dev/shm/oomsafe-0")
    assert "[WARNING]" in warning
    assert why in warning
    (board,) = tmp_path.glob("oomsafe-*/*.board")
    gunicorn.watch(Scoreboard.open(str(board)))
    assert gunicorn.serving().pool().supervisor == gunicorn.pid
    recycle_one(gunicorn)
    assert gunicorn.serving().stop() == 0
    assert not board.exists()


def test_without_any_folder_the_scoreboard_is_in_memory(serve, tmp_path):
    """It says that nobody else sees the pool; the workers still take turns, and are recycled."""
    need(may_mount(), "no mount namespace with a /dev/shm of its own can be made here")
    (tmp_path / f"oomsafe-{os.geteuid()}").write_text("in the way")
    prefix = ["unshare", "-m", "sh", "-c", f'{READ_ONLY} && exec "$@"', "sh"]
    gunicorn = serve(soft_limit="100MiB", min_lifetime=0, prefix=prefix, env={"TMPDIR": str(tmp_path), "XDG_RUNTIME_DIR": ""})
    gunicorn.wait_for("Booting worker", 2)
    assert gunicorn.lines("the scoreboard is in memory only")
    until(lambda: gunicorn.get("/")[0] == 200, "it serves")
    recycle_one(gunicorn)
    recycle_one(gunicorn)
    assert gunicorn.stop() == 0


def test_nothing_at_all_can_be_written_to(serve, tmp_path):
    """But for gunicorn's own heartbeats. `oomsafe status` says in one line why it sees nothing."""
    need(may_mount(), "no mount namespace can be made here")
    (beats := tmp_path / "heartbeats").mkdir()
    nowhere = read_only_everywhere(beats)
    gunicorn = serve("gthread", soft_limit="100MiB", min_lifetime=0, settings=f"worker_tmp_dir = {str(beats)!r}", prefix=nowhere)
    gunicorn.wait_for("Booting worker", 2)
    assert len(gunicorn.lines("the scoreboard is in memory only")) == 1
    until(lambda: gunicorn.get("/")[0] == 200, "it serves")
    recycle_one(gunicorn)

    asked = subprocess.run([*nowhere, sys.executable, "-m", "oomsafe.cli", "status"], capture_output=True, text=True, check=False)

    assert (asked.returncode, asked.stdout) == (1, "")
    (line,) = asked.stderr.splitlines()
    assert "or its scoreboard is in memory only: no folder here is writable" in line
    assert gunicorn.stop() == 0


def test_spawned_workers_find_a_scoreboard_in_memory(started, tmp_path):
    """Nothing can be written to: uvicorn's workers have the pool's memory from their supervisor, and the replacement comes first."""
    need(may_mount(), "no mount namespace can be made here")
    (unused := tmp_path / "unused").mkdir()
    start = [*read_only_everywhere(unused), sys.executable, "-m", "oomsafe.uvicorn"]
    uvicorn = started(
        lambda folder: Uvicorn(folder, "uvicorn_apps:asgi", "--workers", "2", start=start, python=(), soft_limit="130MiB", min_lifetime=0)
    ).up()
    assert len(uvicorn.lines("the scoreboard is in memory only")) == 1
    pid = max(until(lambda: len(uvicorn.workers()) == 2 and uvicorn.workers(), "two workers"))

    uvicorn.grow(pid, 140)

    uvicorn.wait_for(f"worker {pid} (slot 1) recycling: ")  # in a pool of its own it would have the first slot
    until(lambda: len(uvicorn.workers()) == 2 and pid not in uvicorn.workers(), "another is in its place")
    assert not uvicorn.lines("no scoreboard (")


@pytest.mark.parametrize("worker_class", CLASSES)
def test_workers_of_another_user_are_guarded(serve, tmp_path, worker_class):
    """gunicorn's --user and --group: the score is raised before privileges are dropped, the rest works after."""
    need(os.geteuid() == 0, "only root can become somebody else")
    nobody = pwd.getpwnam("nobody")
    settings = f"user, group = {nobody.pw_uid}, {nobody.pw_gid}"
    gunicorn = serve(worker_class, soft_limit="100MiB", min_lifetime=0, settings=settings, prefix=opened_to_others(tmp_path)).serving()
    for pid in gunicorn.workers():
        assert f"Uid:\t{nobody.pw_uid}" in Path(f"/proc/{pid}/status").read_text()
        assert adj(pid) == adj(gunicorn.pid) + 300
    recycle_one(gunicorn)
    for pid in gunicorn.serving().workers():
        assert adj(pid) == adj(gunicorn.pid) + 300
    assert all(worker.figures.rss for worker in gunicorn.pool().workers)
    assert "Traceback" not in gunicorn.log()


@pytest.mark.parametrize("worker_class", CLASSES)
def test_the_master_has_no_more_threads_than_without_us(serve, worker_class):
    """A fork copies one thread only, and the locks of all."""
    plain = serve(worker_class, install=False)
    guarded = serve(worker_class, soft_limit="100MiB").serving()
    plain.wait_for("Booting worker", 2)
    until(lambda: plain.get("/")[0] == 200, "it serves")
    assert guarded.get("/")[0] == 200
    assert len(os.listdir(f"/proc/{guarded.pid}/task")) == len(os.listdir(f"/proc/{plain.pid}/task"))


def test_containers_that_share_dev_shm_leave_each_others_pools(serve):
    """A second one has pids of its own, in which the first's supervisor is dead."""
    command = ["unshare", "--pid", "--fork", "--mount-proc"]
    need(subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0, "no pid namespace can be made here")
    first = serve(soft_limit="100MiB").serving()
    board = Path(board_of(first.pid))

    code = "from oomsafe.scoreboard.board import Scoreboard; board, said = Scoreboard.create(1, 'test'); print(said); board.remove()"
    second = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert second.stdout.strip() == "[]"
    assert board.exists()
    assert first.serving().get("/")[0] == 200
