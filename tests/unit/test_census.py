"""Objects are found and counted without calling any code of the application's."""

from __future__ import annotations

import ast
import functools
import gc
import importlib.util
import os
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oomsafe.policy.objects import NAME, TYPE_NAME
from oomsafe.worker import census
from oomsafe.worker.census import Census, Clock, Named, take_baseline, take_census, type_name

pytestmark = pytest.mark.skipif(sys.implementation.name != "cpython", reason="another Python does not list its objects so")

calls: list[str] = []
"""What of the application's code was called."""


@pytest.fixture
def app() -> Iterator[types.ModuleType]:
    """A module of the application's, which has one container that must be found whatever lies beside it."""
    module = types.ModuleType("the_app")
    module.CACHE = dict.fromkeys(range(500))
    sys.modules["the_app"] = module
    calls.clear()
    yield module
    del sys.modules["the_app"]


def entries(found: Census | None = None) -> dict[str, int]:
    """How many entries what is in the module has, by name."""
    found = found or take_census(30.0)
    return {one.name: one.entries for one in found.containers if one.name.startswith("the_app")}


def _calling(name: str) -> Callable[..., Any]:
    def called(*args: Any, **more: Any) -> Any:
        calls.append(name)
        raise RuntimeError(name)

    return called


#: What a class of the application's may define, and be called for by the usual ways to ask.
METHODS = (
    "__len__", "__sizeof__", "__repr__", "__str__", "__hash__", "__eq__", "__getattr__", "__iter__", "__bool__", "__getitem__",
    "__contains__", "__index__", "__format__", "__dir__", "__reduce_ex__", "items", "keys", "values",
)  # fmt: skip


def hostile(*bases: type, **more: Any) -> Any:
    """A class whose every method is noticed, and lies about its class."""
    methods = {name: _calling(name) for name in METHODS}
    methods["__getattribute__"] = _calling("__getattribute__")
    return type("Hostile", bases, {**methods, "__class__": property(_calling("__class__")), "__slots__": (), **more})


class Meta(type):
    """A class of classes that does not like to be asked either."""

    __hash__ = _calling("meta __hash__")
    __eq__ = _calling("meta __eq__")
    __instancecheck__ = _calling("meta __instancecheck__")
    __subclasscheck__ = _calling("meta __subclasscheck__")
    __repr__ = _calling("meta __repr__")
    __getattribute__ = _calling("meta __getattribute__")  # type: ignore[assignment]


class LyingText(str):
    """A name that is not what it seems."""

    __slots__ = ()
    __eq__ = _calling("text __eq__")  # type: ignore[assignment]
    __getitem__ = _calling("text __getitem__")  # type: ignore[assignment]
    __iter__ = _calling("text __iter__")
    __str__ = _calling("text __str__")  # type: ignore[assignment]
    __format__ = _calling("text __format__")  # type: ignore[assignment]
    __hash__ = str.__hash__


class LyingTuple(tuple):
    """A function's defaults."""

    __slots__ = ()
    __iter__ = _calling("tuple __iter__")
    __len__ = _calling("tuple __len__")
    __bool__ = _calling("tuple __bool__")


class WithDict:
    """Its attributes are where they are, whatever this says."""

    def __init__(self) -> None:
        object.__setattr__(self, "data", list(range(300)))

    __dict__ = property(_calling("__dict__"))  # type: ignore[assignment]
    __getattribute__ = _calling("__getattribute__")  # type: ignore[assignment]


class Descriptor:
    """It computes."""

    __get__ = _calling("__get__")
    __set__ = _calling("__set__")


class Lazy(types.ModuleType):
    """A module that is loaded when it is touched."""

    __getattribute__ = _calling("lazy __getattribute__")  # type: ignore[assignment]


def _made_by_hand() -> Any:
    return functools._lru_cache_wrapper(lambda: None, None, False, _calling("cache info"))  # type: ignore[attr-defined]


def _marked_by_hand() -> Any:
    made = _made_by_hand()
    made.cache_parameters = _calling("cache parameters")
    return made


