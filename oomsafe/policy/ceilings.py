"""The limits of one piece of work while it runs: when to warn it, when to stop it, and when to check it next."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from oomsafe.policy.units import GIB

#: Bytes a second that any work may suddenly grow by, however quiet it was: plain memset reaches it.
SUDDEN = 2 * GIB

#: Bytes above its hard limit at which work is stopped that the kernel refuses more memory at that limit. While such work handles its
#: MemoryError, it is at the limit; it may be above it by pages that were mapped but not touched when it began, and by stacks of threads.
SPARE = 4 << 20

#: Seconds between two checks, at most and at least. The least costs 1 % of one processor while work stays just below its limit.
SELDOM, OFTEN = 0.1, 0.004


class Ceiling(NamedTuple):
    """The limits of one piece of work in bytes; None means no such limit."""

    soft: int | None = None
    """Above it the work is warned, once, and may end by itself."""
    hard: int | None = None
    """Above it the work is stopped."""
    absolute: bool = False
    """Compare both limits with all that the process holds, and not with what it has grown by since the work began."""
    spare: int = 0
    """Bytes above `hard` at which the work is stopped."""


class Act(Enum):
    """From mildest to last."""

    LEAVE = "leave"
    TELL = "tell"
    STOP = "stop"


class Ruling(NamedTuple):
    """The result of one check: what to do with the work."""

    act: Act
    used: int
    """Bytes, as the limits count them."""
    limit: int | None
    """The limit that the work is over; None if it is over none, or only over the soft limit that it was warned about."""
    again: float
    """Seconds until the next check."""


def judge(ceiling: Ceiling, before: int, held: int, speed: float, warned: bool) -> Ruling:
    """Check work that began when its process held `before` bytes; the process now holds `held` bytes.

    `speed` is its growth since the last check in bytes a second; `warned` is whether it was already warned about its soft limit.
    """
    used = held if ceiling.absolute else max(0, held - before)
    stop_at = None if ceiling.hard is None else ceiling.hard + ceiling.spare
    if stop_at is not None and used > stop_at:
        return Ruling(Act.STOP, used, ceiling.hard, OFTEN)
    if ceiling.soft is not None and used > ceiling.soft and not warned:
        return Ruling(Act.TELL, used, ceiling.soft, OFTEN)
    ahead = [limit - used for limit in (ceiling.soft, stop_at) if limit is not None and limit >= used]
    return Ruling(Act.LEAVE, used, None, next_check(min(ahead), speed) if ahead else SELDOM)


def next_check(headroom: int, speed: float) -> float:
    """Seconds until the next check of work that has `headroom` bytes left and grows by `speed` bytes a second.

    This is half the time that it would need at twice its speed, because nothing makes up for a check that comes too late.
    """
    return min(SELDOM, max(OFTEN, headroom / (2 * max(2 * speed, SUDDEN))))


def lowered(own: Ceiling, asked: Ceiling) -> Ceiling:
    """`own` with each limit lowered to what was asked for: a caller may ask for less, never for more."""
    return Ceiling(_least(own.soft, asked.soft), _least(own.hard, asked.hard), own.absolute)


def in_order(ceiling: Ceiling) -> Ceiling:
    """`ceiling` without its soft limit, if that would never be reached before the hard one."""
    never = ceiling.soft is not None and ceiling.hard is not None and ceiling.soft >= ceiling.hard
    return ceiling._replace(soft=None) if never else ceiling


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
