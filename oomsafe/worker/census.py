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
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ExtensionFileLoader, ModuleSpec, SourceFileLoader
from itertools import islice
from types import CellType, FunctionType, GetSetDescriptorType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

from oomsafe.policy.objects import NAME, TYPE_NAME, Cache, Container, TypeCount
from oomsafe.policy.text import printable

#: A container with fewer entries is not remembered; one with more is not looked into as a whole, but in so many places.
LEAST, BIG, PLACES = 100, 1000, 200

#: Types are counted among at most so many objects, in so many rounds, each spread over all of them.
SAMPLE, ROUNDS = 24_000, 8

#: The same for the baseline, which a worker takes before it serves.
BASELINE_SAMPLE, BASELINE_PLACES = 2500, 20

#: With more blocks than this no list of all objects is made: it would take too long, and 8 bytes for each.
MOST_BLOCKS = 8_000_000

#: A type of which there are fewer objects, or of which fewer were among those that were counted, is not remembered.
LEAST_COUNT, LEAST_COUNTED = 200, 10

#: The most modules, and the most names in one of them or in a class, that are looked at.
MOST_MODULES, MOST_NAMES = 20_000, 20_000

#: An object that more than this refer to is not any one's.
SHARED = 1000

#: Which part of the time that has passed counts as spent, at least: 0.12 s are over after 0.3 s.
WALL = 0.4

#: How many objects are looked at between two looks at the clock.
CHUNK = 25_000

#: Bytes before each object that the garbage collector tracks.
GC_HEAD = 16

#: A bit of a type's flags: a class statement (or C code at run time) has made it (Include/object.h, Py_TPFLAGS_HEAPTYPE).
_HEAP_TYPE = 1 << 9

# the slots of built-in types, called as such: what a subclass has put in their place is never called
_module_dict: Callable[[ModuleType], Any] = vars(ModuleType)["__dict__"].__get__
_class_dict = type.__dict__["__dict__"].__get__
_class_flags = type.__dict__["__flags__"].__get__
_class_mro = type.__dict__["__mro__"].__get__
_class_qualname = type.__dict__["__qualname__"].__get__
_class_module = type.__dict__["__module__"].__get__

Length = Callable[[Any], int]
_LENGTHS: tuple[tuple[type, Length], ...] = (
    (dict, dict.__len__),
    (list, list.__len__),
    (set, set.__len__),
    (deque, deque.__len__),
    (tuple, tuple.__len__),
    (frozenset, frozenset.__len__),
)
_SIZES: tuple[tuple[type, Length], ...] = (
    (OrderedDict, OrderedDict.__sizeof__),
    (dict, dict.__sizeof__),
    (list, list.__sizeof__),
    (str, str.__sizeof__),
    (bytes, bytes.__sizeof__),
    (int, int.__sizeof__),
    (set, set.__sizeof__),
    (frozenset, frozenset.__sizeof__),
    (bytearray, bytearray.__sizeof__),
    (deque, deque.__sizeof__),
    (type, type.__sizeof__),
)
_LRU: Any = _lru_cache_wrapper

#: What a value of a type may be that is no container.
_NOTHING, _FUNCTION, _METHOD, _CLASS, _CACHE, _INSTANCE = range(6)


