"""Which workers of a pool may take no more memory for now, because together they would take more than is left. Pure.

A hard limit holds one worker. Two that grow at once, each within its own hard limit, may still be more than the pool has. Then the one
that holds most gets no more: its request is refused, as at its hard limit, before the kernel would kill.

Two kinds of growth look the same for a moment. A balloon is what one request grows by: it may go on much faster than now, and ask for much
at once. A leak is what many small requests leave behind: it goes on as it went for a while, and is for recycling, which refuses nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from oomsafe.policy.units import MIB

#: What is kept for workers that do not grow: this share of the limit, at least and at most so many bytes.
KEPT, KEPT_AT_LEAST, KEPT_AT_MOST = 0.04, 8 * MIB, 64 * MIB

#: The share of a pool's room that is divided among its workers: what a worker within its part asks for at once must fit beside that.
SHARED = 0.9

#: Seconds by which growth is looked ahead, at least and at most; in between, twice the time between two checks.
AHEAD, AHEAD_AT_MOST = 0.03, 0.1

#: The share of its growth that a worker may ask for at once: a dict or a list that has no more room takes a new table beside the old.
JUMPS = 0.4

#: A worker that grows by less than this many bytes a second does not fill the memory: other means are fast enough. Work that has made it
#: grow by less than this many bytes is no balloon: many small requests take as much for a moment.
FAST, MUCH = 16 * MIB, 16 * MIB

#: Beside a balloon, work that has made its worker grow by this many bytes is one, too: what it takes of a heap that earlier work has left
#: free is not seen, and several are to be noticed before they need another table each.
BESIDE = 4 * MIB

#: Seconds, at least, over which it is measured how fast a worker grows for what is no balloon; at most twice as many.
STEADY = 0.25

#: Bytes a second that a pool is assumed to be able to take, as long as nobody grows.
FASTEST = 4096 * MIB

#: Seconds between two checks: at least, at least while nobody grows fast, and at most.
SHORTEST, CALM, LONGEST = 0.005, 0.02, 0.1

#: Seconds after which a pace counts for half: a worker that does not grow now may have had no processor, or be refused memory.
HALVES_IN = 0.1

#: Seconds for which a worker is capped at least, unless it has given back this share of what it held: it is to notice.
HOLDS_FOR, GIVES_BACK = 0.2, 0.2

#: Seconds for which one that is capped counts as one that grows, though it does not: so long the cap lasts, where there is no room for it.
LATELY = 3.0


class Grower(NamedTuple):
    """One worker, as it was just measured from outside. Bytes."""

    generation: int
    held: int
    """What its hard limit counts."""
    grown: int
    """By how much that is more than the least that it ever held."""
    granted: int
    """What it has mapped and not touched yet: the kernel will not be asked again for that."""
    pace: float
    """Bytes a second: its growth since the last check, or shortly before."""
    work: int = 0
    """By how much it has grown for what it has in flight: see grown_by()."""
    steady: float = 0.0
    """Bytes a second: its growth over the last STEADY seconds or more."""
    capped: bool = False
    """Whether it has been capped lately: it does not grow for that, or has had no processor to notice."""

    balloons: bool = False
    """Whether it grows by what it has in flight: growers() says so."""

    def takes(self, hard: int, ahead: float, jumps: float = JUMPS, capped: bool = False) -> int:
        """What it may still take within `ahead` seconds, a balloon also by a jump of this share of its growth, with a hard limit of `hard`
        bytes; `capped`: the kernel grants it no more.

        All growth counts for the jump: what earlier work has left free in its heap is used again, and then is the balloon's.
        """
        if self.balloons:
            more = self.granted + (0 if capped else int(self.pace * ahead + self.grown * jumps))
        else:
            more = int(self.steady * ahead)
            more = min(more, self.granted) if capped else more
        return max(0, min(hard - self.held, more))


class Window(NamedTuple):
    """What a worker held at two earlier moments. Seconds, bytes."""

    since: tuple[float, int]
    """The one since which its steady growth is measured."""
    next: tuple[float, int]
    """The one that takes its place."""


def applies(hard: int, workers: int, supervisor: int, room: int | None) -> bool:
    """Whether workers that are all at their hard limit would be more than the pool may hold, `room` (None: not known)."""
    return room is not None and workers > 1 and hard * workers + supervisor > room


def share_of(room: int, supervisor: int, workers: int) -> int:
    """What each worker may hold whatever the others do: if all hold no more, the pool is within SHARED of its `room`."""
    return max(0, int(room * SHARED) - supervisor) // max(1, workers)


def kept_of(limit: int) -> int:
    """What is kept of a limit for workers that do not grow."""
    return min(max(KEPT_AT_LEAST, int(limit * KEPT)), KEPT_AT_MOST)


def growers(workers: Sequence[Grower]) -> list[Grower]:
    """Those that may fill the memory: balloons, the largest first, and then whoever else has grown fast for a while."""
    fast = [one for one in workers if one.grown >= MUCH and (one.pace >= FAST or one.capped)]
    least = BESIDE if any(one.work >= MUCH for one in fast) else MUCH
    balloons = [one._replace(balloons=True) for one in fast if one.work >= least]
    others = [one for one in workers if one.steady >= FAST and not (one in fast and one.work >= least)]
    return [one for group in (balloons, others) for one in sorted(group, key=lambda one: one.held, reverse=True)]


def to_cap(growing: Sequence[Grower], share: int, left: int, kept: int, hard: int, since: float) -> list[Grower]:
    """Those of `growing` that get no more for now, so that the others find what they may take meanwhile: none that is within its share.

    `left`: bytes up to the limit; `kept`: how many of them balloons may not have; `since`: seconds since the last check.
    """
    ahead, jumps = _ahead(since), 0.0 if _alone(growing) else JUMPS
    left -= sum(one.takes(hard, ahead, jumps) for one in growing)
    found = []
    for one in growing:
        if one.held > share and left < (kept if one.balloons else 0):
            found.append(one)
            left += one.takes(hard, ahead, jumps) - one.takes(hard, ahead, capped=True)
    return found


def may_map(growing: Sequence[Grower], left: int, kept: int, hard: int, since: float) -> int:
    """Bytes that the first of `growing` may still map if it is capped: none if several balloon.

    One that balloons alone gets all that there is, less what is kept and what the others take meanwhile: its request may be about to end,
    however fast it grows. The parameters are those of to_cap().
    """
    if not _alone(growing):
        return 0
    first, *others = growing
    ahead = _ahead(since)
    return max(0, left - kept - first.granted - sum(one.takes(hard, ahead, 0.0) for one in others))


def _alone(growing: Sequence[Grower]) -> bool:
    """Whether one of them balloons, which is the first."""
    return sum(one.balloons for one in growing) == 1


def _ahead(since: float) -> float:
    return min(AHEAD_AT_MOST, max(AHEAD, 2 * since))


def pause(workers: Sequence[Grower], left: int) -> float:
    """Seconds until the next check: half of the time in which what is left may be filled, if they grow twice as fast as now."""
    pace = 2 * sum(one.pace for one in workers if one.pace >= FAST)
    return min(LONGEST, max(SHORTEST if pace else CALM, left / max(FASTEST, pace) / 2))


def next_pace(before: float, grown: int, seconds: float) -> float:
    """The pace of a worker that has grown by `grown` bytes within the last `seconds`, and had the pace `before` until then.

    0 if it gives memory back (`grown` is negative): its request is over.
    """
    if grown < -MUCH // 4:
        return 0.0
    return max(grown / seconds, before * 0.5 ** (seconds / HALVES_IN)) if seconds > 0 else before


def moved(window: Window | None, held: int, now: float) -> Window:
    """The window of a worker that holds `held` bytes at `now`; None: it is measured for the first time."""
    if window is None:
        return Window((now, held), (now, held))
    return window if now - window.next[0] < STEADY else Window(window.next, (now, held))


def steady_pace(window: Window, held: int, now: float) -> float:
    """The steady growth of a worker that holds `held` bytes at `now`, in bytes a second; 0 if it is not known yet, or gives memory back."""
    since, before = window.since
    return max(0.0, (held - before) / (now - since)) if now - since >= STEADY else 0.0


def grown_by(began: Sequence[int], unknown: bool, rss: int, window: Window, held: int) -> int:
    """By how much a worker that holds `held` bytes, and has `rss`, has grown for what it has in flight. Bytes.

    `began` is what its rss was when that began, as far as known. `unknown`: there is growth whose beginning is not known, as that of a
    websocket, or of a thread beside requests that are over: then what it has grown by within the window counts, too.
    """
    return max(0, rss - min(began, default=rss), held - window.since[1] if unknown else 0)


def ends(held_then: int, held: int, seconds: float) -> bool:
    """Whether a cap that has lasted for `seconds` may end, if it is not needed any more; `held_then`: when it began."""
    return seconds >= HOLDS_FOR or held <= held_then * (1 - GIVES_BACK)
