"""apps.wsgi and apps.asgi behind PRELOAD_MIB of Python objects, for preload_app, and all that a worker may leave to its end."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import types

import apps

#: About so many bytes a pair of an int and a list of it.
ENTRY = 104

# a module without functions is in no cycle: the interpreter's end walks it even when it is frozen
sys.modules["preloaded_data"] = data = types.ModuleType("preloaded_data")
data.loaded = [[number] for number in range((int(os.environ["PRELOAD_MIB"]) << 20) // ENTRY)]


class Walked:
    """Says when the interpreter's end comes by."""

    def __del__(self):
        apps.tell("the heap was walked")


data.walked = Walked()
data.audit = open("audit", "a")  # noqa: SIM115  as an app does that never closes it
audit = data.audit
del data


@atexit.register
def _at_exit():
    apps.tell("at exit")


def note():
    """A line in the audit, which is not flushed; and a thread that waits for the end."""
    audit.write(f"{os.getpid()}\n")
    threading.Thread(target=_outlive).start()


def _outlive():
    threading.main_thread().join()
    audit.write(f"{os.getpid()} at the end\n")


def wsgi(environ, start_response):
    """As apps.wsgi, and /note."""
    if environ["PATH_INFO"] == "/note":
        note()
    return apps.wsgi(environ, start_response)


async def asgi(scope, receive, send):
    """As apps.asgi, and /note."""
    if scope["type"] == "http" and scope["path"] == "/note":
        note()
    await apps.asgi(scope, receive, send)
