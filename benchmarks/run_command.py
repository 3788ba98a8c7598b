"""What `oomsafe run` costs: the start of a command, a Python below it that serves nothing, and a worker's memory. Prints Markdown."""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from oomsafe.demo.server_process import ServerProcess, environment, free_ports, until
from oomsafe.run.environment import PATH

PYTHON = sys.executable
RUN = (PYTHON, "-m", "oomsafe", "run", "--")
STARTS, BOOTS, WORKERS = 60, 3, 10

APP = """
def wsgi(environ, start_response):
    start_response("200 OK", [])
    return [b"hello"]

async def asgi(scope, receive, send):
    await receive()
    if scope["type"] == "lifespan":
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
"""


def taken(command: Sequence[str], environ: dict[str, str]) -> tuple[float, float]:
    """Milliseconds from its start to its end, and of a processor's time."""
    began = time.perf_counter()
    pid = os.posix_spawn(command[0], command, environ)
    _, _, usage = os.wait4(pid, 0)
    return (time.perf_counter() - began) * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3


def starts() -> None:
    plain = environment()
    plain.pop("PYTHONDONTWRITEBYTECODE", None)
    # what `oomsafe run` has put into the environment
    below = {**plain, "OOMSAFE_RUN": "1", "PYTHONPATH": os.pathsep.join(filter(None, [PATH, plain.get("PYTHONPATH")]))}
    script = str(Path(PYTHON).with_name("oomsafe"))
    cases = {
        "`python -c pass`": ((PYTHON, "-c", "pass"), plain),
        "the same below `oomsafe run`, where nothing serves": ((PYTHON, "-c", "pass"), below),
        "`oomsafe run -- python -c pass`": ((script, "run", "--", PYTHON, "-c", "pass"), plain),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(STARTS):
        for name, (command, environ) in cases.items():
            found[name].append(taken(command, environ))
    print("| | processor time, ms | time, ms | fastest, ms |\n| --- | --- | --- | --- |")
    for name, pairs in found.items():
        times, used = zip(*pairs, strict=True)
        print(f"| {name} | {quartiles(used)} | {quartiles(times)} | {min(times):.1f} |")


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def anon(pid: int) -> float:
    """In MiB."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def memory() -> None:
    (port,) = free_ports()
    gunicorn = ("-w", str(WORKERS), "-b", f"127.0.0.1:{port}", "--no-control-socket", "app:wsgi")
    uvicorn = ("--workers", str(WORKERS), "--port", str(port), "app:asgi")
    cases = {
        "gunicorn, by hand": (PYTHON, "-m", "gunicorn", "-c", "python:oomsafe.gunicorn.conf", *gunicorn),
        "gunicorn, `oomsafe run`": (*RUN, PYTHON, "-m", "gunicorn", *gunicorn),
        "uvicorn, by hand": (PYTHON, "-m", "oomsafe.uvicorn", *uvicorn),
        "uvicorn, `oomsafe run`": (*RUN, PYTHON, "-m", "uvicorn", *uvicorn),
    }
    found: dict[str, list[float]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "app.py").write_text(APP)
        for _ in range(BOOTS):
            for name, command in cases.items():
                with ServerProcess(command, folder, {**environment(), "OOMSAFE_SOFT_LIMIT": "500MiB"}) as server:
                    until(lambda server=server: [w.state for w in server.pool().workers] == ["serving"] * WORKERS, f"{name} serves", 120)
                    time.sleep(2)  # it has taken its first breath
                    found[name] += [anon(worker.pid) for worker in server.pool().workers]
    print("\n| | a worker's anonymous memory, MiB |\n| --- | --- |")
    for name, sizes in found.items():
        print(f"| {name} | {statistics.median(sizes):.2f} ({min(sizes):.2f}-{max(sizes):.2f}) |")


if __name__ == "__main__":
    starts()
    memory()
