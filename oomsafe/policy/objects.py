"""What a worker's memory is by objects, what of it has grown since the worker was ready, and the words for it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from oomsafe.policy.units import MIB, format_size

#: How many types, containers and caches are remembered of one worker.
TYPES, CONTAINERS, CACHES = 8, 6, 4

#: The most characters of a type's name, of a container's or a cache's name, and of a container's kind.
TYPE_NAME, NAME, KIND = 64, 96, 16

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
    before: int | None = None
    """How many it had when the worker was ready; None: not known."""

    @property
    def grown(self) -> int | None:
        """How many more there are than when the worker was ready; None: not known."""
        return None if self.before is None else self.entries - self.before

    @property
    def called(self) -> str:
        """Its name, or that it has none."""
        return self.name or f"a {self.kind} that no name of a module leads to"


@dataclass(frozen=True, kw_only=True)
class Cache:
    """A functools.lru_cache."""

    name: str
    """Of the function."""
    entries: int
    bound: int | None
    """The most entries that it keeps; None: it has no bound (maxsize=None)."""
    before: int | None = None
    """How many it had when the worker was ready; None: not known."""

    @property
    def grown(self) -> int | None:
        """How many more there are than when the worker was ready; None: not known."""
        return None if self.before is None else self.entries - self.before


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
    """Likewise, by entries."""
    caches: tuple[Cache, ...] = ()
    """Likewise."""

    @property
    def compared(self) -> bool:
        """Whether it is known what there was when the worker was ready."""
        every: tuple[TypeCount | Container | Cache, ...] = (*self.types, *self.containers, *self.caches)
        return any(one.before is not None for one in every)


def largest_types(types: Iterable[TypeCount], before: Mapping[str, int] | None) -> tuple[TypeCount, ...]:
    """Those that have grown most. `before`: how many there were of each that had many; None: not known."""
    known = [replace(each, before=None if before is None else before.get(each.name, 0)) for each in types]
    return tuple(sorted(known, key=lambda each: (-each.grown_bytes, -each.size, each.name))[:TYPES])


N = TypeVar("N", "Container", "Cache")


def largest(several: Iterable[N], before: Mapping[str, int] | None, most: int, unknown: Callable[[str], bool]) -> tuple[N, ...]:
    """Those with a name that have grown most, then those that have most entries.

    `before`: how many entries each had that had many; None: not known. `unknown`: whether it is not known of one that is not there.
    """

    def compared(one: N) -> N:
        if before is None or not one.name or (one.name not in before and unknown(one.name)):
            return one
        return replace(one, before=before.get(one.name, 0))

    def rank(one: N) -> tuple[int, int, str]:
        grown = one.entries if one.grown is None and before is None else one.grown or 0
        return (-grown if grown >= GROWN_ENTRIES else 0, -one.entries, one.name)

    # what was not looked at before, and is not large, would only hide the rest
    worth = (one for one in map(compared, several) if before is None or one.grown is not None or one.entries >= LARGE)
    return tuple(sorted(worth, key=rank)[:most])


def grower_words(objects: Objects) -> str:
    """``; apps.CACHE grew by 240 000 entries``, for the line at a worker's end: what grew most; empty: nothing stands out."""
    words = [_most(objects), _handles(objects)]
    return "".join(f"; {word}" for word in words if word)


def _most(objects: Objects) -> str:
    for one in _growers(objects):
        return f"{_called(one)} grew by {spaced(one.grown or 0)} entries"
    # a container without a name tells less than what it holds: types come first
    grown = sorted(
        (each for each in objects.types if each.grown is not None and each.grown_bytes >= GROWN_BYTES), key=lambda each: -each.grown_bytes
    )
    if grown:
        own = [each for each in grown if "." in each.name]  # a type of the application's, or of a library's, tells more than a list
        return ", ".join(_more(each) for each in dict.fromkeys((grown[0], *own[:1])))
    every: list[Container | Cache] = [*objects.containers, *objects.caches]
    unknown = [one for one in every if one.name and one.entries >= LARGE]
    if unknown and not objects.compared:
        biggest = max(unknown, key=lambda one: one.entries)
        return f"{_called(biggest)} has {spaced(biggest.entries)} entries"
    return ""


def _more(kind: TypeCount) -> str:
    return f"{spaced(kind.grown or 0)} more objects of {kind.name} ({format_size(kind.grown_bytes)})"


def _growers(objects: Objects) -> list[Container | Cache]:
    """What has a name and has grown by entries, the most first."""
    every: list[Container | Cache] = [*objects.containers, *objects.caches]
    named = [one for one in every if one.name and (one.grown or 0) >= GROWN_ENTRIES]
    return sorted(named, key=lambda one: -(one.grown or 0))


def _called(one: Container | Cache) -> str:
    if isinstance(one, Container):
        return one.name
    return f"the cache of {one.name} ({bound_words(one)})"


def bound_words(cache: Cache) -> str:
    """Whether it has a bound."""
    return "lru_cache without a bound" if cache.bound is None else f"lru_cache of {spaced(cache.bound)}"


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
    by_name = [{_called(one): one.grown or 0 for one in _growers(objects)} for objects in known]
    found = _in_all(by_name)
    return f"{found[0]} grew in all of the last {len(known)} workers, by {spaced(found[1])} entries in the median" if found else ""


def _common_type(known: Sequence[Objects]) -> str:
    by_name = [
        {each.name: each.grown_bytes for each in objects.types if each.grown is not None and each.grown_bytes >= GROWN_BYTES}
        for objects in known
    ]
    found = _in_all(by_name)
    return f"objects of {found[0]} grew in all of the last {len(known)} workers, by {format_size(found[1])} in the median" if found else ""


def _in_all(by_name: Sequence[dict[str, int]]) -> tuple[str, int] | None:
    """The name that is in all of these and has grown most in the median (the lower one of two), with that median."""
    names = set.intersection(*map(set, by_name))
    # not by the module statistics, which a worker would have to import
    medians = [(sorted(growth[name] for growth in by_name)[(len(by_name) - 1) // 2], name) for name in names]
    if not medians:
        return None
    most, name = max(medians)
    return name, most


def spaced(number: int) -> str:
    """``812 000``: a count in groups of three digits."""
    return f"{number:,}".replace(",", " ")
