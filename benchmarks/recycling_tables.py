"""The tables of recycling.py. A contestant that did not do what its row says has a remark there, and no ratio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import common
from contestants import WORKERS
from recycling_runs import Goal, Run

Rounds = dict[str, list[Run]]


def latency(seen: Rounds, baselines: dict[str, str], ways: dict[str, str]) -> str:
    """What the verifying clients saw."""
    head = ["", "requests/s", "p50, ms", "p99, ms", "p99 against not recycling", "max, ms", "failed / requests", "recycles a round"]
    rows = []
    for name, runs in seen.items():
        base = _base(name, seen, baselines)
        cells = [spread(runs, "rate"), spread(runs, "p50", 1), spread(runs, "p99", 1), _ratio(runs, base, "p99")]
        rows.append([name, *cells, spread(runs, "max"), failed(runs), _recycles(runs, ways[name])])
    return common.table(head, rows) + kinds(seen)


def throughput(seen: Rounds, baselines: dict[str, str], ways: dict[str, str]) -> str:
    """What wrk saw."""
    head = ["", "requests/s", "against not recycling", "p99, ms", "p99 against not recycling", "failed / requests", "recycles a round"]
    rows = []
    for name, runs in seen.items():
        base = _base(name, seen, baselines)
        cells = [spread(runs, "rate"), _ratio(runs, base, "rate"), spread(runs, "p99", 1), _ratio(runs, base, "p99")]
        rows.append([name, *cells, failed(runs), _recycles(runs, ways[name])])
    return common.table(head, rows)


def failures(seen: Rounds, ways: dict[str, str], goal: Goal) -> str:
    """Failed of how many over how many recycles, and how they failed."""
    head = ["", "failed / requests", "recycles", "failed a recycle", "connections given up when told", "ended while nothing was asked"]
    rows = []
    for name, runs in seen.items():
        recycles = sum(run.recycles for run in runs)
        short = "" if recycles >= goal.recycles and _sum(runs, "requests") >= goal.requests else " (not enough: out of time)"
        each = f"{_sum(runs, 'failed') / recycles:.2f}" if recycles else ""
        cells = [_recycles(runs, ways[name]) + short, each, thousands(_sum(runs, "announced")), thousands(_sum(runs, "closed_idle"))]
        rows.append([name, failed(runs), *cells])
    return common.table(head, rows) + kinds(seen)


def slow(seen: Rounds, ways: dict[str, str]) -> str:
    """What became of the slow requests, and of the others meanwhile."""
    head = ["", "slow: answered / asked", "others: failed / requests", "longest, s", f"first workers gone, of {WORKERS}", "workers killed"]
    rows = []
    for name, runs in seen.items():
        asked = sum(run.asked["slow"] for run in runs)
        lost = sum(count for run in runs for kind, count in run.failures.items() if kind.startswith("slow:"))
        others = f"{thousands(_sum(runs, 'failed') - lost)} / {thousands(_sum(runs, 'requests') - asked)}"
        gone = common.shown([float(run.first_gone) for run in runs]) + _remark(runs, ways[name])
        longest = common.shown([run.max / 1e3 for run in runs], 1)
        rows.append([name, f"{asked - lost} / {asked}", others, longest, gone, thousands(_sum(runs, "killed"))])
    return common.table(head, rows) + kinds(seen)


def _base(name: str, seen: Rounds, baselines: dict[str, str]) -> list[Run] | None:
    return seen.get(baselines.get(name, ""))


def _ratio(runs: list[Run], base: list[Run] | None, key: str) -> str:
    if base is None or not all(getattr(run, key) for run in base):
        return ""
    return common.shown([getattr(a, key) / getattr(b, key) for a, b in zip(runs, base, strict=True)], 2)


def spread(runs: list[Run], key: str, digits: int = 0) -> str:
    return common.shown([float(getattr(run, key)) for run in runs], digits)


def failed(runs: list[Run]) -> str:
    return f"{thousands(_sum(runs, 'failed'))} / {thousands(_sum(runs, 'requests'))}"


def _recycles(runs: list[Run], way: str) -> str:
    killed = _sum(runs, "killed")
    return spread(runs, "recycles") + (f", {killed} killed" if killed else "") + _remark(runs, way)


def _remark(runs: list[Run], way: str) -> str:
    """What makes a row doubtful, in capitals: it must not be overlooked."""
    doubts = Counter(filter(None, (run.doubt(way) for run in runs)))
    return "".join(f" ({doubt.upper()}{f', {count} rounds' if count > 1 else ''})" for doubt, count in doubts.items())


def kinds(seen: Rounds) -> str:
    """Below the table: how requests failed, where any did."""
    lines = []
    for name, runs in seen.items():
        found: Counter[str] = Counter()
        for run in runs:
            found.update(run.failures)
        if found:
            lines.append(f"- {name}: " + ", ".join(f"{count} {kind}" for kind, count in found.most_common()))
    return "\n\nHow requests failed:\n\n" + "\n".join(lines) if lines else ""


def _sum(runs: Iterable[Run], key: str) -> int:
    return sum(getattr(run, key) for run in runs)


def thousands(number: int) -> str:
    """As the tables write numbers."""
    return f"{number:,}".replace(",", " ")
