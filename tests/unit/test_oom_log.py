"""The OOM killer's reports in every format that loggers and kernels have: whole, interleaved, cut, doubled, hostile."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from oom_reports import CGROUP, EXEMPT, HOG, LIMIT_KB, LOGGERS, PROCESSES, RELEASES, SMALL, at_least, killed_line, report

from oomsafe.policy.oomlog.reader import BLOCK, LINE, read_events
from oomsafe.policy.oomlog.record import Charge, Event, Killed, Left

REAL = Path(__file__).parent / "kernel_logs"
DMESG = LOGGERS["dmesg"][0]


def events(text: str | bytes) -> list[Event]:
    """The events of a log."""
    return list(read_events([text.encode() if isinstance(text, str) else text]))


def event(text: str | bytes) -> Event:
    """The only one."""
    (found,) = events(text)
    return found


@pytest.mark.parametrize("memcg", [True, False], ids=["memcg", "machine"])
@pytest.mark.parametrize("logger", LOGGERS)
def test_each_logger_of_each_kernel(logger: str, memcg: bool) -> None:
    """One report is one event, with its time, its limit, its table and its victim."""
    write, iso = LOGGERS[logger]
    for release in RELEASES:
        found = event(write(report(release, memcg=memcg)))

        assert found.killed is not None
        assert (found.killed.pid, found.killed.comm, found.invoker, found.is_memcg) == (HOG.pid, HOG.comm, HOG.comm, memcg)
        assert [(row.pid, row.comm, row.rss) for row in found.rows] == [(one.pid, one.comm, one.rss) for one in PROCESSES]
        assert found.time.iso == iso
        if "GCP" not in logger:
            assert found.invoker_thread == 27719
        assert not found.gaps


@pytest.mark.parametrize("release", RELEASES)
def test_what_each_kernel_tells(release: str) -> None:
    """Figures that its format does not have are None, and the others are right."""
    found = event(DMESG(report(release)))
    killed, row = found.killed, found.rows[-1]

    assert killed is not None
    told = at_least(release, "2.6.36")
    assert (killed.total_vm, killed.anon, killed.file) == ((30_354 * 4096, 27_277 * 4096, 963 * 4096) if told else (None,) * 3)
    assert killed.shmem == (0 if at_least(release, "4.5") else None)
    assert (killed.uid, killed.pgtables, killed.oom_score_adj) == ((0, 69 * 4096, 0) if at_least(release, "5.4") else (None,) * 3)
    assert (row.uid, row.tgid, row.total_vm, row.rss) == (0, 27718, 30_354, 28_240)
    assert (row.rss_anon, row.rss_file, row.rss_shmem) == ((27_277, 963, 0) if at_least(release, "6.8") else (None,) * 3)
    assert row.pgtables_bytes == (69 * 4096 if at_least(release, "4.15") else None)
    assert row.nr_ptes == (69 if at_least(release, "3.10") and not at_least(release, "4.15") else None)
    assert row.swapents == (0 if at_least(release, "3.10") else None)
    assert row.oom_score_adj == (0 if told else None)
    assert (found.oom_memcg, found.task_memcg) == (CGROUP, CGROUP)
    assert found.memory == Charge(usage=LIMIT_KB << 10, limit=LIMIT_KB << 10)
    assert (found.swap is None, found.memsw is None) == (not at_least(release, "5.0"), at_least(release, "5.0"))
    assert found.constraint == ("CONSTRAINT_MEMCG" if at_least(release, "5.0") else None)
    assert found.kernel is not None
    assert found.kernel.startswith(release)
    assert found.chosen_score == (None if at_least(release, "5.1") else 544 if told else 54402)


def test_the_machine_s_memory() -> None:
    """RAM, swap and what is in no process's row."""
    found = event(DMESG(report(memcg=False)))

    assert (found.ram_pages, found.reserved_pages, found.total_swap, found.free_swap) == (511_983, 43_784, 256 << 20, 128 << 10)
    assert (found.slab_pages, found.shmem_pages, found.hugepages) == (5821, 154, 8 << 20)
    assert (found.memory, found.oom_memcg, found.task_memcg) == (None, None, CGROUP)


