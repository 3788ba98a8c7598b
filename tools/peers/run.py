"""make test-peers: the test suites of the frameworks and servers that oomsafe plugs into, with oomsafe wired in.

Each runs plain, with an empty wrapper, and with oomsafe. What ends otherwise under oomsafe than under the empty wrapper,
alone as well, and is not listed in differences.txt, fails. Usage: run.py [SUITE...]
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from suites import SUITES, Suite

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("PEERS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oomsafe-peers")
WAYS = ("plain", "empty", "oomsafe")
#: A test has several notes, of its phases and subtests: the worst counts.
WORST_LAST = ("missing", "passed", "skipped", "xfailed", "failed", "error")
#: Seconds that a whole suite may take, one way, and a test alone.
TIMEOUT, TIMEOUT_ALONE = 3600, 300
#: More differences than these are not tried again alone: something is wrong with all of them.
TRIED_ALONE = 60
#: How often a test that differs is tried alone: some fail every other time, plain too. One that differs each time counts.
TRIES = 5
#: Measured, with headers on, and a limit that no test reaches.
POLICY = {"OOMSAFE_HEADERS": "true", "OOMSAFE_SOFT_LIMIT": "90%"}
#: With our plugin, without their own options, and on where a module can't be imported.
PYTEST = ("-p", "wiring", "-p", "no:cacheprovider", "-o", "addopts=", "--continue-on-collection-errors", "-q", "-rfE")
HEAD = ("suite", "tests", "failed: plain", "empty", "oomsafe", "wrapper's own", "oomsafe's", "listed", "flaky", "calls measured", "min")
#: Held at the project's versions in every suite's environment.
PEERS = ("starlette", "uvicorn", "django", "flask", "werkzeug", "fastapi", "celery", "gunicorn", "asgiref")


@dataclass
class Run:
    """One suite, one way."""

    outcomes: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    finished: bool = False

    def count(self, *outcomes: str) -> int:
        return sum(outcome in outcomes for outcome in self.outcomes.values())


def installed(dist: str) -> str | None:
    """Its version in the project's environment."""
    try:
        return importlib.metadata.version(dist)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*args: str | Path, cwd: Path | None = None) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, args)], check=True, cwd=cwd)


def fetch(dist: str) -> Path:
    """The folder of its sdist, fetched unless it is there; a copy of our own, for tests leave things behind."""
    version = installed(dist)
    found = sorted(CACHE.glob(f"sdists/{dist}-{version or '*'}.tar.gz"))
    if not found:
        pip("download", "--no-deps", "--no-binary", dist, "--dest", CACHE / "sdists", f"{dist}=={version}" if version else dist)
        found = sorted(CACHE.glob(f"sdists/{dist}-{version or '*'}.tar.gz"))
    folder = CACHE / "sources"
    unpacked = folder / found[-1].name.removesuffix(".tar.gz")
    shutil.rmtree(unpacked, ignore_errors=True)
    with tarfile.open(found[-1]) as archive:
        archive.extractall(folder, filter="data")
    return unpacked


def environment(suite: Suite, source: Path) -> Path:
    """The Python of the suite's own environment, made unless it is there."""
    version = source.name.rpartition("-")[2]
    held = [f"{peer}=={found}" for peer in PEERS if (found := installed(peer))]
    wanted = [f"{suite.dist}=={version}", *suite.needs, f"psutil=={installed('psutil')}"]
    key = hashlib.sha256(repr((wanted, held, sys.version)).encode()).hexdigest()[:12]
    venv = CACHE / "venvs" / f"{suite.dist}-{version}-{key}"
    python = venv / "bin" / "python"
    if not (venv / "ready").exists():
        print(f"making an environment for {suite.dist} {version}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", venv], check=True)
        (venv / "held.txt").write_text("\n".join(held))
        pip("--python", python, "install", "--constraint", venv / "held.txt", *wanted, cwd=source)
        (venv / "ready").touch()
    return python


