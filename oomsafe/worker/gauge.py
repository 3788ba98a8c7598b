"""The figure that a soft limit is compared with: anon or rss, or private, pss or uss, which are too expensive to read often."""

from __future__ import annotations

from oomsafe.kernel.process import Shares, awaits_writing, file_dirty_of, shared_out
from oomsafe.policy.readers import Metric

#: Seconds between two samples of private, pss and uss: one holds the process's mmap_lock for 2.5 ms a GiB.
SAMPLE_EVERY = 5.0

#: Seconds until the next attempt after a sample could not be read, or not be believed.
TRY_AGAIN = 0.5


class Gauge:
    """One process's memory, in any metric."""

    def __init__(self) -> None:
        self.shares: Shares | None = None
        """The last sample; None before there is one, and if none can be read."""
        self._before = 0
        """What was held at the last sample, without file pages."""
        self._dirty = 0
        self._dirty_at = float("-inf")
        self._sample_at = float("-inf")

    def read(self, metric: Metric, held: int, at_least: float, now: float) -> int:
        """Bytes in `metric`. `held` is rss or anon, whichever includes this metric; up to `at_least`, `held` itself is returned.

        Between two samples, growth of `held` counts as the process's own. If
        smaps_rollup may not be read, the result is `held`.
        """
        if metric in ("anon", "rss") or held <= at_least:
            return held
        shares = self._sample(held, now)
        if shares is None:
            return held
        figure = shares.private if metric == "private" else shares.pss if metric == "pss" else shares.uss
        return max(0, figure + held - self._before)

    def file_dirty(self, held: int, rss: int, at_least: float, now: float) -> int:
        """Bytes of file pages that the process has written to and the kernel can't drop yet; `held` includes the previous result.

        0 if they can't lift `held` above `at_least`: they are bounded by what is resident, and by what the whole machine still has to
        write, which is cheap to read.
        """
        bound = awaits_writing() if rss > at_least else 0
        if bound is not None and held - self._dirty + bound <= at_least:
            self._dirty = 0
        elif now >= self._dirty_at:
            self._dirty_at = now + SAMPLE_EVERY
            try:
                self._dirty = file_dirty_of() or 0
            except MemoryError:
                pass  # at its hard limit: smaps takes more memory than it has, and its limit must be measured all the same
        return self._dirty

    def forget(self) -> None:
        """Take a new sample at the next read. Call this after memory was given back."""
        self._sample_at = float("-inf")

    def keep(self) -> None:
        """Take no new sample until forget(): a fork of this process shares its pages for a while."""
        self._sample_at = float("inf")

    def _sample(self, held: int, now: float) -> Shares | None:
        if now >= self._sample_at:
            self._before, self.shares = held - self._dirty, shared_out()
            self._sample_at = now + (SAMPLE_EVERY if self.shares else TRY_AGAIN)
        return self.shares
