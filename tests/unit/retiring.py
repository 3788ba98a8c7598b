"""Workers that were recycled, as a pool remembers them."""

from __future__ import annotations

from oomsafe.policy.retirement import Point, Retirement
from oomsafe.policy.stock import Parts

MIB = 1 << 20
FRESH = 40 * MIB


def worker(grown: int, work: int = 1000, *, kept: int = 0, by_malloc: bool = False, shape: str = "line", number: int = 0) -> Retirement:
    """One that has grown by so many MiB, of which `kept` were free; `shape`: how it grew over its life."""
    size = grown * MIB
    curve = {
        "line": lambda share: share,
        "levels": lambda share: min(1.0, share * 4),
        "at once": lambda share: 1.0,
        "late": lambda share: share**6,
    }[shape]
    points = tuple(Point(max(1, work * step // 10), FRESH + int(size * curve(step / 10))) for step in range(1, 10))
    if shape == "at once":
        points = (Point(1, FRESH + size), *points)
    live = FRESH + size - kept * MIB
    parts = Parts(
        python_live=live,
        python_kept=0 if by_malloc else kept * MIB,
        malloc_live=0,
        malloc_kept=0,
        malloc_stuck=kept * MIB if by_malloc else 0,
    )
    return Retirement(
        at=1000.0 + number, pid=100 + number, slot=0, generation=number, reason="soft_limit", work=work, served=60.0,
        fresh=FRESH, parts=parts, points=points,
    )  # fmt: skip


def several(count: int, grown: int = 100, **more: object) -> list[Retirement]:
    """So many workers alike."""
    return [worker(grown, number=number, **more) for number in range(count)]  # type: ignore[arg-type]
