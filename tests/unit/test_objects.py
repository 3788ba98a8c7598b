"""What of a worker's objects has grown: which of it is shown, in which words, and what its pool's workers have in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.retiring import several

from oomsafe.cli.objects_text import objects_lines
from oomsafe.kernel.capacity import read_capacity
from oomsafe.policy.objects import (
    CACHES,
    CONTAINERS,
    TYPES,
    Cache,
    Container,
    Objects,
    TypeCount,
    grower_words,
    keeper,
    largest,
    largest_types,
    spaced,
)
from oomsafe.policy.retention import Kind, judge
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.objects import packed, unpacked
from oomsafe.worker import baseline, stocktaking
from oomsafe.worker.baseline import baseline_of
from oomsafe.worker.stocktaking import objects_of

MIB = 1 << 20
GROWN = Container(name="apps.CACHE", kind="dict", entries=250_000, before=10_000)
SAME = Container(name="apps.TABLE", kind="dict", entries=900_000, before=900_000)
UNNAMED = Container(name="", kind="list", entries=500_000)
CACHED = Cache(name="apps.f", entries=50_000, bound=None, before=0)
LARGE = Container(name="apps.BLOBS", kind="list", entries=300, size=90 * MIB, before=20)
LISTS = TypeCount(name="list", count=300_000, size=30 * MIB, before=10_000)
OWN = TypeCount(name="apps.Thing", count=200_000, size=20 * MIB, before=0)
FEW = TypeCount(name="dict", count=1000, size=MIB // 4, before=10)

WORDS = {
    "a container": (Objects(containers=(SAME, GROWN), types=(LISTS,)), "; apps.CACHE grew by 240 000 entries"),
    "a cache": (Objects(caches=(CACHED,)), "; the cache of apps.f (lru_cache without a bound) grew by 50 000 entries"),
    "a bounded cache": (
        Objects(caches=(replace(CACHED, bound=60_000),)), "; the cache of apps.f (lru_cache of 60 000) grew by 50 000 entries",
    ),
    "few entries, and large ones": (
        Objects(containers=(GROWN, LARGE), types=(LISTS,)), "; apps.BLOBS grew by 280 entries (84.0 MiB)",
    ),
    "a bounded cache of another kind": (
        Objects(caches=(replace(CACHED, kind="deque", bound=60_000, size=50 * MIB),)),
        "; apps.f (deque of at most 60 000) grew by 50 000 entries (50.0 MiB)",
    ),
    "types, where no name leads": (
        Objects(containers=(SAME, UNNAMED), types=(LISTS, OWN, FEW)),
        "; 290 000 more objects of list (29.0 MiB), 200 000 more objects of apps.Thing (20.0 MiB)",
    ),
    "its own type first": (Objects(types=(OWN, FEW)), "; 200 000 more objects of apps.Thing (20.0 MiB)"),
    "nothing known of before": (
        Objects(containers=(replace(SAME, before=None), UNNAMED), types=(replace(LISTS, before=None),)), "; apps.TABLE has 900 000 entries",
    ),
    "nothing large": (Objects(containers=(replace(GROWN, entries=900, before=None),)), ""),
    "nothing": (Objects(), ""),
    "no growth": (Objects(containers=(SAME,), types=(FEW,)), ""),
    "threads": (Objects(threads=40, threads_before=3), "; 37 more threads than when it was ready"),
    "descriptors": (
        Objects(containers=(GROWN,), descriptors=1000, descriptors_before=12),
        "; apps.CACHE grew by 240 000 entries; 988 more open descriptors than when it was ready",
    ),
    "few of either": (Objects(threads=8, threads_before=3, descriptors=30, descriptors_before=12), ""),
    "not known": (Objects(threads=80, descriptors=300), ""),
}  # fmt: skip


@pytest.mark.parametrize(("objects", "expected"), WORDS.values(), ids=WORDS)
def test_the_words_in_the_line(objects: Objects, expected: str) -> None:
    """The largest grower: a name before a type."""
    assert grower_words(objects) == expected


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ([Objects(containers=(GROWN,))] * 3, "apps.CACHE grew in all of the last 3 workers, by 240 000 entries in the median"),
        ([Objects(containers=(GROWN,)), None, Objects(), Objects(containers=(GROWN, SAME))],
         "apps.CACHE grew in all of the last 2 workers, by 240 000 entries in the median"),
        ([Objects(containers=(GROWN,)), Objects(containers=(SAME,))], ""),
        ([Objects(containers=(GROWN, LARGE)), Objects(containers=(LARGE, GROWN))],
         "apps.BLOBS grew in all of the last 2 workers, by 280 entries (84.0 MiB) in the median"),
        ([Objects(containers=(GROWN, LARGE)), Objects(containers=(replace(LARGE, size=None, before=0, entries=5000), GROWN))],
         "apps.CACHE grew in all of the last 2 workers, by 240 000 entries in the median"),
        ([Objects(containers=(GROWN,))], ""),
        ([Objects(containers=(UNNAMED,), types=(OWN, LISTS))] * 2,
         "objects of list grew in all of the last 2 workers, by 29.0 MiB in the median"),
        ([], ""),
    ],
)  # fmt: skip
def test_what_grew_in_all_workers(pool: list[Objects | None], expected: str) -> None:
    """Only that is named for a leak; a worker of which nothing is known from before does not count."""
    assert keeper(pool) == expected


def test_a_leak_names_what_keeps_it() -> None:
    """In what would help, beside the probe."""
    leak = judge([replace(one, objects=Objects(containers=(GROWN,))) for one in several(4)])

    assert leak.kind is Kind.LEAK
    assert leak.help == (
        "it is a leak, or a cache without a bound: apps.CACHE grew in all of the last 4 workers, by 240 000 entries in the median; "
        "oomsafe probe names the line"
    )
    assert "grew in all" not in judge(several(4)).help


NAMES = st.text("abc.", max_size=4)
COUNTS = st.dictionaries(NAMES, st.integers(0, 1 << 40))
TYPE = st.builds(TypeCount, name=NAMES, count=st.integers(1, 1 << 40), size=st.integers(0, 1 << 50))
CONTAINER = st.builds(Container, name=NAMES, kind=st.just("dict"), entries=st.integers(0, 1 << 40))


@given(st.lists(CONTAINER, max_size=12), st.none() | COUNTS)
def test_those_that_grew_most_are_kept(found: list[Container], before: dict[str, int] | None) -> None:
    """Law: no more than there is room for, and none that is left out has grown by more than one that is kept."""
    kept = largest(found, before, CONTAINERS, lambda name: name.startswith("b"))

    assert len(kept) <= min(CONTAINERS, len(found))
    if before is not None:
        named = [one for one in found if one.name and (one.name in before or not one.name.startswith("b"))]
        growth = sorted((one.entries - before.get(one.name, 0) for one in named), reverse=True)
        assert [one for one in growth if one >= 1000][:CONTAINERS] == [one.grown for one in kept if (one.grown or 0) >= 1000]


def test_what_was_not_looked_at_before_has_no_growth() -> None:
    """The standard library's; nor has what no name leads to. If it is small, it is left out."""
    found = [replace(SAME, name="html.entities", before=None), UNNAMED, replace(SAME, before=None)]

    small = replace(SAME, name="html.small", entries=2000, before=None)
    kept = {one.name: one.grown for one in largest([small, *found], {}, CONTAINERS, lambda name: name.startswith("html."))}

    assert kept == {"html.entities": None, "": None, "apps.TABLE": 900_000}


