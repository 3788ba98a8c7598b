"""What is said of a worker that is recycled, in one line: what happened, to whom, with which figures; and of one that is not."""

from __future__ import annotations

import logging

from oomsafe.log import once
from oomsafe.policy.limits import Limits
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.recycle import History, Reason
from oomsafe.policy.units import format_size


def why(limits: Limits, reason: Reason, used: int | None, held: int, history: History, asks: bool, now: float) -> str:
    """``anon 812 MiB > soft limit 768 MiB for 2.0 s``: the figure, the limit that it is over, and for how long; bytes and seconds.

    ``anon 742 MiB, growing towards soft limit 768 MiB``: its replacement serves before it is over its limit. `asks`: it still
    does; else it has stopped growing so fast.
    """
    whole = "rss" if limits.metric in COUNT_CLEAN else "anon"
    seconds = 0.0 if history.breached_since is None else now - history.breached_since
    if reason is Reason.REPLACED:
        return f"{whole} {format_size(held)}, ended by its supervisor: the pool is over its budget, or has one worker too many"
    if reason is Reason.HARD:
        return f"{whole} {format_size(held)} > hard limit {format_size(limits.hard)} for {seconds:.1f} s"
    jitter = "" if limits.early == limits.soft else f" (of {format_size(limits.soft)}, jitter)"
    if used is None or limits.early is None:
        return f"{whole} {format_size(held)}; it asked to be replaced, and its replacement serves"
    if used <= limits.early:
        until = "" if asks or history.asked_at is None else f" until {now - history.asked_at:.1f} s ago"
        return f"{limits.metric} {format_size(used)}, growing towards soft limit {format_size(limits.early)}{jitter}{until}"
    return f"{limits.metric} {format_size(used)} > soft limit {format_size(limits.early)}{jitter} for {seconds:.1f} s"


def say_it_stays(name: str) -> None:
    """Once, of a worker that nobody would replace."""
    once(
        "abandoned", logging.WARNING, "%s stays, whatever it holds: its supervisor is gone, or has stood still for seconds, and "
        "nobody would bring up another worker in its place", name,
    )  # fmt: skip
