"""What a worker says of itself on the scoreboard: its figures, and whether it asks to be replaced."""

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
    """Of one worker; used under its guard's lock. `poke` wakes the supervisor; None: it sees all this when it looks next."""

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

    def ask(self, asks: bool, now: float, used: int | None) -> None:
        """Whether it asks from now on, and what it holds by its soft limit's metric: its supervisor decides by that."""
        if asks is self.asks:
            return
        self.asks = asks
        self.need(now, used)
        self.publish(now)
        self._slot.set_state(State.WAITING if asks else State.SERVING)
        if asks:
            self.wake_supervisor()

    def need(self, now: float, used: int | None) -> None:
        """What it holds by its soft limit's metric, and how fast it grows."""
        self._slot.need(used, self._trend.growth(now, self._meter.held))

    def publish(self, now: float) -> None:
        """All other figures. The next time is as soon as the worker's growth makes it due."""
        meter, limits = self._meter, self._thresholds.limits
        meter.publish_at = now + self._cadence.pause(now, self.asks)
        pss, uss, private, *_ = self._gauge.shares or (None, None, None)
        known = meter.rss_known
        try:
            figures = Figures(
                rss=meter.rss if known else None, peak_rss=meter.peak_rss if known else None, anon=meter.anon if known else None,
                pss=pss, uss=uss, private=private,
                baseline=self._thresholds.baseline, soft=meter.soft_limit, hard=limits.hard,
                oom_score_adj=read_score(), in_flight=meter.in_flight,
            )  # fmt: skip
            meter.publish(figures)
        except Exception as error:  # whether others can see it or not, this worker protects itself
            failed("publish", "the server", error)

    def wake_supervisor(self) -> None:
        """Have it look now: by itself it does within a second."""
        try:
            if self._poke is not None:
                self._poke()
        except OSError:
            pass  # it belongs to another user
