"""The second stage: what a kernel message says, if it belongs to a report of the OOM killer.

The texts are those of mm/oom_kill.c, mm/memcontrol.c, mm/show_mem.c and mm/swap_state.c from Linux 2.6.32 to 6.18, and of the kernels of
RHEL 6 and 7. A process chooses its own name: spaces, commas and parentheses in it must not end it too early.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from oomsafe.policy.oomlog.record import Charge, Killed, Left, Row

#: A cgroup without a limit: PAGE_COUNTER_MAX, or what cgroup v1 shows for it, in kB, less the rounding to pages.
NO_LIMIT = (1 << 53) - 256

#: The longest message that is looked at, in characters. The kernel cuts its lines at 1024 bytes; a path of a cgroup may have 4096.
LONGEST = 8192


class Invoked(NamedTuple):
    """``x invoked oom-killer: gfp_mask=…, order=0, oom_score_adj=0``: a report begins."""

    comm: str
    order: int | None
    score_adj: int | None


class Running(NamedTuple):
    """``CPU: 0 UID: 0 PID: 31368 Comm: x Not tainted 6.18.44``: who asked, and which kernel this is."""

    pid: int
    comm: str
    kernel: str | None


class Fact(NamedTuple):
    """One field of the Event."""

    field: str
    value: Any


class Header(NamedTuple):
    """The table begins."""

    width: int
    """Figures before the name."""
    pick: Callable[[list[int | None]], tuple[int | None, ...]]
    """From the figures, with None and the sum of `ptes` behind them, those of Row's fields, from uid to oom_score_adj."""
    ptes: tuple[int, ...]
    """Which figures are page tables in pages (before 4.15): nr_ptes, and later nr_pmds and nr_puds."""


class Summary(NamedTuple):
    """``oom-kill:constraint=…`` (Linux 5.0)."""

    constraint: str
    is_memcg: bool
    oom_memcg: str | None
    task_memcg: str | None
    comm: str
    pid: int


class LimitOf(NamedTuple):
    """``Task in /a killed as a result of limit of /b`` (until Linux 4.20)."""

    task_memcg: str | None
    oom_memcg: str


class Chosen(NamedTuple):
    """``Kill process 1 (x) score 900 or sacrifice child`` (until Linux 5.0): selected, but perhaps not the one that is killed."""

    pid: int
    comm: str
    score: int | None
    message: str


class Group(NamedTuple):
    """``Tasks in /a are going to be killed due to memory.oom.group set``."""

    path: str


class NoKillable(NamedTuple):
    """``Out of memory and no killable processes...``"""


class Panic(NamedTuple):
    """The kernel gives up."""

    why: str


class Gap(NamedTuple):
    """``** 12 printk messages dropped **``."""


Message = (
    Invoked | Running | Fact | Header | Row | Summary | LimitOf | Chosen | Killed | Left | Group | NoKillable | Panic | Gap
)  # fmt: skip

_NUMBER = r"(-?\d{1,19})"
_INVOKED = re.compile(r"order=(-?\d{1,3})")
_INVOKED_ADJ = re.compile(r"oom_score_adj=(-?\d{1,5})")
_RUNNING = re.compile(r"P(?:ID|id): (\d{1,10}),? [Cc]omm: ")
_KERNEL = re.compile(r"(?:Not tainted|Tainted: .{1,40}?) \(?(\d\.\d{1,3}[\w.+~-]{0,64})")
_USAGE = re.compile(rf"(memory|memory\+swap|swap|kmem): usage {_NUMBER}kB, limit {_NUMBER}kB")
_HEADER = re.compile(r"\[ *pid *\] ")
_COLUMN = re.compile(r"\w{1,32}")
_FIGURE = re.compile(rf"(total-vm|vsz|anon-rss|file-rss|shmem-rss|pgtables|oom_score_adj|UID):{_NUMBER}")
# what stands before it has no colon and no quote: text that a program chose, in another message, can't pass for it
_KILLED = re.compile(r"(?:([^\":]{1,64}): )?Killed process (\d{1,10})")
_UID = re.compile(r", UID (\d{1,10}),")
_CHOSEN = re.compile(r"(?:([^\":]{1,64}): )?[Kk]ill process (\d{1,10}) \(")
_SCORE = re.compile(r"\) score (-?\d{1,19}) or (?:sacrifice|a) child")
_REAPED = re.compile(r"oom_reaper: reaped process (\d{1,10}) \(")
_PAGES = re.compile(rf"{_NUMBER} pages (RAM|reserved)$")
_SWAP = re.compile(rf"(Free|Total) swap {{1,4}}= {{0,4}}{_NUMBER}kB")
_SLAB = re.compile(rf"slab_unreclaimable:{_NUMBER}(?: |#012|$)")  # rsyslog writes a line break as #012
_SHMEM = re.compile(rf"shmem:{_NUMBER} pagetables:")
_HUGE = re.compile(rf"hugepages_total={_NUMBER} .{{0,80}}hugepages_size={_NUMBER}kB")
_STAT = re.compile(rf"(?:total_)?shmem {_NUMBER}$")
_STATS_IN_A_LINE = re.compile(r" shmem:(\d{1,16})KB")

