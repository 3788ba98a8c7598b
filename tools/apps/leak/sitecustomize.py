"""The test's own: found after oomsafe's, which imports it. Where the app's code is not ours, its workers leak by this.

APPS_LEAK_KIB is what a worker that is guarded keeps, each tenth of a second. Nobody else leaks: supervisors and helpers are left alone.
"""

import os
import sys
import threading
import time

kept = []


def leak():
    kib = int(os.environ["APPS_LEAK_KIB"])
    while True:
        time.sleep(0.1)
        get_guard = getattr(sys.modules.get("oomsafe.worker.current"), "get_guard", None)  # it may be half imported
        if get_guard is not None and get_guard() is not None:
            kept.append(b"\xff" * (kib << 10))


def begin():
    threading.Thread(target=leak, daemon=True).start()


if os.environ.get("APPS_LEAK_KIB"):
    # no thread in a parent that forks
    os.register_at_fork(after_in_child=begin)
    if "--multiprocessing-fork" in sys.orig_argv or os.environ.get("APPS_SINGLE"):  # spawned, or one that has no parent that forks
        begin()
