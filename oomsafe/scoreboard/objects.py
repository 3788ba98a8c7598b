"""The bytes that say what objects a recycled worker held; little-endian; -1 in a figure is None::

      0  u64 generation of the worker · f64 when it was recycled, seconds since 1970, as in its own record: else this is another's
     16  u32 of how many objects one was counted · u32 1: not all modules were looked at
     24  i64 objects tracked · threads · threads at ready · descriptors · descriptors at ready
     64  8 types of 88: name, 64 bytes of text · i64 objects · i64 bytes · i64 objects at ready
    768  5 containers of 136: name, 96 bytes of text · kind, 16 bytes of text · i64 entries · i64 bytes · i64 entries at ready
   1448  4 caches of 144: the same · i64 bound

A row whose figures are 0, but for names, is none. Everything that is read is checked: any worker can write it.
"""

from __future__ import annotations

import struct
from typing import Any

from oomsafe.policy.objects import CACHES, CONTAINERS, KIND, NAME, TYPE_NAME, TYPES, Cache, Container, Objects, TypeCount
from oomsafe.policy.text import printable, shortened
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import as_text, optional, stored

_HEAD = struct.Struct("<Qd2I5q")
_TYPE = struct.Struct(f"<{TYPE_NAME}s3q")
_CONTAINER = struct.Struct(f"<{NAME}s{KIND}s3q")
_CACHE = struct.Struct(f"<{NAME}s{KIND}s4q")
_TYPES_AT = _HEAD.size
_CONTAINERS_AT = _TYPES_AT + TYPES * _TYPE.size
_CACHES_AT = _CONTAINERS_AT + CONTAINERS * _CONTAINER.size

assert _CACHES_AT + CACHES * _CACHE.size <= layout.OBJECTS_SIZE


def packed(objects: Objects | None, generation: int, at: float) -> bytes:
    """For the scoreboard, of one size; zeros if there are none."""
    if objects is None:
        return bytes(layout.OBJECTS_SIZE)
    raw = bytearray(layout.OBJECTS_SIZE)
    handles = (objects.threads, objects.threads_before, objects.descriptors, objects.descriptors_before)
    _HEAD.pack_into(
        raw, 0, generation, at, min(objects.every, 0xFFFFFFFF), not objects.complete, *map(_figure, (objects.tracked, *handles))
    )
    for number, each in enumerate(objects.types[:TYPES]):
        figures = map(_figure, (each.count, each.size, each.before))
        _TYPE.pack_into(raw, _TYPES_AT + number * _TYPE.size, _text(each.name, TYPE_NAME), *figures)
    for number, one in enumerate(objects.containers[:CONTAINERS]):
        _CONTAINER.pack_into(raw, _CONTAINERS_AT + number * _CONTAINER.size, *_container(one))
    for number, cache in enumerate(objects.caches[:CACHES]):
        _CACHE.pack_into(raw, _CACHES_AT + number * _CACHE.size, *_container(cache), _figure(cache.bound))
    return bytes(raw)


def unpacked(raw: bytes, generation: int, at: float) -> Objects | None:
    """What the worker of this generation wrote, which was recycled `at`; None: nothing, or these bytes are another worker's."""
    whose, when, every, incomplete, tracked, *handles = _HEAD.unpack_from(raw)
    if whose != generation or when != at or not every:
        return None
    threads, threads_before, descriptors, descriptors_before = map(optional, handles)
    return Objects(
        tracked=optional(tracked),
        every=every,
        complete=not incomplete,
        threads=threads,
        threads_before=threads_before,
        descriptors=descriptors,
        descriptors_before=descriptors_before,
        types=tuple(
            TypeCount(name=_name(name), count=count, size=size, before=optional(before))
            for name, count, size, before in _rows(raw, _TYPE, _TYPES_AT, TYPES)
            if count > 0 and size >= 0
        ),
        containers=tuple(
            Container(name=_name(name), kind=_name(kind), entries=entries, size=optional(size), before=optional(before))
            for name, kind, entries, size, before in _rows(raw, _CONTAINER, _CONTAINERS_AT, CONTAINERS)
            if entries > 0
        ),
        caches=tuple(
            Cache(name=_name(name), kind=_name(kind), entries=entries, size=optional(size), before=optional(before), bound=optional(bound))
            for name, kind, entries, size, before, bound in _rows(raw, _CACHE, _CACHES_AT, CACHES)
            if entries > 0
        ),
    )


def _container(one: Container) -> tuple[bytes, bytes, int, int, int]:
    return _text(one.name, NAME), _text(one.kind, KIND), _figure(one.entries), _figure(one.size), _figure(one.before)


def _rows(raw: bytes, form: struct.Struct, at: int, count: int) -> list[tuple[Any, ...]]:
    return [form.unpack_from(raw, at + number * form.size) for number in range(count)]


def _name(raw: bytes) -> str:
    return printable(as_text(raw), NAME)


def _text(text: str, length: int) -> bytes:
    return shortened(text, length).encode("utf-8", "replace")


def _figure(figure: int | None) -> int:
    return stored(None if figure is None else min(max(0, figure), layout.LARGEST))
