"""What a worker held by objects, in lines of a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from oomsafe.cli.columns import Column, cells_of, line_of, that_fit
from oomsafe.cli.labelled import labelled
from oomsafe.policy.objects import Cache, Container, Objects, TypeCount, spaced
from oomsafe.policy.text import without_controls
from oomsafe.policy.units import format_size

#: A line's figures: what it is called, what it is, how many, how large, how many more than when the worker was ready.
_Row = tuple[str, str, str, str, str]


def objects_lines(who: str, objects: Objects, width: int, held: str = "held at its end") -> list[Text]:
    """``worker 5565 held at its end: 1 240 000 objects …``, then a line for each container, cache and type."""
    lines = labelled("", f"{who} {held}: {_counts(objects)}", width, "bold", indent=2)
    rows = [*map(_container, (*objects.containers, *objects.caches)), *map(_type, objects.types)]
    if not rows:
        return lines
    columns: Sequence[Column[_Row]] = [
        Column("name", lambda row: row[0], right=False),
        Column("is", lambda row: row[1], left_out=2, right=False),
        Column("has", lambda row: row[2]),
        Column("size", lambda row: row[3], left_out=1),
        Column("since ready", lambda row: row[4]),
    ]
    cells = [cells_of(columns, row) for row in rows]
    kept, widths = that_fit(columns, cells, width)
    shown = [columns[at] for at in kept]
    lines.append(line_of([Text(column.title, style="bold") for column in shown], shown, widths))
    return lines + [line_of([row[at] for at in kept], shown, widths) for row in cells]


def _counts(objects: Objects) -> str:
    tracked = (
        "its objects were not counted"
        if objects.tracked is None
        else f"{spaced(objects.tracked)} objects that the garbage collector tracks"
        + (f" (types: estimated from one in {spaced(objects.every)})" if objects.every > 1 else "")
    )
    if not objects.complete:
        tracked += " (there was no time to look at all modules)"
    threads = _pair(objects.threads, objects.threads_before, "threads")
    return f"{tracked}, {threads}, {_pair(objects.descriptors, objects.descriptors_before, 'open descriptors')}"


def _pair(now: int | None, before: int | None, what: str) -> str:
    if now is None:
        return f"unknown {what}"
    what = what.removesuffix("s") if now == 1 else what
    return f"{spaced(now)} {what}" + ("" if before is None else f" ({spaced(before)} when it was ready)")


def _container(one: Container) -> _Row:
    kind = one.kind if not isinstance(one, Cache) else f"{one.kind}, {'no bound' if one.bound is None else f'at most {spaced(one.bound)}'}"
    name = one.name if isinstance(one, Cache) else one.called
    return without_controls(name), without_controls(kind), f"{spaced(one.entries)} entries", _size(one.size), _grown(one.grown)


def _size(size: int | None) -> str:
    return "" if size is None else format_size(size)


def _type(kind: TypeCount) -> _Row:
    return without_controls(kind.name), "type", f"{spaced(kind.count)} objects", format_size(kind.size), _grown(kind.grown)


def _grown(grown: int | None) -> str:
    return "unknown" if grown is None else f"+{spaced(grown)}" if grown > 0 else spaced(grown)
