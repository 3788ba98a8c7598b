"""What is preloaded stays shared: real forks of real supervisors, each in an interpreter of its own."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
from needs import need

#: A supervisor that has loaded so many MiB in Python objects, and what its children need.
SUPERVISOR = r"""
import atexit, gc, gzip, json, logging, os, sys, tempfile, threading, types, zipfile
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
from oomsafe.kernel.process import shared_out
from oomsafe.policy.settings import Policy
from oomsafe.supervisor.preload import Preload
from oomsafe.kernel import heap
from oomsafe.supervisor import preload as module
from oomsafe.worker import reclaim

def load(mib):
    return [[number] for number in range(mib * 10_000)]

class Walked:
    def __del__(self): os.write(1, b'"walked"\n')

def load_walked(mib):
    '''What the interpreter's end walks even when it is frozen: a module without functions is in no cycle.'''
    sys.modules["data"] = types.ModuleType("data")
    sys.modules["data"].loaded = [Walked(), load(mib)]

def fork(run):
    '''Runs run() in a worker, which then ends as gunicorn's do; returns the wait status.'''
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    preload.after_fork()
    try:
        run()
        sys.exit(0)
    finally:
        preload.end_with(sys.exc_info()[1])
"""


@pytest.fixture(autouse=True)
def _proc() -> None:
    need(os.path.exists("/proc/self/smaps_rollup"), "no /proc here")


def supervisor(folder: Path, code: str, status: int = 0) -> tuple[list[Any], str]:
    """Run a supervisor: the lines of JSON that it and its workers print, and what they log."""
    script = folder / "supervisor.py"
    script.write_text(SUPERVISOR + textwrap.dedent(code))
    ended = subprocess.run([sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()], ended.stderr


#: Prints by how many MiB a worker's own memory grows when it reclaims, and whether its heap is known to be frozen.
RECLAIMING = """
loaded = load(80)
preload = Preload(Policy(freeze_preload={on}))
preload.before_fork()

def worker():
    before = shared_out()[1]
    reclaim.collect(others_wait=False)
    print(json.dumps([(shared_out()[1] - before) >> 20, heap.frozen_blocks() is not None]), flush=True)

fork(worker)
"""


@pytest.mark.parametrize("on", [True, False])
def test_a_reclaim_copies_nothing(tmp_path: Path, on: bool) -> None:
    """Frozen or not, a worker that reclaims goes on sharing what its supervisor loaded; what is off is said to be off."""
    ((grown, frozen),), log = supervisor(tmp_path, RECLAIMING.format(on=on))

    assert (grown < 8, frozen) == (True, on)
    assert ("stay shared with the workers" in log, "freeze_preload is off" in log) == (on, not on)


def test_a_full_collection_would_copy(tmp_path: Path) -> None:
    """So the test above can tell."""
    code = """
    loaded = load(80)
    preload = Preload(Policy(freeze_preload=False))
    preload.before_fork()

    def worker():
        before = shared_out()[1]
        gc.collect()
        print(json.dumps((shared_out()[1] - before) >> 20), flush=True)

    fork(worker)
    """

    ((grown,), _) = supervisor(tmp_path, code)

    assert grown > 40


@pytest.mark.parametrize(
    ("mib", "policy", "expected"), [(80, "", True), (1, "", False), (80, "dry_run=True", False)], ids=["much", "little", "dry-run"]
)
def test_what_is_frozen(tmp_path: Path, mib: int, policy: str, expected: bool) -> None:
    """Much, also what a hook has loaded since the policy was read; little is left as it is, and in a dry run all is."""
    code = f"""
    preload = Preload(Policy({policy}))
    loaded = load({mib})
    preload.before_fork()
    later = load(1)
    preload.before_fork()
    print(json.dumps([preload.bytes is not None, gc.get_freeze_count() >= len(loaded), len(gc.get_objects()) >= len(later)]), flush=True)
    """

    assert supervisor(tmp_path, code)[0] == [[expected, expected, True]]


@pytest.mark.parametrize(
    ("change", "supervisor_frozen", "worker_frozen", "walked"),
    [
        ("preload.reloaded(Policy())", True, True, False),
        ("more = load(60); preload.reloaded(Policy())", False, True, True),
        ("preload.reloaded(Policy(freeze_preload=False)); preload.before_fork()", False, False, True),
        ("preload.reloaded(Policy(dry_run=True)); preload.before_fork()", False, False, True),
    ],
    ids=["nothing-new", "loaded-anew", "switched-off", "dry-run"],
)
def test_a_reload(tmp_path: Path, change: str, supervisor_frozen: bool, worker_frozen: bool, walked: bool) -> None:
    """A supervisor that has loaded something new can collect what it replaces; its next workers share what there is until they end."""
    code = f"""
    load_walked(80)
    preload = Preload(Policy())
    preload.before_fork()
    {change}
    print(json.dumps(gc.get_freeze_count() > 0), flush=True)
    fork(lambda: print(json.dumps(gc.get_freeze_count() > 0), flush=True))
    os._exit(0)
    """

    said, _ = supervisor(tmp_path, code)

    assert said == [supervisor_frozen, worker_frozen, *["walked"] * walked]


def test_a_reload_that_preloads(tmp_path: Path) -> None:
    """It did not before."""
    code = """
    preload = Preload(Policy())
    preload.before_fork()
    before = preload.bytes
    loaded = load(80)
    preload.reloaded(Policy())
    preload.before_fork()
    print(json.dumps([before, preload.bytes is not None]), flush=True)
    """

    assert supervisor(tmp_path, code)[0] == [[None, True]]


#: A worker that leaves something to do for every way in which a process may finish it at its end.
ENDING = """
load_walked(40)
inherited = open("inherited", "w")
atexit.register(lambda: print(json.dumps("atexit of " + ("the supervisor" if os.getpid() == me else "its fork")), flush=True))
me = os.getpid()
preload = Preload(Policy(freeze_preload={on}))
preload.before_fork()

