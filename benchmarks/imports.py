"""What oomsafe costs before the first request: its import, and the memory and boot time of a gunicorn worker.

Fresh processes, with and without it in turn. See benchmarks/README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import common
from common import MIB, PORT, Server

PAGE = os.sysconf("SC_PAGE_SIZE")

#: Prints what the process holds at its end; in pages, as statm has it.
_STATM = "print(open('/proc/self/statm').read().split()[1])"

IMPORTS = {
    "pass": "pass",
    "import psutil": "import psutil",
    "import oomsafe": "import oomsafe",
    "import oomsafe.gunicorn": "import oomsafe.gunicorn",
}
WORKERS = {"bare": [], "-c python:oomsafe.gunicorn.conf": ["-c", "python:oomsafe.gunicorn.conf"]}


def run_python(name: str) -> dict[str, float]:
    """A fresh interpreter: its whole life and its CPU time in milliseconds, and its memory at the end in MiB."""
    started = time.perf_counter()
    command = [sys.executable, "-c", f"{IMPORTS[name]}\n{_STATM}"]
    process = subprocess.Popen(command, env=common.environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        pages = int(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    return {"ms": wall * 1e3, "cpu": (usage.ru_utime + usage.ru_stime) * 1e3, "rss": pages * PAGE / MIB}


def boot_gunicorn(name: str) -> dict[str, float]:
    """A gunicorn with one sync worker: milliseconds until its first answer, and its idle worker's memory in MiB."""
    argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{PORT}", "--no-control-socket", *WORKERS[name], "apps:wsgi"]
    with Server(argv) as server:
        booted = (time.perf_counter() - server.started) * 1e3
        time.sleep(0.3)
        (worker,) = server.forked()
        return {"ms": booted, "rss": statm(worker) / MIB, "private": private(worker) / MIB, "master": statm(server.pid) / MIB}


def statm(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE


def private(pid: int) -> int:
    """Resident bytes that it shares with no other process (smaps_rollup)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))


def lines(seen: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """Rows of a table: every figure, and what it is above the first row's."""
    first = next(iter(seen.values()))
    found = []
    for name, mine in seen.items():
        cells = [name]
        for key in mine[0]:
            cells.append(common.shown(common.column(mine, key), 1))
            cells.append("" if mine is first else f"{_median(mine, key) - _median(first, key):+.2f}")
        found.append(cells)
    return found


def _median(rows: list[dict[str, float]], key: str) -> float:
    return common.statistics.median(common.column(rows, key))


def main() -> None:
    """Measure, print both tables."""
    parser = common.arguments(__doc__ or "", rounds=20)
    parser.add_argument("--boots", type=int, default=10, help="of each gunicorn, default 10")
    options = parser.parse_args()
    about = common.machine("gunicorn", "psutil", "oomsafe")
    with common.quiet_interrupt():
        for name in IMPORTS:
            run_python(name)  # so that byte code is there
        boot_gunicorn("bare")
        imports = common.interleaved(options.rounds, list(IMPORTS), run_python)
        boots = common.interleaved(options.boots, list(WORKERS), boot_gunicorn)
    import_head = ["python -c", "whole process, ms", "added", "its CPU, ms", "added", "RSS, MiB", "added"]
    boot_head = ["gunicorn, 1 sync worker", "first answer, ms", "added", "worker RSS, MiB", "added"]
    parts = [
        (f"Import: {options.rounds} fresh processes each, median (min-max)", common.table(import_head, lines(imports))),
        (
            f"Boot: {options.boots} boots each, median (min-max)",
            common.table([*boot_head, "private, MiB", "added", "master RSS, MiB", "added"], lines(boots)),
        ),
    ]
    common.report("What oomsafe costs before the first request", about, parts, {"imports": imports, "boots": boots}, options.json)


if __name__ == "__main__":
    main()
