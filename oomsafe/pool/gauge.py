"""The figure that a soft limit is compared with: rss, or pss or uss, which cost too much to be read often."""

from __future__ import annotations

from oomsafe.kernel.process import shared_out
from oomsafe.policy.readers import Metric

#: Seconds between two samples of pss and uss: one holds the process's mmap_lock for 2.5 ms a GiB.
SAMPLE_EVERY = 5.0


class Gauge:
    """One process's memory, by one metric or another."""

    def __init__(self) -> None:
        self.pss: int | None = None
        self.uss: int | None = None
        """At the last sample, in bytes; None before there is one."""
        self._rss = 0
        self._sampled_at = float("-inf")

    def read(self, metric: Metric, rss: int, at_least: float, now: float) -> int:
        """Bytes by `metric`. Neither pss nor uss is ever above rss, so up to `at_least` rss says enough.

        Between two samples, what rss has grown by is taken to be the process's own. Where
        smaps_rollup may not be read it is rss.
        """
        if metric == "rss" or rss <= at_least:
            return rss
        if now - self._sampled_at >= SAMPLE_EVERY:
            self._sampled_at, self._rss = now, rss
            self.pss, self.uss = shared_out() or (None, None)
        figure = self.pss if metric == "pss" else self.uss
        return rss if figure is None else max(0, figure + rss - self._rss)

    def forget(self) -> None:
        """Memory was given back: the next read samples anew."""
        self._sampled_at = float("-inf")
