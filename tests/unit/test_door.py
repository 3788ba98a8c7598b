"""Work that waits for memory which another worker is about to give back: when, for whose sake, and for how long."""

from __future__ import annotations

import pytest

from oomsafe.policy.door import WAITS_FOR, Crowd, Door, checks_from, next_door
from oomsafe.policy.trend import Growth

MIB = 1 << 20
SOFT, NOW = 200 * MIB, 100.0

#: 500 MiB a second: 25 MiB within the moment that a door takes to shut; and who leaves takes 8 MiB.
FAST = Growth(burst=500.0 * MIB)
OUT = Crowd(room=32 * MIB, leaving=1)
SHUT = Door(NOW - 0.1, FAST)


@pytest.mark.parametrize(
    ("crowd", "used", "growth", "shut"),
    [
        pytest.param(OUT, 50, FAST, True, id="no room, and one leaves"),
        pytest.param(OUT._replace(leaving=0), 50, FAST, False, id="no room, and nobody leaves: nothing would come of it"),
        pytest.param(OUT._replace(leaving=0, starting=1), 50, FAST, False, id="nor of one that boots"),
        pytest.param(OUT._replace(room=34 * MIB), 50, FAST, False, id="there is room"),
        pytest.param(OUT._replace(room=34 * MIB, serving=2), 50, FAST, True, id="not for two that grow so"),
        pytest.param(OUT._replace(room=34 * MIB, starting=1, fresh=9 * MIB), 50, FAST, True, id="not for one that boots beside it"),
        pytest.param(OUT, 50, Growth(steady=500.0 * MIB), False, id="it does not grow just now"),
        pytest.param(OUT._replace(room=None), 50, FAST, False, id="nobody knows what room there is"),
        pytest.param(Crowd(400 * MIB, full=True, starting=1), 211, FAST, True, id="above its limit, its replacement boots in a full pool"),
        pytest.param(Crowd(400 * MIB, full=True, leaving=1), 211, FAST, True, id="or another leaves there"),
        pytest.param(Crowd(400 * MIB, full=True), 211, FAST, False, id="above its limit, and nobody comes"),
        pytest.param(Crowd(400 * MIB, full=True, starting=1), 209, FAST, False, id="hardly above it"),
        pytest.param(Crowd(400 * MIB, full=False, starting=1), 211, FAST, False, id="above it, and the budget has room"),
        pytest.param(Crowd(400 * MIB, full=True, starting=1), 211, Growth(burst=99.0 * MIB), False, id="above it, and slow"),
    ],
)
def test_when_it_is_shut(crowd: Crowd, used: int, growth: Growth, shut: bool) -> None:
    """Only while something comes of it."""
    assert (next_door(Door(), crowd, SOFT, used * MIB, growth, NOW).shut_at is not None) is shut


def test_without_a_soft_limit_there_is_the_kernel_s() -> None:
    """A worker whose limit is refused waits where there is no room, too."""
    assert next_door(Door(), OUT, None, 50 * MIB, FAST, NOW).shut_at == NOW


def test_who_waits_is_taken_to_grow_as_before() -> None:
    """While work waits nothing grows: that is no reason to let all of it in at once."""
    assert next_door(SHUT, OUT, SOFT, 50 * MIB, Growth(), NOW) == SHUT


def test_it_opens_as_soon_as_there_is_room() -> None:
    """Or when the one that left is gone, and room or not nothing more will come."""
    assert next_door(SHUT, OUT._replace(room=34 * MIB), SOFT, 50 * MIB, Growth(), NOW) == Door()
    assert next_door(SHUT, OUT._replace(leaving=0), SOFT, 50 * MIB, Growth(), NOW).shut_at is None


def test_it_opens_after_a_while_whatever_comes_and_stays_open() -> None:
    """Work waits once for one that takes long to leave, and not again until there has been room."""
    began = NOW - WAITS_FOR - 0.01
    spent = next_door(Door(began, FAST), OUT, SOFT, 50 * MIB, Growth(), NOW)
    assert (spent.shut_at, spent.spent_at) == (None, NOW)

    slow = next_door(spent, OUT, SOFT, 50 * MIB, Growth(), NOW + 8)
    still = next_door(slow, OUT, SOFT, 50 * MIB, FAST, NOW + 9)
    assert still.shut_at is None

    flickers = next_door(still, OUT._replace(room=900 * MIB), SOFT, 50 * MIB, FAST, NOW + 9.5)
    assert next_door(flickers, OUT, SOFT, 50 * MIB, FAST, NOW + 9.6).shut_at is None

    room = next_door(flickers, OUT._replace(room=900 * MIB), SOFT, 50 * MIB, FAST, NOW + 10)
    assert next_door(room, OUT, SOFT, 50 * MIB, FAST, NOW + 11).shut_at == NOW + 11


@pytest.mark.parametrize(
    ("room", "workers", "expected"),
    [
        pytest.param(40 * MIB, 2, 110 * MIB, id="half of its part"),
        pytest.param(20 * MIB, 0, 110 * MIB, id="alone"),
        pytest.param(900 * MIB, 2, 116 * MIB, id="at the latest"),
        pytest.param(-9, 2, 100 * MIB, id="there is none"),
        pytest.param(None, 2, None, id="nobody knows"),
    ],
)
def test_checks_from(room: int | None, workers: int, expected: int | None) -> None:
    """The less room there is, the sooner it is looked at again."""
    assert checks_from(100 * MIB, room, workers) == expected
