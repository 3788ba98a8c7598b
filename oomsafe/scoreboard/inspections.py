"""The place on the scoreboard where a worker that serves, or a fork of it, tells what its memory is: the last inspection of the pool.

Its supervisor orders one at a time, so there is one writer at a time: the worker, then its fork, or the supervisor when neither has told
anything. Everything that is read is checked: any worker can write it.
"""

from __future__ import annotations

import dataclasses

from oomsafe.policy.inspection import TEXT, Inspection, Phase
from oomsafe.policy.stock import Parts
from oomsafe.policy.text import printable, shortened
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import optional, stored

_PHASES = frozenset(Phase)


def write_inspection(memory: memoryview, one: Inspection) -> None:
    """Write it; a reader that comes meanwhile finds none."""
    from oomsafe.scoreboard.objects import packed  # imported here, because most workers never write one

    layout.write(memory, layout.INSPECTED_AT, layout.MOMENT, 0.0)
    memory[layout.INSPECTED_OBJECTS_AT : layout.INSPECTED_OBJECTS_AT + layout.OBJECTS_SIZE] = packed(one.objects, one.generation, one.at)
    parts = (_figure(getattr(one.parts, part.name)) for part in dataclasses.fields(Parts))
    text = shortened(one.text, TEXT).encode("utf-8", "replace")
    fields = (one.pid, one.generation, one.slot, one.phase, min(one.work, layout.LARGEST), one.served, _figure(one.fresh))
    seconds = (-1.0 if figure is None else figure for figure in (one.stopped, one.took))
    layout.write(memory, layout.INSPECTED_AT, layout.INSPECTED, 0.0, *fields, *parts, *seconds, text)
    layout.write(memory, layout.INSPECTED_AT, layout.MOMENT, one.at)


def read_inspection(header: bytes | memoryview) -> Inspection | None:
    """The last one; None: there was none, it is being written, or what is there is impossible."""
    at, pid, generation, slot, phase, work, served, fresh, *figures = layout.INSPECTED.unpack_from(header, layout.INSPECTED_AT)
    *parts, stopped, took, text = figures
    at, served = layout.seconds(at), layout.seconds(served)
    if not at or served is None or phase not in _PHASES or phase == Phase.NONE:
        return None
    python_live, python_kept, malloc_live, malloc_kept, malloc_stuck, files, shared, other = map(optional, parts)
    objects = None
    if phase == Phase.DONE:
        from oomsafe.scoreboard.objects import unpacked  # imported here: workers read the pool, too, mostly before there was one

        place = layout.INSPECTED_OBJECTS_AT
        objects = unpacked(bytes(header[place : place + layout.OBJECTS_SIZE]), generation, at)
    return Inspection(
        at=at, pid=pid, slot=slot, generation=generation, phase=Phase(phase), text=printable(layout.as_text(text), TEXT),
        work=work, served=served, fresh=optional(fresh), stopped=layout.seconds(stopped), took=layout.seconds(took), objects=objects,
        parts=Parts(
            python_live=python_live, python_kept=python_kept, malloc_live=malloc_live, malloc_kept=malloc_kept, malloc_stuck=malloc_stuck,
            files=files or 0, shared=shared or 0, other=other or 0,
        ),
    )  # fmt: skip


def _figure(figure: int | None) -> int:
    return stored(None if figure is None else min(max(0, figure), layout.LARGEST))
