"""What the benchmarks share: a server in a process of its own, wrk beside it, and the statistics of rounds."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import http.client
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from oomsafe.demo import server_process
from oomsafe.demo.server_process import ServerProcess, free_ports, remove
from oomsafe.kernel.process import descendants_of
from oomsafe.kernel.sandbox import Sandbox

T = TypeVar("T")

HERE = Path(__file__).parent
MIB = 1 << 20

#: Seconds until a server must answer, and later be gone.
PATIENCE = 20

#: Seconds that a verifying client waits for an answer, beyond those that the answer takes by itself.
TIMEOUT = 15.0

#: Stands in a command where the server's port goes.
PORT = "{port}"

_numbers = itertools.count()


# --- a server


class Server(ServerProcess):
    """A server on a loopback port; it and whatever it forked is ended by pid.

    `argv` holds PORT where its port goes; `files` are written to its folder, where it starts; `core` pins it to one
    CPU; `boot` is how many seconds longer than others it takes to answer; `memory` is the limit, in bytes, of a memory cgroup
    of its own: OSError where none can be made. Use as a context manager: inside, it answers.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environ: dict[str, str] | None = None,
        files: dict[str, str] | None = None,
        core: int | None = None,
        boot: float = 0,
        memory: int | None = None,
    ) -> None:
        self.sandbox = None if memory is None else Sandbox(f"oomsafe-benchmark-{os.getpid()}-{next(_numbers)}", memory)
        self._patience = PATIENCE + boot
        self.folder = Path(tempfile.mkdtemp(prefix="oomsafe-benchmark-"))
        for name, text in (files or {}).items():
            (self.folder / name).write_text(text)
        (self.port,) = free_ports()
        command = [*pinned(core), *(word.replace(PORT, str(self.port)) for word in argv)]
        command = self.sandbox.command(command) if self.sandbox else command
        plain = environment(HERE)
        self.started = time.perf_counter()
        # with memray installed, a leaking pool would be probed by itself, and be slower for a while
        plain |= {"HOME": str(self.folder), "OOMSAFE_PROBE": "false"}
        super().__init__(command, self.folder, {**plain, **(environ or {})})

    def __enter__(self) -> Server:
        try:
            self.until(self._answers, "an answer", self._patience, pause=0.002)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.sandbox is not None:
            remove(self.sandbox)

    def kernel_kills(self) -> int:
        """How many processes of its cgroup the kernel has killed; 0 where it has none of its own."""
        return (self.sandbox.cgroup.oom_kills() or 0) if self.sandbox else 0

    def get(self, path: str = "/") -> http.client.HTTPResponse:
        """One request on a connection of its own; the answer's body has been read and is its `body`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path, headers={"Connection": "close"})
            response: Any = connection.getresponse()
            response.body = response.read()
            return response
        finally:
            connection.close()

    def forked(self) -> set[int]:
        """The pids that it forked and that run, the forks of forks too."""
        return set(descendants_of(self.pid))

    def settle(self, workers: int) -> None:
        """Wait until so many processes have been forked, and have had a moment to load the app."""
        self.until(lambda: len(self.forked()) >= workers, f"{workers} workers", PATIENCE, pause=0.01)
        time.sleep(1)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.get().status == 200
        return False


def environment(*path: Path) -> dict[str, str]:
    """What every process starts with: no settings of the caller's, and byte code, as an installed package has it. `path` is Python's."""
    plain = server_process.environment("GRANIAN_", "UWSGI_", "PYTHONDONTWRITEBYTECODE", path=path)
    return {**plain, "PYTHONPYCACHEPREFIX": _byte_code()}


@functools.cache
def _byte_code() -> str:
    folder = tempfile.mkdtemp(prefix="oomsafe-benchmark-pyc-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def peak_of(pid: int) -> int:
    """Bytes that a process held at most."""
    return status_of(pid, "VmHWM")


class Watch(threading.Thread):
    """Looks every 20 ms at all that a server has forked: who came, who is gone, and how large each was at most."""

    def __init__(self, server: Server, size: Callable[[int], int] = peak_of, every: float = 0.02) -> None:
        """`size(pid)` is what is looked at, in bytes."""
        super().__init__(daemon=True)
        self.peaks: dict[int, int] = {}
        """The largest size of each process, by pid, in bytes."""
        self._server = server
        self._size = size
        self._every = every
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(self._every):
            self.look()

    def look(self) -> None:
        """Once."""
        for pid in self._server.forked():
            self.peaks[pid] = max(self.peaks.get(pid, 0), self._size(pid))

    def stop(self) -> None:
        """No more looks."""
        self._done.set()
        self.join()


def pinned(core: int | None) -> list[str]:
    """What goes before a command to keep it on one CPU; nothing where there is only one."""
    return [] if core is None or (os.cpu_count() or 1) < 2 else ["taskset", "-c", str(core)]


def tool(name: str) -> str:
    """The path of a command that was installed beside this Python, or on PATH."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise SystemExit(f"{name} is not installed: see benchmarks/README.md")
    return found


