"""What ``oomsafe demo --balloon`` says: a request that asks for 2 GiB each 1.5 s, beside good ones."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from oomsafe.demo.app import BALLOON, BALLOON_PATH
from oomsafe.demo.load import BalloonLoad
from oomsafe.demo.server import DemoServer
from oomsafe.policy.units import MIB, format_size

SOFT_LIMIT, HARD_LIMIT = 280 * MIB, 300 * MIB

#: What stands in the opening line in place of the leak.
RATE = f"beside good requests, GET {BALLOON_PATH} asks for {format_size(BALLOON)} each 1.5 s"


def result(server: DemoServer, load: BalloonLoad, without: bool) -> dict[str, Any]:
    """What the demo's result has more, or different, with a balloon."""
    return {
        "soft_limit_bytes": None if without else SOFT_LIMIT,
        "hard_limit_bytes": None if without else HARD_LIMIT,
        "balloons": load.balloons,
        "refused": load.refused,
        "killed": server.observed.killed,
    }


def is_good(result: dict[str, Any]) -> bool:
    """Whether each balloon got 503, and nobody else noticed."""
    refused = 0 < result["balloons"] == result["refused"]
    return bool(refused and not result["failed"] and not result["killed"] and result["supervisor_survived"])


def summary(result: dict[str, Any], server: DemoServer, load: BalloonLoad, without: bool) -> Text:
    """The last lines."""
    observed = server.observed
    failures = ", ".join(f"{count} {name}" for name, count in sorted(load.failures.items()))
    ends = ", ".join(f"{count} {name}" for name, count in sorted(load.ends.items()))
    rows = {
        "good requests": f"{result['requests']}, each answer checked",
        "failed": f"{result['failed']}{f' ({failures})' if failures else ''}",
        "balloons": f"{result['balloons']} ({ends})",
        "killed by SIGKILL": str(observed.killed),
        "peak of a worker": format_size(observed.peak_rss)
        + ("" if without else f", mapped files included (hard limit {format_size(HARD_LIMIT)} without them)"),
        "supervisor": f"{server.pid}, {'alive from the first second to the last' if observed.supervisor_alive else 'DEAD'}",
    }
    lines = [f"  {name:18} {value}" for name, value in rows.items()]
    return Text("\n".join(["", *lines, "", _verdict(result, without)]))


def _verdict(result: dict[str, Any], without: bool) -> str:
    balloons, failed = result["balloons"], result["failed"]
    if without:
        return (
            f"{balloons} balloons: the kernel's OOM killer took {result['killed']} workers, and with them {failed} good requests. "
            "Now try it without --without."
        )
    if not balloons:
        return "No balloon was sent in this time: run it for longer."
    if is_good(result):
        return f"{balloons} requests asked for {format_size(BALLOON)} each, and got 503. Nothing was killed, and no other request noticed."
    return "NOT GOOD: something else than the balloons was hurt. This should not happen: please report it with the lines above."
