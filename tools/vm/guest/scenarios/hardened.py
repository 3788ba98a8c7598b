"""In a hardened unit, whose /proc has only processes, each server starts and is guarded, and its supervisor outlives a kernel kill."""

import sys
from pathlib import Path

from guest import MIB, until

HARDENED = {
    "User": "daemon", "NoNewPrivileges": "yes", "ProtectProc": "invisible", "ProcSubset": "pid", "ProtectSystem": "strict",
    "PrivateTmp": "yes", "ProtectControlGroups": "yes", "ReadWritePaths": "/run/broker", "MemoryMax": "300M", "OOMPolicy": "continue",
}  # fmt: skip

#: Where tasks.py has its messages and results.
BROKER = Path("/run/broker")


def run(vm):
    """Three servers, one after the other."""
    for name in ("", "in", "results"):
        (BROKER / name).mkdir()
        (BROKER / name).chmod(0o777)
    with vm.part("gunicorn"):
        web(vm, vm.gunicorn("gunicorn", **HARDENED))
    with vm.part("uvicorn"):
        command = [sys.executable, "-m", "oomsafe.uvicorn", "app:asgi", "--workers", "2", "--port", "0"]
        web(vm, vm.unit("uvicorn", command, **HARDENED))
    with vm.part("celery"):
        command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-c", "2", "--without-gossip", "--without-mingle"]
        celery(vm, vm.unit("celery", command, **HARDENED))


def web(vm, unit):
    """One request takes all."""
    limit = unit.pool().limit
    supervisor, workers = unit.pid, set(unit.workers())
    unit.get("/hog")
    until(lambda: workers - set(unit.workers()), "a worker is gone")
    vm.check("kernel kills", unit.kills, 1)
    unit.pool()
    vm.holds("it serves", unit.get("/"), "GET /")
    judge(vm, unit, supervisor, limit)


def celery(vm, unit):
    """One task takes all."""
    import tasks

    limit, supervisor = unit.pool().limit, unit.pid
    vm.check("a task fails with", type(tasks.hog.delay().get(timeout=150, propagate=False)).__name__, "WorkerOutOfMemory")
    vm.check("another's result", tasks.add.delay(1, 2).get(timeout=60), 3)
    judge(vm, unit, supervisor, limit)


def judge(vm, unit, supervisor, limit):
    """What holds for all."""
    vm.check("the pool's limit, MiB", limit and limit // MIB, 300)
    vm.check("the supervisor", unit.pid, supervisor)
    vm.check("lines that say oomsafe failed", unit.lines("oomsafe failed"), [])
    vm.stop(unit)
