"""Inside the machine: runs the scenario that the kernel's command line names, and says on the second serial port what it found.

A scenario is a module in scenarios/: its docstring's first line is what oomsafe promises, MEMORY (optional) the machine's MiB, and
`run(vm)` does it with the tools of `Vm` and `Unit`. Each check is one JSON object a line; without the last, {"end": …}, a run has failed.
"""

from __future__ import annotations

import http.client
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HERE = Path(__file__).parent
CGROUPS = Path("/sys/fs/cgroup")
PORT = "/dev/ttyS1"
MIB = 1 << 20

#: At most 20 MiB a second, however fast the machine: two clients, each answer after 0.05 s.
LEAK = "/leak?kib=512&s=0.05"

#: A line of gunicorn's configuration for each word that a scenario does not give.
GUNICORN = {"bind": "127.0.0.1:0", "workers": 2, "worker_class": "sync", "control_socket_disable": True, "timeout": 300}


def until(condition: Callable[[], T], what: str, seconds: float = 200) -> T:
    """Poll until `condition()` is true, and return what it gave; after `seconds`, fail and say `what` did not happen."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.2)
    return found


class Unit:
    """A service of systemd's, started as an operator would: `properties` are those of systemd.exec(5) and systemd.resource-control(5)."""

    def __init__(self, name: str, command: list[str], **properties: str) -> None:
        self.name = f"{name}.service"
        self._pid = 0
        self._cgroup: Path | None = None
        self._log = Path(f"/run/{name}.log")
        given = {"WorkingDirectory": str(HERE), "StandardOutput": f"append:{self._log}", "StandardError": f"append:{self._log}"}
        words = [f"--property={key}={value}" for key, value in {**given, **properties}.items()]
        # systemd expands variables by itself; ours are the command's own
        command = [word.replace("$", "$$") for word in command]
        subprocess.run(["systemd-run", "--quiet", f"--unit={self.name}", *words, *command], check=True)

    def show(self, key: str) -> str:
        """A property as systemd has it now: ActiveState, Result, NRestarts, MainPID, …"""
        return systemctl("show", "--value", "-p", key, self.name)

    def set(self, **properties: str) -> None:
        """systemctl set-property: a resize while it runs."""
        systemctl("set-property", "--runtime", self.name, *(f"{key}={value}" for key, value in properties.items()))

    @property
    def pid(self) -> int:
        """The main process's; 0 where none runs."""
        # systemctl costs a tenth of a second of a processor that qemu emulates
        if not (self._pid and os.path.exists(f"/proc/{self._pid}")):
            self._pid = int(self.show("MainPID"))
        return self._pid

    @property
    def cgroup(self) -> Path:
        """Its folder. Raises AssertionError where it has none any more."""
        if not (self._cgroup and self._cgroup.exists()):
            folder = self.show("ControlGroup")
            assert folder, f"{self.name} does not run: {self.log().strip().splitlines()[-1:]}"
            self._cgroup = CGROUPS / folder.lstrip("/")
        return self._cgroup

    @property
    def kills(self) -> int:
        """How many of its processes the kernel has killed for memory."""
        return keyed(self.cgroup / "memory.events")["oom_kill"]

    @property
    def usage(self) -> int:
        """The bytes that are charged to it, page cache included."""
        return int((self.cgroup / "memory.current").read_text())

    def rss(self, pid: int) -> int:
        """Resident bytes of a process; 0 when it is gone."""
        try:
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def workers(self) -> list[int]:
        """The pids of the main process's children."""
        return children(self.pid)

    def log(self) -> str:
        """What it has written."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def lines(self, text: str) -> list[str]:
        """The lines of its log that hold `text`."""
        return [line for line in self.log().splitlines() if text in line]

    def recycled(self, times: int, seconds: float = 300) -> int:
        """Wait until so many workers were recycled, or the kernel has killed one, or that long. Returns how many were."""
        deadline = time.monotonic() + seconds
        while len(self.lines(" recycling: ")) < times and not self.kills and time.monotonic() < deadline:
            time.sleep(0.5)
        return len(self.lines(" recycling: "))

    def wait_for(self, text: str, times: int = 1, seconds: float = 200) -> list[str]:
        """Wait until `times` lines of its log hold `text`."""
        return until(lambda: len(self.lines(text)) >= times and self.lines(text), f"{times} lines {text!r} of {self.name}", seconds)

    @property
    def port(self) -> int:
        """Where it listens, as its log says last."""
        found = re.findall(r"http://127\.0\.0\.1:(\d+)", "\n".join(self.wait_for("http://127.0.0.1:")))
        return int(found[-1])

    def get(self, path: str, seconds: float = 30) -> bytes | None:
        """The body of an answer with status 200; None for any other, or none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            body = response.read()
            return body if response.status == 200 else None
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def pool(self) -> Any:
        """What its scoreboard shows (a PoolView), once all the workers that are wanted serve."""
        from oomsafe.scoreboard.board import Scoreboard
        from oomsafe.scoreboard.places import board_of

        def path() -> str | None:
            assert self.pid, f"{self.name} does not run: {self.log().strip().splitlines()[-1:]}"
            return board_of(self.pid)

        board = Scoreboard.open(until(path, f"a scoreboard of {self.name}", 60))
        try:
            return until(lambda: serving(board.read()), f"the workers of {self.name} serve")
        finally:
            board.close()