def worker():
    global text, packed, wrapped, archive, temporary, thread
    inherited.write("inherited")
    text = open("text", "w")
    text.write("text")
    packed = gzip.open("packed", "wb")
    packed.write(b"packed")
    wrapped = gzip.open("wrapped", "wt")  # the interpreter may close what it wraps first
    wrapped.write("wrapped")
    archive = zipfile.ZipFile("archive", "w")
    archive.writestr("name", "archived")
    temporary = tempfile.NamedTemporaryFile(dir=".", prefix="temporary-")
    print(json.dumps("printed"))  # and not flushed
    atexit.register(lambda: text.write(", and at exit"))
    atexit.register(lambda: 1 / 0)
    def last():
        threading.main_thread().join()
        text.write(", and in a thread")
    thread = threading.Thread(target=last)
    thread.start()
    {ends}

status = fork(worker)
print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""


@pytest.mark.parametrize(("ends", "status"), [("", 0), ("sys.exit(7)", 7), ("sys.exit(-1)", 255), ("sys.exit('why')", 1)])
def test_nothing_is_lost_at_the_end(tmp_path: Path, ends: str, status: int) -> None:
    """Neither what is registered, nor what threads do, nor what files still hold; only the heap is not walked."""
    said, log = supervisor(tmp_path, ENDING.format(on=True, ends=ends))

    assert sorted(map(str, said)) == sorted(map(str, ["printed", "atexit of its fork", status, "walked", "atexit of the supervisor"]))
    left_by_an_end(tmp_path)
    assert gzip.decompress((tmp_path / "wrapped").read_bytes()) == b"wrapped"
    assert "ZeroDivisionError" in log
    assert ("why" in log) is ("why" in ends)


def test_switched_off_the_interpreter_ends_it(tmp_path: Path) -> None:
    """It leaves the same, and walks the heap."""
    said, _ = supervisor(tmp_path, ENDING.format(on=False, ends=""))

    assert said.count("walked") == 2
    left_by_an_end(tmp_path)


def left_by_an_end(folder: Path) -> None:
    """What the worker's end has to leave behind."""
    assert (folder / "text").read_text() == "text, and in a thread, and at exit"
    assert (folder / "inherited").read_text() == "inherited"
    assert gzip.decompress((folder / "packed").read_bytes()) == b"packed"
    assert zipfile.ZipFile(folder / "archive").read("name") == b"archived"
    assert list(folder.glob("temporary-*")) == []


def test_a_worker_that_fails_ends_as_ever(tmp_path: Path) -> None:
    """Its traceback is the interpreter's to show."""
    said, log = supervisor(tmp_path, ENDING.format(on=True, ends="raise KeyError('lost')"))

    assert said.count("walked") == 2
    assert 1 in said
    assert "KeyError: 'lost'" in log