#: Each of these stands in a line that says something; a line without any is passed over, except a row of the table. Tried in turn, so the
#: common ones come first.
MARKS = (
    "shmem", "usage ", "ll process", "lled process", "oom-kill", "oom_reaper", "total_vm", "omm: ", "pages RAM", "pages reserved",
    " swap =", " swap  =", "slab_unreclaimable:", "hugepages_total", "limit of ", "oom.group", "limit reached of", "killable",
    "panic_on_oom", "deadlocked on mem", "messages dropped", '"MESSAGE":[',
)  # fmt: skip

#: One of these is in every report, even if only one line of it is left; the journal writes what is not UTF-8 as an array of bytes, and
#: netconsole long lines in fragments.
OPENERS = (
    "ll process ", "lled process ", "oom-kill", "killable proc", "panic_on_oom", "oom.group", "total_vm", "limit of /",
    ",ncfrag=", '"MESSAGE":[',
)  # fmt: skip


def classify(text: str) -> Message | None:
    """What a message without its prefix says; None: nothing about an OOM kill."""
    if len(text) > LONGEST:
        text = text[:LONGEST]
    for mark, read in _READERS:
        if mark in text:
            found = read(text)
            if found is not None:
                return found
    return None


def row_of(text: str, header: Header) -> Row | None:
    """A line of the table; None if it is none."""
    if text[:1] != "[":
        return None
    pid, closed, rest = text[1:300].partition("]")
    words = rest.split(None, header.width)
    if not closed or len(words) < header.width or len(rest) > 280:
        return None
    comm = words.pop().rstrip() if len(words) > header.width else ""
    try:
        figures: list[int | None] = [*map(int, words), None]
        figures.append(sum(int(words[at]) for at in header.ptes) if header.ptes else None)
        return Row(int(pid), *header.pick(figures), comm)  # type: ignore[arg-type, call-arg]
    except ValueError:
        return None


def _invoked(text: str) -> Invoked | None:
    comm, found, rest = text.partition(" invoked oom-killer: ")
    if not found:
        return None
    order, adj = _INVOKED.search(rest), _INVOKED_ADJ.search(rest)
    return Invoked(comm[-64:], int(order[1]) if order else None, int(adj[1]) if adj else None)


def _summary(text: str) -> Summary | None:
    _, found, rest = text.partition("oom-kill:constraint=")
    rest, has_uid, _ = rest.rpartition(",uid=")
    rest, has_pid, pid = rest.rpartition(",pid=")
    rest, has_task, comm = rest.rpartition(",task=")
    pid = pid.strip()
    if not (found and has_uid and has_pid and has_task and pid.isdigit() and len(pid) < 11):
        return None
    constraint, _, rest = rest.partition(",")
    limit, _, task_memcg = rest.partition(",task_memcg=")
    _, has_memcg, oom_memcg = limit.partition(",oom_memcg=")
    return Summary(constraint[:64], bool(has_memcg), oom_memcg or None, task_memcg or None, comm[:64], int(pid))


def _limit_of(text: str) -> LimitOf | None:
    task, found, limit = text.partition(" killed as a result of limit of ")
    if found and "Task in " in task:
        return LimitOf(task.partition("Task in ")[2], limit.rstrip())
    _, found, limit = text.partition("Memory limit reached of cgroup ")
    return LimitOf(None, limit.rstrip()) if found else None


def _killed(text: str) -> Killed | None:
    match = _KILLED.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    uid = _UID.match(rest)  # RHEL 6: Killed process 1, UID 0, (x) total-vm:…
    rest = rest[uid.end() :] if uid else rest
    ends = [at for at in (rest.rfind(f"){after}") for after in (" total-vm:", ", UID ", " vsz:")) if at > 0]
    end = min(ends) if ends else rest.rfind(")")
    if not rest.lstrip().startswith("(") or end < 0:
        return None
    comm, rest = rest.lstrip()[1 : end - (len(rest) - len(rest.lstrip()))], rest[end:]
    uid = uid or re.match(r"\), UID (\d{1,10}),", rest)
    figures = {name: int(value) for name, value in _FIGURE.findall(rest)}

    def size(*names: str) -> int | None:
        return next((figures[name] << 10 for name in names if figures.get(name, -1) >= 0), None)

    return Killed(
        pid=int(match[2]), comm=comm[:64], message=match[1] or "",
        uid=int(uid[1]) if uid else figures.get("UID"), total_vm=size("total-vm", "vsz"), anon=size("anon-rss"), file=size("file-rss"),
        shmem=size("shmem-rss"), pgtables=size("pgtables"), oom_score_adj=figures.get("oom_score_adj"),
    )  # fmt: skip


