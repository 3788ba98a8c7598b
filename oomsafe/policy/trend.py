"""How fast a process grows: by what it does all the time, not by what it did once. Pure."""

from __future__ import annotations

from typing import NamedTuple

#: Seconds between two samples, at least: over less, one piece of work looks like a trend.
SAMPLE_EVERY = 0.2

#: A trend is what all of so many spans between samples have in common.
SPANS = 2


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

    @property
    def speed(self) -> float:
        """Bytes a second that it grows by, at least, in each of the last spans; 0 where it does not, or too little is known.

        One balloon fills one span, and leaves the others as they were.
        """
        pairs = list(zip(self._samples, self._samples[1:], strict=False))
        if len(pairs) < SPANS:
            return 0.0
        return max(0.0, min(_pace(*pair) for pair in pairs))


def _pace(earlier: Sample, later: Sample) -> float:
    return (later.used - earlier.used) / (later.at - earlier.at)