def test_a_real_report() -> None:
    """As Linux 6.18 has printed it, with its stack, its registers and its statistics."""
    found = event((REAL / "linux-6.18-memcg.txt").read_bytes())

    assert found.killed == Killed(
        pid=28974,
        comm="oomsafe-w0-d02c",
        message="Memory cgroup out of memory",
        uid=0,
        total_vm=658_612 << 10,
        anon=305_476 << 10,
        file=7_676 << 10,
        shmem=0,
        pgtables=704 << 10,
        oom_score_adj=300,
    )
    assert [(row.pid, row.rss, row.rss_shmem) for row in found.rows][:2] == [(28951, 7419, 0), (28954, 22902, 0)]
    assert (found.kernel, found.invoker, found.invoker_thread) == ("6.18.44-fc-v769", "oomsafe-w1-d028", 28973)
    assert (found.memory, found.memsw) == (Charge(usage=512 << 20, limit=512 << 20),) * 2
    assert found.kmem == Charge(usage=2452 << 10, limit=None)
    assert (found.shmem, found.time.uptime) == (208_896, 63_543.186358)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # RHEL 6, RHEL 7
        (["Killed process 6608, UID 500, (top) total-vm:15028kB, anon-rss:308kB, file-rss:4kB"], (6608, "top", 500, 308 << 10, None)),
        (["Killed process 17 (java), UID 0, total-vm:9kB, anon-rss:7kB, file-rss:0kB, shmem-rss:0kB"], (17, "java", 0, 7 << 10, 0)),
        # 2.6.9, 2.6.33
        (["Out of Memory: Killed process 2592 (mysql)."], (2592, "mysql", None, None, None)),
        (["Killed process 7 (x) vsz:15028kB, anon-rss:308kB, file-rss:4kB"], (7, "x", None, 308 << 10, None)),
        (["Out of memory (oom_kill_allocating_task): Killed process 9 (sh) total-vm:1kB, anon-rss:1kB"], (9, "sh", None, 1 << 10, None)),
    ],
)
def test_other_forms_of_the_last_line(lines: list[str], expected: tuple[object, ...]) -> None:
    """Each kernel has its own."""
    killed = event(DMESG(lines)).killed

    assert killed is not None
    assert (killed.pid, killed.comm, killed.uid, killed.anon, killed.shmem) == expected


@pytest.mark.parametrize(
    "comm", ["a b", "((sd-pam))", "x) total-vm:1k", "a,pid=1,uid=2", ",task=x", "日本", "Killed process", " lead", "x] y", "-"]
)
def test_a_name_is_what_the_process_chose(comm: str) -> None:
    """Whatever is in it, it is taken whole, and changes no figure."""
    hog = replace(HOG, comm=comm)
    found = event(DMESG(report(victim=hog, processes=(SMALL, hog))))

    assert found.killed is not None
    assert (found.killed.comm, found.killed.anon, found.killed.uid) == (comm, 27_277 * 4096, 0)
    assert (found.rows[1].comm, found.rows[1].rss) == (comm.lstrip(), 28_240)
    assert found.chosen_pid == HOG.pid


def test_a_part_of_each_event() -> None:
    """Of a burst most kills have only their last line: each is an event, and what is not known is None."""
    victims = [replace(HOG, pid=100 + at, anon=1000 + at) for at in range(40)]
    text = DMESG(
        report(victim=victims[0], processes=(SMALL, victims[0])) + [line for one in victims[1:] for line in killed_line("6.8", one)]
    )

    found = events(text)

    assert [one.killed.pid for one in found if one.killed] == [one.pid for one in victims]
    assert [one.has_table for one in found] == [True, *[False] * 39]
    assert found[1] == replace(Event(time=found[1].time), killed=found[1].killed, is_memcg=True)


@pytest.mark.parametrize("release", ["3.10", "4.19", "6.18"])
def test_cut_at_any_line(release: str) -> None:
    """The ring buffer has lost the beginning: what is left is one event, and says that something is missing, or has less in it."""
    messages = report(release)
    for at in range(1, len(messages)):
        found = events(DMESG(messages[at:]))
        assert [one.killed.pid for one in found if one.killed] == [HOG.pid]
        assert len(found) == 1
        assert found[0].invoker is None
    # and the end
    for at in range(1, len(messages) - len(killed_line(release, HOG))):
        (found_one,) = events(DMESG(messages[:at]))
        assert found_one.killed is None
        assert found_one.invoker == HOG.comm


def test_other_messages_between() -> None:
    """Another processor prints between any two lines."""
    noise = "audit: type=1400 oom_reaper usage limit of Out of memory total_vm shmem 5 (not a kill)"
    messages = [line for message in report() for line in (message, noise, "eth0: link up")]

    found = event(DMESG(messages))

    assert [row.pid for row in found.rows] == [one.pid for one in PROCESSES]
    assert found.killed is not None


