"""What is computed from an OOM event: points, who would have been chosen without scores, and the advice that fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oom_reports import EXEMPT, HOG, LOGGERS, SMALL, Process, report

from oomsafe.policy.kill_advice import advice, reasons
from oomsafe.policy.oomlog.reader import read_events
from oomsafe.policy.why_killed import Account, Outcome, Scope, account_of, slot_of

LIMIT_PAGES = 204_800 // 4
WORKERS = tuple(Process(100 + at, f"oomsafe-w{at}-a1b{at}", 20_000, 9_000 + at, 500, adj=300) for at in range(4))


def account(messages: list[str]) -> Account:
    """Of the only event in these messages."""
    (event,) = read_events([LOGGERS["dmesg"][0](messages).encode()])
    return account_of(event)


def said(messages: list[str]) -> str:
    """All reasons and all advice."""
    found = account(messages)
    return " ".join([*reasons(found), *advice(found)])


def test_points_in_a_cgroup() -> None:
    """rss + swap + page tables + score * limit / 1000, in pages; -1000 is exempt."""
    hog, small = replace(HOG, adj=-500, swap=7), replace(SMALL, adj=800)
    found = account(report(victim=small, processes=(EXEMPT, hog, small)))

    assert (found.total_pages, found.total_is_least, found.page_size, found.page_size_is_assumed) == (LIMIT_PAGES, False, 4096, False)
    assert [(one.pid, one.points) for one in found.holders] == [
        (small.pid, 1_500 + 10 + 800 * 51),
        (hog.pid, 28_240 + 7 + 69 - 500 * 51),
        (EXEMPT.pid, None),
    ]
    assert found.victim is found.holders[0]
    assert found.without_scores is found.holders[1]


def test_points_on_the_machine() -> None:
    """The machine's RAM that can be used, and its swap."""
    found = account(report(memcg=False, processes=(SMALL, replace(HOG, adj=100))))

    assert (found.scope, found.total_pages, found.total_is_least) == (Scope.MACHINE, 511_983 - 43_784 + (256 << 20) // 4096, False)
    assert found.holders[0].points == 28_240 + 69 + 100 * (found.total_pages // 1000 if found.total_pages else 0)


@pytest.mark.parametrize(
    ("swap", "is_least"),
    [("swap: usage 0kB, limit 0kB", False), ("swap: usage 0kB, limit 9007199254740988kB", True), ("swap: usage 4kB, limit 4096kB", True)],
)
def test_swap_that_the_log_does_not_tell(swap: str, is_least: bool) -> None:
    """A cgroup may use the machine's swap, whose size is not in its report."""
    messages = [swap if line.startswith("swap: ") else line for line in report(processes=(SMALL, replace(HOG, adj=10)))]

    assert account(messages).total_is_least == is_least
    assert ("at least" in said(messages)) == is_least


def test_figures_that_are_missing_make_no_points() -> None:
    """Without its limit a score counts for nothing known; without swap and page tables there are no points at all."""
    no_limit = [line for line in report(processes=(SMALL, replace(HOG, adj=10))) if not line.startswith(("memory: ", "swap: "))]

    assert [one.points for one in account(no_limit).holders] == [None, 1_510]
    assert [one.points for one in account(report("2.6.36")).holders] == [None] * 3
    assert "lacks figures" in said(report("2.6.36"))


@pytest.mark.parametrize("size", [4096, 16384, 65536])
def test_the_page_size_of_another_machine(size: int) -> None:
    """The victim's line has kB, the table has pages."""
    messages = report()
    for name, pages in (("total-vm", HOG.total_vm), ("anon-rss", HOG.anon), ("file-rss", HOG.file)):
        messages[-1] = messages[-1].replace(f"{name}:{pages * 4}kB", f"{name}:{pages * size >> 10}kB")

    found = account(messages)

    assert (found.page_size, found.page_size_is_assumed) == (size, False)
    assert found.victim is not None
    assert found.victim.rss == HOG.rss * size


def test_the_page_size_is_assumed_where_it_can_t_be_known() -> None:
    """4 KiB, and it is said."""
    assert account(report("2.6.32")).page_size_is_assumed


SCORES = st.lists(st.tuples(st.integers(0, 100_000), st.integers(-1000, 1000)), min_size=1, max_size=8)


@given(SCORES)
@settings(max_examples=200, deadline=None)
def test_the_first_is_whom_the_kernel_takes(scores: list[tuple[int, int]]) -> None:
    """By the kernel's own formula, whatever the scores; without them it is the one that holds most."""
    processes = tuple(Process(10 + at, f"p{at}", 200_000, anon, adj=adj) for at, (anon, adj) in enumerate(scores))
    found = account(report(victim=processes[0], processes=processes))
    able = [one for one in processes if one.adj > -1000]

    assert {one.pid for one in found.holders if one.is_exempt} == {one.pid for one in processes} - {one.pid for one in able}
    assert found.holders[0].points == max((one.rss + one.tables + one.adj * (LIMIT_PAGES // 1000) for one in able), default=None)
    if able:
        assert found.without_scores is not None
        assert found.without_scores.held_pages == max(one.rss + one.tables for one in able)
    else:
        assert found.without_scores is None


@pytest.mark.parametrize(
    ("comm", "slot"),
    [
        ("oomsafe-w0-d02c", 0),
        ("oomsafe-w12-a1b2", 12),
        ("oomsafe-w1234-a", 1234),
        ("oomsafe-metrics", None),
        ("python", None),
        ("oomsafe-w", None),
    ],
)
def test_a_worker_of_ours(comm: str, slot: int | None) -> None:
    """By its name, which the kernel shows although its pid is another in its container."""
    assert slot_of(comm) == slot


def test_a_real_event() -> None:
    """A worker with a third of the limit had most; the sum of the points is the kernel's own choice."""
    (event,) = read_events([(Path(__file__).parent / "kernel_logs" / "linux-6.18-memcg.txt").read_bytes()])
    found = account_of(event)

    assert (found.outcome, found.scope, found.slot, found.limit) == (Outcome.KILLED, Scope.CGROUP, 0, 512 << 20)
    assert found.most_points is found.victim is found.without_scores
    assert reasons(found) == [
        "It had the most points of 5: 306 MiB resident + 704 KiB of page tables + 154 MiB for its oom_score_adj of 300 "
        "(300/1000 of 512 MiB) = 117764 pages.",
        "Without any oom_score_adj it would have been chosen too.",
    ]


MANY = said(report(victim=WORKERS[3], processes=(SMALL, *WORKERS)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (said(report()), "One process held 55% of the cgroup's limit."),
        (said(report()), "Without any oom_score_adj it would have been chosen too."),
        (said(report(processes=(SMALL, HOG))), "No score changed that: every oom_score_adj is 0."),
        (MANY, "4 processes share the memory evenly, up to 37.1 MiB each: the cgroup's limit is too small for so many."),
        (MANY, "For 4 of them it must be 165 MiB or more."),
        (
            said(report(victim=replace(SMALL, adj=1000), processes=(HOG, replace(SMALL, adj=1000)))),
            "It was small (5.9 MiB), and killed for its oom",
        ),
        (
            said(report(victim=replace(SMALL, adj=1000), processes=(HOG, replace(SMALL, adj=1000)))),
            "python3 (27718) would have been chosen",
        ),
        (said(report(victim=SMALL, processes=(SMALL, *WORKERS))), "is none of the 4 workers that oomsafe guards here"),
        (
            said(report(victim=replace(HOG, pid=9, comm="gunicorn"), processes=(replace(HOG, pid=9, comm="gunicorn"), SMALL))),
            "It may have been the supervisor: of 2 processes named gunicorn it has the lowest pid.",
        ),
        (said(report(memcg=False, processes=(replace(SMALL, anon=90_000, adj=-900), HOG))), "The whole machine ran out"),
        (said(report(memcg=False, processes=(replace(SMALL, anon=90_000, adj=-900), HOG))), "The most memory was held by gunicorn (27700)"),
        (said([line.replace("shmem 8192", "shmem 99000000") for line in report()]), "94.4 MiB are shared memory and tmpfs"),
        (
            said([line.replace("slab_unreclaimable:5821", "slab_unreclaimable:300000") for line in report(memcg=False)]),
            "(unreclaimable slab)",
        ),
        (
            said([line.replace("hugepages_total=4", "hugepages_total=800") for line in report(memcg=False)]),
            "1.6 GiB are set apart as huge pages",
        ),
        (said(report()[-1:]), "Who else held memory is not in the log"),
        (said(report(order=-1)), "Somebody asked for this kill (SysRq-f)"),
        (
            said([line.replace("Memory cgroup out of memory", "Out of memory (oom_kill_allocating_task)") for line in report()]),
            "did not choose",
        ),
        (said([*report()[:-1], "Out of memory and no killable processes..."]), "Nobody could be killed"),
        (said([*report()[:-1], "Kernel panic - not syncing: Out of memory: system-wide panic_on_oom is enabled"]), "vm.panic_on_oom=0"),
        (
            said([*report(), "Tasks in /a are going to be killed due to memory.oom.group set", *report(victim=SMALL)[-1:]]),
            "singleProcessOOMKill",
        ),
        (said(report()[:6]), "The end of this report is not in the log"),
        (said(report("4.9")), "a process with CAP_SYS_ADMIN had 3 % less points"),
        (said(report("2.6.32")), "it weighed run time and niceness too"),
    ],
)
def test_what_is_said_of_each_case(text: str, wanted: str) -> None:
    """The sentence that fits it."""
    assert wanted in text


@pytest.mark.parametrize(
    "phrase", ["niceness", "CAP_SYS_ADMIN", "allocating_task", "supervisor", "The whole machine", "oom.group", "shared memory"]
)
def test_what_is_not_said_of_an_ordinary_case(phrase: str) -> None:
    """An error of the articles is only named where the event shows it."""
    assert phrase not in said(report("6.18"))


def test_a_child_in_its_parents_place() -> None:
    """Until Linux 5.0."""
    messages = report("4.9")
    messages[-2] = messages[-2].replace("27718 (python3)", "600 (supervisor)")

    assert "The kernel selected supervisor (600), and killed its child python3 (27718) in its place" in said(messages)


def test_text_of_the_log_is_printable() -> None:
    """A name with an escape sequence, in every sentence."""
    evil = replace(HOG, comm="\x1b[31mred\x07")
    small = replace(SMALL, comm="\x1b]0;x\x07", adj=1000)

    assert all(" " <= one <= "~" for one in said(report(victim=small, processes=(evil, small))))