class Sloppy:
    """It has slots, and no wish to be asked for them."""

    __slots__ = ("data",)

    def __init__(self) -> None:
        self.data = list(range(300))

    __getattribute__ = _calling("__getattribute__")  # type: ignore[assignment]


def _with_defaults() -> Any:
    def function(a: object = None) -> None:
        """Its defaults lie."""

    function.__defaults__ = LyingTuple((1, 2))
    return function


def _with_a_name() -> Any:
    kind = type("Plain", (), {})
    kind.__qualname__ = LyingText("Plain")
    kind.__module__ = LyingText("elsewhere")
    return [kind() for _ in range(300)]


def _with_text_as_key() -> Any:
    module = types.ModuleType("with_text")
    vars(module)[LyingText("x")] = list(range(300))
    return module


HOSTILE: dict[str, Callable[[], Any]] = {
    "an instance": lambda: hostile(object)(),
    "a dict": lambda: dict.__new__(hostile(dict)),
    "a dict with entries": lambda: _filled(hostile(dict)),
    "a list": lambda: list.__new__(hostile(list)),
    "a set": lambda: set.__new__(hostile(set)),
    "an ordered dict": lambda: OrderedDict.__new__(hostile(OrderedDict)),
    "text": lambda: str.__new__(hostile(str), "text"),
    "a class of a class": lambda: Meta("Made", (), {}),
    "an instance of that": lambda: object.__new__(Meta("Made", (), {"items": list(range(300))})),
    "many instances of that": lambda: [*map(object.__new__, [Meta("Made", (), {})] * 300)],
    "its own __dict__": WithDict,
    "a descriptor in a class": lambda: type("Described", (), {"computed": Descriptor()}),
    "a descriptor in a class of an instance": lambda: _with_data(type("Described", (), {"computed": Descriptor()})()),
    "a property": lambda: type("Proper", (), {"computed": property(_calling("property"))})(),
    "a cache made by hand": _made_by_hand,
    "the same, marked as if functools had": _marked_by_hand,
    "slots": Sloppy,
    "a function with lying defaults": _with_defaults,
    "a type with a lying name": _with_a_name,
}


def _filled(kind: Any) -> Any:
    made = dict.__new__(kind)
    dict.update(made, dict.fromkeys(range(2000)))
    return made


def _with_data(instance: Any) -> Any:
    instance.data = list(range(300))
    return instance


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_of_the_application_is_called(app: types.ModuleType, what: str) -> None:
    """Wherever it lies: in a module, in a class, in an instance, in a closure, in a container; and the rest is found."""
    thing, more = HOSTILE[what](), [HOSTILE[what]() for _ in range(150)]

    def closing() -> object:
        return thing

    app.thing, app.function, app.things, app.more = thing, closing, [thing] * 200, more
    app.Class = type("Class", (), {"thing": thing})
    app.instance = _with_data(types.SimpleNamespace(thing=thing))
    calls.clear()

    found = entries()
    take_baseline(30.0)

    assert calls == []
    assert found["the_app.CACHE"] == 500
    assert found["the_app.things"] == 200
    assert calls == []


def test_lengths_are_those_of_the_built_in_types(app: types.ModuleType) -> None:
    """Whatever __len__ says."""
    app.lying, app.raw = _filled(hostile(dict)), type("Deaf", (list,), {"__len__": lambda self: 0})(range(700))

    found = entries()

    assert (found["the_app.lying"], found["the_app.raw"]) == (2000, 700)


