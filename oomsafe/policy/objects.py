"""What a worker's memory is by objects, what of it has grown since the worker was ready, and the words for it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from oomsafe.policy.units import MIB, format_size

#: How many types, containers and caches are remembered of one worker.
TYPES, CONTAINERS, CACHES = 8, 5, 4

#: The most characters of a type's name, of a container's or a cache's name, and of a container's kind.
TYPE_NAME, NAME, KIND = 64, 96, 16

#: The kind of a functools.lru_cache.
LRU = "lru_cache"

#: Growth by fewer entries than this, and objects that have grown by less, are not worth a word in the log.
GROWN_ENTRIES, GROWN_BYTES = 1000, 4 * MIB

#: So many more threads, or descriptors, than when the worker was ready are worth a word.
GROWN_THREADS, GROWN_DESCRIPTORS = 20, 50

#: A container whose growth is not known is worth a word from so many entries on.
LARGE = 10_000

#: Workers in all of which a container must have grown to be named in a verdict.
AGREE = 2


@dataclass(frozen=True, kw_only=True)
class TypeCount:
    """The objects of one type, estimated if they were sampled."""

    name: str
    count: int
    size: int
    """In bytes, without what they refer to. An approximation: nothing of the application's is called to measure it."""
    before: int | None = None
    """How many there were when the worker was ready; None: not known."""

    @property
    def grown(self) -> int | None:
        """How many more there are than when the worker was ready; None: not known."""
        return None if self.before is None else self.count - self.before

    @property
    def grown_bytes(self) -> int:
        """About how many bytes the growth is; all of them if it is not known."""
        return self.size if self.grown is None else self.size * self.grown // max(1, self.count)


@dataclass(frozen=True, kw_only=True)
class Container:
    """A container that can be reached from a module by names."""

    name: str
    """``module.name``, ``module.Class.name``; empty: no name leads to it."""
    kind: str
    """The name of its type."""
    entries: int
    size: int | None = None
    """About how many bytes it and what it alone holds take, estimated from a few entries; None: not estimated."""
    before: int | None = None
    """How many entries it had when the worker was ready; None: not known."""

    @property
    def grown(self) -> int | None:
        """How many more there are than when the worker was ready; None: not known."""
        return None if self.before is None else self.entries - self.before

    @property
    def grown_bytes(self) -> int | None:
        """About how many bytes the growth is; None: not known."""
        return None if self.grown is None or self.size is None else self.size * self.grown // max(1, self.entries)

    @property
    def called(self) -> str:
        """Its name, or that it has none."""
        return self.name or f"a {self.kind} that no name of a module leads to"


@dataclass(frozen=True, kw_only=True)
class Cache(Container):
    """What forgets by itself, or says that it does not: a functools.lru_cache, a deque with a length, an object with a maxsize."""

    kind: str = LRU
    bound: int | None
    """The most entries that it keeps, or the most of what else it counts; None: it has no bound (maxsize=None)."""

    @property
    def called(self) -> str:
        """What it is, and whether it has a bound."""
        what = "the cache of " if self.kind == LRU else ""
        return f"{what}{self.name or 'something'} ({self.bound_words})"

    @property
    def bound_words(self) -> str:
        """Whether it has a bound."""
        if self.bound is None:
            return f"{self.kind} without a bound"
        return f"{self.kind} of {'' if self.kind == LRU else 'at most '}{spaced(self.bound)}"


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What a worker held at its end, by objects."""

    tracked: int | None = None
    """Objects that Python's garbage collector knows; None: they were not counted, for lack of time or memory."""
    every: int = 1
    """Types were counted from one in so many of these."""
    complete: bool = True
    """Whether there was time to follow the names in all modules."""
    threads: int | None = None
    threads_before: int | None = None
    """When it was ready; None: not known. As below."""
    descriptors: int | None = None
    descriptors_before: int | None = None
    types: tuple[TypeCount, ...] = ()
    """Those that have grown most, in bytes; those that take most if nothing is known about when it was ready."""
    containers: tuple[Container, ...] = ()
    """Likewise, by bytes where those are known, else by entries."""
    caches: tuple[Cache, ...] = ()
    """Likewise."""

    @property
    def compared(self) -> bool:
        """Whether it is known what there was when the worker was ready."""
        every: tuple[TypeCount | Container, ...] = (*self.types, *self.containers, *self.caches)
        return any(one.before is not None for one in every)


def largest_types(types: Iterable[TypeCount], before: Mapping[str, int] | None) -> tuple[TypeCount, ...]:
    """Those that have grown most. `before`: how many there were of each that had many; None: not known."""
    known = [replace(each, before=None if before is None else before.get(each.name, 0)) for each in types]
    return tuple(sorted(known, key=lambda each: (-each.grown_bytes, -each.size, each.name))[:TYPES])


N = TypeVar("N", bound=Container)


