"""Importing oomsafe does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

LOOK = """
import json, logging, os, signal, sys, threading
def look():
    return {
        "threads": threading.active_count(),
        "tasks": len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1,
        "descriptors": sorted(os.listdir("/dev/fd")),
        "signals": [str(signal.getsignal(n)) for n in sorted(signal.valid_signals())],
        "handlers": [str(logging.getLogger(name).handlers) for name in (None, "oomsafe", "oomsafe.kernel")],
        "levels": [logging.getLogger(name).level for name in (None, "oomsafe")],
        "environ": dict(os.environ),
        "hooks": [str(sys.excepthook), str(threading.excepthook), str(sys.gettrace()), str(sys.getprofile())],
    }
before = look()
import oomsafe
print(json.dumps([before, look(), sorted(sys.modules)]))
"""


def test_importing_does_nothing() -> None:
    """No thread, descriptor, signal handler, logging handler or variable, and nothing dear is imported."""
    ran = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True)

    before, after, modules = json.loads(ran.stdout)
    assert before == after
    assert ran.stderr == ""
    assert {"psutil", "ctypes", "asyncio", "hmac", "difflib", "gunicorn", "uvicorn", "starlette", "flask", "django"} & set(modules) == set()


def test_the_middleware_need_no_server_and_no_framework() -> None:
    """Each of the two imports nothing of the other, nor of any framework."""
    for ours, others in (("wsgi", "oomsafe.asgi"), ("asgi", "oomsafe.wsgi")):
        code = f"import sys, oomsafe.{ours}; print(*sys.modules)"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

        assert {others, "gunicorn", "uvicorn", "starlette", "flask", "django", "psutil"} & set(ran.stdout.split()) == set()


#: What macOS has not, of what we use.
LACKS = """
import fcntl, os, signal
missing = {
    fcntl: [name for name in dir(fcntl) if "SEAL" in name],
    os: [name for name in dir(os) if name.startswith(("MFD_", "memfd_", "pidfd_", "posix_fallocate", "sched_"))],
    signal: ["SIGRTMIN", "SIGRTMAX", "pidfd_send_signal"],
}
for module, names in missing.items():
    for name in names:
        delattr(module, name)
signal.SIGINFO = 29
import importlib, pkgutil, oomsafe
for found in pkgutil.walk_packages(oomsafe.__path__, "oomsafe."):
    if not found.name.endswith(("__main__", "gunicorn.conf", "django.middleware")):
        importlib.import_module(found.name)
"""


def test_nothing_that_only_linux_has_is_needed_to_import_it() -> None:
    """On macOS workers start, with what can be had there."""
    ran = subprocess.run([sys.executable, "-c", LACKS], capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stderr
