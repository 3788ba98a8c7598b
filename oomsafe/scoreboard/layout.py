"""The bytes of a scoreboard. Version 16, little-endian; sizes in bytes; -1 in a figure is None, never 0.

A scoreboard is one header of 61440 bytes and then `slots` slots of 6144 bytes, one slot for each worker. It is mapped with room for
SLOTS_MAX slots, and the supervisor adds `slots` more when it needs them::

    header   0  magic "oomsafe\\0" · u32 version · u32 slots · u32 slot size
            20  u16 bits of what one worker has logged for all: 1 soft limit refused, 2 hard limit refused, 4 it stays above its soft limit,
               8 max_lifetime refused, 16 what workers have right after boot, 32 new work is shed
            22  u16 recycles in a row of workers that had settled above their soft limit
            24  u64 sequence: odd while the supervisor adds a slot to the totals
            32  u64 supervisor's pid · u64 its start time · f64 created, seconds since 1970
            56  u64 generations handed out · i64 workers wanted · i64 turns (how many may recycle at once)
            80  i64 limit that leaves least · i64 budget: what the pool itself may hold
            96  server, 32 bytes of text
           128  24 names of routes, 64 bytes of text each: the names under which all workers count
          1664  totals: the counters of all workers that are gone
          5632  f64 when the supervisor last decided which workers may leave, on the machine's monotonic clock; 0: it gives no orders
          5648  f64 since when no worker has served, on the same clock; 0: one serves · f64 seconds of earlier gaps
          5664  u64 how often the capacity has changed · i64 limit · smallest limit · what others use below the
               limit · what the supervisor holds: workers compute their limits from these
          5704  i64 what the pool holds, as its budget counts it
          5712  where the limit comes from, 192 bytes of text
          5904  what the soft limit is compared with, 16 bytes of text: the policy's metric
          5920  what the pool is called, 64 bytes of text
          5984  f64 when a worker was recycled last, seconds since 1970, 0: none was · its line in the log, 504 bytes of text
          6496  what workers count, 16 bytes of text: requests, tasks
          6512  u64 how many workers have ended, by kind (16 of them, in the order of policy.ends.End)
          6640  u64 how many of them were not in order
          6656  an operator's order (written by his tool): u64 sequence, written last, 0: none · u64 slot · u64 pid · u64 start time
               · u64 generation · f64 when, seconds since 1970 · u64 what (mailbox.What) · u64 pieces of work, f64 seconds: a probe's window
          6736  the supervisor's answer: u64 the order's sequence · u32 what became of it (mailbox.Answer)
          7168  i64 what of the pool's memory is page cache, which the kernel drops before it kills
          7176  f64 when the supervisor ended in order, seconds since 1970, 0: it has not
          7184  24 u64 how often each of the routes at 128 was found to have made a recycled worker grow · u64 how often another one was
          7384  u64 how many recycled workers have told what their memory was
          7392  the last probe of a worker (written by that worker; if it dies, by the supervisor): f64 when this was written, seconds since
               1970, 0: there was none · u64 pid · u64 generation · u32 how far it is (policy.probe.Stage) · 256 bytes of text: what it is
               about to do, has found, or why it failed · 252 bytes of text: the path of its report
          8192  8 deaths of 1024, the one that was the nth at n % 8: f64 when, seconds since 1970, 0: none was · u32 its kind
               · its line in the log, 1012 bytes of text
         16384  16 recycled workers of 512, the one that was the nth at n % 16: f64 when, seconds since 1970, 0: none was · u64 pid
               · u32 slot · u32 reason · u64 generation · u64 work done · f64 seconds served · i64 what it held when it was fresh
               · 8 i64 what its memory was (policy.stock.Parts) · 12 points of its life: u64 work done · i64 what it held then
         24576  16 of 2048: what objects these workers held (scoreboard.objects)
         57344  the last inspection of a worker (written by that worker and by a fork of it; if neither tells anything, by the supervisor):
               f64 when this was written, seconds since 1970, written last, 0: there is none · u64 pid · u64 generation · u32 slot
               · u32 how far it is (policy.inspection.Phase) · u64 work done · f64 seconds served · i64 what it held when it was fresh
               · 8 i64 what its memory is (policy.stock.Parts) · f64 seconds that it stood still, f64 seconds that its fork has counted,
               both below 0: not known · 256 bytes of text: why there are no figures
         59392  what objects it holds (scoreboard.objects)

    slot     0  u32 state · u32 order (written by the supervisor), 1: drain, 2: drain when over the limit,
               3: drain, for the pool's budget
             8  u64 pid · u64 start time · u64 generation · f64 reserved, seconds since 1970
            40  u64 sequence: odd while the worker publishes
            48  i64 rss · peak rss · baseline · soft limit · hard limit · pss · uss · oom_score_adj · in flight
           120  f64 published, seconds since 1970
           128  u64 ticket of the current work, 0: none · i64 what was held when it began
           144  u64 ticket of the work that is over its soft limit · i64 what it uses · i64 the limit (written by the supervisor,
               zeroed by the worker once the work was warned)
           168  i64 what the soft limit is compared with, in the policy's metric · i64 its steady growth, bytes a second
               · i64 its growth over the last moment, bytes a second
           192  counters
          3968  16 cells of 128: work in flight
          6016  i64 anon · private · pages of files that can't be dropped yet, which are part of anon
          6040  f64 when the supervisor measured a worker that publishes nothing, seconds since 1970 · i64 rss · anon · what the soft
               limit is compared with (written by the supervisor)
          6072  u32 1: the worker has served for its lifetime, or an operator has ordered it to be recycled
          6076  u32 1: an operator has ordered it to be recycled (written by the supervisor)
          6080  a cap that the supervisor has put on it: i64 what it may have mapped (RLIMIT_DATA) · i64 the value before · i64 what
               was left up to the pool's limit · f64 until when it holds, on the machine's monotonic clock (written by the supervisor)
          6112  an order to trace its allocations: u64 for how many pieces of work, 0: no order · f64 for how many seconds (written by the
               supervisor, zeroed by the worker that takes it)
          6128  u64 1: an order to tell what its memory is, while it serves (written by the supervisor, zeroed by the worker that takes it)

    counters 0  u64 work done · reclaims · bytes reclaimed · recycles by reason (8 of them) · aborts by reason (4 of them)
           120  24 routes of 152: name, 64 bytes of text · u64 sum of growth · u64 in each of 10 buckets

    cell     0  u8 0 · u8 length of the name · 6 bytes 0 · f64 began, on the machine's monotonic clock · i64 rss then
               and what the worker has grown by since for other work, as far as known; -1: work that stays open and is mostly idle
            24  name, 103 bytes as they came from outside: readers must make them printable
           127  u8 1 while in use: written last

Each slot has one writer, its worker, except for the order and the fields at 144, 6040, 6076, 6080, 6112 and 6128. The header and the
totals have one writer, the supervisor (except the fields at 20, 22, 128, 5984, 7184, 7384, 16384 and 24576, which the workers write under
the lock, 6496, where all write the same, 7392, 57344 and 59392, which one worker writes, and 6656, which a process outside the pool
writes).
A reader takes a copy, and copies again if a sequence was odd or has changed in the meantime.

Every worker can write every byte, and may run as a different user than its supervisor. So the supervisor only writes what it knows by
itself (which worker has which slot, the totals), and every figure that is read here is checked against its range.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from oomsafe.policy.ends import End
from oomsafe.policy.state import State
from oomsafe.policy.text import without_controls

MAGIC = b"oomsafe\0"
VERSION = 16

HEADER_SIZE = 61440
SLOT_SIZE = 6144
IDENTITY = struct.Struct("<8s3I")
REFUSED_AT, REFUSED = 20, struct.Struct("<H")
SETTLED_AT, SETTLED = 22, struct.Struct("<H")
SEQUENCE_AT = 24
SUPERVISOR_AT, SUPERVISOR = 32, struct.Struct("<QQd")
POOL_AT, POOL = 56, struct.Struct("<Q4q32s")
NAMES_AT = 128
TOTALS_AT = 1664
DECIDED_AT, DECIDED = 5632, struct.Struct("<d")
UNSERVED_AT, UNSERVED = 5648, struct.Struct("<dd")
ALLOWED_AT, ALLOWED = 5664, struct.Struct("<Q4q")
HELD_AT, HELD = 5704, struct.Struct("<q")
SOURCE_AT, SOURCE = 5712, struct.Struct("<192s")
METRIC_AT, METRIC = 5904, struct.Struct("<16s")
NAME_AT, NAME = 5920, struct.Struct("<64s")
RECYCLED_AT, RECYCLED = 5984, struct.Struct("<d504s")
UNIT_AT, UNIT = 6496, struct.Struct("<16s")
ENDS_AT, ENDS = 6512, struct.Struct("<16Q")
DEATHS_AT, DEATH, DEATHS = 8192, struct.Struct("<dI1012s"), 8
#: The bytes of a death before its text.
DEATH_HEAD = 12
DIED_AT, DIED = 6640, struct.Struct("<Q")
MAILBOX_AT, MAILBOX = 6656, struct.Struct("<5Qd2Qd")
ANSWER_AT, ANSWER = 6736, struct.Struct("<QI")
DROPPABLE_AT, DROPPABLE = 7168, struct.Struct("<q")
ENDED_AT, ENDED = 7176, struct.Struct("<d")
CULPRITS_AT = 7184
RETIREMENTS_AT, RETIREMENTS = 7384, struct.Struct("<Q")
PROBED_AT, PROBED = 7392, struct.Struct("<dQQI256s252s")
RETIRED_AT, RETIRED, RETIRED_KEPT = 16384, struct.Struct("<dQIIQQd9q24q200x"), 16
#: Where in a retirement's fields its parts begin, and the points of its life.
PARTS_PLACE, POINTS_PLACE = 8, 16
OBJECTS_AT, OBJECTS_SIZE = 24576, 2048
INSPECTED_AT, INSPECTED = 57344, struct.Struct("<dQQIIQd9q2d256s")
#: Where in an inspection the seconds stand that the worker stood still.
STOPPED_AT = INSPECTED_AT + struct.calcsize("<dQQIIQd9q")
INSPECTED_OBJECTS_AT = 59392
MOMENT = struct.Struct("<d")

STATE = struct.Struct("<I")
ORDER_AT, ORDER = 4, struct.Struct("<I")
OWNER_AT, OWNER = 8, struct.Struct("<QQQd")
PID_AT, STARTED_AT, WORD = 8, 16, struct.Struct("<Q")
SLOT_SEQUENCE_AT = 40
FIGURES_AT, FIGURES = 48, struct.Struct("<9qd")
PUBLISHED_AT, PUBLISHED = 120, struct.Struct("<d")
HAND_AT, HAND = 128, struct.Struct("<Qq")
WARNED_AT, WARNED = 144, struct.Struct("<Qqq")
NEED_AT, NEED = 168, struct.Struct("<3q")
COUNTERS_AT = 192
CELLS_AT = 3968
CELL_SIZE, CELLS = 128, 16
MORE_AT, MORE = 6016, struct.Struct("<3q")
MEASURED_AT, MEASURED = 6040, struct.Struct("<d3q")
AGED_AT, AGED = 6072, struct.Struct("<I")
OPERATOR_AT, OPERATOR = 6076, struct.Struct("<I")
CAP_AT, CAP = 6080, struct.Struct("<3qd")
PROBE_AT, PROBE = 6112, struct.Struct("<Qd")
INSPECT_AT, INSPECT = 6128, struct.Struct("<Q")
CELL_NAME = 103
CELL = struct.Struct(f"<xB6xdq{CELL_NAME}sB")
#: The offset in a cell of its rss, which the worker corrects while several pieces of work are in flight.
CELL_RSS_AT, CELL_RSS = 16, struct.Struct("<q")
#: The offset in a cell of the byte that says whether it is in use.
IN_USE = CELL_SIZE - 1
SEQUENCE = struct.Struct("<Q")

#: The most slots of a scoreboard. A reader of an untrusted scoreboard reads no more than these.
SLOTS_MAX = 1024
#: What stands as the server of a process that has no supervisor.
SINGLE_PROCESS = "single process"
SIZE_MAX = HEADER_SIZE + SLOTS_MAX * SLOT_SIZE

#: The value at which a counter stops.
COUNT_MAX = (1 << 64) - 1

#: The greatest plausible time in seconds: the year 5138.
SECONDS_MAX = 1e11

#: Upper ends of the growth buckets in bytes; the last bucket has none.
BOUNDS = (0, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30)
BUCKETS = len(BOUNDS) + 1
#: The largest figure that a signed 64-bit field can hold.
LARGEST = (1 << 63) - 1
ROUTES, ROUTE_NAME = 24, 64
CULPRITS = struct.Struct(f"<{ROUTES + 1}Q")
#: How many bytes of a name that is too long come before its missing middle.
HEAD = 28
#: Recycles are counted by reason, in this order; append new reasons at the end.
REASONS = ("soft_limit", "hard_limit", "replaced", "max_lifetime", "killed", "budget", "operator", "probed")

#: Work that was aborted is counted by reason, in this order; append new reasons at the end.
ABORTS = ("hard_limit", "shed", "pool")

_TALLY = struct.Struct("<15Q")
_ROUTE = struct.Struct(f"<{ROUTE_NAME}s{1 + BUCKETS}Q")
COUNTERS_SIZE = _TALLY.size + ROUTES * _ROUTE.size

#: Bits for the limits that a worker has refused, or stays above.
REFUSES_SOFT, REFUSES_HARD, STAYS_ABOVE, REFUSES_LIFETIME = 1, 2, 4, 8
#: The limits that a worker can refuse, by their settings' names.
REFUSABLE = {"soft_limit": REFUSES_SOFT, "hard_limit": REFUSES_HARD, "max_lifetime": REFUSES_LIFETIME}
#: Another of these bits: what workers have right after boot, and what that leaves, has been logged.
SAID_ROOM = 16
#: And another: new work is being shed. The supervisor takes it back when that is over.
SAID_SHEDS = 32

#: The states, each at the index of its number.
STATES = tuple(State)
_NUMBERS = {state: number for number, state in enumerate(STATES)}
#: The number of a worker that serves, and asks for nothing.
SERVING = _NUMBERS[State.SERVING]

#: The route of work whose route is not known, and that of work for which the table had no more room.
UNMATCHED, OTHER = "unmatched", "other"

assert NAMES_AT + ROUTES * ROUTE_NAME <= TOTALS_AT
assert TOTALS_AT + COUNTERS_SIZE <= DECIDED_AT
assert DECIDED_AT + DECIDED.size <= UNSERVED_AT <= ALLOWED_AT - UNSERVED.size
assert ALLOWED_AT + ALLOWED.size <= HELD_AT <= SOURCE_AT - HELD.size
assert SOURCE_AT + SOURCE.size <= METRIC_AT <= NAME_AT - METRIC.size
assert NAME_AT + NAME.size <= RECYCLED_AT <= UNIT_AT - RECYCLED.size
assert UNIT_AT + UNIT.size <= ENDS_AT <= DIED_AT - ENDS.size
assert DIED_AT + DIED.size <= MAILBOX_AT <= ANSWER_AT - MAILBOX.size
assert ANSWER_AT + ANSWER.size <= DROPPABLE_AT <= ENDED_AT - DROPPABLE.size <= CULPRITS_AT - DROPPABLE.size - ENDED.size
assert CULPRITS_AT + CULPRITS.size <= RETIREMENTS_AT <= PROBED_AT - RETIREMENTS.size <= DEATHS_AT - RETIREMENTS.size - PROBED.size
assert DEATHS_AT + DEATHS * DEATH.size <= RETIRED_AT <= OBJECTS_AT - RETIRED_KEPT * RETIRED.size
assert OBJECTS_AT + RETIRED_KEPT * OBJECTS_SIZE <= INSPECTED_AT <= INSPECTED_OBJECTS_AT - INSPECTED.size
assert INSPECTED_OBJECTS_AT + OBJECTS_SIZE <= HEADER_SIZE
assert WARNED_AT + WARNED.size <= NEED_AT <= COUNTERS_AT - NEED.size
assert COUNTERS_AT + COUNTERS_SIZE <= CELLS_AT
assert CELLS_AT + CELLS * CELL_SIZE <= MORE_AT <= MEASURED_AT - MORE.size
assert MEASURED_AT + MEASURED.size <= AGED_AT <= OPERATOR_AT - AGED.size
assert OPERATOR_AT + OPERATOR.size <= CAP_AT
assert CAP_AT + CAP.size <= PROBE_AT <= INSPECT_AT - PROBE.size <= SLOT_SIZE - PROBE.size - INSPECT.size
assert FIGURES_AT + FIGURES.size == PUBLISHED_AT + PUBLISHED.size
assert CELL.size == CELL_SIZE
assert len(REASONS) <= 8
assert len(ABORTS) <= 4
assert len(End) <= 16


@dataclass
class Counters:
    """Counts that only ever rise."""

    work: int = 0
    reclaims: int = 0
    reclaimed: int = 0
    recycles: list[int] = field(default_factory=lambda: [0] * 8)
    aborts: list[int] = field(default_factory=lambda: [0] * 4)
    routes: dict[str, list[int]] = field(default_factory=dict)
    """By route: the sum of growth (shrinking counts as 0), then the number in each bucket."""

    def route(self, name: str) -> list[int]:
        """The row of a route; of OTHER when the table is full, so that no client can make it grow."""
        name = route_name(name)
        row = self.routes.get(name)
        if row is None:
            # one row is reserved for OTHER
            named = len(self.routes) - (OTHER in self.routes)
            name = name if named < ROUTES - 1 else OTHER
            row = self.routes.setdefault(name, [0] * (1 + BUCKETS))
        return row

    @property
    def by_reason(self) -> dict[str, int]:
        """The number of recycles for each reason."""
        return dict(zip(REASONS, self.recycles, strict=False))

    @property
    def aborts_by_reason(self) -> dict[str, int]:
        """The number of pieces of work that were aborted, for each reason."""
        return dict(zip(ABORTS, self.aborts, strict=False))

    def add(self, other: Counters) -> None:
        """Add another's counts to these. Sums stop at COUNT_MAX, so that they fit the same fields."""
        self.work, self.reclaims, self.reclaimed = _sums(
            (self.work, self.reclaims, self.reclaimed), (other.work, other.reclaims, other.reclaimed)
        )
        self.recycles = _sums(self.recycles, other.recycles)
        self.aborts = _sums(self.aborts, other.aborts)
        for name, row in other.routes.items():
            mine = self.route(name)
            mine[:] = _sums(mine, row)

    def pack(self) -> bytes:
        """The bytes for the scoreboard; names of routes are cut at 64 bytes."""
        rows = [_ROUTE.pack(name.encode("utf-8", "replace"), *row) for name, row in list(self.routes.items())]
        packed = _TALLY.pack(self.work, self.reclaims, self.reclaimed, *self.recycles, *self.aborts) + b"".join(rows)
        return packed.ljust(COUNTERS_SIZE, b"\0")

    @classmethod
    def unpack(cls, raw: bytes, routes: bool = True) -> Counters:
        """The counters in `raw`, which is COUNTERS_SIZE long; without `routes`, which take most of the time, only the other ones."""
        work, reclaims, reclaimed, *others = _TALLY.unpack_from(raw)
        counters = cls(work, reclaims, reclaimed, others[:8], others[8:])
        if not routes:
            return counters
        for offset in range(_TALLY.size, COUNTERS_SIZE, _ROUTE.size):
            name, *row = _ROUTE.unpack_from(raw, offset)
            if not name.strip(b"\0"):
                break
            mine = counters.routes.setdefault(without_controls(as_text(name)), [0] * len(row))
            mine[:] = _sums(mine, row)
        return counters