def largest(several: Iterable[N], before: Mapping[str, int] | None, most: int, unknown: Callable[[str], bool]) -> tuple[N, ...]:
    """Those with a name that have grown most, then those that have most entries.

    `before`: how many entries each had that had many; None: not known. `unknown`: whether it is not known of one that is not there.
    """

    def compared(one: N) -> N:
        if before is None or not one.name or (one.name not in before and unknown(one.name)):
            return one
        return replace(one, before=before.get(one.name, 0))

    def rank(one: N) -> tuple[int, int, int, str]:
        # nothing is known of before: all of it may be growth
        as_if = replace(one, before=0) if one.grown is None and before is None else one
        grown, size = as_if.grown or 0, as_if.grown_bytes or 0
        return (-size if size >= GROWN_BYTES else 0, -grown if grown >= GROWN_ENTRIES else 0, -one.entries, one.name)

    # what was not looked at before, and is not large, would only hide the rest
    worth = (one for one in map(compared, several) if before is None or one.grown is not None or one.entries >= LARGE)
    return tuple(sorted(worth, key=rank)[:most])


def grower_words(objects: Objects) -> str:
    """``; apps.CACHE grew by 240 000 entries``, for the line at a worker's end: what grew most; empty: nothing stands out."""
    words = [_most(objects), _handles(objects)]
    return "".join(f"; {word}" for word in words if word)


def _most(objects: Objects) -> str:
    for one in _growers(objects):
        return f"{one.called} grew by {_growth_words(one.grown or 0, one.grown_bytes)}"
    # a container without a name tells less than what it holds: types come first
    grown = sorted(
        (each for each in objects.types if each.grown is not None and each.grown_bytes >= GROWN_BYTES), key=lambda each: -each.grown_bytes
    )
    if grown:
        own = [each for each in grown if "." in each.name]  # a type of the application's, or of a library's, tells more than a list
        return ", ".join(_more(each) for each in dict.fromkeys((grown[0], *own[:1])))
    every: list[Container] = [*objects.containers, *objects.caches]
    unknown = [one for one in every if one.name and one.entries >= LARGE]
    if unknown and not objects.compared:
        biggest = max(unknown, key=lambda one: one.entries)
        return f"{biggest.called} has {spaced(biggest.entries)} entries"
    return ""


def _more(kind: TypeCount) -> str:
    return f"{spaced(kind.grown or 0)} more objects of {kind.name} ({format_size(kind.grown_bytes)})"


def _growth_words(entries: int, size: int | None) -> str:
    large = f" ({format_size(size)})" if size is not None and size >= GROWN_BYTES else ""
    return f"{spaced(entries)} {'entry' if entries == 1 else 'entries'}{large}"


def _growers(objects: Objects) -> list[Container]:
    """What has a name and has grown by entries or by bytes, the most first."""
    named = [one for one in (*objects.containers, *objects.caches) if one.name and _has_grown(one)]
    return sorted(named, key=lambda one: (-(one.grown_bytes or 0), -(one.grown or 0)))


def _has_grown(one: Container) -> bool:
    """Whether its growth is worth a word."""
    return (one.grown or 0) > 0 and ((one.grown or 0) >= GROWN_ENTRIES or (one.grown_bytes or 0) >= GROWN_BYTES)


def _handles(objects: Objects) -> str:
    pairs = (
        (objects.threads, objects.threads_before, GROWN_THREADS, "threads"),
        (objects.descriptors, objects.descriptors_before, GROWN_DESCRIPTORS, "open descriptors"),
    )
    found = [
        f"{spaced(now - before)} more {what} than when it was ready"
        for now, before, least, what in pairs
        if now is not None and before is not None and now - before >= least
    ]
    return "; ".join(found)


def keeper(several: Iterable[Objects | None]) -> str:
    """What grew in all of these workers, in words; empty: nothing, or too few of them tell.

    Those about which nothing is known from when they were ready do not count.
    """
    known = [objects for objects in several if objects is not None and objects.compared]
    if len(known) < AGREE:
        return ""
    return _common_container(known) or _common_type(known)


def _common_container(known: Sequence[Objects]) -> str:
    by_name = [{one.called: one for one in _growers(objects)} for objects in known]
    names = set.intersection(*map(set, by_name))
    medians = []
    for name in names:
        sizes = [grown[name].grown_bytes for grown in by_name]
        size = None if None in sizes else _median([size or 0 for size in sizes])
        medians.append((size or 0, _median([grown[name].grown or 0 for grown in by_name]), name, size))
    if not medians:
        return ""
    _, entries, name, size = max(medians, key=lambda one: one[:3])
    return f"{name} grew in all of the last {len(known)} workers, by {_growth_words(entries, size)} in the median"


def _common_type(known: Sequence[Objects]) -> str:
    by_name = [
        {each.name: each.grown_bytes for each in objects.types if each.grown is not None and each.grown_bytes >= GROWN_BYTES}
        for objects in known
    ]
    names = set.intersection(*map(set, by_name))
    medians = [(_median([growth[name] for growth in by_name]), name) for name in names]
    if not medians:
        return ""
    most, name = max(medians)
    return f"objects of {name} grew in all of the last {len(known)} workers, by {format_size(most)} in the median"


def _median(several: Sequence[int]) -> int:
    """The lower one of two in the middle: an interpolated number of entries is none. Not statistics', which a worker would import."""
    return sorted(several)[(len(several) - 1) // 2]


def spaced(number: int) -> str:
    """``812 000``: a count in groups of three digits."""
    return f"{number:,}".replace(",", " ")
