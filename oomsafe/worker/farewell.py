"""The one line about a worker that is recycled: what happened, to whom, with which figures."""

from __future__ import annotations

from oomsafe.policy.limits import Limits
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.recycle import Reason
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_change, format_size


def farewell(limits: Limits, reason: Reason, used: int | None, held: int, seconds: float) -> str:
    """``anon 812 MiB > soft limit 768 MiB for 2.0 s``: the figure, the limit that it is over, and for how long; bytes and seconds.

    ``anon 742 MiB, growing towards soft limit 768 MiB``: one whose replacement is there before it is over its limit.
    """
    whole = "rss" if limits.metric in COUNT_CLEAN else "anon"
    if reason is Reason.REPLACED:
        return f"{whole} {format_size(held)}; it was over its limit, or one worker too many, and another serves in its place"
    if reason is Reason.HARD:
        return f"{whole} {format_size(held)} > hard limit {format_size(limits.hard)} for {seconds:.1f} s"
    jitter = "" if limits.early == limits.soft else f" (of {format_size(limits.soft)}, jitter)"
    if used is not None and limits.early is not None and used <= limits.early:
        return f"{limits.metric} {format_size(used)}, growing towards soft limit {format_size(limits.early)}{jitter}"
    return f"{limits.metric} {format_size(used)} > soft limit {format_size(limits.early)}{jitter} for {seconds:.1f} s"


def history(done: int, unit: str, largest: tuple[int, bytes]) -> str:
    """``after 1203 requests; largest growth in one of them: POST /reports (+410 MiB)``."""
    growth, name = largest
    most = f"; largest growth in one of them: {printable(name)} ({format_change(growth)})" if growth else ""
    return f"after {done} {unit}{most}"