def route_name(name: str) -> str:
    """`name` made fit for a table: at most 64 bytes, no zero bytes, and never empty.

    A longer name loses its middle, because neither its first part (method, mounts) nor its last part says enough alone.
    """
    raw = name.replace("\0", "").encode("utf-8", "replace")
    if len(raw) > ROUTE_NAME:
        raw = raw[:HEAD] + b"..." + raw[HEAD + 3 - ROUTE_NAME :]
    return raw.decode("utf-8", "ignore") or UNMATCHED


def as_text(raw: bytes) -> str:
    """The text in a fixed-size field, up to the first zero byte."""
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def slot_at(number: int) -> int:
    """Where the slot of this number begins."""
    return HEADER_SIZE + number * SLOT_SIZE


def write(memory: memoryview, at: int, form: struct.Struct, *values: object) -> None:
    """Write `values` to shared memory in one assignment, because struct.pack_into would first write zeros for a moment."""
    memory[at : at + form.size] = form.pack(*values)


def read_state(memory: bytes | memoryview, at: int = 0, unknown: State = State.FREE) -> State:
    """The state of the worker whose slot begins at `at`; `unknown` if the number stands for no state."""
    (number,) = STATE.unpack_from(memory, at)
    return STATES[number] if number < len(STATES) else unknown


