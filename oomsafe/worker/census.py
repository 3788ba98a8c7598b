"""What objects this process holds, by type, by container and by cache, found without calling any code of the application.

Nothing here compares, hashes, measures or prints an object by the object's own methods: a type is asked by type(), never by ``__class__``;
lengths and sizes come from the methods of built-in types, attributes from the dictionaries in which they lie. Dictionaries here have ids as
keys, because even a type may have a hash of its own (by its metaclass). Only names are kept, never values or the keys of the application's
data.
"""

from __future__ import annotations

import functools
import gc
import sys
import time
from _functools import _lru_cache_wrapper  # type: ignore[import-not-found]  # not from functools, where others may have put theirs
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader
from itertools import islice
from types import CellType, FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from oomsafe.policy.objects import LRU, NAME, TYPE_NAME, Cache, Container, TypeCount
from oomsafe.policy.text import printable
from oomsafe.worker.sizes import (
    ENTRIES,
    GC_HEAD,
    HEAP_TYPE,
    SHARED,
    Length,
    Measure,
    Measures,
    Sizes,
    class_dict,
    class_flags,
    content_of,
    module_dict,
    own_references,
)

#: A container with fewer entries is not remembered; one with more is not looked into as a whole, but in so many places.
LEAST, BIG, PLACES = 100, 1000, 200

#: Types are counted among at most so many objects, in so many rounds, each spread over all of them.
SAMPLE, ROUNDS = 24_000, 8

#: The same for the baseline, which a worker takes before it serves.
BASELINE_SAMPLE, BASELINE_PLACES = 2500, 20

#: A cache, or a container that has a bound, is remembered with fewer entries: they may be large.
LEAST_CACHED = 8

#: Names of an attribute that bounds what an object holds, after underscores: of cachetools, asyncio.Queue, SQLAlchemy, Django and others.
BOUNDS = frozenset(("maxsize", "max_size", "maxlen", "max_len", "max_entries", "capacity"))

#: Of how many containers it is estimated how many bytes they hold, and of how many even if the time is spent: it takes 1 or 2 ms.
ESTIMATED, ANYWAY = 12, 5

#: With more blocks than this no list of all objects is made: it would take too long, and 8 bytes for each.
MOST_BLOCKS = 8_000_000

#: A type of which there are fewer objects, or of which fewer were among those that were counted, is not remembered.
LEAST_COUNT, LEAST_COUNTED = 200, 10

#: The most modules, and the most names in one of them or in a class, that are looked at.
MOST_MODULES, MOST_NAMES = 20_000, 20_000

#: Which part of the time that has passed counts as spent, at least: 0.12 s are over after 0.3 s.
WALL = 0.4

#: How many objects are looked at between two looks at the clock.
CHUNK = 25_000

# the slots of built-in types, called as such: what a subclass has put in their place is never called
_class_mro = type.__dict__["__mro__"].__get__
_deque_maxlen: Callable[[Any], Any] = vars(deque)["maxlen"].__get__
_class_qualname = type.__dict__["__qualname__"].__get__
_class_module = type.__dict__["__module__"].__get__

_LENGTHS: tuple[tuple[type, Length], ...] = (
    (dict, dict.__len__),
    (list, list.__len__),
    (set, set.__len__),
    (deque, deque.__len__),
    (tuple, tuple.__len__),
    (frozenset, frozenset.__len__),
)
_LRU: Any = _lru_cache_wrapper

#: What a value of a type may be that is no container.
_NOTHING, _FUNCTION, _METHOD, _CLASS, _CACHE, _INSTANCE, _CACHING = range(7)


class Found(NamedTuple):
    """A container that a name leads to, or a cache."""

    name: str
    entries: int
    container: Any
    kind: str
    """The name of its type, or of that of the object which bounds it."""
    is_cache: bool = False
    bound: int | None = None
    """The most entries that a cache keeps; None: it has no bound."""


