"""The line about a worker's end: what happened and how sure that is, what it held and did, who else held how much, and what to do. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from oomsafe.policy.ends import By, End, name_of_signal
from oomsafe.policy.units import MIB, counted, format_size

#: At most this many pieces of work in flight are named.
NAMED = 3

#: A piece of work is what a worker died of if it has caused this share of the worker's growth since boot, and this many bytes.
BALLOON, LEAST_BALLOON = 0.5, 32 * MIB

#: What a process once held is told if that is so many bytes more than when it was measured last.
MUCH_MORE = 16 * MIB

#: Where freshly booted workers alone take this share of the limit, there are too many of them.
CROWDED = 0.8

#: Where the whole pool held less than this share of the limit, somebody else held the rest.
SMALL = 0.5


class Flight(NamedTuple):
    """A piece of work that had begun and not ended."""

    name: str
    """Printable."""
    seconds: float
    """Since it began."""
    grown: int | None
    """Bytes by which it had made its worker grow; None: not known."""
    then: int | None = None
    """What its worker's rss would have been without it: what it was when it began, and has grown by since for other work."""


class Beside(NamedTuple):
    """What the rest of its pool held when a worker died. Bytes; None is not known."""

    workers: int
    held: int | None
    supervisor: int | None


@dataclass(frozen=True, kw_only=True)
class DeathRecord:
    """The end of one worker, as `on_death` gets it. Sizes in bytes, times in seconds; None is a figure that is not known."""

    end: End
    """How it ended: its value is the `verdict` of the metric oomsafe_deaths_total."""
    pid: int
    slot: int | None
    exitcode: int | None
    """A negative number is the signal that ended it."""
    at: float
    """When its supervisor reaped it, seconds since 1970."""
    booting: bool = False
    """Whether it had not served yet."""
    by: By | None = None
    """Why its server ended it; None: it did not."""
    evidence: str = ""
    """Why the verdict on a SIGKILL is as sure as it is."""
    held: int | None = None
    """Its memory when it was measured last, in the metric of its soft limit, else its rss."""
    died_with: int | None = None
    """What it held when the kernel killed it, by the kernel's log: anonymous and shared memory."""
    peak: int | None = None
    """The greatest rss that it ever had."""
    baseline: int | None = None
    """What it held right after boot."""
    soft_limit: int | None = None
    hard_limit: int | None = None
    limit: int | None = None
    """The effective limit of its pool."""
    whence: str = ""
    """Where that limit comes from."""
    workers: int = 0
    """How many workers its pool is to have."""
    in_flight: tuple[Flight, ...] = ()
    """What it was doing, the greatest growth first."""
    beside: Beside | None = None
    killers: tuple[str, ...] = ()
    """Programs of this machine that kill others when memory runs short: earlyoom and the like. Looked for after an unexplained SIGKILL."""
    line: str = ""
    """All of this in one line, as it is logged."""


def line_of(death: DeathRecord) -> str:
    """The line: printable if the names and paths in `death` are."""
    who = f"worker {death.pid}" + ("" if death.slot is None else f" (slot {death.slot})")
    parts = [f"{who} {what_happened(death)}"]
    if not death.end.in_order:
        parts += [part for part in (_held(death), "" if death.booting else doing(death.in_flight), _beside(death), _limit(death)) if part]
    what_to_do = advice(death)
    return "; ".join(parts) + (f". {what_to_do}" if what_to_do else "")


def what_happened(death: DeathRecord) -> str:
    """``was killed by the kernel's OOM killer (confirmed: ...)``."""
    signal, boot = name_of_signal(death.exitcode), " while it booted" if death.booting else ""
    because = f": {death.evidence}" if death.evidence else ""
    status = f"exited with status {death.exitcode}" if not signal else f"ended by {signal}"
    return {
        End.RECYCLED: "was recycled",
        End.SERVER: "was ended by its server",
        End.EXITED: f"exited by itself with status {death.exitcode}{boot}",
        End.CRASHED: f"crashed with {signal}{boot}: no OOM kill",
        End.LIMIT: "was killed by oomsafe, above its hard limit",
        End.TIMEOUT: f"was ended by its server, because {(death.by or By.TIMEOUT).value} ({status}): no OOM kill",
        End.SIGNAL: f"was ended by somebody's {signal}{boot}: no OOM kill{f' ({death.evidence})' if death.evidence else ''}",
        End.OOM_CONFIRMED: f"was killed by the kernel's OOM killer{boot} (confirmed{because})",
        End.OOM_LIKELY: f"was killed by SIGKILL{boot}, likely by the kernel's OOM killer (likely{because})",
        End.OOMD: f"was killed by systemd-oomd{boot}, which has marked its cgroup (user.oomd_kill)",
        End.UNKNOWN: f"was killed by SIGKILL{boot}, and nothing here tells whose{because}"
        if signal
        else f"has ended{boot}, how is not known",
    }[death.end]