@given(st.lists(TYPE, max_size=20), COUNTS)
def test_types_by_their_growth_in_bytes(found: list[TypeCount], before: dict[str, int]) -> None:
    """Law: the most first."""
    kept = largest_types(found, before)

    assert len(kept) == min(TYPES, len(found))
    assert [one.grown_bytes for one in kept] == sorted((one.grown_bytes for one in kept), reverse=True)


FIGURE = st.none() | st.integers(0, layout.LARGEST)
WHOLE = st.builds(
    Objects, tracked=FIGURE, every=st.integers(1, 1 << 30), complete=st.booleans(), threads=FIGURE, threads_before=FIGURE,
    descriptors=FIGURE, descriptors_before=FIGURE,
    types=st.lists(
        st.builds(TypeCount, name=NAMES, count=st.integers(1, layout.LARGEST), size=st.integers(0, layout.LARGEST), before=FIGURE),
        max_size=TYPES,
    ).map(tuple),
    containers=st.lists(
        st.builds(Container, name=NAMES, kind=NAMES, entries=st.integers(1, layout.LARGEST), size=FIGURE, before=FIGURE),
        max_size=CONTAINERS,
    ).map(tuple),
    caches=st.lists(
        st.builds(Cache, name=NAMES, kind=NAMES, entries=st.integers(1, layout.LARGEST), size=FIGURE, bound=FIGURE, before=FIGURE),
        max_size=CACHES,
    ).map(tuple),
)  # fmt: skip


@given(WHOLE)
def test_on_the_scoreboard_and_back(objects: Objects) -> None:
    """Law: nothing is lost, and it takes a fixed number of bytes. It is read for that worker only."""
    raw = packed(objects, 7, 1000.0)

    assert len(raw) == layout.OBJECTS_SIZE
    assert unpacked(raw, 7, 1000.0) == objects
    assert unpacked(raw, 8, 1000.0) is unpacked(raw, 7, 999.0) is unpacked(packed(None, 7, 1000.0), 7, 1000.0) is None