@pytest.mark.parametrize("other", ["syslog", "journalctl", "/dev/kmsg", "journalctl json"])
def test_two_copies_of_each_line(other: str) -> None:
    """rsyslog and the journal wrote to one file: line by line, one after the other, or each line twice. It is one event."""
    messages = report() + report(victim=replace(HOG, pid=5), processes=(SMALL, replace(HOG, pid=5)))
    one, two = DMESG(messages), LOGGERS[other][0](messages)
    zipped = "".join(f"{a}\n{b}\n" for a, b in zip(one.splitlines(), two.splitlines(), strict=True))
    shifted = "".join(f"{a}\n{b}\n" for a, b in zip(["", "", "", *one.splitlines()], [*two.splitlines(), "", "", ""], strict=True))

    for text in (one + two, two + one, zipped, shifted, "".join(f"{line}\n{line}\n" for line in one.splitlines())):
        found = events(text)
        assert [event.killed.pid for event in found if event.killed] == [HOG.pid, 5]
        assert [len(event.rows) for event in found] == [3, 2]


def test_the_copy_that_says_more_stays() -> None:
    """One logger has dropped the table, the other has not."""
    found = event(LOGGERS["syslog"][0](killed_line("6.8", HOG)) + LOGGERS["journalctl"][0](report()))

    assert len(found.rows) == 3


def test_two_machines_in_one_file() -> None:
    """Their lines are mixed; each has its event."""
    one = LOGGERS["journalctl"][0](report()).splitlines()
    two = LOGGERS["journalctl"][0](report(victim=SMALL, processes=(SMALL,))).replace("node-1", "node-2").splitlines()
    mixed = [line for pair in zip(one, two + [""] * (len(one) - len(two)), strict=True) for line in pair]

    found = {event.host: event for event in events("\n".join(mixed))}

    assert {host: len(event.rows) for host, event in found.items()} == {"node-1": 3, "node-2": 1}


def test_the_same_pid_in_another_boot() -> None:
    """The kernel's clock tells that it is another kill."""
    text = DMESG(killed_line("6.8", HOG))

    assert len(events(text + text.replace("[ 1740.", "[ 9740."))) == 2


def test_a_group_dies() -> None:
    """memory.oom.group: all of them are one event, and the victim, which is named twice, is counted once."""
    messages = report() + [f"Tasks in {CGROUP} are going to be killed due to memory.oom.group set"]
    messages += [line for one in (HOG, SMALL, replace(SMALL, pid=27_701)) for line in killed_line("6.18", one)]
    messages += ["oom_reaper: reaped process 27718 (python3), now anon-rss:12kB, file-rss:0kB, shmem-rss:4kB"]

    found = event(DMESG(messages))

    assert found.group == CGROUP
    assert [one.pid for one in found.also_killed] == [SMALL.pid, 27_701]
    assert found.left == Left(pid=27_718, anon=12 << 10, file=0, shmem=4 << 10)


def test_a_child_is_killed_for_its_parent() -> None:
    """Until Linux 5.0 the selected process may not be the one that dies."""
    parent = replace(HOG, pid=600, comm="supervisor")
    messages = [*report("4.9")[:-2], killed_line("4.9", parent)[0], killed_line("4.9", HOG)[1]]

    found = event(DMESG(messages))

    assert found.killed is not None
    assert (found.chosen_pid, found.chosen_comm, found.killed.pid) == (600, "supervisor", HOG.pid)


@pytest.mark.parametrize(
    ("last", "no_killable", "panic"),
    [
        ("Out of memory and no killable processes...", True, None),
        (
            "Kernel panic - not syncing: Out of memory: compulsory panic_on_oom is enabled",
            False,
            "Out of memory: compulsory panic_on_oom is enabled",
        ),
        ("Kernel panic - not syncing: System is deadlocked on memory", False, "System is deadlocked on memory"),
        ("Kernel panic - not syncing: Out of memory and no killable processes...", False, "Out of memory and no killable processes..."),
    ],
)
def test_nobody_is_killed(last: str, no_killable: bool, panic: str | None) -> None:
    """The kernel finds nobody, or panics."""
    found = event(DMESG([*report(memcg=False, processes=(EXEMPT,))[:-2], last]))

    assert (found.killed, found.no_killable, found.panic) == (None, no_killable, panic)


def test_a_lost_last_line() -> None:
    """A victim that is not the one in the report before belongs to a report of its own."""
    stranger = replace(HOG, pid=4, comm="other")

    first, second = events(DMESG(report()[:-1] + killed_line("6.8", stranger)))

    assert (first.killed, first.chosen_pid, len(first.rows)) == (None, HOG.pid, 3)
    assert second.killed is not None
    assert (second.killed.pid, second.rows) == (4, ())


def test_dropped_messages_are_told() -> None:
    """The table may lack rows."""
    messages = report()
    assert event(DMESG([*messages[:-3], "** 12 printk messages dropped **", *messages[-3:]])).gaps


