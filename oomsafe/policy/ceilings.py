"""What one piece of work may take while it runs: when it is told, when it is stopped, and when to look next."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from oomsafe.policy.units import GIB

#: Bytes a second that any work is taken to be able to grow by, however still it was: plain memset reaches it.
SUDDEN = 2 * GIB

#: Seconds between two looks: the most, and the least, which costs a hundredth of one processor for as long as work is just below its limit.
SELDOM, OFTEN = 0.1, 0.004


class Ceiling(NamedTuple):
    """The limits of one piece of work in bytes; None means that this one does not apply."""

    soft: int | None = None
    """Above it the work is told, once, and may end by itself."""
    hard: int | None = None
    """Above it the work is stopped."""
    absolute: bool = False
    """Whether both are compared with all that the process holds, and not with what it has grown by since the work began."""


class Step(Enum):
    """From mildest to last."""

    LEAVE = "leave"
    TELL = "tell"
    STOP = "stop"


class Look(NamedTuple):
    """What to do with work that was looked at."""

    step: Step
    used: int
    """Bytes, as the limits count them."""
    limit: int | None
    """The one that it is over; None while it is over none that it has not been told of."""
    again: float
    """Seconds until the next look."""


def judge(ceiling: Ceiling, before: int, held: int, speed: float, told: bool) -> Look:
    """One look at work that began when its process held `before` bytes, and now holds `held`.

    `speed` is what it grew by since the last look, in bytes a second; `told`, whether its soft limit is behind it.
    """
    used = held if ceiling.absolute else max(0, held - before)
    if ceiling.hard is not None and used > ceiling.hard:
        return Look(Step.STOP, used, ceiling.hard, OFTEN)
    if ceiling.soft is not None and used > ceiling.soft and not told:
        return Look(Step.TELL, used, ceiling.soft, OFTEN)
    ahead = [limit - used for limit in (ceiling.soft, ceiling.hard) if limit is not None and limit >= used]
    return Look(Step.LEAVE, used, None, next_look(min(ahead), speed) if ahead else SELDOM)


def next_look(headroom: int, speed: float) -> float:
    """Seconds until work with so many bytes left, growing by `speed` bytes a second, must be looked at.

    In half the time that it would need at twice its speed, for a look that comes too late can't be made up for.
    """
    return min(SELDOM, max(OFTEN, headroom / (2 * max(2 * speed, SUDDEN))))


def lowered(own: Ceiling, asked: Ceiling) -> Ceiling:
    """`own`, each limit of it at most what was asked for: who asks may take less, never more."""
    return Ceiling(_least(own.soft, asked.soft), _least(own.hard, asked.hard), own.absolute)


def in_order(ceiling: Ceiling) -> Ceiling:
    """The same, without a soft limit that would never be met before the hard one."""
    never = ceiling.soft is not None and ceiling.hard is not None and ceiling.soft >= ceiling.hard
    return ceiling._replace(soft=None) if never else ceiling


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