def test_each_retirement_has_its_own() -> None:
    """And those that have none, none."""
    board = Scoreboard.private()
    told = [replace(one, objects=Objects(containers=(replace(GROWN, entries=one.pid),)) if one.pid % 2 else None) for one in several(20)]
    for one in told:
        board.header.note_retirement(one)

    assert [one.objects for one in board.read().retired] == [one.objects for one in told[:3:-1]]


@given(st.binary(min_size=layout.OBJECTS_SIZE - 20, max_size=layout.OBJECTS_SIZE - 20), st.integers(1, 9))
def test_hostile_bytes_are_bounded(noise: bytes, every: int) -> None:
    """Any worker may write there: whatever it is, it can be shown."""
    raw = packed(Objects(), 7, 1000.0)[:16] + every.to_bytes(4, "little") + noise

    found = unpacked(raw, 7, 1000.0)

    assert found is not None
    shown = "\n".join(str(line) for line in objects_lines("worker 5", found, 100))
    assert all(each.isprintable() for each in shown.split("\n"))
    assert grower_words(found).isprintable() and keeper([found, found]).isprintable()


def test_how_it_is_shown() -> None:
    """A line each, and what is not known is not 0."""
    objects = Objects(
        tracked=1_240_000, every=25, threads=3, threads_before=3, descriptors=14, types=(OWN,), caches=(CACHED,), complete=False,
        containers=(GROWN, UNNAMED, replace(GROWN, name="apps.OTHER", size=3 * MIB, before=250_010)),
    )  # fmt: skip

    lines = [str(line) for line in objects_lines("worker 5565", objects, 300)]

    assert lines == [
        "  worker 5565 held at its end: 1 240 000 objects that the garbage collector tracks (types: estimated from one in 25) "
        "(there was no time to look at all modules), 3 threads (3 when it was ready), 14 open descriptors",
        "  name                                      is                               has      size  since ready",
        "  apps.CACHE                                dict                 250 000 entries               +240 000",
        "  a list that no name of a module leads to  list                 500 000 entries                unknown",
        "  apps.OTHER                                dict                 250 000 entries   3.0 MiB          -10",
        "  apps.f                                    lru_cache, no bound   50 000 entries                +50 000",
        "  apps.Thing                                type                 200 000 objects  20.0 MiB     +200 000",
    ]
    narrow = [str(line) for line in objects_lines("worker 5565", objects, 70)]
    assert all(len(line) <= 75 for line in narrow) and "+240 000" in "\n".join(narrow)


def test_counts_in_groups() -> None:
    """Of three digits."""
    assert [*map(spaced, (0, 999, 1000, 1_234_567, -1234))] == ["0", "999", "1 000", "1 234 567", "-1 234"]


def test_the_baseline_counts_objects_only_where_workers_are_recycled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that has recycled none pays for threads and descriptors only."""
    monkeypatch.setattr(baseline, "LONGEST", 30.0)  # the test runner has imported everything
    board = Scoreboard.private()
    before = baseline_of(board.header)
    board.header.note_retirement(several(1)[0])
    after = baseline_of(board.header)

    assert (before.types, before.names, before.modules) == (None, None, None)
    assert before.handles.threads and (before.handles.descriptors or 0) >= 3
    assert (after.types or {}).get("dict", 0) > 200 and after.modules
    assert after.names is not None
    assert baseline_of(None).types is None


def test_a_baseline_does_not_copy_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its parent, as in a preloaded pool: to look at objects is to write to their pages."""
    board = Scoreboard.private()
    board.header.note_retirement(several(1)[0])
    monkeypatch.setattr(baseline, "shared_with_parent", lambda: baseline.MOST_SHARED + 1)

    assert baseline_of(board.header).types is None


@pytest.mark.parametrize(("left", "counted"), [(1 << 42, True), (1 << 40, False), (1000, False), (None, True)])
def test_objects_are_not_listed_without_room(monkeypatch: pytest.MonkeyPatch, left: int | None, counted: bool) -> None:
    """The list of them must not be what the kernel kills for; threads and descriptors are known all the same."""
    limit = None if left is None else (1 << 42) + left
    monkeypatch.setattr(stocktaking, "read_capacity", lambda: replace(read_capacity(), limit=limit, working_set=1 << 42, droppable=0))

    found = objects_of(None)

    assert (found.tracked is not None) is counted
    assert found.threads and found.descriptors and not found.compared
