"""How fast a process grows."""

from __future__ import annotations

import pytest

from oomsafe.policy.trend import SAMPLE_EVERY, Growth, Trend


def trend(*used: int, every: float = SAMPLE_EVERY) -> Trend:
    """A process that held these bytes, one sample after the other, the first at 100 s."""
    made = Trend()
    for number, held in enumerate(used):
        made.add(100 + number * every, held)
    return made


@pytest.mark.parametrize(
    ("used", "speed"),
    [
        pytest.param((), 0, id="nothing known"),
        pytest.param((10, 20), 0, id="too little known"),
        pytest.param((10, 20, 30), 10, id="steady"),
        pytest.param((10, 20, 50), 10, id="without the biggest"),
        pytest.param((10, 500, 500), 0, id="one balloon"),
        pytest.param((10, 10, 500), 0, id="one balloon just now"),
        pytest.param((50, 40, 30), 0, id="it shrinks"),
        pytest.param((50, 10, 20, 20, 30), 5, id="one in which it stood still"),
        pytest.param((10, 90, 90, 90, 90), 0, id="only the last spans count"),
    ],
)
def test_speed(used: tuple[int, ...], speed: float) -> None:
    """What it grew by in the last spans but the biggest, a second."""
    assert trend(*used, every=1.0).growth(0, 0).steady == speed


@pytest.mark.parametrize(
    ("used", "now", "burst"), [((), 50, 0), ((10,), 50, 40), ((10, 500), 500, 0), ((10, 40), 10, 0), ((0, 10, 20, 90, 120), 130, 10)]
)
def test_burst(used: tuple[int, ...], now: int, burst: float) -> None:
    """All that it has grown by since the last sample, balloons and all."""
    made = trend(*used, every=1.0)

    assert made.growth(100 + max(1, len(used)), now).burst == burst


def test_growth_of_several() -> None:
    """Together, and alike."""
    assert sum([Growth(1, 2), Growth(3, 4)], Growth()) == (4, 6)
    assert Growth(1, 2).times(3) == (3, 6)


def test_what_comes_too_soon_is_left_out() -> None:
    """Over a moment, one piece of work would look like a trend."""
    assert trend(10, 20, 30, every=SAMPLE_EVERY / 3).growth(100.25, 30) == (0, 80)


def test_a_jump() -> None:
    """What has come since the last sample, and the pace before it; a sample of this very moment is none from before."""
    assert trend().jump(101, 50) == (None, None)
    assert trend(10).jump(101, 50) == (40, None)
    assert trend(10, 20, every=1.0).jump(102, 50) == (30, 10.0)
    assert trend(10, 20, 50, every=1.0).jump(102, 50) == (30, 10.0)


def test_memory_that_was_given_back_is_another_story() -> None:
    """Nothing of what was before counts."""
    made = trend(10, 20, 30)
    made.forget()

    assert (made.growth(102, 5), made.pace, made.jump(102, 5)) == ((0, 0), None, (None, None))
