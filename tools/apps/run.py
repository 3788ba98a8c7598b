"""make test-apps: real applications from the package index, each started by one line with `oomsafe run`.

Each runs twice: as it is, which says how much memory its processes have and how it ends, and under oomsafe, with a soft limit that its
leaking workers pass. There no request may fail while they are recycled, and it has to end as it does by itself. Usage: run.py [APP...]
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from apps import APPS, OWN, WRAPPED, App, Fate  # noqa: E402
from clients import Load  # noqa: E402
from serving import Server, until  # noqa: E402

from oomsafe.demo.server_process import answers, free_ports  # noqa: E402
from oomsafe.kernel.session import session_of  # noqa: E402

CACHE = Path(os.environ.get("APPS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oomsafe-apps")
#: A space in it: whoever takes PYTHONPATH apart has to get it right.
SITE = CACHE / "on the path"
RECYCLES = 5
#: Requests that a row without recycles answers.
REQUESTS = 200
#: Seconds for a boot, for all recycles, and for an end. Generous: workers of some of these boot for half a minute on a busy machine.
BOOT, RECYCLING, END = 300, 1500, 300
#: A soft limit is so much more than the largest process has after boot, in MiB; a worker that leaks passes it in a few seconds.
MARGIN = 48
LEAK_KIB = 512
#: What a single process says that is above its limit.
STAYS = "should be recycled, and nothing here can"
HEAD = ("app", "servers", "the line", "what becomes of it", "soft limit", "recycles", "requests", "failed", "ends with", "s")


class FailedError(RuntimeError):
    """What of a row is not as it should be."""


@dataclass
class Row:
    """What one app's runs have shown."""

    name: str
    versions: str = ""
    limit: int = 0
    recycles: int = 0
    served: int = 0
    failed: list[str] = field(default_factory=list)
    status: int | None = None
    """Of both runs."""
    wrong: list[str] = field(default_factory=list)

    def cells(self, seconds: float) -> list[object]:
        """For the table."""
        app = APPS[self.name]
        first, _, others = self.versions.partition(", ")
        line = app.command.replace("{oomsafe}", "oomsafe run --").replace("{port}", "…")
        limit = f"{self.limit} MiB" if app.fate is Fate.GUARDED else ""
        fate = "FAILED" if self.wrong else app.fate.value
        return [first, others, f"`{line}`", fate, limit, self.recycles or "", self.served, len(self.failed), self.status, f"{seconds:.0f}"]


class Running(Server):
    """An app's command. As a context manager it ends with all that it has started, also what has left its session."""

    def __init__(self, app: App, python: Path, folder: Path, port: int, *, limit: int | None) -> None:
        """`limit` in MiB; None: without oomsafe."""
        self._app, self._port = app, port
        self._mark = os.urandom(8).hex()
        self.seen: set[int] = set()
        oomsafe = "" if limit is None else f"oomsafe run --soft-limit {limit}MiB --min-lifetime 1 --headers --"
        command = shlex.split(app.command.replace("{oomsafe}", oomsafe).replace("{port}", str(port)))
        command[0] = str(python.parent / command[0])
        leaks = {"APPS_LEAK_KIB": str(LEAK_KIB)} if app.leaks and limit is not None else {}
        if app.fate is Fate.STAYS:
            leaks["APPS_SINGLE"] = "1"
        (folder / "server.log").unlink(missing_ok=True)
        super().__init__(folder, command, {**environment(app, python, folder), **leaks, "APPS_MARK": self._mark})

    @property
    def port(self) -> int:
        """As it was told."""
        return self._port

    def session(self) -> set[int]:
        """And those that have left it, with its environment."""
        found = super().session()
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with suppress(OSError):
                if f"APPS_MARK={self._mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes() and session_of(pid):
                    found.add(pid)
        self.seen |= found
        return found

    def recycled(self) -> set[str]:
        """The lines about workers that are recycled."""
        return self._ours("worker ", " recycling: ")

    def guarded(self) -> set[str]:
        """The lines about what is guarded."""
        return self._ours("oomsafe ", "oomsafe guards")

    def _ours(self, begins: str, text: str) -> set[str]:
        """Without what the server's log puts around a line, and so each once: Airflow writes each line of gunicorn's twice."""
        return {line[line.index(begins) :].partition(" [oomsafe]")[0] for line in self.lines(text)}

    def answer(self) -> tuple[bytes, dict[str, str]] | None:
        """Body and headers of its URL; None while it does not answer with 200."""
        if not self.alive:
            raise FailedError(f"it ended with {self.process.returncode}")
        with suppress(OSError, HTTPException):
            status, headers, body = self.get(self._app.url)
            if status == 200:
                return body, headers
        return None

    def boot(self) -> tuple[bytes, dict[str, str]]:
        """Wait until it answers, or works."""
        if not self._app.url:
            self.wait_for(" ready.", seconds=BOOT)
            return b"", {}
        return until(self.answer, f"{self._app.url} is answered", BOOT)

    def largest(self) -> int:
        """Its largest process's anonymous memory, in MiB."""
        return max(anon(pid) for pid in self.session()) >> 10

    def finish(self) -> int:
        """SIGTERM, its status; all of it has to go, its port and its scoreboards too."""
        self.session()
        status = self.stop()
        until(lambda: not self.session(), f"all its processes end: {self.session()}", 60)
        if answers(self._port):
            raise FailedError(f"port {self._port} is still open")
        left = [path for path in Path("/dev/shm").glob("oomsafe-*/*.board") if int(path.name.partition("-")[0]) in self.seen]
        if left:
            raise FailedError(f"left behind: {left}")
        return status

    def stop(self) -> int:
        """SIGTERM, and its status."""
        self.signal(signal.SIGTERM)
        return self.ended(END)