@contextlib.contextmanager
def service(name: str) -> Iterator[dict[str, str]]:
    """The service, as what it adds to the environment."""
    if not name:
        yield {}
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--dir", tempfile.gettempdir()]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        url = f"redis://127.0.0.1:{port}"
        yield {"TEST_BROKER": url, "TEST_BACKEND": url, "REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(port)}
    finally:
        server.terminate()
        server.wait()


def run(name: str, way: str, only: str = "") -> Run:
    """The suite, or one test of it, one way. Its output goes into a log in the cache."""
    suite = SUITES[name]
    source = SOURCES[name]
    log = CACHE / "logs" / f"{name}-{way}{'-alone' if only else ''}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="oomsafe-peers-") as site, service(suite.service) as more:
        # not the checkout on their path: it has folders of the same names as theirs, and may be edited meanwhile
        shutil.copytree(ROOT / "oomsafe", Path(site, "oomsafe"), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HERE / "wiring.py", site)
        notes = Path(site, "notes")
        notes.touch()
        ours = {"PEERS_WAY": way, "PEERS_WIRES": suite.wires, "PEERS_NOTES": str(notes), "PYTHONPATH": site}
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("OOMSAFE_", "MAKE", "MFLAGS", "VIRTUAL_ENV"))}
        if suite.script:
            args = [arg for arg in suite.args if not only or arg.startswith("--")] + [only] * bool(only)
            command = ["-m", "wiring", suite.script, *args]
        else:
            args = [only, *(arg for arg in suite.args if arg.startswith("-"))] if only else list(suite.args)
            command = ["-m", "pytest", *PYTEST, *args]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [PYTHONS[name], *command],
                cwd=source / suite.folder,
                env={**clean, **more, **ours, **(POLICY if way == "oomsafe" else {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(TIMEOUT_ALONE if only else TIMEOUT)
            except subprocess.TimeoutExpired as late:
                print(f"  {name}, {way} {only}: not done after {late.timeout:.0f} s", flush=True)
            finally:
                with contextlib.suppress(ProcessLookupError):  # and what its tests have left behind
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return read(notes)


def read(notes: Path) -> Run:
    result = Run()
    for line in notes.read_text().splitlines():
        outcome, _, test = line.partition(" ")
        if outcome == "calls":
            result.calls, result.finished = int(test), True
        elif outcome in WORST_LAST:
            result.outcomes[test] = max(outcome, result.outcomes.get(test, "missing"), key=WORST_LAST.index)
    return result


def expected(name: str, test: str) -> bool:
    """Whether it is in the list, where a * at its end stands for any end."""
    for line in (HERE / "differences.txt").read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            suite, _, listed = line.partition(" ")
            if suite == name and (listed == test or (listed.endswith("*") and test.startswith(listed[:-1]))):
                return True
    return False


def differing(one: Run, other: Run) -> list[str]:
    tests = one.outcomes.keys() | other.outcomes.keys()
    return sorted(test for test in tests if one.outcomes.get(test) != other.outcomes.get(test))


def agree_alone(name: str, test: str) -> bool:
    """Whether it ends the same both ways; False where it can't be run by itself."""
    empty, oomsafe = (run(name, way, test).outcomes.get(test) for way in WAYS[1:])
    return empty is not None and empty == oomsafe


def check(name: str) -> tuple[str, bool]:
    """The suite's row in the table, and whether it may stay as it is."""
    began = time.monotonic()
    runs = {}
    for way in WAYS:
        runs[way] = run(name, way)
        bad, all_ = runs[way].count("failed", "error"), len(runs[way].outcomes)
        print(f"  {way}: {all_} tests, {bad} failed, {runs[way].calls} calls, after {time.monotonic() - began:.0f} s", flush=True)
    plain, empty, oomsafe = (runs[way] for way in WAYS)
    found = differing(empty, oomsafe)
    listed = [test for test in found if expected(name, test)]
    left = [test for test in found if test not in listed]
    flaky = []
    if len(left) <= TRIED_ALONE:
        flaky = [test for test in left if any(agree_alone(name, test) for _ in range(TRIES))]
    faults = [test for test in left if test not in flaky]
    for test in flaky:
        print(f"  flaky: {test}: empty {empty.outcomes.get(test)}, oomsafe {oomsafe.outcomes.get(test)}, the same alone")
    for test in faults:
        print(f"  DIFFERS: {test}: empty {empty.outcomes.get(test)}, oomsafe {oomsafe.outcomes.get(test)}")
    bad = [f"{way} not finished" for way in WAYS if not runs[way].finished]
    bad += [f"{way}: nothing was wrapped" for way in WAYS[1:] if not runs[way].calls]
    for why in bad:
        print(f"  FAILED: {name}: {why}; see {CACHE / 'logs'}")
    cells = [
        SOURCES[name].name + " integration" * name.endswith("integration"),
        len(oomsafe.outcomes),
        *(run.count("failed", "error") for run in (plain, empty, oomsafe)),
        len(differing(plain, empty)),
        *map(len, (faults, listed, flaky)),
        oomsafe.calls,
        f"{(time.monotonic() - began) / 60:.1f}",
    ]
    return f"| {' | '.join(map(str, cells))} |", not faults and not bad


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        print(f"no such suite: {' '.join(unknown)}; there are {' '.join(SUITES)}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a suite that runs, and its service, end with us
    rows, green = [], True
    for name in names or SUITES:
        SOURCES[name] = fetch(SUITES[name].dist)
        PYTHONS[name] = environment(SUITES[name], SOURCES[name])
        print(name, flush=True)
        row, good = check(name)
        rows.append(row)
        green = green and good
    print(f"\n{time.strftime('%Y-%m-%d')}, Python {sys.version.split()[0]}; logs in {CACHE / 'logs'}\n")
    print(f"| {' | '.join(HEAD)} |", "| --- " * len(HEAD) + "|", *rows, sep="\n")
    return 0 if green else 1


SOURCES: dict[str, Path] = {}
PYTHONS: dict[str, Path] = {}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