class Found(NamedTuple):
    """A container that a name leads to."""

    name: str
    entries: int
    container: Any


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
        self.containers: dict[int, Found] = {}
        """By the id of the container."""
        self.caches: dict[str, Cache] = {}
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
                if length(value) >= LEAST and type(name) is str:
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
                self._walk(name, _class_dict(value), deeper=False)
            else:
                self._instance(name, value)

    def _kind_of(self, kind: type) -> tuple[type, int, Length | None]:
        found = self._kinds.get(id(kind))
        if found is None:
            found = self._kinds[id(kind)] = (kind, *_classified(kind))  # which keeps the type, and so its id
        return found

    def _keep(self, name: str, container: object, entries: int) -> None:
        if entries >= LEAST:
            self.containers.setdefault(id(container), Found(name, entries, container))

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
        length = self._kind_of(type(value))[2]
        if length is not None and (entries := length(value)) >= LEAST:
            self._keep(f"{name} ({where})", value, entries)

    def _instance(self, name: str, instance: object) -> None:
        """Its attributes are read only if one of them may be large, because that takes 3.11 and 3.12 a dictionary for the instance."""
        if any(map(self._may_be_large, gc.get_referents(instance))):
            for attribute, value in _attributes(instance):
                length = self._kind_of(type(value))[2]
                if length is not None:
                    self._keep(f"{name}.{attribute}", value, length(value))

    def as_containers(self) -> list[Container]:
        """What was found, by name."""
        return [
            Container(name=shown(found.name, NAME), kind=container_kind(found.container), entries=found.entries)
            for found in self.containers.values()
        ]

    def _may_be_large(self, value: object) -> bool:
        length = self._kind_of(type(value))[2]
        if length is None:
            return False
        # an exact dictionary may be that of the instance itself
        return length(value) >= LEAST or (type(value) is dict and any(map(self._is_large, list(value.values()))))

    def _is_large(self, value: object) -> bool:
        length = self._kind_of(type(value))[2]
        return length is not None and length(value) >= LEAST

    def _cache(self, name: str, cache: Any) -> None:
        if id(cache) not in self.visited:
            self.visited[id(cache)] = cache
            found = read_cache(name, cache)
            if found is not None and found.entries >= LEAST:
                self.caches.setdefault(found.name, found)


def read_cache(name: str, cache: Any) -> Cache | None:
    """What a functools.lru_cache holds; None: it was made in another way, and may call what it likes when it is asked."""
    asks = _cache_attributes(cache).get("cache_parameters")
    if type(asks) is not FunctionType or asks.__code__.co_name != "<lambda>" or asks.__code__.co_filename != functools.__file__:
        return None
    info = _LRU.cache_info(cache)
    return Cache(name=shown(name, NAME), entries=info.currsize, bound=info.maxsize)


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
    return (_INSTANCE if _class_flags(kind) & _HEAP_TYPE and not issubclass(kind, others) else _NOTHING), None


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
            names = _module_dict(module)
            if type(names) is dict:
                yield name, names


def _items(names: Any) -> list[tuple[str, object]]:
    """The names in the dictionary of a module or a class, as it is at one moment: no other thread runs in between."""
    return [(name, value) for name, value in list(islice(names.items(), MOST_NAMES)) if type(name) is str]


def _attributes(instance: object) -> Iterator[tuple[str, object]]:
    """The attributes that an instance holds itself, in its dictionary and its slots."""
    for base in _class_mro(type(instance)):
        for name, value in _items(_class_dict(base)):
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

    def __init__(self, kind: type) -> None:
        self.kind = kind
        self.count = self.bytes = 0.0
        self.size: Length = next((size for base, size in _SIZES if issubclass(kind, base)), object.__sizeof__)
        """Measures one, as far as built-in types can."""
        self.has_values = self.size is object.__sizeof__ and bool(_class_flags(kind) & _HEAP_TYPE)
        """Whether its attributes take memory beside that."""