@pytest.mark.parametrize("how", ["a subclass", "its __getattr__", "LazyLoader", "no module at all", "a lying key"])
def test_lazy_modules_stay_lazy(app: types.ModuleType, tmp_path: Path, how: str) -> None:
    """Nothing is loaded by being looked at."""
    lazy: Any
    if how == "a subclass":
        lazy = Lazy("lazy")
    elif how == "its __getattr__":
        lazy = types.ModuleType("lazy")
        lazy.__getattr__ = _calling("module __getattr__")
    elif how == "LazyLoader":
        (tmp_path / "lazy.py").write_text("import unit.test_census as ours\nours.calls.append('loaded')\n")
        spec = importlib.util.spec_from_file_location("lazy", tmp_path / "lazy.py")
        assert spec and spec.loader
        spec.loader = importlib.util.LazyLoader(spec.loader)
        lazy = importlib.util.module_from_spec(spec)
        sys.modules["lazy"] = lazy
        spec.loader.exec_module(lazy)
    elif how == "a lying key":
        lazy = _with_text_as_key()
    else:
        lazy = hostile(object)()
    sys.modules["lazy"] = app.imported = lazy
    calls.clear()
    try:
        found = entries()
    finally:
        del sys.modules["lazy"]

    assert calls == []
    assert type(lazy).__name__ in ("Lazy", "_LazyModule", "module", "Hostile")
    assert found["the_app.CACHE"] == 500


def test_djangos_lazy_objects_stay_lazy(app: types.ModuleType) -> None:
    """They would run a function to become what they stand for."""
    functional = pytest.importorskip("django.utils.functional")
    app.lazy = functional.SimpleLazyObject(_calling("lazy object"))

    assert entries()["the_app.CACHE"] == 500
    assert calls == []


class Slotted:
    """It has no dictionary."""

    __slots__ = ("data", "empty")


class Keeping:
    """It keeps in itself, and in its class."""

    shared: set[int] = set(range(150))  # noqa: RUF012

    def __init__(self) -> None:
        self.own = deque(range(160))

    def method(self, memo: dict[int, int] = dict.fromkeys(range(170), 0)) -> None:  # noqa: B008  that is the fault
        """A default that keeps."""

    @staticmethod
    @functools.lru_cache(maxsize=None)  # noqa: UP033
    def cached(number: int) -> int:
        """Without a bound."""
        return number


def _memoized() -> Callable[[], object]:
    memo = dict.fromkeys(range(180))
    return lambda: memo


def test_where_containers_are_found(app: types.ModuleType) -> None:
    """In a module, in its classes, their functions, in its instances, with slots or without, in closures and among defaults."""
    slotted = Slotted()
    slotted.data = list(range(190))  # type: ignore[attr-defined]
    app.keeping, app.Keeping, app.slotted, app.memoized = Keeping(), Keeping, slotted, _memoized()
    app.counted = defaultdict(list, {number: [] for number in range(200)})
    for number in range(210):
        setattr(app, f"name_{number}", number)
    vars(app)[5] = "no name"

    assert entries() == {
        "the_app.CACHE": 500,
        "the_app.Keeping.shared": 150,
        "the_app.keeping.own": 160,
        "the_app.Keeping.method (default)": 170,
        "the_app.memoized (closure)": 180,
        "the_app.slotted.data": 190,
        "the_app.counted": 200,
        "the_app.__dict__": len(vars(app)),
    }


def test_caches(app: types.ModuleType) -> None:
    """With their bounds; one that no name leads to is called by its function."""

    @functools.lru_cache(maxsize=300)
    def bounded(number: int) -> int:
        return number

    hidden = functools.lru_cache(maxsize=None)(lambda number: number)
    app.Keeping, app.bounded = Keeping, bounded
    for number in range(400):
        bounded(number), hidden(number), Keeping.cached(number)

    for number in range(400, 5003):
        hidden(number)
    taken = take_census(30.0)
    found = {cache.name: (cache.entries, cache.bound) for cache in taken.caches}

    assert found["the_app.bounded"] == (300, 300)
    assert found["the_app.Keeping.cached"] == (400, None)
    assert found[f"{__name__}.test_caches.<locals>.<lambda>"] == (5003, None)
    assert 5003 not in [one.entries for one in taken.containers]  # its own dictionary is not one more


class BoundedCache:
    """As those that are written again in every project; what it keeps its entries in are two containers."""

    def __init__(self, size: int, entries: int) -> None:
        self.__maxsize = size
        self._data = dict.fromkeys(range(entries), b"x" * 1000)
        self._order = OrderedDict.fromkeys(range(entries - 1))