def _held(death: DeathRecord) -> str:
    if death.held is None and death.died_with is None:
        return ""
    limits = [f"{name} limit {format_size(size)}" for name, size in (("soft", death.soft_limit), ("hard", death.hard_limit)) if size]
    of = f" ({', '.join(limits)})" if limits else ""
    if death.died_with is not None:
        return f"it held {format_size(death.died_with)}{of}"
    most = f", its greatest rss was {format_size(death.peak)}" if (death.peak or 0) > (death.held or 0) + MUCH_MORE else ""
    return f"it held {format_size(death.held)} when it was measured last{of}{most}"


def doing(flights: Sequence[Flight]) -> str:
    """``in flight: GET /export (4.2 s, +310 MiB)``, the first NAMED of them."""
    if not flights:
        return "nothing was in flight"
    shown = ", ".join(_flight(flight) for flight in flights[:NAMED])
    more = len(flights) - NAMED
    return f"in flight: {shown}{f' and {more} more' if more > 0 else ''}"


def _flight(flight: Flight) -> str:
    """``GET /export (4.2 s, +310 MiB)``."""
    grown = "" if flight.grown is None or flight.grown <= 0 else f", +{format_size(flight.grown)}"
    return f"{flight.name} ({max(0.0, flight.seconds):.1f} s{grown})"


def _beside(death: DeathRecord) -> str:
    if death.beside is None or death.end in (End.EXITED, End.CRASHED, End.TIMEOUT):
        return ""
    workers, held, supervisor = death.beside
    parts = [f"{workers} other worker{'s' * (workers != 1)} held {format_size(held)}"] if workers and held is not None else []
    parts += [] if supervisor is None else [f"{'the' if parts else 'its'} supervisor {'' if parts else 'held '}{format_size(supervisor)}"]
    return ", ".join(parts)


def _limit(death: DeathRecord) -> str:
    if death.limit is None or death.end in (End.EXITED, End.CRASHED, End.TIMEOUT):
        return ""
    return f"the limit is {format_size(death.limit)}{f' ({death.whence})' if death.whence else ''}"


def advice(death: DeathRecord) -> str:
    """What to do in this case; empty: nothing."""
    if death.end in (End.OOM_CONFIRMED, End.OOM_LIKELY, End.OOMD):
        return _more_memory(death)
    if death.end is End.CRASHED:
        spent = " A C library may abort where memory is refused: is its hard_limit too low?" if death.hard_limit else ""
        return f"C code has failed: PYTHONFAULTHANDLER=1 in its environment prints the stack.{spent}"
    if death.end is End.TIMEOUT and death.by is By.TIMEOUT:
        return "Its server has a limit of time for this, and its log names it: find what took so long, or raise that limit"
    if death.end is End.EXITED and not death.booting:
        return "Something in the app has ended the process (sys.exit, os._exit): its own lines are above"
    if death.end in (End.SIGNAL, End.UNKNOWN) and name_of_signal(death.exitcode) == "SIGKILL":
        known = f"It may have been {' or '.join(death.killers)}, which runs here: its log tells" if death.killers else ""
        surer = "; root, or CAP_SYSLOG with /dev/kmsg, could read in the kernel's log whether it was" if death.end is End.UNKNOWN else ""
        return (known or "Perhaps kill -9, a container runtime, or a service manager") + surer
    return ""


def _more_memory(death: DeathRecord) -> str:
    first = death.in_flight[0] if death.in_flight else None
    grown, held = (first.grown or 0) if first is not None else 0, death.held if death.died_with is None else death.died_with
    if first is not None and grown >= max(LEAST_BALLOON, BALLOON * max(0, (held or 0) - (death.baseline or 0))):
        if death.hard_limit is None:
            return f"{first.name} took {format_size(grown)}: with hard_limit=auto the kernel refuses it memory, and kills nobody"
        return f"{first.name} took {format_size(grown)}: lower hard_limit (now {format_size(death.hard_limit)}), so that the pool holds it"
    supervisor = 0 if death.beside is None else death.beside.supervisor or 0
    fresh = None if death.baseline is None else death.baseline * death.workers + supervisor
    if fresh is not None and death.limit and fresh > CROWDED * death.limit:
        return f"{counted(death.workers, 'workers')} need {format_size(fresh)} right after boot: have fewer workers, or more memory"
    pool = _pool(death)
    if pool is not None and death.limit and pool < SMALL * death.limit:
        return f"The whole pool held only {format_size(pool)}: something else used up that limit (oomsafe status shows what others use)"
    if death.soft_limit and held is not None and held > death.soft_limit:
        return "It was above its soft limit: it grew faster than it could be recycled, or its work took long; lower soft_limit or budget"
    if death.soft_limit and death.limit and death.soft_limit * death.workers > death.limit:
        most = format_size(death.soft_limit * death.workers)
        return f"{counted(death.workers, 'workers')} may hold {most} together: lower soft_limit, or have fewer workers"
    return "Lower budget or soft_limit, have fewer workers, or more memory"


def _pool(death: DeathRecord) -> int | None:
    """What the pool held; None: not known, because what the worker held when it was measured last may be long past."""
    if death.died_with is None or death.beside is None or (death.beside.workers and death.beside.held is None):
        return None
    return death.died_with + (death.beside.held or 0) + (death.beside.supervisor or 0)
