"""What is known of a pool that may die the next moment, for whoever looks at what is left: "if I died now, this is why". Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from oomsafe.policy.text import printable, shortened
from oomsafe.policy.units import counted, format_size

#: Kubernetes shows at most this many bytes of a termination message (kubelet, MaxContainerTerminationMessageLength).
LONGEST = 4096

#: From this share of the limit on, memory is likely to be the reason if the whole pool is gone.
SHORT = 0.85

#: Shares of the limit that count as the same.
STEPS = 20

#: At most this many workers, and this many deaths, are told of.
MOST = 5


class Worker(NamedTuple):
    """One living worker; sizes in bytes, None is not known."""

    who: str
    """``worker 4711 (slot 2)``."""
    held: int | None
    doing: str
    """``in flight: GET /export (4.2 s, +310 MiB)``."""


class Present(NamedTuple):
    """A pool at this moment. Sizes in bytes; None is not known."""

    pool: str
    """Its server and its name."""
    supervisor: int
    """Its pid."""
    held: int | None
    limit: int | None
    used: int | None
    """Of the limit, by the pool and others, without what the kernel can drop."""
    source: str
    """Where the limit comes from."""
    dies_whole: bool
    """Whether the kernel kills all processes at once (memory.oom.group)."""
    workers: Sequence[Worker]
    deaths: Sequence[str]
    """The lines about the last deaths, the latest first."""
    died: int
    """How many there have been."""

    @property
    def share(self) -> float | None:
        """The share of the limit that is in use."""
        return None if not self.limit or self.used is None else self.used / self.limit

    @property
    def is_short(self) -> bool:
        """Whether memory is short."""
        return self.share is not None and self.share >= SHORT

    @property
    def matters(self) -> bool:
        """Whether there is anything to say: where there is not, an empty file leaves Kubernetes the container's log."""
        return self.is_short or self.died > 0


def key_of(present: Present) -> tuple[object, ...]:
    """Changes when the words should be written again, though not with every figure."""
    step = None if present.share is None else math.floor(present.share * STEPS)
    doing = tuple(worker.doing.partition(" (")[0] for worker in present.workers) if present.is_short else ()
    return step, present.is_short, present.died, len(present.workers), present.limit, doing


def last_words(present: Present, at: str) -> str:
    """The words, as of `at`, at most LONGEST bytes of printable lines."""
    share = "" if present.share is None else f", {present.share:.0%} of it in use"
    why = (
        "memory is short: if this process is gone, the kernel's OOM killer is the likely reason"
        if present.is_short
        else "memory was not short then: if this process is gone, look for another reason first"
    )
    lines = [
        f"oomsafe, as of {at}: {why}",
        f"{present.pool}, supervisor {present.supervisor}: the pool holds {format_size(present.held)}; the limit is "
        f"{format_size(present.limit)} ({present.source}){share}",
    ]
    if present.dies_whole:
        lines.append("memory.oom.group is set: the kernel kills all processes here at once (Kubernetes: kubelet's singleProcessOOMKill)")
    ranked = sorted(present.workers, key=lambda worker: -(worker.held or 0))
    lines += [f"{worker.who}: {format_size(worker.held)}; {worker.doing}" for worker in ranked[:MOST]]
    if len(ranked) > MOST:
        lines.append(f"and {counted(len(ranked) - MOST, 'workers')} more")
    if present.died:
        lines.append(f"{counted(present.died, 'workers')} died before, the last ones:")
        lines += list(present.deaths[:MOST])
    return shortened("\n".join(printable(line, 700) for line in lines) + "\n", LONGEST)


class Note(NamedTuple):
    """What a pool has left in its state folder while it lived."""

    pid: int
    started: int
    boot: str
    """Of the machine."""
    namespace: str
    """Of its pids."""
    at: str
    words: str


def pack(note: Note) -> bytes:
    """The bytes for a file; the words are cut so that they fit."""
    words = note.words
    while len(packed := json.dumps([1, *note._replace(words=words)]).encode()) > LONGEST:
        words = words[: len(words) - (len(packed) - LONGEST)] if len(packed) - LONGEST < len(words) else ""
    return packed


def unpack(raw: bytes) -> Note | None:
    """None if these bytes are no note: anybody may have written them who may write in that folder."""
    try:
        found: Any = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, list) or len(found) != 1 + len(Note._fields) or found[0] != 1:
        return None
    kinds = (int, int, str, str, str, str)
    if any(type(value) is not kind for value, kind in zip(found[1:], kinds, strict=True)):
        return None
    return Note(*found[1:])


def epitaph(note: Note, same_boot: bool) -> str:
    """The line about a pool that has ended without saying goodbye."""
    words = "; ".join(printable(line, 700) for line in note.words.splitlines()[:8])
    since = "" if same_boot else " The machine has been booted since."
    return f"the pool before this one ended without a goodbye (killed, or its machine went down). Its last words: {words}.{since}"
