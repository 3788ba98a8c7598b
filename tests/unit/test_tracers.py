"""Both tracers in a process of their own: whole stacks, whichever thread allocates, and what stands in their way is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from oomsafe.worker.tracers import holds_frames

SCRIPT = """
import sys, threading
from oomsafe.worker.tracers import CanNotTraceError, Memray, Tracemalloc

kept = []
tracer = None

def leak():
    kept.append(bytes(65536))

def serve(tick):
    for _ in range(50):
        tick()
        leak()

def deep(levels, begin):
    return begin() if not levels else deep(levels - 1, begin)

def tick():
    global tracer
    if tracer is None:
        tracer = Memray(lambda: sys.argv[1]) if sys.argv[2] == "memray" else Tracemalloc()
        deep(9, tracer.start)  # as a guard does, from far below the loop that goes on

def outer():
    if sys.argv[3] == "main":
        serve(tick)
    else:
        tick()
        thread = threading.Thread(target=serve, args=(lambda: None,))
        thread.start()
        thread.join()

outer()
for one in sorted(tracer.alive(), key=lambda one: -one.size)[:1]:
    print(one.size, [(frame.function, frame.line) for frame in one.stack if frame.file.endswith("script.py")])
tracer.stop()
"""

LINES = {text.split("(")[0].removeprefix("def "): number for number, text in enumerate(SCRIPT.splitlines(), 1) if text.startswith("def ")}


def run(tmp_path: Path, *argv: str, script: str = SCRIPT) -> str:
    """What the script prints."""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "script.py", str(tmp_path / "out.bin"), *argv]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


@pytest.mark.parametrize("thread", ["main", "another"])
@pytest.mark.parametrize("tool", ["memray", "tracemalloc"])
def test_stacks_are_whole(tmp_path: Path, tool: str, thread: str) -> None:
    """Also in the thread that has started it, whose stack then was deeper than it is later."""
    printed = run(tmp_path, tool, thread)
    size, stack = int(printed.split(" ", 1)[0]), eval(printed.split(" ", 1)[1])

    assert 40 * 65536 <= size <= 60 * 65536
    assert [line for _, line in stack[:2]] == [LINES["leak"] + 1, LINES["serve"] + 3]
    if tool == "memray":
        assert [name for name, _ in stack][:2] == ["leak", "serve"]
        assert ("outer" in [name for name, _ in stack]) is (thread == "main")


IN_THE_WAY = """
import sys
from oomsafe.worker.tracers import CanNotTraceError, Memray, Tracemalloc
{before}
for tracer in (Memray(lambda: sys.argv[1]), Tracemalloc()):
    try:
        tracer.start()
        print("starts")
    except CanNotTraceError as error:
        print(error)
    tracer.stop()
"""


WAITING = """
import sys, threading
from oomsafe.worker.tracers import Memray

waits, go_on = threading.Semaphore(0), threading.Event()

def wait(levels):
    if levels:
        return wait(levels - 1)
    waits.release()
    go_on.wait()

tracer = Memray(lambda: sys.argv[1])
tracer.start()
threads = [threading.Thread(target=wait, args=(300,)) for _ in range(5)]
for thread in threads:
    thread.start()
for thread in threads:
    waits.acquire()
print([one.size for one in tracer.alive() if one.size >= 16384 and one.stack and one.stack[0].function == "wait"])
go_on.set()
"""


def test_the_memory_of_frames_is_not_the_line_s(tmp_path: Path) -> None:
    """Of threads that are in the middle of deep calls."""
    pytest.importorskip("memray")
    assert run(tmp_path, script=WAITING) == "[]"


@pytest.mark.parametrize(
    ("size", "allocations", "threads", "expected"),
    [
        (5 * 16384, 5, 6, True),
        (5 * (16384 + 192), 10, 6, True),  # Python 3.13
        (5 * 16384, 5, 4, False),  # more than there are threads
        (5 * (16384 + 1000), 10, 6, False),
        (65569, 1, 8, False),  # one block of a leak
        (2000 * (16384 + 112), 4000, 8, False),  # arrays of numpy
        (1000, 10, 8, False),
    ],
)
def test_what_threads_need_for_their_frames(size: int, allocations: int, threads: int, expected: bool) -> None:
    """By its size, and by how many there can be."""
    assert holds_frames(size, allocations, threads) is expected


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("sys.setprofile(lambda *_: None)", ["the app has a profiler of its own (sys.setprofile), which memray would replace", "starts"]),
        ("sys.modules['memray'] = None", ["memray is not installed: pip install 'oomsafe[probe]'", "starts"]),
        ("import types; sys.modules['memray'] = types.SimpleNamespace(__version__='0.1')", ["memray 0.1 can't trace here (", "starts"]),
        (
            "import tracemalloc; tracemalloc.start()",
            ["starts", "tracemalloc runs already: the app, or PYTHONTRACEMALLOC, has started it"],
        ),
        ("sys.modules['tracemalloc'] = None", ["starts", "this Python has no tracemalloc"]),
    ],
)
def test_what_stands_in_their_way(tmp_path: Path, before: str, expected: list[str]) -> None:
    """A profiler, another version, no module at all."""
    printed = run(tmp_path, script=IN_THE_WAY.format(before=before)).splitlines()

    assert all(line.startswith(start) for line, start in zip(printed, expected, strict=True)), printed


def test_a_file_that_can_not_be_made(tmp_path: Path) -> None:
    """A full disk, or a folder that is gone."""
    script = IN_THE_WAY.format(before="sys.argv[1] = '/nowhere/out.bin'")

    first, second = run(tmp_path, script=script).splitlines()

    assert "can't trace here" in first
    assert second == "starts"
