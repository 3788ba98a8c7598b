"""An OOM event as text in lines of a given width: what happened, which limit, who was killed, who held what, why, and what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.text import Text

from oomsafe.cli.columns import GAP, Column, cells_of, line_of, that_fit
from oomsafe.cli.labelled import NARROWEST, labelled, wrapped
from oomsafe.policy.kill_advice import advice, reasons
from oomsafe.policy.oomlog.record import Killed
from oomsafe.policy.text import printable
from oomsafe.policy.units import format_size
from oomsafe.policy.why_killed import Account, Holder, Outcome, Scope, ram

#: The processes that are shown: those with the most points, and always the killed one.
SHOWN = 8


def event_text(account: Account, width: int, *, ascii_only: bool = False) -> Text:
    """One event. A figure is never cut; text from the log is made printable."""
    width = max(NARROWEST, width)
    lines = [Text(line, style="bold") for line in wrapped(_headline(account), width)]
    lines += [Text(line, style="dim") for line in wrapped(_time(account), width)]
    for label, text in (("limit", _limit(account)), ("killed", _killed(account)), ("asked", _asked(account))):
        if text:
            lines += labelled(label, text, width)
    lines += _table(account, width, "*" if ascii_only else "→")
    for label, sentences, style in (("why", reasons(account), ""), ("do", advice(account), "green")):
        for number, sentence in enumerate(sentences):
            lines += labelled("" if number else label, sentence, width, style)
    return Text("\n").join(lines)


def _headline(account: Account) -> str:
    event, killed = account.event, account.event.killed
    what = {
        Scope.CGROUP: "A memory cgroup ran out of memory",
        Scope.MACHINE: "The machine ran out of memory",
        Scope.NODES: "The memory nodes that a cpuset or policy allows ran out",
        Scope.UNKNOWN: "Out of memory",
    }[account.scope]
    if account.outcome is Outcome.PANIC:
        return f"{what}: the kernel panicked"
    if account.outcome is Outcome.NONE_KILLABLE:
        return f"{what}: nobody could be killed"
    if killed is None:
        return f"{what}: the log does not tell who was killed"
    worker = f", a worker of oomsafe's (slot {account.slot})," if account.slot is not None else ""
    more = f" and {len(event.also_killed)} more of its cgroup were" if event.also_killed else " was"
    return f"{what}: {_who(killed)}{worker}{more} killed"


def _who(killed: Killed) -> str:
    return f"{printable(killed.comm, 32) or 'a process without a name'} ({killed.pid})"


def _time(account: Account) -> str:
    event = account.event
    parts = [event.time.iso or event.time.text or "at an unknown time"]
    if event.time.text and event.time.text != parts[0]:
        parts.append(f"{event.time.text} in the log")
    parts += [f"on {event.host}"] if event.host else []
    parts += [f"kernel {event.kernel}"] if event.kernel else []
    return ", ".join(printable(part, 120) for part in parts)


def _limit(account: Account) -> str:
    event = account.event
    if account.scope is Scope.CGROUP:
        memory = event.memory
        path = f" of {printable(event.oom_memcg, 4096)}" if event.oom_memcg else ""
        if memory is None:
            return f"not in the log{path}" if path else ""
        limit = "none" if memory.limit is None else format_size(memory.limit)
        swap = event.swap or event.memsw
        beside = ""
        if swap is not None and swap.usage > (0 if event.swap else memory.usage):
            beside = f", {'swap' if event.swap else 'with swap'} {format_size(swap.usage)}"
        return f"{limit}, {format_size(memory.usage)} in use{beside}{path}"
    own = ram(event, account.page_size)
    if own is None:
        return ""
    swap_text = "" if event.total_swap is None else f", swap {format_size(event.total_swap)}, of which {format_size(event.free_swap)} free"
    return f"the machine's {format_size(own)} of RAM{swap_text if event.total_swap else ', no swap' if event.total_swap == 0 else ''}"


def _killed(account: Account) -> str:
    killed, event = account.event.killed, account.event
    if killed is None:
        return ""
    parts = [f"uid {killed.uid}"] if killed.uid is not None else []
    kinds = (("anonymous", killed.anon), ("files", killed.file), ("shared", killed.shmem))
    parts += [f"{format_size(size)} {kind}" for kind, size in kinds if size is not None]
    parts += [f"{format_size(killed.pgtables)} page tables"] if killed.pgtables is not None else []
    parts += [f"oom_score_adj {killed.oom_score_adj}"] if killed.oom_score_adj is not None else []
    if event.task_memcg and event.task_memcg != event.oom_memcg:
        parts.append(f"in {printable(event.task_memcg, 4096)}")
    if event.left is not None and event.left.anon:
        parts.append(f"{format_size(event.left.anon)} could not be taken back at once")
    return f"{_who(killed)}: {', '.join(parts) or 'the log has no figures'}"


def _asked(account: Account) -> str:
    event = account.event
    if event.invoker is None or (event.killed is not None and event.invoker == event.killed.comm):
        return ""
    thread = f" (thread {event.invoker_thread})" if event.invoker_thread is not None else ""
    return f"{printable(event.invoker, 64)}{thread} asked for the memory that was not there"


def _table(account: Account, width: int, arrow: str) -> list[Text]:
    if not account.holders:
        return []
    killed = {account.event.killed.pid} if account.event.killed else set()
    killed |= {one.pid for one in account.event.also_killed}
    first = [*account.holders[:SHOWN]]
    other = account.without_scores
    first += [one for one in account.holders[SHOWN:] if one is account.victim or one is other]
    columns = _columns(arrow, killed)
    rows = [cells_of(columns, holder) for holder in first]
    kept, widths = that_fit(columns, rows, width)

    def line(cells: Sequence[Text], style: str) -> Text:
        found = line_of([cells[at] for at in kept], [columns[at] for at in kept], widths)[GAP:]
        found.stylize(style)
        return found

    lines = [line([Text(column.title) for column in columns], "bold")]
    lines += [line(row, "red" if one.pid in killed else "") for row, one in zip(rows, first, strict=True)]
    more = len(account.holders) - len(first) + account.event.rows_left_out
    if more:
        shown = {one.pid for one in first}
        rest = format_size(sum(one.size for one in account.holders if one.pid not in shown))
        least = "at least " if account.event.rows_left_out else ""
        lines += [
            Text(line, style="dim")
            for line in textwrap.wrap(f"and {more} more, which hold {least}{rest}", width - GAP, initial_indent="  ")
        ]
    if account.page_size_is_assumed:
        lines += [Text("  " + line, style="dim") for line in wrapped("(pages of 4 KiB assumed)", width - GAP)]
    return lines


def _columns(arrow: str, killed: set[int]) -> list[Column[Holder]]:
    def adj(holder: Holder) -> str:
        return "?" if holder.oom_score_adj is None else str(holder.oom_score_adj)

    def points(holder: Holder) -> str:
        return "exempt" if holder.is_exempt else "?" if holder.points is None else str(holder.points)

    def size(value: int | None) -> str:
        return "?" if value is None else format_size(value)

    return [
        Column("", lambda holder: arrow if holder.pid in killed else "", right=False),
        Column("pid", lambda holder: str(holder.pid)),
        Column("name", lambda holder: printable(holder.comm, 15), right=False),
        Column("resident", lambda holder: size(holder.rss)),
        Column("swap", lambda holder: size(holder.swap), left_out=2),
        Column("page tables", lambda holder: size(holder.pgtables), left_out=3),
        Column("adj", adj),
        Column("points", points, left_out=1),
        Column("uid", lambda holder: "?" if holder.uid is None else str(holder.uid), left_out=4),
    ]
