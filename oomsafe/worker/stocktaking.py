"""What the memory of a recycled worker was: it takes stock at its end.

Only a worker that was recycled imports this, or one that is inspected.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from oomsafe.kernel.allocators import take_stock
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.handles import Handles, own_handles
from oomsafe.kernel.process import shared_with_parent
from oomsafe.log import attempt, log
from oomsafe.policy.objects import CACHES, CONTAINERS, Objects, grower_words, largest, largest_types
from oomsafe.policy.recycle import Reason
from oomsafe.policy.retirement import Retirement
from oomsafe.policy.stock import stock_line
from oomsafe.worker.baseline import Baseline, Beginning, can_count_objects

if TYPE_CHECKING:
    from oomsafe.scoreboard.header import Header
    from oomsafe.worker.guard import Guard
    from oomsafe.worker.life import Life


#: Seconds that looking at a worker's objects may take, about. With 2 million it takes 50 ms more to let go of the list of them.
FOR_OBJECTS = 0.12

#: The share of the limit that must be left: else a worker that leaves gives back its memory first.
LEFT = 0.25

#: To list all objects takes so many bytes for each block of Python's allocator, and memory that is shared may be copied.
LIST_BYTES = 8

#: Where nothing is known of what a worker had when it was ready.
NOTHING = Baseline(Handles(None, None))


def say_stock(guard: Guard, life: Life, began: Beginning, *, header: Header | None, reason: Reason | None) -> None:
    """Say what the memory of this recycled worker was: it has nothing to do any more, and its replacement serves.

    It is left in the scoreboard's `header`, too, if there is one, and the `reason` of the recycle is known.
    """
    parts = take_stock()
    if parts is None:
        return
    objects = attempt("counting objects", "the server", partial(objects_of, began.baseline))
    log.info("%s held at its end %s%s", guard, stock_line(parts, began.held), grower_words(objects) if objects else "")
    if header is not None and reason is not None:
        header.note_retirement(
            Retirement(
                at=time.time(),
                pid=guard.pid,
                slot=guard.slot.number,
                generation=guard.slot.generation,
                reason=reason.value,
                work=guard.meter.counters.work,
                served=time.monotonic() - began.at,
                fresh=began.held,
                parts=parts,
                points=life.points,
                objects=objects,
            )
        )


def objects_of(baseline: Baseline | None) -> Objects:
    """This process's objects, and what has grown since its `baseline`."""
    found = handles_of(baseline)
    return counted(found, baseline, FOR_OBJECTS) if can_count_objects() and is_room() else found


def handles_of(baseline: Baseline | None) -> Objects:
    """The same without the objects themselves: threads and descriptors."""
    handles, before = own_handles(), (baseline or NOTHING).handles
    return Objects(
        threads=handles.threads,
        threads_before=before.threads,
        descriptors=handles.descriptors,
        descriptors_before=before.descriptors,
    )


def counted(found: Objects, baseline: Baseline | None, seconds: float) -> Objects:
    """`found` with this process's objects, and what of them has grown since its `baseline`, in about so many seconds at most.

    Takes a list of all objects: see is_room().
    """
    from oomsafe.worker.census import is_standard, take_census  # imported here, because another Python may not have what it needs

    before = baseline or NOTHING
    census = take_census(seconds, before.modules)
    return replace(
        found,
        tracked=census.tracked,
        every=census.every,
        complete=census.complete,
        types=largest_types(census.types, before.types),
        containers=largest(census.containers, before.names, CONTAINERS, is_standard),
        caches=largest(census.caches, before.names, CACHES, is_standard),
    )


def is_room(copies: int = 0) -> bool:
    """Whether the pool has room for what counting takes: a list of all objects, a copy of what this process shares with its parent, and
    `copies` bytes besides.

    And as much besides that nobody waits for the memory of this worker meanwhile.
    """
    capacity = read_capacity()
    if capacity.limit is None or capacity.undroppable is None:
        return True
    wanted = LIST_BYTES * sys.getallocatedblocks() + (shared_with_parent() or 0) + copies
    return capacity.limit - capacity.undroppable > max(wanted, LEFT * capacity.limit)