class Clock:
    """How much of the time for a census is spent: the processor time of this thread, or WALL of what has passed, if that is more.

    So a busy machine does not make a census incomplete at once, nor keep a worker's memory from its pool for long.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._worked, self._began = time.thread_time(), time.monotonic()

    def is_past(self, share: float) -> bool:
        """Whether this share of the time is spent."""
        spent = max(time.thread_time() - self._worked, (time.monotonic() - self._began) * WALL)
        return spent >= share * self._seconds


class Named:
    """Walks from the modules by their names: to containers and caches there, in their classes, functions and instances."""

    def __init__(self, clock: Clock, share: float, first: int | None = None, standard: bool = True) -> None:
        """`share` of the clock's time is for this. `first`: how many modules come before those that were imported later; None: all are
        alike. `standard`: those of the standard library, too.
        """
        self.complete = True
        """Whether there was time for all modules."""
        self.found: dict[int, Found] = {}
        """By the id of the container, or of the cache."""
        self.parts: dict[int, object] = {}
        """What is a part of a cache that was found, by id."""
        self._kinds: dict[int, tuple[type, int, Length | None]] = {}
        self.visited: dict[int, object] = {}
        """Caches, classes and instances that were visited, by id."""
        for name, names in _modules(first, standard):
            if clock.is_past(share):
                self.complete = False
                break
            self._keep(f"{name}.__dict__", names, dict.__len__(names))
            self._walk(name, names)

    def _walk(self, owner: str, names: Any, deeper: bool = True) -> None:
        """Visit what is in the dictionary of a module; with `deeper`, in its classes and instances, too."""
        kinds = self._kinds
        # as it is at one moment: no other thread runs while the list is made
        for name, value in list(islice(names.items(), MOST_NAMES)):
            kind = type(value)
            if kind is FunctionType:  # most are functions, text or modules
                if value.__closure__ is None and value.__defaults__ is None and value.__kwdefaults__ is None:
                    continue
            elif kind is str or kind is ModuleType:
                continue
            _, what, length = kinds.get(id(kind)) or self._kind_of(kind)
            if length is not None:
                if length(value) >= LEAST_CACHED and type(name) is str:
                    self._keep(f"{owner}.{name}", value, length(value))
            elif what != _NOTHING and type(name) is str:
                self._visit(f"{owner}.{name}", value, what, deeper)

    def _visit(self, name: str, value: Any, what: int, deeper: bool) -> None:
        """What is no container itself, but may hold some."""
        if what == _FUNCTION:
            self._function(name, value)
        elif what == _METHOD:
            self._method(name, value.fget if type(value) is property else value.__func__)
        elif what == _CACHE:
            self._cache(name, value)
        elif deeper and id(value) not in self.visited:
            self.visited[id(value)] = value
            if what == _CLASS:
                self._walk(name, class_dict(value), deeper=False)
            else:
                self._instance(name, value, what)

    def _kind_of(self, kind: type) -> tuple[type, int, Length | None]:
        found = self._kinds.get(id(kind))
        if found is None:
            found = self._kinds[id(kind)] = (kind, *_classified(kind))  # which keeps the type, and so its id
        return found

    def _keep(self, name: str, container: object, entries: int) -> None:
        kind = type(container)
        if (entries < LEAST and kind is not deque) or id(container) in self.found:
            return
        bound = None
        if kind is deque:
            bound = _deque_maxlen(container)
        elif class_flags(kind) & HEAP_TYPE:
            bound = _bound_among(_attributes(container))
        if bound is not None and entries <= bound:
            self._cached(name, container, entries, container, bound)
        elif entries >= LEAST:
            self.found[id(container)] = Found(name, entries, container, container_kind(container))

    def _cached(self, name: str, container: object, entries: int, owner: object, bound: int | None) -> None:
        """A cache, whose `owner` is what bounds it."""
        self.found.setdefault(id(container), Found(name, entries, container, container_kind(owner), is_cache=True, bound=bound))

    def _method(self, name: str, function: object) -> None:
        """What a staticmethod, a classmethod or a property is made of."""
        what = self._kind_of(type(function))[1]
        if what == _FUNCTION:
            self._function(name, function)
        elif what == _CACHE:
            self._cache(name, function)

    def _function(self, name: str, function: Any) -> None:
        """The containers in its closure, and among the defaults of its arguments: they live as long as the function."""
        closure, defaults, by_keyword = function.__closure__, function.__defaults__, function.__kwdefaults__
        if type(closure) is tuple:
            for cell in closure:
                self._inside(name, "closure", _content_of(cell))
        if type(defaults) is tuple:
            for default in defaults:
                self._inside(name, "default", default)
        if type(by_keyword) is dict:
            for default in list(by_keyword.values()):
                self._inside(name, "default", default)

    def _inside(self, name: str, where: str, value: object) -> None:
        _, what, length = self._kind_of(type(value))
        if length is not None:
            self._keep(f"{name} ({where})", value, length(value))
        elif what in (_INSTANCE, _CACHING) and id(value) not in self.visited:
            self.visited[id(value)] = value
            self._instance(f"{name} ({where})", value, what)

    def _instance(self, name: str, instance: object, what: int) -> None:
        """Its attributes are read only if one of them may be large, because that takes 3.11 and 3.12 a dictionary for the instance."""
        least = LEAST_CACHED if what == _CACHING else LEAST
        if not any(self._may_be_large(value, least) for value in gc.get_referents(instance)):
            return
        attributes = list(_attributes(instance))
        lengths = ((attribute, value, self._kind_of(type(value))[2]) for attribute, value in attributes)
        held = [(attribute, value, length(value)) for attribute, value, length in lengths if length is not None]
        bound = _bound_among(attributes)
        most = max((entries for _, _, entries in held if bound is not None and LEAST_CACHED <= entries <= bound), default=None)
        for attribute, value, entries in held:
            if most is None:
                self._keep(f"{name}.{attribute}", value, entries)
            elif entries == most and id(value) not in self.found:
                self._cached(name, value, entries, instance, bound)
                most = -1  # what else it has is how it keeps its entries
            else:
                self.parts[id(value)] = value

    def _may_be_large(self, value: object, least: int) -> bool:
        length = self._kind_of(type(value))[2]
        if length is None:
            return False
        # an exact dictionary may be that of the instance itself
        return length(value) >= least or (type(value) is dict and any(self._is_large(each, least) for each in list(value.values())))

    def _is_large(self, value: object, least: int) -> bool:
        length = self._kind_of(type(value))[2]
        return length is not None and length(value) >= least

    def _cache(self, name: str, cache: Any) -> None:
        if id(cache) not in self.visited:
            self.visited[id(cache)] = cache
            found = read_cache(name, cache)
            if found is not None and found.entries >= LEAST_CACHED:
                self.found.setdefault(id(cache), found)


def read_cache(name: str, cache: Any) -> Found | None:
    """What a functools.lru_cache holds; None: it was made in another way, and may call what it likes when it is asked."""
    asks = _cache_attributes(cache).get("cache_parameters")
    if type(asks) is not FunctionType or asks.__code__.co_name != "<lambda>" or asks.__code__.co_filename != functools.__file__:
        return None
    info = _LRU.cache_info(cache)
    return Found(name, info.currsize, cache, LRU, is_cache=True, bound=info.maxsize)


def _bound_among(attributes: Iterable[tuple[str, object]]) -> int | None:
    """The bound that an object with these attributes has for what it holds; None: it has none that is called so."""
    for name, value in attributes:
        if type(value) is int and value > 0 and name.lstrip("_").rpartition("__")[2].lstrip("_") in BOUNDS:
            return value
    return None


def cache_name(cache: Any) -> str:
    """By the function that it caches for, if functools has noted that; else empty."""
    named = _cache_attributes(cache)
    return ".".join(part for part in (_plain(named.get("__module__")), _plain(named.get("__qualname__"))) if part)


def _cache_attributes(cache: Any) -> dict[str, object]:
    attributes = _LRU.__dict__["__dict__"].__get__(cache)
    return dict(_items(attributes)) if type(attributes) is dict else {}


def _classified(kind: type) -> tuple[int, Length | None]:
    """What a value of this type may be, and how long, if it is a container."""
    for base, length in _LENGTHS:
        if issubclass(kind, base):
            return _NOTHING, length
    for base, what in ((type, _CLASS), (_LRU, _CACHE)):
        if issubclass(kind, base):
            return what, None
    if kind is FunctionType:
        return _FUNCTION, None
    if kind is staticmethod or kind is classmethod or kind is property:
        return _METHOD, None
    # each module has a specification and a loader, which hold nothing of the application's
    others = (ModuleType, ModuleSpec, SourceFileLoader, ExtensionFileLoader)
    if not class_flags(kind) & HEAP_TYPE or issubclass(kind, others):
        return _NOTHING, None
    return (_CACHING if any(word in _plain(_class_qualname(kind)).lower() for word in ("cache", "lru")) else _INSTANCE), None


def is_standard(name: str) -> bool:
    """Whether what has this name is in a module of the standard library."""
    return name.partition(".")[0] in sys.stdlib_module_names


def _modules(first: int | None, standard: bool) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The modules' own dictionaries: a lazy module stays as it is. Those of the standard library come last, if they are wanted.

    Of others those that were imported last come first: what a module has imported comes before it, and so a container is called by where
    it was made. The `first` modules come before the others, so that what they hold is called as it was when there were no others.
    """
    if type(sys.modules) is not dict:
        return
    modules = [(name, module) for name, module in list(sys.modules.items()) if type(name) is str]
    first = len(modules) if first is None else first
    ordered = [*reversed(modules[:first]), *reversed(modules[first:])]
    others = [each for each in ordered if not is_standard(each[0])]
    theirs = [each for each in ordered if is_standard(each[0])] if standard else []
    for name, module in islice((*others, *theirs), MOST_MODULES):
        if issubclass(type(module), ModuleType):
            names = module_dict(module)
            if type(names) is dict:
                yield name, names


