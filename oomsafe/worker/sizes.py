"""How many bytes objects take, estimated without calling any code of theirs: what is asked are the slots of built-in types, as such.

An object that several others refer to counts for each by its share. So what a container alone holds is told from what it only mentions.
"""

from __future__ import annotations

import gc
import io
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, GetSetDescriptorType, MethodType, ModuleType
from typing import Any, NamedTuple

Length = Callable[[Any], int]

#: A bit of a type's flags: a class statement (or C code at run time) has made it (Include/object.h, Py_TPFLAGS_HEAPTYPE).
HEAP_TYPE = 1 << 9

#: An object that more than this refer to is not any one's.
SHARED = 1000

#: Bytes before each object of a type that the garbage collector knows, and the bit of the type's flags that says so (Py_TPFLAGS_HAVE_GC).
GC_HEAD, _HAVE_GC = 16, 1 << 14

#: To estimate a container, so many of its entries are looked at, and of what one of them refers to, so many; so deep, and so many in all.
ENTRIES, REFERENTS, DEEP, VISITS = 12, 12, 6, 250

#: What more than so many refer to may be the whole application: it is not looked into.
OWN = 8

class_flags = type.__dict__["__flags__"].__get__
class_dict = type.__dict__["__dict__"].__get__
module_dict: Callable[[ModuleType], Any] = vars(ModuleType)["__dict__"].__get__

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
    (array, array.__sizeof__),
    (io.BytesIO, io.BytesIO.__sizeof__),
)

#: What belongs to the program rather than to its data.
_PROGRAM = (type, ModuleType, FunctionType, BuiltinFunctionType, MethodType, CodeType)


class Measure(NamedTuple):
    """How objects of one type are measured."""

    kind: type
    size: Length
    """Bytes of one, without what it refers to, as far as built-in types can tell; and numpy's arrays."""
    head: int
    """Bytes before it."""
    has_values: bool
    """Whether its attributes take memory beside that."""


class Measures:
    """How objects of each type are measured. One is for one census, which finds that out once for each type."""

    def __init__(self) -> None:
        self._sizes = (*_SIZES, *_numpy())
        self._known: dict[int, Measure] = {}
        """By the type's id, which stays its own because this keeps the type."""

    def of(self, kind: type) -> Measure:
        """Of this type."""
        found = self._known.get(id(kind))
        if found is None:
            size = next((size for base, size in self._sizes if issubclass(kind, base)), object.__sizeof__)
            flags = class_flags(kind)
            values = size is object.__sizeof__ and bool(flags & HEAP_TYPE)
            found = self._known[id(kind)] = Measure(kind, size, GC_HEAD if flags & _HAVE_GC else 0, values)
        return found


def _numpy() -> tuple[tuple[type, Length], ...]:
    """numpy's array, if that is loaded. Its data is neither in its __sizeof__() nor known to the garbage collector."""
    module = sys.modules.get("numpy") if type(sys.modules) is dict else None
    names = module_dict(module) if issubclass(type(module), ModuleType) else None  # type: ignore[arg-type]
    kind = names.get("ndarray") if type(names) is dict else None
    if type(kind) is not type or class_flags(kind) & HEAP_TYPE:
        return ()
    own = class_dict(kind)
    nbytes, base = own.get("nbytes"), own.get("base")
    if type(nbytes) is not GetSetDescriptorType or type(base) is not GetSetDescriptorType:
        return ()
    # an array with a base is a view of that one's data
    return ((kind, lambda each: object.__sizeof__(each) + (nbytes.__get__(each) if base.__get__(each) is None else 0)),)


def own_references() -> int:
    """How many references to an object a loop over a fresh list of objects has itself, which asks for them in its body."""
    for each in gc.get_referents([object()]):
        return sys.getrefcount(each)
    return 0


