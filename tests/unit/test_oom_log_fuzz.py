"""The OOM log parser under input of any kind: it raises nothing, how the input is cut makes no difference, and its time is linear."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oom_reports import HOG, LOGGERS, RELEASES, Process, killed_line, report

from oomsafe.cli.kill_record import record_of
from oomsafe.cli.kill_text import event_text
from oomsafe.policy.oomlog.messages import MARKS, classify
from oomsafe.policy.oomlog.reader import read_events
from oomsafe.policy.oomlog.undress import undress
from oomsafe.policy.why_killed import account_of

LOGGER, RELEASE = st.sampled_from(sorted(LOGGERS)), st.sampled_from(RELEASES)
COMM = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=15)
PROCESS = st.builds(
    Process,
    pid=st.integers(2, 4_000_000),
    comm=COMM,
    total_vm=st.integers(1000, 1 << 30),
    anon=st.integers(0, 1 << 20),
    file=st.integers(0, 1 << 16),
    shmem=st.integers(0, 1 << 16),
    tables=st.integers(3, 1 << 12),
    swap=st.integers(0, 1 << 20),
    adj=st.integers(-1000, 1000),
    uid=st.integers(0, (1 << 32) - 2),
)
PROCESSES = st.lists(PROCESS, min_size=1, max_size=6, unique_by=lambda one: one.pid).map(tuple)


def explained(log: bytes) -> list[str]:
    """Everything that is made of a log: each event as JSON and as text, which must all be printable."""
    made = []
    for event in read_events([log]):
        account = account_of(event)
        text = event_text(account, 80, ascii_only=True).plain
        assert all(line.isprintable() and line.isascii() for line in text.split("\n"))
        made.append(json.dumps(record_of(account), allow_nan=False))
    return made


@given(LOGGER, RELEASE, PROCESSES, st.booleans(), st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_printed_is_read(logger: str, release: str, processes: tuple[Process, ...], memcg: bool, data: st.DataObject) -> None:
    """Any processes, printed by any kernel and any logger: the same come out."""
    victim = data.draw(st.sampled_from(processes))

    (event,) = read_events([LOGGERS[logger][0](report(release, victim, processes, memcg)).encode()])

    assert [(row.pid, row.comm, row.uid, row.total_vm, row.rss) for row in event.rows] == [
        (one.pid, one.comm, one.uid, one.total_vm, one.rss) for one in processes
    ]
    assert event.killed is not None
    assert (event.killed.pid, event.killed.comm, event.is_memcg) == (victim.pid, victim.comm, memcg)
    assert explained(LOGGERS[logger][0](report(release, victim, processes, memcg)).encode())


@given(LOGGER, RELEASE, st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=12)), max_size=8), st.lists(st.floats(0, 1), max_size=4))
@example("journalctl short-precise", "6.8", [], [0.75, 0.546875, 0.55])  # a score below -1000
@settings(max_examples=300, deadline=None)
def test_damaged_reports(logger: str, release: str, damages: list[tuple[float, bytes]], cuts: list[float]) -> None:
    """Bytes put in, and pieces taken out, anywhere: nothing is raised, and nothing raw is printed."""
    log = LOGGERS[logger][0](report(release) + killed_line(release, replace(HOG, pid=3))).encode()
    for place, damage in damages:
        at = int(place * len(log))
        log = log[:at] + damage + log[at + len(damage) :]
    for place in cuts:
        at = int(place * len(log))
        log = log[:at] + log[at + 40 :]

    explained(log)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.sampled_from([mark.encode() for mark in MARKS]),
            st.sampled_from(
                [
                    b"\n",
                    b"[",
                    b"]",
                    b"{",
                    b"}",
                    b'"',
                    b"Killed process 1 (",
                    b") total-vm:",
                    b"[ 1.000000] ",
                    b"kernel: ",
                    b'"MESSAGE": "',
                    b'{"log":"',
                    b"6,1,1,-;",
                    b" invoked oom-killer: ",
                    b"oom-kill:constraint=",
                    b",task=",
                    b",pid=",
                    b",uid=",
                    b"[ pid ] uid rss name",
                    b"9" * 30,
                    b"\\u0000",
                    b"\x1b[2J",
                ]
            ),
        ),
        max_size=60,
    )
)
@settings(max_examples=500, deadline=None)
def test_any_bytes(pieces: list[bytes]) -> None:
    """Made of what the parser looks for, in any order."""
    explained(b"".join(pieces))


@given(st.text(max_size=300))
def test_any_text(text: str) -> None:
    """Each stage for itself."""
    for line in undress(text):
        classify(line.message)
    classify(text)


@given(LOGGER, st.lists(st.integers(1, 3000), max_size=10))
@settings(max_examples=100, deadline=None)
def test_how_it_is_cut_makes_no_difference(logger: str, sizes: list[int]) -> None:
    """The same events, whatever pieces the bytes come in."""
    log = LOGGERS[logger][0](report() + killed_line("6.8", replace(HOG, pid=3))).encode()
    pieces, at = [], 0
    for size in sizes:
        pieces.append(log[at : at + size])
        at += size

    assert list(read_events([*pieces, log[at:]])) == list(read_events([log]))


UNIT = 200_000


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        ") total-vm:",
        "oom-kill:constraint=,pid=1,uid=2,task=",
        "[[[[",
        '{"a":',
        '"MESSAGE": "\\',
        "[ 1.000000] ",
        "Kill process 1 (",
        ") score 1 or sacrifice child",
        " Comm: x Not tainted",
        "Tainted: ",
        " killed as a result of limit of ",
        " 1",
        "\t",
        "> ",
        "\n",
        "\n\n[",
        '\n"msg": "x',
        "\nMESSAGE=Killed process 1 (x) total-vm:1kB",
        "\n x invoked oom-killer: ",
        "\n[ pid ] uid rss name",
        "\0",
        "hugepages_total=1 ",
        "\n{",
        "\n6,1,1,-,ncfrag=0/60000;Killed process ",
        "1-",
        "a.",
        "\r",
    ],
    ids=ascii,
)
def test_linear_time(piece: str) -> None:
    """The worst that can be repeated: ten times as much takes about ten times as long, and a second's worth is generous for either."""
    head = "x invoked oom-killer: order=0\n[ pid ] uid rss name\nKilled process 1 ("

    def seconds(size: int) -> float:
        log = (head + piece * (size // len(piece))).encode()
        begin = time.process_time()
        list(read_events([log]))
        return time.process_time() - begin

    small = min(seconds(UNIT // 10) for _ in range(3))
    assert seconds(UNIT) < max(0.3, 40 * small)
    assert seconds(UNIT) < 8