def _items(names: Any) -> list[tuple[str, object]]:
    """The names in the dictionary of a module or a class, as it is at one moment: no other thread runs in between."""
    return [(name, value) for name, value in list(islice(names.items(), MOST_NAMES)) if type(name) is str]


def _attributes(instance: object) -> Iterator[tuple[str, object]]:
    """The attributes that an instance holds itself, in its dictionary and its slots."""
    for base in _class_mro(type(instance)):
        for name, value in _items(class_dict(base)):
            if type(value) is MemberDescriptorType:
                try:
                    yield name, value.__get__(instance)
                except AttributeError:
                    continue  # the slot is empty
            elif name == "__dict__" and type(value) is GetSetDescriptorType:
                own = value.__get__(instance)
                if type(own) is dict:
                    yield from _items(own)


def _content_of(cell: object) -> object:
    try:
        return cell.cell_contents if type(cell) is CellType else None
    except ValueError:
        return None  # it is empty


class _Row:
    """What was counted of one type."""

    __slots__ = ("bytes", "count", "has_values", "kind", "size")

    def __init__(self, measure: Measure) -> None:
        self.kind, self.size, _, self.has_values = measure
        self.count = self.bytes = 0.0


class Types:
    """Counts objects by their types: those that the garbage collector tracks, and what these refer to that it does not track.

    What it does not track (strings, bytes, numbers, dictionaries and tuples of such) is counted by its share of the references to it.
    """

    def __init__(self, objects: list[Any], measures: Measures, apart: Iterable[int] = ()) -> None:
        """`objects`: all that the collector tracks. `apart`: ids of containers that are looked into later, each as a whole.

        What those hold is not to count for as many objects as one of the sample stands for: a list of large blobs would decide alone.
        """
        self.every = 1
        """Objects were counted from one in so many."""
        self._objects = objects
        self._measures = measures
        self._apart = frozenset(apart)
        self._rows: dict[int, _Row] = {}
        """By the type's id, which stays its own because the row keeps the type."""
        self.large: dict[int, Any] = {}
        """Large dictionaries and tuples that the collector does not track, by id."""
        self._own = own_references()

    def count(self, clock: Clock, share: float, sample: int) -> None:
        """Count among `sample` objects, or fewer if that share of the time is spent first."""
        step = max(1, -(-len(self._objects) // sample)) * ROUNDS
        counted = 0
        for start in range(ROUNDS):
            self._count(self._objects[start::step])
            counted += 1
            if clock.is_past(share):
                break
        self.every = step // counted
        for row in self._rows.values():
            row.count *= step / counted
            row.bytes *= step / counted

    def find_big(self, clock: Clock) -> Iterator[Any]:
        """Big containers, and caches, among all objects, as far as there is time; every seventh part of the objects comes first."""
        starts = range(0, len(self._objects), CHUNK)
        for first in range(7):
            for start in starts[first::7]:
                if clock.is_past(1.0):
                    return
                yield from _big(self._objects[start : start + CHUNK])

    def look_into_all(self, found: Iterable[Found], places: int, clock: Clock, share: float) -> None:
        """The same for all that are big, or set apart, as far as there is time."""
        big = [each for each in found if each.entries >= BIG or id(each.container) in self._apart]
        for each in sorted(big, key=lambda each: (id(each.container) not in self._apart, -each.entries)):
            if clock.is_past(share):
                return
            if type(each.container) is _LRU:
                self._weigh(*some_of_cache(each))
            else:
                self.look_into(each.container, each.entries, places)

    def look_into(self, container: Any, length: int, places: int) -> None:
        """Count what a big container holds that the collector does not track."""
        if not gc.is_tracked(container):  # else it is counted already
            row = self._rows.get(id(type(container))) or self._row(type(container))
            row.count += 1
            row.bytes += row.size(container)
        step = max(1, length // places)
        try:
            content = content_of(container, step)
        except RuntimeError:  # another thread has changed it meanwhile
            return
        self._weigh(content, step)

    def _count(self, objects: list[Any]) -> None:
        rows = self._rows
        for each in objects:
            kind = type(each)
            row = rows.get(id(kind)) or self._row(kind)
            # Never of a module: those of C modules may be objects that are dead and wait to be used again, and die a second time when
            # we let go of them. Python 3.12's asyncio then goes round in circles at the next collection (Modules/_asynciomodule.c,
            # module_traverse). What a module holds is in its dictionary.
            referents = [] if issubclass(kind, ModuleType) else gc.get_referents(each)
            row.count += 1
            row.bytes += row.size(each) + GC_HEAD + (8 * len(referents) if row.has_values else 0)
            if len(referents) < BIG and id(each) not in self._apart:
                self._weigh(referents, 1)

    def _weigh(self, found: list[Any], weight: float, deeper: int = 2) -> None:
        """Count of `found` what the collector does not track, each by its share of the references to it."""
        rows, own = self._rows, self._own
        for each in found:
            if not gc.is_tracked(each):
                kind = type(each)
                if (kind is dict or kind is tuple) and (len(each) >= BIG or id(each) in self._apart):
                    self.large[id(each)] = each  # once, and not for others that were not counted
                    continue
                references = sys.getrefcount(each) - own
                if references > SHARED:
                    continue
                share = weight / references if references > 1 else weight
                row = rows.get(id(kind)) or self._row(kind)
                row.count += share
                row.bytes += share * row.size(each)
                if deeper and (kind is dict or kind is tuple):
                    self._weigh(gc.get_referents(each), share, deeper - 1)

    def _row(self, kind: type) -> _Row:
        row = self._rows[id(kind)] = _Row(self._measures.of(kind))
        return row

    def by_name(self) -> list[TypeCount]:
        """The types of which there are many: those of one name count as one."""
        named: dict[str, TypeCount] = {}
        for row in self._rows.values():
            if row.count >= max(LEAST_COUNT, LEAST_COUNTED * self.every):
                name = type_name(row.kind)
                other = named.get(name) or TypeCount(name=name, count=0, size=0)
                named[name] = TypeCount(name=name, count=other.count + round(row.count), size=other.size + round(row.bytes))
        return list(named.values())


def _big(objects: list[Any]) -> list[Any]:
    return [
        each
        for each in objects
        # len() is theirs, because these are their very types
        if (((kind := type(each)) is dict or kind is list or kind is tuple or kind is set or kind is deque) and len(each) >= BIG)
        or kind is _LRU
    ]


def type_name(kind: type) -> str:
    """``module.Class``, printable and short; without the module for built-in types."""
    module: object = None
    if not class_flags(kind) & HEAP_TYPE:
        module = _class_module(kind)
    else:
        for name, value in _items(class_dict(kind)):
            if name == "__module__":
                module = value
    name = _plain(_class_qualname(kind))
    home = _plain(module)
    return shown(name if home in ("", "builtins") else f"{home}.{name}", TYPE_NAME)


def container_kind(container: object) -> str:
    """The name of its type, without the module."""
    return _plain(_class_qualname(type(container)))


def _plain(text: object) -> str:
    """`text` as a str of no other class; empty if it is no text."""
    if type(text) is str:
        return text
    return str.encode(text, "ascii", "replace").decode("ascii") if issubclass(type(text), str) else ""  # type: ignore[arg-type]


def shown(name: str, length: int) -> str:
    """`name` printable, and at most so long: its middle is left out."""
    if len(name) > length:
        name = f"{name[: length // 3]}...{name[len(name) - (length - length // 3 - 3) :]}"
    return name if name.isascii() and name.isprintable() else printable(name, length)


class Census(NamedTuple):
    """What was found."""

    tracked: int | None
    """Objects that the collector tracks; None: they were not counted."""
    every: int
    complete: bool
    """Whether all names were followed."""
    modules: int
    """How many modules there were."""
    types: list[TypeCount]
    containers: list[Container]
    caches: list[Cache]


def take_census(seconds: float, first: int | None = None) -> Census:
    """This process's objects, in about so many seconds at most. `first`: how many modules there were at the census before this one.

    It must not be called with little memory left: it makes a list of all objects.
    """
    return _undisturbed(lambda: _census(Clock(seconds), first))


def take_baseline(seconds: float) -> Census:
    """The same as far as a worker can afford it before it serves: from a smaller sample, and by the names that the application has made."""
    return _undisturbed(lambda: _baseline(Clock(seconds)))


def _undisturbed(take: Callable[[], Census]) -> Census:
    """A garbage collection would run the finalizers of the application's garbage, and take its time from ours."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return take()
    finally:
        if collects:
            gc.enable()


def _census(clock: Clock, first: int | None) -> Census:
    objects = _listed()  # first, so that nothing of ours is among them
    named = Named(clock, 0.55, first)
    measures = Measures()
    sizes = _estimated(named.found.values(), Sizes(measures, listed=objects is not None), clock, 0.7)
    if objects is None:
        return _as_census(None, 1, named, [], sizes)
    types = Types(objects, measures, sizes)
    types.count(clock, 0.85, SAMPLE)
    types.look_into_all(named.found.values(), PLACES, clock, 0.92)
    big = {id(each): each for each in (*types.find_big(clock), *types.large.values())}
    unnamed = {at: each for at, each in big.items() if at not in named.found and at not in named.parts}
    for each in [each for each in unnamed.values() if type(each) is _LRU]:
        del unnamed[id(each)]
        cache = read_cache(cache_name(each), each)
        if cache is not None and cache.entries >= LEAST and id(each) not in named.visited:
            named.found[id(each)] = cache
    for each in [found.container for found in named.found.values() if type(found.container) is _LRU]:
        for inner in gc.get_referents(each):  # the dictionary in which it keeps its entries is not another container
            unnamed.pop(id(inner), None)
    for each in unnamed.values():
        types.look_into(each, len(each), PLACES)
    return _as_census(len(objects), types.every, named, types.by_name(), sizes, unnamed.values())


def _baseline(clock: Clock) -> Census:
    objects = _listed()
    named = Named(clock, 0.7, standard=False)
    if objects is None:
        return _as_census(None, 1, named, [], {})
    types = Types(objects, Measures())
    types.count(clock, 0.9, BASELINE_SAMPLE)
    types.look_into_all(named.found.values(), BASELINE_PLACES, clock, 1.0)
    return _as_census(len(objects), types.every, named, types.by_name(), {})


def _as_census(
    tracked: int | None, every: int, named: Named, types: list[TypeCount], sizes: dict[int, int], unnamed: Iterable[Any] = ()
) -> Census:
    containers = [
        Container(name=shown(found.name, NAME), kind=found.kind, entries=found.entries, size=sizes.get(id(found.container)))
        for found in named.found.values()
        if not found.is_cache
    ]
    containers += [Container(name="", kind=container_kind(each), entries=len(each)) for each in unnamed]
    caches = {
        found.name: Cache(
            name=shown(found.name, NAME), kind=found.kind, entries=found.entries, size=sizes.get(id(found.container)), bound=found.bound
        )
        for found in reversed(named.found.values())  # of two with one name, the one that was found first
        if found.is_cache
    }
    return Census(tracked, every, named.complete, _number_of_modules(), types, containers, [*reversed(caches.values())])


def _estimated(found: Iterable[Found], sizes: Sizes, clock: Clock, share: float) -> dict[int, int]:
    """About how many bytes those hold that seem to hold most, by id: of a few always, of others while there is time."""
    likely = sorted(
        (one for one in found if not one.name.endswith(".__dict__")),  # a module's names are its code
        key=lambda one: (not one.is_cache, -one.entries),
    )
    seem: list[tuple[int, int, Found]] = []
    for number, one in enumerate(likely):
        if number >= ANYWAY * 10 and number % 50 == 0 and clock.is_past(share):
            break
        size = sizes.bare(*some_of_cache(one)) if type(one.container) is _LRU else sizes.shallow(one.container, one.entries)
        seem.append((size, number, one))
    estimated = {}
    for number, (_, _, one) in enumerate(sorted(seem, reverse=True)[:ESTIMATED]):
        if number >= ANYWAY and clock.is_past(share):
            break
        held = sizes.held(*some_of_cache(one)) if type(one.container) is _LRU else sizes.deep(one.container, one.entries)
        if held is not None:
            estimated[id(one.container)] = held
    return estimated


def some_of_cache(found: Found) -> tuple[list[Any], float]:
    """Some of what a functools.lru_cache holds, and for how many one of them stands."""
    inner = gc.get_referents(found.container)
    if found.bound is not None:  # it refers to each key, to each result and to the type of what links them, and to a dictionary
        inner = [each for each in inner if type(each) is not dict and not issubclass(type(each), type)]
    else:
        own = [each for each in inner if type(each) is dict and dict.__len__(each) == found.entries]
        inner = [each for one in own[:1] for pair in dict.items(one) for each in pair]
    step = max(1, len(inner) // (2 * ENTRIES) | 1)  # an odd one, so that keys and results take turns
    some = inner[::step]
    return some, len(inner) / max(1, len(some))


def _listed() -> list[Any] | None:
    """All objects that the collector tracks; None: they are too many."""
    return gc.get_objects() if sys.getallocatedblocks() <= MOST_BLOCKS else None


def _number_of_modules() -> int:
    return len(sys.modules) if type(sys.modules) is dict else 0
