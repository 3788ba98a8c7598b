"""What ``oomsafe demo --leak`` and ``--fragment`` say: workers are recycled until their pool's judgement is sure; a leak is then traced.

Nothing here knows what the app does: what is printed was found by the pool itself.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text

from oomsafe.demo.app import FRAGMENT_PATH
from oomsafe.demo.load import Load
from oomsafe.demo.server import DemoServer
from oomsafe.policy.probed import Stage
from oomsafe.policy.retention import Kind, Retention, judge
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import MIB

#: Of the app that fragments, so low that all workers and their replacements at once have room in the demo's cgroup: each grows in one jump,
#: and nobody is to be killed, however slow the machine. Of the leak, which the pool's budget sees coming, with room for a tracer.
FRAGMENT_LIMIT, LEAK_LIMIT = 90 * MIB, 120 * MIB

#: What stands in the opening line in place of the leak.
RATE = "the pool is to find out whether the app leaks"

#: Seconds after which it gives up.
SECONDS = 90.0

#: Requests a second, and clients that send them: of the leak, and of the one that fragments, which takes a quarter of a second.
LEAK_RATE, FRAGMENT_RATE, CONNECTIONS = 200.0, 4.0, 8


def soft_limit(fragment: bool) -> int:
    """Its workers', in bytes."""
    return FRAGMENT_LIMIT if fragment else LEAK_LIMIT


def load(server: DemoServer, fragment: bool) -> Load:
    """Its load."""
    path, rate = (FRAGMENT_PATH, FRAGMENT_RATE) if fragment else ("/leak", LEAK_RATE)
    return Load(server.port, CONNECTIONS, rate, path)


def verdict(server: DemoServer) -> Retention:
    """What the pool's recycled workers have grown by."""
    pool = server.observed.pool
    return judge(pool.retired if pool is not None else (), "requests")


def is_over(server: DemoServer) -> bool:
    """Whether all is known: for a leak, its line, too."""
    kind, pool = verdict(server).kind, server.observed.pool
    if kind is not Kind.LEAK:
        return kind is not Kind.UNKNOWN
    # one that has failed is tried again with another worker
    return pool is not None and pool.probed is not None and pool.probed.stage in (Stage.DONE, Stage.NOTHING)


def result(server: DemoServer, fragment: bool) -> dict[str, Any]:
    """What the demo's result has more."""
    found, pool = verdict(server), server.observed.pool
    probed = pool.probed if pool is not None else None
    line = probed.text if probed is not None and probed.stage is Stage.DONE else None
    return {
        "soft_limit_bytes": soft_limit(fragment),
        "verdict": found.kind.value,
        "why": found.why,
        "bytes_per_request": found.each,
        "line": line,
        "help": found.help,
        "killed": server.observed.killed,
    }


def is_good(result: dict[str, Any]) -> bool:
    """Whether it was found out, and nobody noticed."""
    unhurt = not result["failed"] and not result["killed"] and result["supervisor_survived"]
    return bool(unhurt and (result["line"] if result["verdict"] == "leak" else result["verdict"] != "unknown"))


def summary(result: dict[str, Any]) -> Text:
    """The last lines."""
    requests = f"{result['requests']} requests, {result['failed']} failed; {result['recycles']} workers were recycled"
    why = without_controls(result["why"])
    if result["verdict"] == "unknown":
        end = f"Not known yet: {why}. Run it for longer (--seconds)."
    elif result["verdict"] != "leak":
        end = f"Nothing leaks: {why}.\nWhat helps: {without_controls(result['help'])}."
    elif result["line"] is None:
        end = f"A leak: {why}. Its line was not found in this time: run it for longer (--seconds)."
    else:
        end = f"A leak: {why}.\nThe line: {without_controls(result['line'])}."
    return Text("\n".join(["", f"  {requests}", "", end]))
