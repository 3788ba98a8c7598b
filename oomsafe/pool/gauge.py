"""The figure that a soft limit is compared with: rss, or pss or uss, which cost too much to be read often."""

from __future__ import annotations

from oomsafe.kernel.process import shared_out
from oomsafe.policy.readers import Metric

#: Seconds between two samples of pss and uss: one holds the process's mmap_lock for 2.5 ms a GiB.
SAMPLE_EVERY = 5.0


class Gauge:
    """One process's memory by the policy's metric."""

    def __init__(self, metric: Metric) -> None:
        self.pss: int | None = None
        self.uss: int | None = None
        """At the last sample, in bytes; None before there is one."""
        self._metric = metric
        self._sampled_at = float("-inf")

    def read(self, rss: int, at_least: float, now: float) -> int:
        """Bytes by the metric. Neither pss nor uss is ever above rss, so up to `at_least` rss says enough.

        rss also where smaps_rollup may not be read.
        """
        if self._metric == "rss" or rss <= at_least:
            return rss
        if now - self._sampled_at >= SAMPLE_EVERY:
            self._sampled_at = now
            self.pss, self.uss = shared_out() or (None, None)
        figure = self.pss if self._metric == "pss" else self.uss
        return rss if figure is None else figure

    def forget(self) -> None:
        """Memory was given back: the next read samples anew."""
        self._sampled_at = float("-inf")
