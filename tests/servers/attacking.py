"""An app whose worker has been taken over: it writes into the pool's shared memory whatever may hurt the supervisor."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

from oomsafe.kernel.process import start_time
from oomsafe.policy.state import State
from oomsafe.scoreboard import layout
from oomsafe.worker.current import get_guard


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """One attack a path; the answer says what became of it."""
    attack = ATTACKS.get(environ["PATH_INFO"])
    answer = attack(parse_qs(environ["QUERY_STRING"])) if attack else "nothing"
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [f"{os.getpid()} {answer}".encode()]


def claim(query: dict[str, list[str]]) -> str:
    """Every slot is said to be another process's."""
    pid, memory = int(query["pid"][0]), _memory()
    for at in _slots(memory):
        layout.write(memory, at + layout.OWNER_AT, struct.Struct("<QQ"), pid, start_time(pid) or 0)
    return "claimed"


def truncate(query: dict[str, list[str]]) -> str:
    """Whatever is open here and belongs to the pool is cut to nothing."""
    done = []
    for name in os.listdir("/proc/self/fd"):
        try:
            link = os.readlink(f"/proc/self/fd/{name}")
            if "oomsafe" in link:
                os.ftruncate(int(name), 0)
                done.append(link)
        except OSError as error:
            done.append(error.strerror or "?")
    return ", ".join(done)


def odd(query: dict[str, list[str]]) -> str:
    """Every writer looks as if it were in the middle, for ever."""
    memory = _memory()
    for at in _slots(memory):
        layout.write_state(memory, at, State.SERVING)
        layout.write(memory, at + layout.OWNER_AT, struct.Struct("<QQ"), os.getppid(), start_time(os.getppid()) or 0)
        layout.write(memory, at + layout.SLOT_SEQUENCE_AT, layout.SEQUENCE, (1 << 64) - 1)
    layout.write(memory, layout.SEQUENCE_AT, layout.SEQUENCE, (1 << 64) - 1)
    return "odd"


def fill(query: dict[str, list[str]]) -> str:
    """Every byte behind the identity is 0xff: counters, generations and sequences at their ends, states and floats that are none."""
    memory = _memory()
    memory[layout.IDENTITY.size :] = b"\xff" * (len(memory) - layout.IDENTITY.size)
    return "filled"


def _memory() -> memoryview:
    guard = get_guard()
    assert guard is not None
    assert guard._board is not None
    return guard._board._memory


def _slots(memory: memoryview) -> range:
    return range(layout.HEADER_SIZE, len(memory), layout.SLOT_SIZE)


ATTACKS = {"/claim": claim, "/truncate": truncate, "/odd": odd, "/fill": fill}
