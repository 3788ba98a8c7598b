"""Runs the code of Celery's clients in forks of a process that has imported Celery: else each would take most of its time to import it."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path


class Clients:
    """The processes that fork: as many as are in use at once. They end with this one."""

    def __init__(self) -> None:
        self._idle: list[subprocess.Popen[str]] = []

    def run(self, code: str, folder: Path, environ: Mapping[str, str], seconds: float) -> str:
        """Run code in `folder` with this environment, and return what it prints. Raises AssertionError with its error, TimeoutError.

        From any thread.
        """
        try:
            process = self._idle.pop()
        except IndexError:
            process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None and process.stdout is not None
        order = {"code": code, "folder": str(folder), "environ": dict(environ), "seconds": seconds}
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        status, out, err = json.loads(process.stdout.readline())
        self._idle.append(process)
        if status == -signal.SIGALRM:
            raise TimeoutError(f"not within {seconds} s: {code}")
        assert status == 0, err
        return str(out)


def run(order: dict[str, str]) -> tuple[int, str, str]:
    """In the process that forks: its status, and what it has printed."""
    folder = Path(order["folder"])
    names = [folder / f"client.{os.getpid()}.{kind}" for kind in ("out", "err")]
    out, err = (os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600) for name in names)
    pid = os.fork()
    if pid == 0:
        _be(order, out, err)
    _, status = os.waitpid(pid, 0)
    told = []
    for name, written in zip(names, (out, err), strict=True):
        told.append(os.pread(written, 1 << 20, 0).decode("utf-8", "replace"))
        os.close(written)
        name.unlink()
    return os.waitstatus_to_exitcode(status), told[0], told[1]


def _be(order: dict[str, str], out: int, err: int) -> None:
    """In the fork."""
    status = 1
    try:
        signal.setitimer(signal.ITIMER_REAL, float(order["seconds"]))
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(0)
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environ"])
        sys.path[:1] = ["", *order["environ"].get("PYTHONPATH", "").split(os.pathsep)]  # type: ignore[attr-defined]
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        exec(compile(order["code"], "<client>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Until its parent ends."""
    for name in ("celery.backends.redis", "kombu.transport.redis", "kombu.transport.filesystem", "kombu.transport.pyamqp"):
        importlib.import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
