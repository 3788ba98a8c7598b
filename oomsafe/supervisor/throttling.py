"""In the supervisor: says when the kernel throttles the pool at memory.high, once for each time that it does."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from oomsafe.kernel.cgroup import highs_of, stalled_of
from oomsafe.log import log
from oomsafe.policy.limits import Kind, Level
from oomsafe.policy.throttling import Episode, follow, is_throttled
from oomsafe.policy.units import format_size


class ThrottlingLine:
    """The line of one pool."""

    def __init__(self) -> None:
        self._episode: Episode | None = None
        self._before: dict[str, int] = {}
        """By folder: how often memory.high had been passed there at the last check."""
        self._stalled: int | None = None
        self._at = 0.0

    def tick(self, levels: Sequence[Level], now: float) -> None:
        """Check, about once a second. `levels` are those of the pool's capacity; `now` is on the monotonic clock."""
        highs = [level for level in levels if level.high is not None and level.source.kind is Kind.CGROUP]
        if not highs and not self._before:
            return
        # of its own cgroup, the nearest level: the others' processes are none of the pool's
        stalled, before, seconds = stalled_of(levels[0].source.path), self._stalled, now - self._at
        share = None if stalled is None or before is None or seconds <= 0 else (stalled - before) / 1e6 / seconds
        counts = {level.source.path: count for level in highs if (count := highs_of(level.source.path)) is not None}
        hit = next((level for level in highs if self._is_throttled(level, counts, share)), None)
        self._before, self._stalled, self._at = counts, stalled, now
        self._episode, says = follow(self._episode, hit is not None, now)
        if says and hit is not None:
            self._say(hit, share)

    def _is_throttled(self, level: Level, counts: dict[str, int], share: float | None) -> bool:
        count, before = counts.get(level.source.path), self._before.get(level.source.path)
        if count is None or before is None or level.high is None:
            return False
        undroppable = None if level.used is None else level.used - level.droppable
        return is_throttled(count - before, share, undroppable, level.high)

    def _say(self, level: Level, share: float | None) -> None:
        used = "" if level.used is None else f"; {format_size(level.used - level.droppable)} of what is in use there can't be dropped"
        waits = "" if share is None else f"; its processes waited for memory for {min(1.0, share):.0%} of the last second"
        log.log(
            logging.WARNING, "the kernel throttles this pool: it is above memory.high %s of cgroup v%d %s%s%s: raise MemoryHigh, or lower "
            "soft_limit, or have fewer workers", format_size(level.high), level.source.version, level.source.path, used, waits,
        )  # fmt: skip
