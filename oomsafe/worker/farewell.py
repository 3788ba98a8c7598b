"""The one line about a worker that is recycled: what happened, to whom, with which figures."""

from __future__ import annotations

from oomsafe.policy.limits import Limits
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.recycle import Reason
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_change, format_size


def farewell(limits: Limits, reason: Reason, used: int | None, held: int, seconds: float, stopped: float | None = None) -> str:
    """``anon 812 MiB > soft limit 768 MiB for 2.0 s``: the figure, the limit that it is over, and for how long; bytes and seconds.

    ``anon 742 MiB, growing towards soft limit 768 MiB``: its replacement serves before it is over its limit. `stopped`: seconds
    since it stopped growing so fast; None: it has not.
    """
    whole = "rss" if limits.metric in COUNT_CLEAN else "anon"
    if reason is Reason.REPLACED:
        return f"{whole} {format_size(held)}, ended by its supervisor: the pool is over its budget, or has one worker too many"
    if reason is Reason.HARD:
        return f"{whole} {format_size(held)} > hard limit {format_size(limits.hard)} for {seconds:.1f} s"
    jitter = "" if limits.early == limits.soft else f" (of {format_size(limits.soft)}, jitter)"
    if used is None or limits.early is None:
        return f"{whole} {format_size(held)}; it asked to be replaced, and its replacement serves"
    if used <= limits.early:
        until = "" if stopped is None else f" until {stopped:.1f} s ago"
        return f"{limits.metric} {format_size(used)}, growing towards soft limit {format_size(limits.early)}{jitter}{until}"
    return f"{limits.metric} {format_size(used)} > soft limit {format_size(limits.early)}{jitter} for {seconds:.1f} s"


def history(done: int, unit: str, largest: tuple[int, bytes]) -> str:
    """``after 1203 requests; largest growth in one of them: POST /reports (+410 MiB)``."""
    growth, name = largest
    most = f"; largest growth in one of them: {printable(name)} ({format_change(growth)})" if growth else ""
    return f"after {done} {unit}{most}"
