"""Whether a worker that has settled above its soft limit needs what it holds: judged from those that settled before it. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from oomsafe.policy.recycle import SETTLED_WORKERS, Reason
from oomsafe.policy.retirement import Retirement
from oomsafe.policy.units import format_size

#: Growth of which at least this share was in use at the workers' ends was needed.
IN_USE = 0.5

#: Retirements that must be known.
LEAST = 2


@dataclass(frozen=True)
class Grant:
    """What is known of the need."""

    needed: bool = False
    """What the workers before it had grown by was in use: the next one will need as much. False: it was free memory, or is not known."""
    why: str = ""
    """In figures, as the end of a sentence; empty: not known."""


def grant(retired: Sequence[Retirement]) -> Grant:
    """What a worker that has settled above its soft limit is to be granted; `retired`: the pool's, in any order."""
    latest = sorted((one for one in retired if one.reason == Reason.SOFT.value), key=lambda one: one.at)[-SETTLED_WORKERS:]
    known = [(one.parts.kept, one.grown) for one in latest if one.parts.kept is not None and one.grown is not None and one.grown > 0]
    if len(known) < LEAST:
        return Grant()
    shares = [min(1.0, kept / grown) for kept, grown in known]
    size = format_size(round(statistics.median(grown for _, grown in known)))
    least, most = f"{min(shares):.0%}", f"{max(shares):.0%}"
    kept = least if least == most else f"{least} to {most}"
    needed = all(1.0 - share >= IN_USE for share in shares)
    return Grant(
        needed, f"; of {size} that they had grown by, {kept} was free memory{'' if needed else ', which a new worker need not hold'}"
    )