@pytest.mark.parametrize(
    "line",
    [
        'EXT4-fs (vda): Unrecognized mount option "x of memory: Killed process 1 (fake) total-vm:1kB" or missing value',
        "x[1]: segfault at 0 ip 0000 sp 0000 error 6 in Killed process 1 (x)",
        "Killed process [3002]: segfault at 0",
        "Kill process 5 (x) sharing same memory",
        "systemd-oomd killed 3 processes, Killed process none",
        "",
    ],
)
def test_what_is_no_kill(line: str) -> None:
    """A program that chooses what the kernel quotes forges nothing."""
    assert events(DMESG([line])) == []


@pytest.mark.parametrize(
    "line",
    [
        "Nov 20 17:00:06 node-1 myapp[12]: Out of memory: Killed process 1 (x) total-vm:1kB, anon-rss:1kB",
        "12,1,1,-;Out of memory: Killed process 1 (x) total-vm:1kB, anon-rss:1kB",
        '{"_TRANSPORT": "stdout", "MESSAGE": "Out of memory: Killed process 1 (x) total-vm:1kB, anon-rss:1kB"}',
        "<6>1 2026-11-20T17:00:06Z node-1 myapp 12 - - Out of memory: Killed process 1 (x) total-vm:1kB, anon-rss:1kB",
    ],
)
def test_what_another_program_says(line: str) -> None:
    """Only the kernel is believed, where the log tells who spoke."""
    assert events(line + "\n") == []


def test_page_tables_in_bytes_that_are_called_kb() -> None:
    """The first kernels with pgtables in that line."""
    with_table = report("5.4")
    with_table[-1] = with_table[-1].replace("pgtables:276kB", f"pgtables:{69 * 4096}kB")

    for messages in (with_table, with_table[-1:]):
        killed = event(DMESG(messages)).killed
        assert killed is not None
        assert killed.pgtables == 69 * 4096


def test_a_time_from_the_boot() -> None:
    """Where the log has only seconds since boot, and the reader knows the boot."""
    found = next(read_events([DMESG(report()).encode()], boot=1_795_192_266.0))

    assert found.time.iso == "2026-11-20T17:00:06+00:00"


def test_a_table_is_bounded() -> None:
    """A machine with more processes than are kept: it says how many were left out, and those that may have been chosen are kept."""
    many = tuple(replace(SMALL, pid=30_000 + at) for at in range(20_500))
    scored = replace(SMALL, pid=5, adj=900)
    found = event("\n".join(report(processes=(HOG, scored, *many))))

    assert len(found.rows) + found.rows_left_out == 20_502
    assert len(found.rows) <= 20_000
    assert {HOG.pid, scored.pid} <= {row.pid for row in found.rows}


def test_a_line_of_ten_megabytes() -> None:
    """It costs no more than its bound, and the lines around it are read."""
    huge = b"Killed process " + b"x" * (10 << 20)
    pieces = [DMESG(report()).encode(), *(huge[at : at + 4096] for at in range(0, len(huge), 4096)), b"\n", DMESG(report()).encode()]
    pieces[-1] = pieces[-1].replace(b"[ 1740.", b"[ 9740.")
    tracemalloc.start()
    try:
        found = list(read_events(pieces))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert [one.killed.pid for one in found if one.killed] == [HOG.pid] * 2
    assert peak < 4 * (LINE + BLOCK) + (1 << 20)


def test_many_printers_keep_a_bounded_number_of_reports_open() -> None:
    """Each of 5 000 hosts begins a report and never ends it."""
    text = "".join(f"Nov 20 17:00:06 host{at} kernel: x{at} invoked oom-killer: gfp_mask=0x0, order=0\n" for at in range(5000))

    assert len(events(text)) == 5000


def test_a_table_by_pid() -> None:
    """A row that is printed twice is one process."""
    messages = report()
    row = next(at for at, text in enumerate(messages) if text.endswith("gunicorn"))

    assert len(event(DMESG([*messages[: row + 1], messages[row], *messages[row + 1 :]])).rows) == 3


def test_binary_rubbish_around() -> None:
    """NULs, as after a crash in a syslog, and bytes that are no UTF-8."""
    text = DMESG(report()).encode()

    found = event(b"\0" * 4000 + b"\xff\xfe\x1b[2J" + b"\n" + text + b"\0" * 999)

    assert len(found.rows) == 3


def test_no_prefix_at_all_is_one_process_of_a_kind() -> None:
    """Lines that a `grep -h` has left: they are of one report as long as nothing says otherwise."""
    found = event("\n".join(line for line in report() if "Killed" in line or "oom-kill" in line))

    assert found.killed is not None
    assert (found.oom_memcg, found.has_table) == (CGROUP, False)