class Asking(Load):
    """Two clients that keep their connections, and two that don't. A short pause keeps them from having the machine for themselves."""

    def __init__(self, server: Server, path: str, body: bytes) -> None:
        super().__init__(server, path)
        self._body = body

    def _ask(self, connection: HTTPConnection, keeps: bool) -> None:
        connection.request("GET", self._path, headers={} if keeps else {"Connection": "close"})
        response = connection.getresponse()
        status, body = response.status, response.read()
        assert (status, body) == (200, self._body), (status, body)
        if not keeps:
            connection.close()
        with self._lock:
            self.served += 1
        time.sleep(0.01)


class Sending:
    """The same for Celery: a client that sends tasks, in a process of its own."""

    def __init__(self, app: App, python: Path, folder: Path) -> None:
        self._stop = folder / "stop"
        self._stop.unlink(missing_ok=True)
        self._start = {"cwd": folder, "env": {**os.environ, **environment(app, python, folder)}, "stdout": subprocess.PIPE, "text": True}
        self._command = [python, SITE / "ask.py"]
        self.served, self.failed = 0, ["nothing was said"]

    def __enter__(self) -> Sending:
        self._process = subprocess.Popen(self._command, **self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.touch()
        said = json.loads(self._process.communicate(timeout=90)[0])
        self.served, self.failed = said["served"], said["failed"]


def anon(pid: int) -> int:
    """In KiB; 0 where it has ended."""
    with suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) if found else 0
    return 0


def environment(app: App, python: Path, folder: Path) -> dict[str, str]:
    """What all that runs for an app has in its environment, beside our own."""
    more = {name: text.replace("{folder}", str(folder)) for name, text in app.env.items()}
    return {"PATH": f"{python.parent}:{os.environ['PATH']}", "PYTHONPATH": str(SITE), "PYTHONUNBUFFERED": "1", **more}


def pip(*args: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "-qqq", *map(str, args)], check=True)


def wheel(folder: str) -> Path:
    """This tree's oomsafe, as it would be published."""
    pip("wheel", "--no-deps", "--wheel-dir", folder, ROOT)
    return next(Path(folder).glob("*.whl"))


def installed(app: App, ours: Path) -> Path:
    """The Python of the app's environment, made unless it is there; with this tree's oomsafe in it."""
    key = hashlib.sha256(repr((app.needs, sys.version)).encode()).hexdigest()[:12]
    venv = CACHE / "venvs" / f"{re.split(r'[^a-z-]', app.needs[0])[0]}-{key}"
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        print(f"making an environment with {' '.join(app.needs)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", venv], check=True)
        pip("--python", python, "install", *app.needs)
        (venv / "ready").touch()
    pip("--python", python, "install", "psutil")
    pip("--python", python, "install", "--force-reinstall", "--no-deps", ours)
    return python


def prepared(app: App, python: Path) -> Path:
    """The folder that the app runs in, with its database."""
    key = hashlib.sha256(repr((app.needs, app.before)).encode()).hexdigest()[:12]
    folder = CACHE / "folders" / f"{python.parent.parent.name.rpartition('-')[0]}-{key}"
    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    for path in (HERE / "files").iterdir():
        shutil.copy(path, folder)
    if not (folder / "ready").exists():
        for command in app.before:
            print(f"  {command}", flush=True)
            with (folder / "before.log").open("ab") as log:
                program, *arguments = shlex.split(command)
                whole = [str(python.parent / program), *arguments]
                env = {**os.environ, **environment(app, python, folder)}
                subprocess.run(whole, cwd=folder, env=env, stdout=log, stderr=log, check=True)
        (folder / "ready").touch()
    return folder


def versions(app: App, python: Path) -> str:
    names = [re.split(r"[^A-Za-z-]", app.needs[0])[0], *app.servers]
    if app.needs in (OWN, WRAPPED):
        del names[0]
    code = "import importlib.metadata as m, sys; print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:]))"
    return subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True).stdout.strip()


