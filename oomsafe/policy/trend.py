"""How fast a process grows: by what it does all the time, not by what it did once. Pure."""

from __future__ import annotations

from typing import NamedTuple

#: Seconds between two samples, at least: over less, one piece of work looks like a trend.
SAMPLE_EVERY = 0.2

#: Seconds over which growth is told apart from noise, at least.
MOMENT = 0.05

#: Seconds for which what grew fast is taken to do so again.
LATELY = 2.0

#: So many spans between samples are remembered.
SPANS = 3


class Growth(NamedTuple):
    """Bytes a second that a process grows by, never negative."""

    steady: float = 0.0
    """What it does all the time: without the span in which it grew most, for one balloon fills one span. 0 while too little is known."""
    burst: float = 0.0
    """Over the last moment, whatever it was."""

    def __add__(self, other: object) -> Growth:
        """Of two processes together."""
        assert isinstance(other, Growth)
        return Growth(self.steady + other.steady, self.burst + other.burst)

    def at_least(self, other: Growth) -> Growth:
        """The greater figure of each kind."""
        return Growth(max(self.steady, other.steady), max(self.burst, other.burst))

    def times(self, number: int) -> Growth:
        """Of so many that grow alike."""
        return Growth(self.steady * number, self.burst * number)


class Sample(NamedTuple):
    """What was held when; seconds on any monotonic clock, bytes."""

    at: float
    used: int


class Trend:
    """The last few samples of one process."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def add(self, at: float, used: int) -> None:
        """A measurement; one that comes too soon after the last sample is left out."""
        if not self._samples or at - self._samples[-1].at >= SAMPLE_EVERY:
            self._samples = [*self._samples[-SPANS:], Sample(at, used)]

    def forget(self) -> None:
        """Memory was given back: what comes is another story."""
        self._samples = []

    def step(self, at: float, used: int) -> tuple[int | None, float | None]:
        """(growth, pace): bytes since the last sample before `at`, and bytes a second between that and the one before it.

        None for what too few samples tell.
        """
        before = [sample for sample in self._samples if sample.at < at][-2:]
        if not before:
            return None, None
        return used - before[-1].used, _pace(*before) if len(before) == 2 else None

    @property
    def pace(self) -> float | None:
        """Bytes a second by which it has grown between the last two samples; None before there are two."""
        if len(self._samples) < 2:
            return None
        return _pace(*self._samples[-2:])

    def growth(self, at: float, used: int) -> Growth:
        """How fast it grows, with `used` bytes now."""
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
