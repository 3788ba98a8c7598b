"""How a worker ended, and the line that says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from oomsafe.kernel.oom_victims import Victim, oom_victims
from oomsafe.policy.death_line import Beside, DeathRecord, Flight, line_of
from oomsafe.policy.ends import By, End, Facts, end_of, name_of_signal
from oomsafe.policy.verdicts import Count, Verdict, verdicts

MIB = 1 << 20


@pytest.mark.parametrize(
    ("facts", "verdict", "end"),
    [
        (Facts(0, left=True, drained=True), None, End.RECYCLED),
        (Facts(155, left=True, drained=True), None, End.RECYCLED),  # billiard's EX_RECYCLE
        (Facts(0, left=True), None, End.SERVER),
        (Facts(-signal.SIGTERM, By.ORDER), None, End.SERVER),
        (Facts(-signal.SIGKILL, By.ORDER, killed_by_server=True), None, End.SERVER),
        (Facts(None, By.ORDER), None, End.SERVER),
        (Facts(0), None, End.EXITED),
        (Facts(3), None, End.EXITED),
        (Facts(-signal.SIGSEGV), None, End.CRASHED),
        (Facts(-signal.SIGSEGV, By.ORDER), None, End.CRASHED),
        (Facts(-signal.SIGABRT), None, End.CRASHED),
        (Facts(-signal.SIGABRT, By.TIMEOUT), None, End.TIMEOUT),
        (Facts(1, By.TIMEOUT), None, End.TIMEOUT),
        (Facts(-signal.SIGKILL, By.TIMEOUT, killed_by_server=True), None, End.TIMEOUT),
        # asked to abort, and killed by the kernel before it could
        (Facts(-signal.SIGKILL, By.TIMEOUT), Verdict.CONFIRMED, End.OOM_CONFIRMED),
        (Facts(-signal.SIGKILL, By.TIME_LIMIT, killed_by_server=True), None, End.TIMEOUT),
        (Facts(-signal.SIGKILL, stopped=True), None, End.LIMIT),
        (Facts(-signal.SIGTERM), None, End.SIGNAL),
        (Facts(-signal.SIGTERM, left=True), None, End.SIGNAL),
        (Facts(-signal.SIGKILL), Verdict.CONFIRMED, End.OOM_CONFIRMED),
        (Facts(-signal.SIGKILL), Verdict.LIKELY, End.OOM_LIKELY),
        (Facts(-signal.SIGKILL), Verdict.NOT_THE_KERNEL, End.SIGNAL),
        (Facts(-signal.SIGKILL), Verdict.UNKNOWN, End.UNKNOWN),
        (Facts(-signal.SIGKILL, oomd=True), Verdict.NOT_THE_KERNEL, End.OOMD),
        (Facts(-signal.SIGKILL, oomd=True), Verdict.CONFIRMED, End.OOM_CONFIRMED),
        (Facts(None), None, End.UNKNOWN),
    ],
)
def test_each_end(facts: Facts, verdict: Verdict | None, end: End) -> None:
    """From its status, its own record, and what was done to it."""
    assert end_of(facts, verdict) is end


@pytest.mark.parametrize(
    ("named", "dying", "count", "found"),
    [
        ([False], 0, Count(1, True), [Verdict.CONFIRMED]),
        ([False], 1, Count(1, True), [Verdict.LIKELY]),  # another one is about to die: which of them was it?
        ([False] * 4, 0, Count(2, True), [Verdict.LIKELY] * 4),
        ([True, False, True, False], 0, Count(2, True), [Verdict.CONFIRMED, Verdict.NOT_THE_KERNEL] * 2),
        ([True, False], 0, Count(2, True), [Verdict.CONFIRMED, Verdict.CONFIRMED]),
        ([False], 0, Count(1, False), [Verdict.LIKELY]),
        ([True], 0, Count(1, False), [Verdict.CONFIRMED]),
        ([False], 0, Count(0, True), [Verdict.NOT_THE_KERNEL]),
        ([False], 0, Count(None, False), [Verdict.UNKNOWN]),
        ([], 0, Count(1, True), []),
    ],
)
def test_verdicts_on_deaths_at_the_same_time(named: list[bool], dying: int, count: Count, found: list[Verdict]) -> None:
    """The kernel's log names its victims; its counter only tells how many there were."""
    told = verdicts(named, dying, count)
    assert [verdict for verdict, _ in told] == found
    assert all(evidence for _, evidence in told)


def died(end: End, exitcode: int = -9, **more: object) -> DeathRecord:
    """A worker of a pool of 3 in 400 MiB."""
    figures = {
        "held": 120 * MIB, "baseline": 25 * MIB, "soft_limit": 200 * MIB, "limit": 400 * MIB, "whence": "cgroup v2 /a", "workers": 3,
        "beside": Beside(2, 60 * MIB, 28 * MIB),
    }  # fmt: skip
    return DeathRecord(**{"end": end, "pid": 4711, "slot": 2, "exitcode": exitcode, "at": 0.0, **figures, **more})  # type: ignore[arg-type]


BALLOON = (Flight("GET /export", 4.21, 290 * MIB, 25 * MIB), Flight("GET /", 0.02, None))