class Remembers(OrderedDict):  # type: ignore[type-arg]
    """A dictionary that says how much it will hold."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.max_entries = size


class Room:
    """What has a bound, but not for this."""

    def __init__(self) -> None:
        self.capacity = 4
        self.visitors = list(range(600))


def test_what_has_a_bound(app: types.ModuleType) -> None:
    """Even with few entries, which may be large; not what is above it, which it does not bound."""
    app.recent, app.fifo = deque([b"x"] * 30, maxlen=60), deque(range(5000))
    app.cache, app.room, app.remembers = BoundedCache(50, 20), Room(), Remembers(500)
    app.remembers.update(dict.fromkeys(range(120)))
    app.wrapped = _closing_over(BoundedCache(3000, 2000))
    taken = take_census(30.0)

    caches = {cache.name: (cache.kind, cache.entries, cache.bound) for cache in taken.caches if cache.name.startswith("the_app")}
    assert caches == {
        "the_app.recent": ("deque", 30, 60),
        "the_app.cache": ("BoundedCache", 20, 50),
        "the_app.remembers": ("Remembers", 120, 500),
        "the_app.wrapped (closure)": ("BoundedCache", 2000, 3000),
    }
    assert entries(taken) == {"the_app.CACHE": 500, "the_app.fifo": 5000, "the_app.room.visitors": 600}
    assert (2000, 1999) not in {(one.entries, one.entries - 1) for one in taken.containers}


def _closing_over(value: object) -> Callable[[], object]:
    return lambda: value


def test_what_was_there_first_keeps_its_name(app: types.ModuleType) -> None:
    """A module that is imported later, and has it under another name, does not rename it."""
    first = len(sys.modules)
    later = types.ModuleType("the_app_later")
    later.ALIAS = app.CACHE  # type: ignore[attr-defined]
    sys.modules["the_app_later"] = later
    try:
        assert entries(take_census(30.0, first)) == {"the_app.CACHE": 500}
        assert entries(take_census(30.0)) == {"the_app_later.ALIAS": 500}
    finally:
        del sys.modules["the_app_later"]


class Leaked:
    """An object of the application's."""

    def __init__(self, number: int) -> None:
        self.number, self.text = number, f"{number:050}"


def counted() -> dict[str, tuple[int, int, int]]:
    """(objects, bytes, how many objects one stands for) of what was kept where no name leads to it, by type."""
    before = {one.name: one for one in take_census(30.0).types}
    kept = (
        [Leaked(number + 1000) for number in range(90_000)],
        [b"%050d" % number for number in range(70_000)],
        {n: (n,) for n in range(50_000)},
    )
    found = take_census(30.0)
    assert len(kept) == 3 and any(one.entries == 90_000 and not one.name for one in found.containers)
    after = {one.name: one for one in found.types}
    told = {}
    for name in (type_name(Leaked), "bytes", "str", "tuple"):
        now, was = after[name], before.get(name)
        count, size = (was.count, was.size) if was else (0, 0)
        told[name] = (now.count - count, now.size - size, found.every)
    return told


def test_types_are_counted_by_a_sample() -> None:
    """Tracked ones, and those that only containers lead to; a shared one is not counted for each reference."""
    # a new process, not a fork of this one, whose own objects would be most of the sample
    script = "from unit.test_census import Leaked, counted, type_name as n; found = counted(); print({**found, 'leaked': found[n(Leaked)]})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), str(Path(__file__).parents[1])])}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True, timeout=60)
    types = ast.literal_eval(ended.stdout)

    assert types["bytes"][2] > 1
    assert types["leaked"][0] == pytest.approx(90_000, rel=0.1)
    assert types["str"][0] == pytest.approx(90_000, rel=0.2)
    assert types["tuple"][0] == pytest.approx(50_000, rel=0.3)
    assert types["bytes"][:2] == (pytest.approx(70_000, rel=0.1), pytest.approx(70_000 * sys.getsizeof(b"%050d" % 1), rel=0.1))