def content_of(container: Any, step: int) -> list[Any]:
    """Every `step`-th of what it holds, keys and values. Raises RuntimeError if another thread changes it meanwhile."""
    kind = type(container)
    if issubclass(kind, dict):
        return [each for pair in islice(dict.items(container), 0, None, step) for each in pair]
    if issubclass(kind, list):
        return list.__getitem__(container, slice(None, None, step))
    if issubclass(kind, tuple):
        return list(tuple.__getitem__(container, slice(None, None, step)))
    for base in (set, deque, frozenset):
        if issubclass(kind, base):
            return list(islice(base.__iter__(container), 0, None, step))
    return []


class Sizes:
    """Estimates containers."""

    def __init__(self, measures: Measures, listed: bool = False) -> None:
        """`listed`: a list of all objects that the collector tracks refers to each of them, too."""
        self._own = own_references()
        self._listed = listed
        self._measures = measures
        self._visits = 0

    def shallow(self, container: Any, entries: int) -> int:
        """Bytes of a container and of its entries, without what these refer to, by its first and last ones; quick."""
        try:
            content, stands_for = _ends(container, entries)
        except RuntimeError:
            return 0
        return self._size(container) + self.bare(content, stands_for)

    def deep(self, container: Any, entries: int) -> int | None:
        """Bytes of a container and of what it alone holds; None: it was changed meanwhile."""
        step = max(1, entries // ENTRIES)
        try:
            content = content_of(container, step)
        except RuntimeError:
            return None
        return self._size(container) + self.held(content, entries / max(1, -(-entries // step)))

    def bare(self, content: list[Any], weight: float) -> int:
        """Bytes of these objects, each of which stands for so many, without what they refer to."""
        return int(sum(map(self._size, content)) * weight)

    def held(self, content: list[Any], weight: float) -> int:
        """Bytes of these objects and of what they alone hold; no other list may refer to them because of us."""
        self._visits = VISITS
        return int(self._held(content, weight, DEEP))

    def _held(self, found: list[Any], weight: float, deeper: int) -> float:
        total = 0.0
        for each in found:
            kind, measure, head, values = self._measures.of(type(each))
            tracked = gc.is_tracked(each)
            references = sys.getrefcount(each) - self._own - (tracked and self._listed)
            if references > SHARED or issubclass(kind, _PROGRAM):
                continue
            share = weight / max(1, references)
            total += share * (measure(each) + head)
            if deeper and references <= OWN and self._visits > 0 and (tracked or kind is tuple or kind is dict):
                self._visits -= 1
                inner, times = _referents(each)
                total += share * (8 * len(inner) * times if values else 0) + self._held(inner, share * times, deeper - 1)
        return total

    def _size(self, each: object) -> int:
        measure = self._measures.of(type(each))
        return measure.size(each) + measure.head


def _ends(container: Any, entries: int) -> tuple[list[Any], float]:
    """The first and the last of what it holds (a set has no last), and for how many one of them stands. May raise RuntimeError."""
    kind = type(container)
    if entries <= 2 * ENTRIES:
        return content_of(container, 1), 1.0
    if issubclass(kind, dict):
        pairs = dict.items(container)
        some = [*islice(pairs, ENTRIES), *islice(reversed(pairs), ENTRIES)]
        return [each for pair in some for each in pair], entries / len(some)
    for base in (list, tuple, deque):
        if issubclass(kind, base):
            found = [base.__getitem__(container, at) for at in (*range(ENTRIES), *range(-ENTRIES, 0))]
            return found, entries / len(found)
    for unordered in (set, frozenset):
        if issubclass(kind, unordered):
            return list(islice(unordered.__iter__(container), ENTRIES)), entries / ENTRIES
    return [], 0.0


def _referents(each: Any) -> tuple[list[Any], float]:
    """Some of what an object refers to, and for how many one of them stands."""
    found = gc.get_referents(each)
    if len(found) <= 2 * REFERENTS:
        return found, 1.0
    step = len(found) // REFERENTS
    some = found[::step]
    return some, len(found) / len(some)