def write_state(memory: memoryview, at: int, state: State) -> None:
    """Write a state at once, because other processes wait for it."""
    write(memory, at, STATE, _NUMBERS[state])


def optional(figure: int) -> int | None:
    """A figure that was read: None if it is -1, or any other negative number."""
    return None if figure < 0 else figure


def measured_since(slot: bytes | memoryview, published: float, at: int = 0) -> tuple[int | None, int | None, int | None] | None:
    """(rss, anon, what the soft limit is compared with) if the supervisor measured them after the worker last `published`; else None."""
    when, *sizes = MEASURED.unpack_from(slot, at + MEASURED_AT)
    if not (seconds(when) or 0.0) > published:
        return None
    rss, anon, used = map(optional, sizes)
    return rss, anon, used


def seconds(figure: float) -> float | None:
    """A time that was read, in seconds; None if it is impossible (NaN, infinite, below 0, above SECONDS_MAX)."""
    return figure if math.isfinite(figure) and 0 <= figure <= SECONDS_MAX else None


def count(figure: int) -> int:
    """A sequence number or a count, wrapped to 0 after COUNT_MAX so that it can be written."""
    return figure & COUNT_MAX


def _sums(some: Iterable[int], others: Iterable[int]) -> list[int]:
    return [min(a + b, COUNT_MAX) for a, b in zip(some, others, strict=True)]


def stored(figure: int | None) -> int:
    """A figure for writing: None is -1."""
    return -1 if figure is None else figure