def serving(pool: Any) -> Any:
    """The pool, when as many workers serve as are wanted; else None."""
    return pool if [w.state for w in pool.workers].count("serving") == pool.workers_wanted else None


class Load:
    """Clients that ask one unit (for more and more of its memory) without a pause while the block runs; `answered` and `failed` count."""

    def __init__(self, unit: Unit, path: str = LEAK, clients: int = 2) -> None:
        self.answered = self.failed = 0
        self._unit, self._path, self._clients = unit, path, clients

    def __enter__(self) -> Load:
        self._end, port = threading.Event(), self._unit.port
        self._threads = [threading.Thread(target=self._ask, args=(port,), daemon=True) for _ in range(self._clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)

    def for_seconds(self, seconds: float) -> float:
        """Wait; answers a second meanwhile."""
        began, before = time.monotonic(), self.answered
        time.sleep(seconds)
        return (self.answered - before) / (time.monotonic() - began)

    def _ask(self, port: int) -> None:
        while not self._end.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                connection.request("GET", self._path)
                good = connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                good = False
                self._end.wait(0.1)
            connection.close()
            self.answered += good
            self.failed += not good


class Vm:
    """What a scenario has: units to start, and checks to make."""

    def __init__(self, words: dict[str, str]) -> None:
        self.words = words
        self.units: list[Unit] = []
        self._part = ""
        self._port = os.open(PORT, os.O_WRONLY | os.O_NOCTTY)

    def say(self, **fields: object) -> None:
        """One line to the host."""
        os.write(self._port, json.dumps(fields).encode() + b"\n")

    def check(self, what: str, got: object, wanted: object, *, least: bool = False) -> None:
        """`got` must be `wanted`, or with `least` as much at least. A check that fails ends nothing: the others are made too."""
        good = got == wanted if not least else got >= wanted  # type: ignore[operator]
        self.say(check=self._part + what, got=got, wanted=f">= {wanted}" if least else wanted, good=bool(good))

    def holds(self, what: str, condition: object, got: object) -> None:
        """`condition` must be true of what is shown as `got`."""
        self.say(check=self._part + what, got=got, wanted="that", good=bool(condition))

    def note(self, what: str, got: object) -> None:
        """A figure that is shown, and judged by nobody."""
        self.say(check=self._part + what, got=got, wanted=None, good=True)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Name what is checked in the block; when it fails midway, that is one more check, and the scenario goes on."""
        self._part, started = f"{name}: " if name else "", len(self.units)
        try:
            yield
        except Exception as error:
            self.holds("comes to its end", False, f"{type(error).__name__}: {error}")
            self.say(log=f"traceback {name}".strip(), text=traceback.format_exc())
            for unit in self.units[started:]:
                self.stop(unit)
        finally:
            self._part = ""

    def unit(self, name: str, command: list[str], **properties: str) -> Unit:
        """Start a service."""
        self.units.append(Unit(name, command, **properties))
        return self.units[-1]

    def stop(self, unit: Unit) -> None:
        """End a service: what comes next has its memory and its processors."""
        subprocess.run(["systemctl", "stop", unit.name], check=False)  # one that has failed is gone

    def gunicorn(
        self, name: str, policy: dict[str, object] | None = None, *, settings: dict[str, object] | None = None, wrap: tuple[str, ...] = (),
        **properties: str,
    ) -> Unit:  # fmt: skip
        """gunicorn with oomsafe as a service: `policy` are oomsafe's settings, `settings` gunicorn's, `wrap` runs its command."""
        lines = [f"{key} = {value!r}" for key, value in {**GUNICORN, **(settings or {})}.items()]
        lines += ["import oomsafe.gunicorn", f"oomsafe.gunicorn.install(globals(), **{policy or {}!r})"]
        conf = Path(f"/run/{name}.conf.py")
        conf.write_text("\n".join(lines) + "\n")
        return self.unit(name, [*wrap, sys.executable, "-m", "gunicorn", "-c", str(conf), "app:wsgi"], **properties)


def systemctl(*words: str) -> str:
    """What it prints. Raises CalledProcessError."""
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True).stdout.strip()


def killed() -> list[str]:
    """The names of the processes that the kernel has killed for memory since the machine is up, oldest first."""
    return re.findall(r"Killed process \d+ \((.*)\) total-vm:", dmesg())


def dmesg() -> str:
    """The kernel's log."""
    return subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout


def children(pid: int) -> list[int]:
    """A process's children; none where it is gone."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def keyed(path: Path) -> dict[str, int]:
    """A kernel file of `key value` lines."""
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}


def stalled(cgroup: Path) -> float:
    """Seconds in which *all* processes of a cgroup that wanted to run waited for memory, since it was made (PSI, full)."""
    line = next(line for line in (cgroup / "memory.pressure").read_text().splitlines() if line.startswith("full"))
    return int(line.rpartition("=")[2]) / 1e6


def main() -> None:
    """Run the scenario that the kernel's command line names."""
    words = dict(
        word.removeprefix("oomsafe.").split("=", 1) for word in Path("/proc/cmdline").read_text().split() if word.startswith("oomsafe.")
    )
    vm = Vm(words)
    with vm.part(""):
        importlib.import_module(f"scenarios.{words['scenario']}").run(vm)
    for unit in vm.units:
        vm.say(log=unit.name, text=unit.log()[-20000:])
    vm.say(log="kernel", text=dmesg()[-20000:])
    vm.say(end=words["scenario"])
    os.sync()


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