def test_time_is_bounded(app: types.ModuleType) -> None:
    """Without any, no module is looked at, and that is said."""
    found = take_census(0.0)

    assert (found.complete, entries(found)) == (False, {})
    assert found.every >= 1
    assert not Named(Clock(0.0), 1.0).complete


def test_with_too_many_objects_they_are_not_listed(app: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are followed all the same."""
    monkeypatch.setattr(census, "MOST_BLOCKS", 1000)

    found = take_census(30.0)

    assert (found.tracked, found.types) == (None, [])
    assert entries(found) == {"the_app.CACHE": 500}


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_left_as_it_was(collects: bool) -> None:
    """It rests meanwhile, because it would run finalizers of the application's."""
    before = gc.isenabled()
    try:
        (gc.enable if collects else gc.disable)()
        take_baseline(1.0)
        assert gc.isenabled() is collects
    finally:
        (gc.enable if before else gc.disable)()


class Finalized:
    """Garbage that notices its end."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        calls.append("__del__")


#: It has awaited futures, whose iterators asyncio keeps when they are dead, to use them again.
AWAITED = """
import asyncio, gc

async def wait(future):
    await future

async def main():
    futures = [asyncio.get_running_loop().create_future() for _ in range(20)]
    tasks = [asyncio.ensure_future(wait(future)) for future in futures]
    await asyncio.sleep(0)
    for future in futures:
        future.set_result(None)
    await asyncio.gather(*tasks)

asyncio.run(main())
from oomsafe.worker.census import take_baseline, take_census

for _ in range(3):
    take_baseline(30.0)
    take_census(30.0)
    gc.collect()
asyncio.run(main())
print("goes on")
"""


def test_what_asyncio_keeps_for_later_stays_dead() -> None:
    """Python 3.12 has its module refer to it: who asks for that, and lets go of it, has it die twice; no collection ever ends then."""
    ended = subprocess.run([sys.executable, "-c", AWAITED], capture_output=True, text=True, timeout=60, check=False)

    assert ended.stdout == "goes on\n", ended.stderr


def test_nobody_asks_a_module_for_what_it_refers_to(app: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every Python: other modules in C may do likewise."""
    app.cached, app.values = functools.lru_cache(maxsize=300)(lambda number: number), [types.ModuleType(f"m{at}") for at in range(200)]
    for number in range(200):
        app.cached(number)
    asked: list[type] = []

    def noted(*objects: object) -> list[Any]:
        asked.extend(map(type, objects))
        return get_referents(*objects)

    get_referents = gc.get_referents
    monkeypatch.setattr(gc, "get_referents", noted)
    take_census(30.0)
    take_baseline(30.0)

    assert len(asked) > 1000
    assert not [kind for kind in asked if issubclass(kind, types.ModuleType)]


def test_no_garbage_is_collected() -> None:
    """Its finalizers are the application's."""
    threshold = gc.get_threshold()

    def allocating() -> Any:
        gc.set_threshold(1, 1, 1)
        return [[number] for number in range(1000)], list(calls)

    gc.collect()
    calls.clear()
    Finalized()
    try:
        _, called = census._undisturbed(allocating)
    finally:
        gc.set_threshold(*threshold)

    assert called == []


def test_names_are_short_and_printable(app: types.ModuleType) -> None:
    """Whatever an application calls its own."""
    setattr(app, "\x1b[31m\n" + "x" * 200, list(range(300)))
    app.ünïcode = list(range(300))
    kind = type("\x1b" + "y" * 200, (), {})

    names = [*entries(), type_name(kind)]

    assert all(name.isascii() and name.isprintable() and len(name) <= NAME for name in names)
    assert len(type_name(kind)) <= TYPE_NAME
    assert "the_app.?n?code" in names


def test_the_standard_library_is_not_in_the_baseline(app: types.ModuleType) -> None:
    """It is large, and what the application keeps there is found at the end."""
    found = take_baseline(30.0)

    assert entries(found) == {"the_app.CACHE": 500}
    assert not any(one.name.startswith(("html.", "token.", "mimetypes.")) for one in found.containers)