def check(name: str, ours: Path) -> Row:
    """Both runs of one app."""
    app, row = APPS[name], Row(name)
    python = installed(app, ours)
    folder = prepared(app, python)
    row.versions = versions(app, python)
    try:
        body = by_itself(app, row, python, folder)
        print(f"  by itself: ends with {row.status}; soft limit {row.limit} MiB", flush=True)
        under(app, row, python, folder, body)
    except (RuntimeError, AssertionError, subprocess.TimeoutExpired) as error:
        row.wrong.append(str(error))
    return row


def by_itself(app: App, row: Row, python: Path, folder: Path) -> bytes:
    """Without oomsafe: what it answers; `row` has its status and the limit afterwards."""
    with Running(app, python, folder, free_ports()[0], limit=None) as running:
        try:
            body = running.boot()[0]
            time.sleep(3)  # the others of its workers boot; the largest of them says most
            row.limit = running.largest() + MARGIN
            if app.url and running.get(app.url)[2] != body:
                raise FailedError(f"{app.url} answers otherwise each time")
            row.status = running.stop()
        finally:
            shutil.copy(folder / "server.log", CACHE / "logs" / f"{row.name}-by-itself.log")
    return body


def under(app: App, row: Row, python: Path, folder: Path, body: bytes) -> None:
    """With oomsafe."""
    with Running(app, python, folder, free_ports()[0], limit=row.limit) as running:
        try:
            said(app, running)
            clients: Any = Asking(running, app.url, body) if app.url else Sending(app, python, folder)
            with clients:
                until(lambda: done(app, running, clients), "all that is awaited has come", RECYCLING)
            row.served, row.failed = clients.served, clients.failed
            row.recycles = len(running.recycled())
            status = running.finish()
        finally:
            shutil.copy(folder / "server.log", CACHE / "logs" / f"{row.name}.log")
        row.wrong += wrong(app, row, running, status)


def done(app: App, running: Running, clients: Any) -> bool:
    """Whether the clients may stop: all has been seen, or there is no more to see."""
    if not running.alive or len(clients.failed) > REQUESTS:
        return True
    if app.fate is Fate.GUARDED:
        return len(running.recycled()) >= RECYCLES
    return clients.served >= REQUESTS and (app.fate is not Fate.STAYS or bool(running.lines(STAYS)))


def said(app: App, running: Running) -> None:
    """Wait until it serves; its fate must be in its log, and on its answers."""
    headers = running.boot()[1]
    if app.says:
        running.wait_for(app.says, seconds=60)
    if app.fate in (Fate.STAYS, Fate.MEASURED):
        assert int(headers.get("x-memory-rss", 0)) > 1 << 20, "the header with its memory is missing"


def wrong(app: App, row: Row, running: Running, status: int) -> list[str]:
    """What is not as it should be, after its end."""
    found = []
    if row.failed:
        found.append(f"{len(row.failed)} requests failed: {row.failed[:3]}")
    if row.served < REQUESTS:
        found.append(f"only {row.served} requests")
    if app.fate is Fate.GUARDED and row.recycles < RECYCLES:
        found.append(f"only {row.recycles} recycles")
    if status != row.status:
        found.append(f"it ends with {status}, by itself with {row.status}")
    guards = running.guarded()
    if len(guards) != (app.fate in (Fate.GUARDED, Fate.STAYS)):
        found.append(f"{len(guards)} lines of what is guarded")
    if app.fate is Fate.ALONE and len(running.lines("oomsafe run: ")) != bool(app.says):
        found.append(f"says too much or too little: {running.lines('oomsafe run: ')}")
    bad = [line for word in ("oomsafe failed", "is not guarded here", "is given up") for line in running.lines(word)]
    return found + bad[:3]


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in APPS]
    if unknown:
        print(f"no such app: {' '.join(unknown)}; there are {' '.join(APPS)}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an app that runs ends with us
    (CACHE / "logs").mkdir(parents=True, exist_ok=True)
    SITE.mkdir(exist_ok=True)
    for path in [*(HERE / "leak").glob("*.py"), *(HERE / "files").glob("*.py")]:
        shutil.copy(path, SITE)
    rows: list[tuple[Row, float]] = []
    with tempfile.TemporaryDirectory(prefix="oomsafe-apps-") as scratch:
        ours = wheel(scratch)
        for name in names or APPS:
            print(name, flush=True)
            began = time.monotonic()
            row = check(name, ours)
            rows.append((row, time.monotonic() - began))
            print(f"  {row.recycles} recycles, {row.served} requests, {len(row.failed)} failed, {rows[-1][1]:.0f} s", flush=True)
            for fault in row.wrong:
                print(f"  WRONG: {fault}; see {CACHE / 'logs'}", flush=True)
    print(f"\n{time.strftime('%Y-%m-%d')}, Python {sys.version.split()[0]}; logs in {CACHE / 'logs'}\n")
    print(f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|", sep="\n")
    for row, seconds in rows:
        print(f"| {' | '.join(map(str, row.cells(seconds)))} |")
    return 1 if any(row.wrong for row, _ in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
