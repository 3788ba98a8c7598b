"""A supervisor of no server: it has a board, it ticks, and SIGHUP has it read its policy anew, from the lines of the file `policy`."""

from __future__ import annotations

import json
import logging
import os
import posix
import signal
import time

from oomsafe.policy.settings import load_policy
from oomsafe.supervisor.supervisor import Supervisor

# not to stdout: where that is closed, its number may be the scoreboard's
logging.basicConfig(level=logging.INFO, filename="server.log", format="%(message)s")
for descriptor in map(int, os.environ.get("CLOSED", "").split()):
    os.close(descriptor)
if os.environ.get("INHERITABLE"):
    os.set_inheritable(os.open("/dev/zero", os.O_RDONLY), True)
if os.environ.get("GEVENT"):
    from gevent import monkey

    monkey.patch_all()


def policy():
    with open("policy") as file:
        return load_policy({}, json.load(file))[0]


supervisor = Supervisor(policy(), "test", 2)
slots = [supervisor.reserve() for _ in range(2)]
for slot in slots:
    pid = posix.fork()  # gevent's own would watch them
    if not pid:
        supervisor.enlist(slot)
        while True:
            time.sleep(60)
    supervisor.born(slot, pid)


if os.environ.get("UNKNOWN_FORK"):
    # by C code: nobody hears of it, and it has all that is open here
    import ctypes

    if not ctypes.PyDLL(None).fork():
        ctypes.CDLL(None).pause()


def end(*_):
    supervisor.close()
    logging.info("closed")
    for entry in supervisor.board.pids:
        os.kill(entry, signal.SIGKILL)
    os._exit(0)


reloads = []
signal.signal(signal.SIGHUP, lambda *_: reloads.append(True))
signal.signal(signal.SIGTERM, end)
while True:
    if reloads:
        reloads.clear()
        supervisor.change(2, policy())
    supervisor.tick()
    time.sleep(0.02)
