"""What the memory of a recycled worker was: it takes stock at its end. Only a worker that was recycled imports this."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from oomsafe.kernel.allocators import take_stock
from oomsafe.log import log
from oomsafe.policy.recycle import Reason
from oomsafe.policy.retirement import Retirement
from oomsafe.policy.stock import stock_line

if TYPE_CHECKING:
    from oomsafe.scoreboard.header import Header
    from oomsafe.worker.guard import Guard
    from oomsafe.worker.life import Life


def say_stock(guard: Guard, life: Life, *, header: Header | None, reason: Reason | None, ready_at: float, fresh: int | None) -> None:
    """Say what the memory of this recycled worker was: it has nothing to do any more, and its replacement serves.

    It is left in the scoreboard's `header`, too, if there is one, and the `reason` of the recycle is known. `ready_at`: when the worker
    began to serve, on the monotonic clock. `fresh`: what it held then, in bytes; None: not known.
    """
    parts = take_stock()
    if parts is None:
        return
    log.info("%s held at its end %s", guard, stock_line(parts, fresh))
    if header is not None and reason is not None:
        header.note_retirement(
            Retirement(
                at=time.time(),
                pid=guard.pid,
                slot=guard.slot.number,
                generation=guard.slot.generation,
                reason=reason.value,
                work=guard.meter.counters.work,
                served=time.monotonic() - ready_at,
                fresh=fresh,
                parts=parts,
                points=life.points,
            )
        )
