"""An advice as text in lines of a given width: each figure with the arithmetic that it comes from."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

from rich.text import Text

from oomsafe.policy.sizing.advice import DEFAULTS, Advice, Bound
from oomsafe.policy.sizing.facts import Facts, Style
from oomsafe.policy.units import MIB, counted, format_duration, format_size

#: Columns in cells: the names, the figures; and from which width on the arithmetic stands beside them.
NAME, FIGURE, WIDE = 12, 13, 64


class Row(NamedTuple):
    """One figure."""

    name: str
    figure: str
    how: str


def advice_text(title: str, facts: Facts, advice: Advice, width: int) -> Text:
    """The title, a row for each figure, what speaks against it, and what is not known."""
    lines = [Text(line, style="bold") for line in _wrapped(title, width)]
    for row in rows_of(facts, advice):
        lines += _row(row, width)
    lines += [Text(line, style="yellow") for concern in concerns(facts, advice) for line in _wrapped(f"! {concern}", width, "  ")]
    unknown = not_known(facts)
    if unknown:
        lines += [Text(line, style="dim") for line in _wrapped(f"not known: {', '.join(unknown)}", width)]
    return Text("\n").join(lines)


def rows_of(facts: Facts, advice: Advice) -> list[Row]:
    """Each figure, with its arithmetic in MiB."""
    beside = (f"{_mib(facts.parent)} supervisor - " if facts.parent else "") + f"{_mib(advice.headroom)} headroom"
    others = f" - {_mib(facts.others)} of others" if facts.others else ""
    return [
        Row("workers", str(advice.workers), _workers(facts, advice)),
        Row("soft limit", _limit(advice.soft), _soft(facts, advice, beside)),
        Row("hard limit", "none" if advice.hard is None else _limit(advice.hard), _hard(facts, advice, beside, others)),
        Row("budget", _mib(advice.budget), f"{DEFAULTS.budget} of {_mib(facts.limit)}{others} ({facts.source})"),
        Row("headroom", _mib(advice.headroom), _headroom(facts, advice)),
        Row("recycles", _recycles_figure(advice), _recycles(facts, advice)),
        Row("preload", "saves" if advice.saved is not None else "unknown", _preload(facts, advice)),
        Row("would do", format_size(advice.would_do), _would_do(facts, advice)),
    ]


def concerns(facts: Facts, advice: Advice) -> list[str]:
    """What speaks against a pool like this."""
    found = []
    if advice.balloon_fits is False:
        found.append(
            f"one of the {facts.unit} may grow by {format_size(facts.balloon)}: a worker near its soft limit has no room for that, and it "
            f"gets 503; {format_size(advice.would_do)} would do"
        )
    if advice.short_lived and advice.life is not None:
        found.append(
            f"a worker lives {format_duration(advice.life)} only, less than {format_duration(advice.should_live)}: mend the leak, or have "
            f"fewer workers or more memory ({format_size(advice.would_do)} for {advice.would_do_for})"
        )
    if advice.bound is Bound.GIVEN and advice.by_cpu is not None and advice.workers > 2 * advice.by_cpu:
        found.append(f"{counted(advice.workers, 'workers')} are many for {facts.cpus:g} CPUs, which {advice.by_cpu} keep busy")
    return found


def not_known(facts: Facts) -> list[str]:
    """Each figure that is missing, and the option that gives it."""
    options = {
        "processors (--cpus 2)": facts.cpus,
        "what the supervisor holds, counted as nothing (--supervisor 60MiB)": facts.supervisor,
        f"what one of the {facts.unit} leaks (--growth 40KiB)": facts.growth,
        f"{facts.unit} a second (--rate 50)": facts.rate,
        f"the largest growth in one of the {facts.unit} (--balloon 200MiB)": facts.balloon,
        "how long a boot takes (--boot 5s)": facts.boot,
    }
    return [what for what, figure in options.items() if figure is None]


def _workers(facts: Facts, advice: Advice) -> str:
    cpu = "by CPU: not known"
    if advice.by_cpu is not None:
        how = f"2 x {facts.cpus:g} + 1" if facts.style is Style.BLOCKING else f"one for each of {facts.cpus:g}"
        cpu = f"by CPU {advice.by_cpu} ({how})"
    memory = f"by memory {advice.by_memory} (each needs a soft limit of {_mib(advice.least_soft)} at least)"
    which = {Bound.CPU: "CPU binds", Bound.MEMORY: "memory binds", Bound.GIVEN: "their number was given"}[advice.bound]
    now = f"; now {facts.workers}" if facts.workers else ""
    return f"{cpu}; {memory}; {which}{now}"


def _soft(facts: Facts, advice: Advice, beside: str) -> str:
    most = (advice.budget - facts.parent - advice.headroom) // advice.workers // MIB * MIB
    lowered = f", less so that {_mib(facts.balloon)} more fit in one" if advice.soft < most and facts.balloon else ""
    metric = "" if advice.metric == "anon" else f"; metric={advice.metric}: what a worker shares is not its own"
    fresh = f"{_mib(facts.own)} of its own" if facts.preloads else _mib(facts.own)
    each = f"({_mib(advice.budget)} budget - {beside}) / {counted(advice.workers, 'workers')}{lowered}"
    return f"{each}; a fresh worker has {fresh}, which leaves it {_mib(advice.soft - facts.own)}{metric}"


def _hard(facts: Facts, advice: Advice, beside: str, others: str) -> str:
    if advice.hard is None and facts.balloon is not None:
        speed = format_size(int((facts.pace or 0.0) / advice.workers))
        return f"a worker leaks {speed}/s: requests would be refused for that as if each of them took everything at once"
    if advice.hard is None:
        return f"what one of the {facts.unit} may need at most is not known (--balloon 200MiB), and a lower limit would refuse it that"
    rest = f" - {advice.workers - 1} x {_mib(advice.soft)}" if advice.workers > 1 else ""
    shared = f" + {_mib(facts.common)} shared" if facts.common else ""
    text = f"{_mib(facts.limit)} limit{others} - {beside}{rest}{shared}: with the others at their soft limits, all still fit"
    if advice.balloon_fits:
        text += f", and a worker at its own has room for the largest growth, {_mib(facts.balloon)}"
    return text


def _headroom(facts: Facts, advice: Advice) -> str:
    more = advice.headroom - facts.own
    growth = f", and {format_size(more)} that the pool grows by until it helps" if more else ""
    return f"kept free for a replacement, which boots before its predecessor leaves: a fresh worker{growth}"


def _recycles_figure(advice: Advice) -> str:
    if advice.recycles is None:
        return "unknown"
    return "none" if not advice.recycles else f"{_short(advice.recycles)} an hour"


def _recycles(facts: Facts, advice: Advice) -> str:
    if facts.growth == 0:
        return f"{facts.unit} leave nothing behind"
    if facts.pace is None or advice.life is None:
        return f"{facts.unit} a second x what each leaks / what a worker may gain; one of them is not known"
    if advice.life == math.inf:
        return "nothing grows"
    gain = int(advice.soft * (1 - DEFAULTS.jitter / 2)) - facts.own
    grows = f"{_short(facts.rate or 0)} {facts.unit} a second x {format_size(int(facts.growth or 0))} = {format_size(int(facts.pace))}/s"
    lives = f"a worker gains {_mib(gain)} until it is recycled, and lives {format_duration(advice.life)}, if it goes on like that"
    young = (
        ""
        if advice.min_lifetime is None
        else f"; min_lifetime={advice.min_lifetime:g}s, or it would stay above its limit until it is {DEFAULTS.min_lifetime:g} s old"
    )
    return f"{grows}; {lives}{young}"


def _preload(facts: Facts, advice: Advice) -> str:
    if advice.saved is None:
        why = "nothing much is shared now" if facts.shared is not None else "what workers share is not known"
        return f"{why}: with gunicorn, run the pool with preload_app = True and advise again; or say what would be shared: --preload 100MiB"
    shared = f"{format_size(advice.saved)}: {advice.workers} workers share {_mib(facts.common)}, which the supervisor holds once"
    return f"{shared}. That is with gc.freeze (freeze_preload, the default); without it, workers copy it bit by bit, down to nothing saved"


def _would_do(facts: Facts, advice: Advice) -> str:
    whose = "as many workers as now" if facts.workers == advice.would_do_for else "these workers"
    lives = f", each of which lives {format_duration(advice.should_live)} at least" if facts.pace else ""
    return f"the smallest memory for {whose} ({advice.would_do_for}){lives}, with room for a replacement"


def _row(row: Row, width: int) -> list[Text]:
    """The arithmetic beside the figure, or below it if there is no room beside it."""
    name, figure = Text(f"  {row.name:<{NAME}}"), Text(f"{row.figure:>{FIGURE}}", style="bold")
    indent = 4 + NAME + FIGURE if width >= WIDE else 4
    how = textwrap.wrap(row.how, max(20, width - indent), break_long_words=False, break_on_hyphens=False)
    beside = Text(f"  {how.pop(0)}" if width >= WIDE else "")
    return [Text.assemble(name, figure, beside), *(Text(" " * indent + line) for line in how)]


def _wrapped(text: str, width: int, indent: str = "") -> Iterable[str]:
    return textwrap.wrap(text, max(20, width), subsequent_indent=indent, break_on_hyphens=False)


def _limit(size: int) -> str:
    return f"{size // MIB} MiB"


def _mib(size: int | None) -> str:
    """``320 MiB``; below 10 with a digit more."""
    return "unknown" if size is None else f"{size / MIB:.0f} MiB" if size >= 10 * MIB else f"{size / MIB:.1f} MiB"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"