@pytest.mark.parametrize(
    ("death", "line"),
    [
        (
            died(End.OOM_CONFIRMED, in_flight=BALLOON, died_with=315 * MIB, evidence="the kernel's log names it"),
            "worker 4711 (slot 2) was killed by the kernel's OOM killer (confirmed: the kernel's log names it); it held 315 MiB (soft "
            "limit 200 MiB); in flight: GET /export (4.2 s, +290 MiB), GET / (0.0 s); 2 other workers held 60.0 MiB, the supervisor 28.0 "
            "MiB; the limit is 400 MiB (cgroup v2 /a). GET /export took 290 MiB: with hard_limit=auto the kernel refuses it memory, "
            "and kills nobody",
        ),
        (
            died(End.CRASHED, -11, beside=None),
            "worker 4711 (slot 2) crashed with SIGSEGV: no OOM kill; it held 120 MiB when it was measured last (soft limit 200 MiB); "
            "nothing was in flight. C code has failed: PYTHONFAULTHANDLER=1 in its environment prints the stack.",
        ),
        (
            died(End.EXITED, 3, booting=True, held=None),
            "worker 4711 (slot 2) exited by itself with status 3 while it booted",
        ),
        (
            died(End.UNKNOWN, slot=None, held=None, limit=None, beside=None, evidence="the kernel shows no count of OOM kills here"),
            "worker 4711 was killed by SIGKILL, and nothing here tells whose: the kernel shows no count of OOM kills here; nothing was in "
            "flight. Perhaps kill -9, a container runtime, or a service manager; root, or CAP_SYSLOG with /dev/kmsg, could read in the "
            "kernel's log whether it was",
        ),
    ],
)
def test_the_line(death: DeathRecord, line: str) -> None:
    """Whole."""
    assert line_of(death) == line


@pytest.mark.parametrize(
    ("more", "advice"),
    [
        (
            {"in_flight": BALLOON, "hard_limit": 500 * MIB},
            "GET /export took 290 MiB: lower hard_limit (now 500 MiB), so that the pool holds it",
        ),
        ({"baseline": 110 * MIB}, "3 workers need 358 MiB right after boot: have fewer workers, or more memory"),
        ({"died_with": 20 * MIB}, "The whole pool held only 108 MiB: something else used up that limit"),
        ({"died_with": 210 * MIB}, "It was above its soft limit: "),
        ({"died_with": 190 * MIB}, "3 workers may hold 600 MiB together: lower soft_limit, or have fewer workers"),
        ({"died_with": 190 * MIB, "soft_limit": 100 * MIB}, "It was above its soft limit: "),
        ({"died_with": 190 * MIB, "soft_limit": None}, "Lower budget or soft_limit, have fewer workers, or more memory"),
    ],
)
def test_the_advice_fits_the_case(more: dict[str, object], advice: str) -> None:
    """A request that ballooned, too many workers, others in the cgroup, a leak, limits that add up to more than there is."""
    assert f". {advice}" in line_of(died(End.OOM_LIKELY, **more))


@pytest.mark.parametrize("end", list(End))
@pytest.mark.parametrize("known", [True, False])
def test_every_end_has_words(end: End, known: bool) -> None:
    """Whatever is known of it; and none calls itself None."""
    nothing = {"held": None, "soft_limit": None, "limit": None, "beside": None, "slot": None, "baseline": None, "whence": ""}
    line = line_of(died(end, **({} if known else nothing)))
    assert "None" not in line
    assert line.startswith("worker 4711")


def test_who_kills_here_is_named() -> None:
    """earlyoom kills by SIGKILL, too, and the kernel counts nothing."""
    assert line_of(died(End.SIGNAL, killers=("earlyoom",))).endswith("It may have been earlyoom, which runs here: its log tells")


def test_names_of_signals() -> None:
    """Also of those that have none."""
    assert [name_of_signal(code) for code in (-9, -60, 0, 3, None)] == ["SIGKILL", "signal 60", "", "", ""]


RECORDS = [
    b"6,1,1000000,-;systemd[1]: started\n",
    b"3,2,5000000,-;Memory cgroup out of memory: Killed process 41 (old) total-vm:9kB, anon-rss:9kB, file-rss:1kB, shmem-rss:0kB, UID:0\n",
    b"3,3,9000000,-,caller=T1;Memory cgroup out of memory: Killed process 4711 (oomsafe-w2-a1b2) total-vm:900000kB, anon-rss:314000kB, "
    b"file-rss:3852kB, shmem-rss:1024kB, UID:0 pgtables:276kB oom_score_adj:300\n SUBSYSTEM=memory\n",
    b"12,4,9100000,-;Out of memory: Killed process 1 (forged) total-vm:1kB, anon-rss:1kB, file-rss:1kB\n",
    b"3,5,9200000,-;Out of memory: Killed process 12 (a (b) c) total-vm:1kB, anon-rss:7kB, file-rss:1kB\n",
]


@pytest.fixture
def kmsg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A log that returns a record at each read, as the kernel's does, and then that there is none."""
    path = tmp_path / "kmsg"
    path.write_bytes(b"")
    left: list[bytes | type[OSError]] = [BrokenPipeError, *RECORDS, BlockingIOError]

    def read(fd: int, size: int) -> bytes:
        record = left.pop(0)
        if isinstance(record, type):
            raise record
        return record

    monkeypatch.setattr(os, "read", read)
    return str(path)


def test_the_kernel_s_log(kmsg: str) -> None:
    """Lines since then, of the kernel alone; what programs have written into it is no evidence."""
    victims = oom_victims(8.0, kmsg)
    assert victims is not None
    assert victims.killed == (Victim(4711, b"oomsafe-w2-a1b2", 315024 * 1024), Victim(12, b"a (b) c", 7 * 1024))
    assert victims.complete


def test_a_log_that_does_not_reach_back_is_no_proof(kmsg: str) -> None:
    """It begins after the time that was asked for."""
    victims = oom_victims(0.5, kmsg)
    assert victims is not None
    assert not victims.complete


def test_without_a_log(tmp_path: Path) -> None:
    """A container has none."""
    assert oom_victims(0.0, str(tmp_path / "kmsg")) is None
