"""What a worker publishes on the scoreboard: its figures, and whether it asks to be replaced."""

from __future__ import annotations

from collections.abc import Callable

from oomsafe.kernel.oom_score import read_score
from oomsafe.log import failed
from oomsafe.policy.state import State
from oomsafe.policy.trend import Trend
from oomsafe.scoreboard.slot import Figures, Slot
from oomsafe.worker.cadence import Cadence
from oomsafe.worker.gauge import Gauge
from oomsafe.worker.meter import Meter
from oomsafe.worker.thresholds import Thresholds


class Report:
    """The report of one worker; used under its guard's lock. `poke` wakes the supervisor; None: it reads the report at its next tick."""

    def __init__(
        self,
        slot: Slot,
        meter: Meter,
        gauge: Gauge,
        trend: Trend,
        thresholds: Thresholds,
        cadence: Cadence,
        poke: Callable[[], None] | None,
    ) -> None:
        self._slot = slot
        self._meter = meter
        self._gauge = gauge
        self._trend = trend
        self._thresholds = thresholds
        self._cadence = cadence
        self._poke = poke
        self.asks = False
        """Whether this worker asks to be replaced."""

    def ask(self, asks: bool, now: float, used: int | None, aged: bool) -> None:
        """Set whether it asks to be replaced, and publish `used`, what it holds in its soft limit's metric.

        `aged`: it has served for its lifetime, or an operator has ordered it to be recycled.
        """
        if asks is self.asks:
            return
        self.asks = asks
        self.need(now, used, aged)
        self.publish(now)
        self._slot.set_state(State.WAITING if asks else State.SERVING)
        if asks:
            self.wake_supervisor()

    def need(self, now: float, used: int | None, aged: bool) -> None:
        """Publish what it holds in its soft limit's metric, how fast it grows, and whether it is `aged`, as in ask()."""
        self._slot.need(used, self._trend.growth(now, self._meter.held), aged)

    def publish(self, now: float) -> None:
        """Publish all other figures, and set when to do so next, depending on the worker's growth."""
        meter, limits = self._meter, self._thresholds.limits
        meter.publish_at = now + self._cadence.pause(now, self.asks)
        pss, uss, private, *_ = self._gauge.shares or (None, None, None)
        known = meter.rss_known
        try:
            figures = Figures(
                rss=meter.rss if known else None, peak_rss=meter.peak_rss if known else None, anon=meter.anon if known else None,
                pss=pss, uss=uss, private=private,
                baseline=self._thresholds.baseline, soft=meter.soft_limit, hard=limits.hard,
                oom_score_adj=read_score(), in_flight=meter.in_flight, file_dirty=meter.file_dirty,
            )  # fmt: skip
            meter.publish(figures)
        except Exception as error:  # this worker protects itself, even if its figures can't be published
            failed("publish", "the server", error)

    def wake_supervisor(self) -> None:
        """Make the supervisor tick now; by itself it does so within a second."""
        try:
            if self._poke is not None:
                self._poke()
        except OSError:
            pass  # it runs as another user
