"""What a process's memory is made of: the parts add up, whatever allocators say; and the line about them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.kernel.allocators import ask_pymalloc, take_stock
from oomsafe.kernel.process import rss_of
from oomsafe.policy.stock import Malloc, Parts, Pymalloc, parts_of, read_pymalloc, stock_line

MIB = 1 << 20

#: As CPython 3.10 to 3.13 print it.
PRINTED = """Small block threshold = 512, in 32 size classes.

class   size   num pools   blocks in use  avail blocks
-----   ----   ---------   -------------  ------------
    1     32           1             160           350

# arenas allocated current         =                    3
3 arenas * 1048576 bytes/arena     =            3,145,728

# bytes in allocated blocks        =            1,796,576
# bytes in available blocks        =              286,288
61 unused pools * 16384 bytes      =              999,424
# bytes lost to pool headers       =                6,144
Total                              =            3,145,728

            2 free PyDictObjects * 48 bytes each =                   96
"""

sizes = st.integers(0, 1 << 42)


@given(
    anon=sizes, files=sizes, shared=sizes, trimmed=st.none() | st.integers(-(1 << 30), 1 << 42),
    pymalloc=st.none() | st.builds(Pymalloc, live=sizes, kept=sizes), malloc=st.none() | st.builds(Malloc, live=sizes, free=sizes),
)  # fmt: skip
def test_the_parts_add_up(
    anon: int, files: int, shared: int, trimmed: int | None, pymalloc: Pymalloc | None, malloc: Malloc | None
) -> None:
    """Law: to what was resident, and none is negative; what can't be asked is None, and never 0."""
    parts = parts_of(anon, files, shared, trimmed, pymalloc, malloc)

    assert parts.total == anon + files + shared
    assert all(size is None or size >= 0 for size in vars(parts).values())
    assert (parts.python_live is None) == (parts.python_kept is None) == (pymalloc is None)
    assert (parts.malloc_live is None) == (parts.malloc_stuck is None) == (malloc is None)
    assert (parts.live is None) == (pymalloc is None and malloc is None)


def test_what_python_prints() -> None:
    """Used, and free in one way or the other."""
    assert read_pymalloc(PRINTED) == Pymalloc(live=1_796_576, kept=286_288 + 999_424)


@pytest.mark.parametrize("text", ["", "no such thing", PRINTED.replace("# bytes in available", "# bytes in other"), PRINTED[:300]])
def test_what_is_not_printed_is_not_known(text: str) -> None:
    """PYTHONMALLOC=malloc, another Python, another version: None."""
    assert read_pymalloc(text) is None


LINES = {
    "a leak": (
        Parts(python_live=90 * MIB, python_kept=MIB, malloc_live=8 * MIB, malloc_kept=0, malloc_stuck=0, files=6 * MIB), 20 * MIB,
        "105 MiB: in use 90.0 MiB by Python objects, 8.0 MiB by malloc; free but kept 1.0 MiB by Python; 6.0 MiB of files",
    ),
    "kept": (
        Parts(python_live=20 * MIB, python_kept=80 * MIB, malloc_live=5 * MIB, malloc_kept=0, malloc_stuck=0), 20 * MIB,
        "105 MiB: in use 20.0 MiB by Python objects, 5.0 MiB by malloc; free but kept 80.0 MiB by Python; "
        "94% of what it grew by is free memory that its allocators kept: that is no leak",
    ),
    "not known": (Parts(other=50 * MIB, shared=2 * MIB), 20 * MIB, "52.0 MiB: 2.0 MiB shared, 50.0 MiB that no allocator knows of"),
    "has hardly grown": (
        Parts(python_live=MIB, python_kept=10 * MIB), 5 * MIB,
        "11.0 MiB: in use 1.0 MiB by Python objects; free but kept 10.0 MiB by Python",
    ),
    "its fresh size is not known": (
        Parts(python_live=MIB, python_kept=90 * MIB), None,
        "91.0 MiB: in use 1.0 MiB by Python objects; free but kept 90.0 MiB by Python",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "fresh", "expected"), LINES.values(), ids=LINES)
def test_the_line(parts: Parts, fresh: int | None, expected: str) -> None:
    """What is used, what is kept, the rest; and whether most of the growth is no leak."""
    assert stock_line(parts, fresh) == expected


def leaking() -> tuple[int, int]:
    """(live, kept) MiB that this process has more of after keeping small objects."""
    before = take_stock()
    kept = [{"a": number} for number in range(200_000)]
    after = take_stock()
    assert before is not None and after is not None and kept
    return (after.python_live or 0) - (before.python_live or 0) >> 20, (after.python_kept or 0) - (before.python_kept or 0) >> 20


def fragmented() -> tuple[int, int]:
    """The same after one in twenty was kept."""
    before = take_stock()
    kept = [{"a": number} for number in range(200_000)][::20]
    after = take_stock()
    assert before is not None and after is not None and kept
    return (after.python_live or 0) - (before.python_live or 0) >> 20, (after.python_kept or 0) - (before.python_kept or 0) >> 20


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_this_process() -> None:
    """The parts are what is resident; small objects are told from what is left of them."""
    parts = take_stock()
    assert parts is not None and 0.7 < parts.total / (rss_of("self") or 1) < 1.4

    live, kept = in_a_new_process(leaking)
    assert live >= 30 and kept <= 5
    live, kept = in_a_new_process(fragmented)
    assert live <= 10 and kept >= 20


def in_a_new_process(function: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """Its result; not in a fork of this process, whose heap may have room for all that is allocated."""
    path = os.pathsep.join([os.getcwd(), str(Path(__file__).parents[1])])
    script = f"from unit.test_stock import {function.__name__}; print(*{function.__name__}())"
    command, env = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": path}
    first, second = subprocess.run(command, capture_output=True, text=True, env=env, check=True, timeout=60).stdout.split()
    return int(first), int(second)


def test_stderr_is_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing of the statistics gets there, and what is written behind them does."""
    assert ask_pymalloc() is not None
    print("behind", file=sys.stderr, flush=True)

    assert capfd.readouterr().err == "behind\n"


@pytest.mark.parametrize("env", [{"PYTHONMALLOC": "malloc"}, {"PYTHONTRACEMALLOC": "1"}])
def test_where_pythons_allocator_is_not_in_use_nothing_of_its_statistics_reaches_the_log(env: dict[str, str]) -> None:
    """CPython then prints its free lists alone. What others write meanwhile is passed on."""
    ask = "import os, sys; from oomsafe.kernel import allocators"
    others = "sys._debugmallocstats, ours = (lambda: (os.write(2, b'a line of 3 free words\\n'), ours())), sys._debugmallocstats"
    script = f"{ask}; {others}; print(allocators.ask_pymalloc())"
    environ = {**os.environ, **env, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, check=True, timeout=60)

    assert (ended.stdout, ended.stderr) == ("None\n", "a line of 3 free words\n")