def _chosen(text: str) -> Chosen | None:
    match, score = _CHOSEN.match(text), _SCORE.search(text)
    # without a score it is a process that shares the victim's memory, and is killed with it
    return Chosen(int(match[2]), text[match.end() : score.start()][:64], int(score[1]), match[1] or "") if match and score else None


def _left(text: str) -> Left | None:
    if (match := _REAPED.search(text)) is None:
        return None
    figures = {name: int(value) << 10 for name, value in _FIGURE.findall(text[match.end() :])}
    return Left(pid=int(match[1]), anon=figures.get("anon-rss"), file=figures.get("file-rss"), shmem=figures.get("shmem-rss"))


def _group(text: str) -> Group | None:
    _, found, rest = text.partition("Tasks in ")
    path, ends, _ = rest.partition(" are going to be killed due to memory.oom.group set")
    return Group(path) if found and ends else None


def _usage(text: str) -> Fact | None:
    if (match := _USAGE.match(text)) is None:
        return None
    limit = int(match[3])
    field = {"memory+swap": "memsw"}.get(match[1], match[1])
    return Fact(field, Charge(usage=int(match[2]) << 10, limit=None if limit >= NO_LIMIT else limit << 10))


@lru_cache(maxsize=4)  # one kernel prints one header
def _header(text: str) -> Header | None:
    if (match := _HEADER.search(text)) is None:
        return None
    names = _COLUMN.findall(text[match.end() : match.end() + 400])
    if names[-1:] != ["name"] or "rss" not in names:
        return None
    width = len(names) - 1
    places = {name: at for at, name in enumerate(names) if name in Row._fields}
    ptes = tuple(at for at, name in enumerate(names) if name in ("nr_ptes", "nr_pmds", "nr_puds"))
    places["nr_ptes"] = width + 1
    return Header(width, itemgetter(*(places.get(name, width) for name in Row._fields[1:-1])), ptes)


def _running(text: str) -> Running | None:
    match = _RUNNING.search(text)
    if match is None:
        return None
    rest, kernel = text[match.end() :], _KERNEL.search(text, match.end())
    comm = rest.partition(" Not tainted")[0].partition(" Tainted: ")[0]
    return Running(int(match[1]), comm[:64], kernel[1] if kernel else None)


def _panic(text: str) -> Panic | None:
    _, found, why = text.partition("Kernel panic - not syncing: ")
    return Panic(why.strip()[:200]) if found else None


def _no_killable(text: str) -> NoKillable | Panic | None:
    return _panic(text) or (NoKillable() if text.startswith("Out of memory and no killable processes") else None)


def _pages(text: str) -> Fact | None:
    match = _PAGES.match(text)
    return Fact("ram_pages" if match[2] == "RAM" else "reserved_pages", int(match[1])) if match else None


def _swap(text: str) -> Fact | None:
    match = _SWAP.match(text)
    return Fact(f"{match[1].lower()}_swap", max(0, int(match[2])) << 10) if match else None


def _slab(text: str) -> Fact | None:
    match = _SLAB.search(text)
    return Fact("slab_pages", int(match[1])) if match else None


def _huge(text: str) -> Fact | None:
    match = _HUGE.search(text)
    return Fact("hugepages", int(match[1]) * int(match[2]) << 10) if match else None


def _shmem(text: str) -> Fact | None:
    if match := _STAT.match(text):
        return Fact("shmem", int(match[1]))
    if match := _SHMEM.search(text):
        return Fact("shmem_pages", int(match[1]))
    if text.startswith("Memory cgroup stats for ") and (match := _STATS_IN_A_LINE.search(text)):
        return Fact("shmem", int(match[1]) << 10)
    return None


_READERS: tuple[tuple[str, Callable[[str], Message | None]], ...] = (
    ("illed process", _killed),
    (" invoked oom-killer", _invoked),
    ("oom-kill:constraint=", _summary),
    ("ill process", _chosen),
    ("oom_reaper:", _left),
    ("memory.oom.group", _group),
    (": usage ", _usage),
    ("total_vm", _header),
    ("omm: ", _running),
    ("limit ", _limit_of),
    ("no killable processes", _no_killable),
    ("Kernel panic", _panic),
    ("printk messages dropped", lambda _: Gap()),
    ("shmem", _shmem),
    (" pages ", _pages),
    (" swap ", _swap),
    ("slab_unreclaimable:", _slab),
    ("hugepages_total=", _huge),
)
