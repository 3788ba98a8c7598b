"""How fast a worker grows, seen from outside, and when it will be at its limit. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from oomsafe.policy.trend import Sample

#: The most samples that are kept of one worker, and the least seconds between two of them.
SAMPLES, SAMPLE_EVERY = 12, 0.9

#: From so many samples, over so many seconds, growth can be told from one request's memory.
LEAST, OVER = 4, 3.0

#: Growth that would take longer than this many seconds to the limit is none worth a figure: a week.
LONGEST = 7 * 86400.0


def kept(samples: Sequence[Sample], new: Sample) -> tuple[Sample, ...]:
    """`samples` with `new`, which is ignored if it comes too soon after the last; the oldest make room for it."""
    if samples and new.at - samples[-1].at < SAMPLE_EVERY:
        return tuple(samples)
    return (*samples[-(SAMPLES - 1) :], new)


def pace_of(samples: Sequence[Sample]) -> float | None:
    """Bytes a second, negative if the worker shrinks; None: there are too few samples to tell.

    The median of the slopes between each two samples (Theil and Sen): one balloon or one collection among them does not move it, as it
    would move a line through the first and the last.
    """
    if len(samples) < LEAST or samples[-1].at - samples[0].at < OVER:
        return None
    pairs = [(earlier, later) for at, later in enumerate(samples) for earlier in samples[:at] if later.at > earlier.at]
    return statistics.median((later.used - earlier.used) / (later.at - earlier.at) for earlier, later in pairs) if pairs else None


def time_to_limit(used: int | None, limit: int | None, pace: float | None) -> float | None:
    """Seconds until a worker that holds `used` bytes and grows by `pace` bytes a second is at `limit`; 0 above it.

    None: a figure is not known, there is no limit, the worker does not grow, or it would take longer than LONGEST.
    """
    if used is None or limit is None:
        return None
    if used >= limit:
        return 0.0
    if pace is None or pace <= 0:
        return None
    seconds = (limit - used) / pace
    return seconds if seconds <= LONGEST else None
