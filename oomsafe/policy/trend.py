"""How fast a process grows: steadily, apart from one-off jumps, and at this moment. Pure."""

from __future__ import annotations

from typing import NamedTuple

#: The least seconds between two samples: over a shorter span, one piece of work looks like a trend.
SAMPLE_EVERY = 0.2

#: The least seconds over which growth can be told from noise.
MOMENT = 0.05

#: Seconds for which a worker that grew fast is expected to do so again.
LATELY = 2.0

#: How many spans between samples are remembered.
SPANS = 3


class Growth(NamedTuple):
    """The growth of a process in bytes a second, never negative."""

    steady: float = 0.0
    """Without the span in which it grew most, because one balloon fills one span. 0 while there are too few samples."""
    burst: float = 0.0
    """Over the last moment (MOMENT or a little more), whatever caused it."""

    def __add__(self, other: object) -> Growth:
        """The growth of two processes together."""
        assert isinstance(other, Growth)
        return Growth(self.steady + other.steady, self.burst + other.burst)

    def at_least(self, other: Growth) -> Growth:
        """The greater of both `steady` figures and the greater of both `burst` figures."""
        return Growth(max(self.steady, other.steady), max(self.burst, other.burst))

    def times(self, number: int) -> Growth:
        """The growth of `number` processes that grow alike."""
        return Growth(self.steady * number, self.burst * number)


class Sample(NamedTuple):
    """A measurement: seconds on any monotonic clock, and bytes."""

    at: float
    used: int


class Trend:
    """The last few samples of one process."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def add(self, at: float, used: int) -> None:
        """Add a measurement; it is ignored if it comes too soon (SAMPLE_EVERY) after the last sample."""
        if not self._samples or at - self._samples[-1].at >= SAMPLE_EVERY:
            self._samples = [*self._samples[-SPANS:], Sample(at, used)]

    def forget(self) -> None:
        """Discard the samples. Call it after memory was given back, because earlier growth no longer predicts later growth."""
        self._samples = []

    def jump(self, at: float, used: int) -> tuple[int | None, float | None]:
        """(growth, pace): bytes since the last sample before `at`, and bytes a second between that sample and the one before it.

        Either is None if there are too few samples.
        """
        before = [sample for sample in self._samples if sample.at < at][-2:]
        if not before:
            return None, None
        return used - before[-1].used, _pace(*before) if len(before) == 2 else None

    @property
    def pace(self) -> float | None:
        """Growth between the last two samples in bytes a second; None before there are two."""
        if len(self._samples) < 2:
            return None
        return _pace(*self._samples[-2:])

    def growth(self, at: float, used: int) -> Growth:
        """How fast the process grows, given that it uses `used` bytes at `at`."""
        spans = list(zip(self._samples, self._samples[1:], strict=False))
        steady = burst = 0.0
        if len(spans) > 1:
            most = max(spans, key=lambda span: span[1].used - span[0].used)
            others = [span for span in spans if span is not most]
            steady = sum(later.used - earlier.used for earlier, later in others) / sum(later.at - earlier.at for earlier, later in others)
        recent = next((sample for sample in reversed(self._samples) if at - sample.at >= MOMENT), None)
        if recent is not None:
            burst = _pace(recent, Sample(at, used))
        return Growth(max(0.0, steady), max(0.0, burst))


def _pace(earlier: Sample, later: Sample) -> float:
    return (later.used - earlier.used) / (later.at - earlier.at)
