"""The one log line about a recycled worker (what happened, to which worker, with which figures), and about one that is not."""

from __future__ import annotations

import logging

from oomsafe.log import once
from oomsafe.policy.limits import Limits
from oomsafe.policy.readers import COUNT_CLEAN
from oomsafe.policy.recycle import History, Reason
from oomsafe.policy.units import format_duration, format_size


def why(limits: Limits, reason: Reason, used: int | None, held: int, history: History, asks: bool, now: float) -> str:
    """``anon 812 MiB > soft limit 768 MiB for 2.0 s``: the figure, the limit that it exceeds, and for how long.

    ``served for 5.8 h > max_lifetime 5.7 h (of 6 h, jitter)``: it leaves for its age.

    ``by an operator's order: anon 171 MiB``: somebody has run `oomsafe recycle`.

    ``its allocations were traced: anon 171 MiB``: it was probed, and is slower since.

    ``anon 742 MiB, growing towards soft limit 768 MiB``: its replacement serves before it is over its limit. `used` and `held` are in
    bytes, None: not known. `asks`: it still asks to be replaced; False: it has stopped growing so fast.
    """
    whole = "rss" if limits.metric in COUNT_CLEAN else "anon"
    if reason is Reason.LIFETIME:
        jitter = "" if limits.lifetime == limits.max_lifetime else f" (of {format_duration(limits.max_lifetime or 0)}, jitter)"
        return f"served for {format_duration(now - history.ready_at)} > max_lifetime {format_duration(limits.lifetime or 0)}{jitter}"
    seconds = 0.0 if history.breached_since is None else now - history.breached_since
    if reason is Reason.PROBED:
        return f"its allocations were traced: {whole} {format_size(held)}"
    if reason is Reason.OPERATOR:
        return f"by an operator's order: {whole} {format_size(held)}"
    if reason is Reason.REPLACED:
        return f"{whole} {format_size(held)}, ended by its supervisor: the pool is over its budget, or has one worker too many"
    if reason is Reason.BUDGET:
        with_ = "" if history.ready_with is None else f", {format_size(history.ready_with)} right after boot"
        return f"by its supervisor's order, for the pool's budget: {whole} {format_size(held)}{with_}"
    if reason is Reason.HARD and history.spent:
        return (
            f"{whole} {format_size(held)}, and its hard limit {format_size(limits.hard)} leaves little of the room that it had after boot"
        )
    if reason is Reason.HARD:
        return f"{whole} {format_size(held)} > hard limit {format_size(limits.hard)} for {seconds:.1f} s"
    jitter = "" if limits.early == limits.soft else f" (of {format_size(limits.soft)}, jitter)"
    if used is None or limits.early is None:
        return f"{whole} {format_size(held)}; it asked to be replaced, and its replacement serves"
    if used <= limits.early:
        since = 0.0 if asks or history.asked_at is None else now - history.asked_at
        until = f" until {since:.1f} s ago" if since >= 0.05 else ""  # less is shown as 0.0
        return f"{limits.metric} {format_size(used)}, growing towards soft limit {format_size(limits.early)}{jitter}{until}"
    return f"{limits.metric} {format_size(used)} > soft limit {format_size(limits.early)}{jitter} for {seconds:.1f} s"


def say_it_stays(name: str) -> None:
    """Log once that this worker stays, because nothing would replace it."""
    once(
        "abandoned", logging.WARNING, "%s stays, whatever it holds and however long it has served: its supervisor is gone, or has stood "
        "still for seconds, and nothing would start another worker in its place", name,
    )  # fmt: skip