class Types:
    """Counts objects by their types: those that the garbage collector tracks, and what these refer to that it does not track.

    What it does not track (strings, bytes, numbers, dictionaries and tuples of such) is counted by its share of the references to it.
    """

    def __init__(self, objects: list[Any]) -> None:
        """`objects`: all that the collector tracks."""
        self.every = 1
        """Objects were counted from one in so many."""
        self._objects = objects
        self._rows: dict[int, _Row] = {}
        """By the type's id, which stays its own because the row keeps the type."""
        self._own = _own_references()

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
        """The same for all that are big, as far as there is time."""
        for each in sorted(found, key=lambda each: -each.entries):
            if each.entries < BIG or clock.is_past(share):
                return
            self.look_into(each.container, each.entries, places)

    def look_into(self, container: Any, length: int, places: int) -> None:
        """Count what a big container holds that the collector does not track."""
        step = max(1, length // places)
        try:
            content = _content(container, step)
        except RuntimeError:  # another thread has changed it meanwhile
            return
        self._weigh(content, step)

    def _count(self, objects: list[Any]) -> None:
        rows = self._rows
        for each in objects:
            kind = type(each)
            row = rows.get(id(kind)) or self._row(kind)
            referents = gc.get_referents(each)
            row.count += 1
            row.bytes += row.size(each) + GC_HEAD + (8 * len(referents) if row.has_values else 0)
            if len(referents) < BIG:
                self._weigh(referents, 1)

    def _weigh(self, found: list[Any], weight: float, deeper: int = 2) -> None:
        """Count of `found` what the collector does not track, each by its share of the references to it."""
        rows, own = self._rows, self._own
        for each in found:
            if not gc.is_tracked(each):
                references = sys.getrefcount(each) - own
                if references > SHARED:
                    continue
                share = weight / references if references > 1 else weight
                kind = type(each)
                row = rows.get(id(kind)) or self._row(kind)
                row.count += share
                row.bytes += share * row.size(each)
                if deeper and (kind is dict or kind is tuple):
                    self._weigh(gc.get_referents(each), share, deeper - 1)

    def _row(self, kind: type) -> _Row:
        row = self._rows[id(kind)] = _Row(kind)
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


def _own_references() -> int:
    """How many references to an object Types._weigh() itself has."""
    for each in gc.get_referents([object()]):
        return sys.getrefcount(each)
    return 0


def _content(container: Any, step: int) -> list[Any]:
    """Every `step`-th of what it holds. Raises RuntimeError if it is changed meanwhile."""
    kind = type(container)
    if issubclass(kind, dict):
        return [each for pair in islice(dict.items(container), 0, None, step) for each in pair]
    for base in (list, tuple, set, deque, frozenset):
        if issubclass(kind, base):
            return list(islice(base.__iter__(container), 0, None, step))
    return []


def type_name(kind: type) -> str:
    """``module.Class``, printable and short; without the module for built-in types."""
    module: object = None
    if not _class_flags(kind) & _HEAP_TYPE:
        module = _class_module(kind)
    else:
        for name, value in _items(_class_dict(kind)):
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
    named = Named(clock, 0.6, first)
    containers, caches = named.as_containers(), dict(named.caches)
    if objects is None:
        return Census(None, 1, named.complete, _number_of_modules(), [], containers, list(caches.values()))
    types = Types(objects)
    types.count(clock, 0.8, SAMPLE)
    types.look_into_all(named.containers.values(), PLACES, clock, 0.9)
    unnamed = {id(each): each for each in types.find_big(clock) if id(each) not in named.containers}
    for each in [each for each in unnamed.values() if type(each) is _LRU]:
        del unnamed[id(each)]
        cache = read_cache(cache_name(each), each)
        if cache is not None and cache.entries >= LEAST:
            if id(each) not in named.visited:
                caches.setdefault(cache.name, cache)
            for inner in gc.get_referents(each):  # the dictionary in which it keeps its entries is not another container
                unnamed.pop(id(inner), None)
    for each in unnamed.values():
        containers.append(Container(name="", kind=container_kind(each), entries=len(each)))
        types.look_into(each, len(each), PLACES)
    return Census(len(objects), types.every, named.complete, _number_of_modules(), types.by_name(), containers, list(caches.values()))


def _baseline(clock: Clock) -> Census:
    objects = _listed()
    named = Named(clock, 0.7, standard=False)
    containers, caches = named.as_containers(), list(named.caches.values())
    if objects is None:
        return Census(None, 1, named.complete, _number_of_modules(), [], containers, caches)
    types = Types(objects)
    types.count(clock, 0.9, BASELINE_SAMPLE)
    types.look_into_all(named.containers.values(), BASELINE_PLACES, clock, 1.0)
    return Census(len(objects), types.every, named.complete, _number_of_modules(), types.by_name(), containers, caches)


def _listed() -> list[Any] | None:
    """All objects that the collector tracks; None: they are too many."""
    return gc.get_objects() if sys.getallocatedblocks() <= MOST_BLOCKS else None


def _number_of_modules() -> int:
    return len(sys.modules) if type(sys.modules) is dict else 0