# --- processes


def status_of(pid: int | str, key: str) -> int:
    """A figure of /proc/PID/status in bytes, VmHWM or VmRSS; 0 when the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def cpu_seconds(pids: Iterable[int]) -> float:
    """What all threads of some processes have run for, exactly (schedstat); those that have ended left nothing."""
    spent = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            spent += sum(int((task / "schedstat").read_text().split()[0]) for task in Path(f"/proc/{pid}/task").iterdir())
    return spent / 1e9


# --- load


@dataclass
class Load:
    """What wrk saw."""

    requests: int
    seconds: float
    p99: float
    """Milliseconds."""
    failed: int
    """Connections refused, reset or timed out, and answers other than 2xx and 3xx."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return self.requests / self.seconds


def wrk(server: Server, path: str, seconds: float, *, connections: int = 16, core: int | None = None) -> Load:
    """Load `server` from one thread; returns when wrk has ended."""
    url = f"http://127.0.0.1:{server.port}{path}"
    command = [*pinned(core), tool("wrk"), "-t1", f"-c{connections}", f"-d{seconds:g}s", "-s", str(HERE / "wrk.lua"), url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + PATIENCE, check=True)
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    failed = sum(seen[kind] for kind in ("connect", "read", "write", "timeout", "status"))
    return Load(seen["requests"], seen["us"] / 1e6, seen["p99_us"] / 1e3, failed)


def ask(server: Server, path: str, seconds: float, rate: float, *, slow: int = 0, timeout: float = TIMEOUT) -> dict[str, Any]:
    """Load `server` from verifying_load.py, in a process of its own: what it printed."""
    command = [sys.executable, str(HERE / "verifying_load.py"), str(server.port), path]
    command += ["--seconds", str(seconds), "--rate", str(rate), "--slow", str(slow), "--timeout", str(timeout)]
    # time for the last answers, for as many as may be overdue one after another
    patience = seconds + 2 * timeout + PATIENCE
    done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=True, env=environment())
    return dict(json.loads(done.stdout))


# --- rounds and statistics


def interleaved(rounds: int, names: Sequence[str], measure: Callable[[str], T]) -> dict[str, list[T]]:
    """`measure` of each name, `rounds` times: A B C A B C, so that what disturbs the machine disturbs all of them."""
    seen: dict[str, list[T]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            progress(f"round {number + 1}/{rounds}: {name}")
            seen[name].append(measure(name))
    progress("")
    return seen


def progress(text: str) -> None:
    """On a terminal, in place of what stood there."""
    if sys.stderr.isatty():
        print(f"{text:79}", end="\r", file=sys.stderr, flush=True)


def column(rows: list[dict[str, float]], key: str) -> list[float]:
    """One figure of every round."""
    return [row[key] for row in rows]


def ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> list[float]:
    """One figure of every round, over the baseline's of the same round."""
    return [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]


def shown(values: Sequence[float], digits: int = 0) -> str:
    """``median (min-max)``; the median alone where there is one value, or no spread to be seen."""
    low, middle, high = (f"{value:,.{digits}f}".replace(",", " ") for value in (min(values), statistics.median(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its columns in line."""
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)


# --- the report


def machine(*packages: str) -> dict[str, str]:
    """What the figures were measured on."""
    return {
        "cpus": f"{os.cpu_count()} ({_cpu_model()})",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load at start": f"{os.getloadavg()[0]:.1f}",
        **{name: _version(name) for name in packages},
    }


def report(title: str, about: dict[str, str], parts: Sequence[tuple[str, str]], raw: Any, as_json: bool) -> None:
    """Print the tables, each under its heading; or everything that was measured, as JSON."""
    if as_json:
        print(json.dumps({"title": title, "machine": about, "rounds": raw}, indent=1))
        return
    print(f"# {title}\n\n" + " · ".join(f"{name} {value}" for name, value in about.items()))
    for heading, text in parts:
        print(f"\n## {heading}\n\n{text}")


def arguments(doc: str, *, rounds: int, seconds: float | None = None) -> argparse.ArgumentParser:
    """The options that all of them have."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print every round as JSON")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default {rounds}")
    if seconds is not None:
        parser.add_argument("--seconds", type=float, default=seconds, help=f"of load a round, default {seconds:g}")
    return parser


@contextlib.contextmanager
def quiet_interrupt() -> Iterator[None]:
    """Ctrl-C, and SIGTERM (from ``timeout``), end the benchmark without a traceback, after its servers."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "-"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
