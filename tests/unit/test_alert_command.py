"""The command of `oomsafe watch`: whatever it does, it is bounded, and its failure is one line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from serving import until
from watching import script

from oomsafe.cli import alert_command
from oomsafe.cli.alert_command import AlertCommand, Message

Run = Callable[..., AlertCommand]


@pytest.fixture
def lines() -> list[str]:
    """What was said."""
    return []


@pytest.fixture
def run(lines: list[str]) -> Iterator[Run]:
    """run("sh", "-c", "...", longest=1.0): a command, which is ended with the test."""
    made: list[AlertCommand] = []

    def start(*argv: str, longest: float = 30.0) -> AlertCommand:
        made.append(AlertCommand(argv, lines.append, longest))
        return made[-1]

    yield start
    for command in made:
        command.end(0.0, time.sleep, lambda: True)
        assert command._runs == []


def message(about: str = "a", body: bytes = b'{"a": 1}\n') -> Message:
    return Message(about=about, what=f"{about} of a pool", body=body)


def settle(command: AlertCommand) -> None:
    """Until nothing runs, and nothing waits."""

    def done() -> bool:
        command.tick()
        return command.pause is None

    until(done, "all commands have ended", pause=0.01)


def lives(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return not Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    return False


def test_it_gets_one_object_and_no_shell(run: Run, tmp_path: Path, lines: list[str]) -> None:
    """Words are words: no `;`, no `$` means anything."""
    got = tmp_path / "got; $HOME"
    command = run(script(tmp_path, "write", 'cat > "$1"'), str(got))

    command.put(message(body=b'{"text": "$(id)"}\n'))
    settle(command)

    assert got.read_bytes() == b'{"text": "$(id)"}\n'
    assert lines == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("echo first >&2; echo 'no\033[2J route' >&2; exit 3", "ended with status 3: no?[2J route"),
        ("kill -9 $$", "ended by signal 9"),
        ("exec 0<&-; exit 1", "ended with status 1"),
        ("cat >/dev/null; echo why > /dev/stderr; exit 4", "ended with status 4: why"),
    ],
)
def test_a_failure_is_one_line(run: Run, tmp_path: Path, lines: list[str], text: str, line: str) -> None:
    """With its last words, printable."""
    path = script(tmp_path, "fail", text)
    command = run(path)

    command.put(message())
    settle(command)

    assert lines == [f"the alert command ({path}) for a of a pool {line}"]


@pytest.mark.parametrize("text", ["exec 0<&-", "exec 0<&- 1>&- 2>&-", "cat /dev/stdin >/dev/null", "true"])
def test_one_that_does_not_read_is_no_failure(run: Run, tmp_path: Path, lines: list[str], text: str) -> None:
    """However much there is to read: nothing waits for it, nothing breaks."""
    command = run(script(tmp_path, "ignore", text))

    command.put(message(body=b"x" * (1 << 20)))
    settle(command)

    assert lines == []


def test_one_that_is_not_there(run: Run, lines: list[str], tmp_path: Path) -> None:
    """It was removed since, or may not be run."""
    plain = tmp_path / "plain"
    plain.write_text("no program")
    for argv in (str(tmp_path / "gone"), str(plain)):
        command = run(argv)
        command.put(message())
        settle(command)

    assert [line.partition("can't be run: ")[2] for line in lines] == ["No such file or directory", "Permission denied"]


def test_one_that_hangs_is_ended_with_what_it_has_started(run: Run, tmp_path: Path, lines: list[str]) -> None:
    """After its time; it holds up no other."""
    pids = tmp_path / "pids"
    path = script(tmp_path, "hang", f'trap "" TERM; sleep 600 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; grep -q quick || wait')
    command = run(path, longest=1.0)

    command.put(message("slow"))
    command.tick()
    until(pids.exists, "it runs")
    command.put(message("fast", b"quick\n"))
    started = time.monotonic()
    until(lambda: command.tick() or len(command._runs) == 1, "the other has ended", pause=0.01)
    took = time.monotonic() - started
    settle(command)

    assert took < 1.0
    assert lines == [f"the alert command ({path}) for slow of a pool was ended after 1 s"]
    for pid in map(int, pids.read_text().split()):
        until(lambda pid=pid: not lives(pid), "it is gone")


def test_what_it_leaves_behind_is_ended_with_it(run: Run, tmp_path: Path) -> None:
    """In its process group."""
    pid = tmp_path / "pid"
    command = run(script(tmp_path, "leave", f"sleep 600 & echo $! > {pid}"))

    command.put(message())
    settle(command)

    until(lambda: not lives(int(pid.read_text())), "it is gone")


def test_one_that_floods_its_output(run: Run, tmp_path: Path, lines: list[str]) -> None:
    """stdout is read by nobody; of stderr a mebibyte is read, and the end of that is kept."""
    path = script(tmp_path, "flood", "head -c 50000000 /dev/zero; yes 'so much' >&2")
    command = run(path)

    command.put(message())
    settle(command)

    (line,) = lines
    assert line.startswith(f"the alert command ({path}) for a of a pool ended ")
    assert len(line) < 500


def test_a_few_at_once_and_the_rest_wait(run: Run, tmp_path: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those about the same one after the other, in order; too many are dropped, and that is said twice: at the begin and at the end."""
    monkeypatch.setattr(alert_command, "AT_ONCE", 2)
    monkeypatch.setattr(alert_command, "WAITING", 4)
    got = tmp_path / "got"
    command = run(script(tmp_path, "append", f"sleep 0.1; cat >> {got}"))

    for body in (b"1\n", b"2\n", b"3\n", b"4\n", b"5\n", b"6\n"):
        command.put(message("same", body))
    most = 0

    def done() -> bool:
        nonlocal most
        command.tick()
        most = max(most, len(command._runs))
        return command.pause is None

    until(done, "all have ended", pause=0.01)

    assert (got.read_text(), most) == ("1\n2\n3\n4\n", 1)
    assert lines == [
        "the alert command is not run for same of a pool, nor for others: 4 alerts wait for it already",
        "the alert command was not run for 2 alerts",
    ]
    for about in "abcd":
        command.put(message(about, b""))
    command.tick()
    assert len(command._runs) == 2
    settle(command)


def test_its_end_waits_and_then_kills(run: Run, tmp_path: Path, lines: list[str]) -> None:
    """For what runs, and for what waits for that, but not for ever."""
    command = run(script(tmp_path, "sleep", "sleep 0.3"))
    command.put(message())
    command.end(20.0, time.sleep, lambda: False)
    hanging = run("sleep", "600")
    for _ in range(2):
        hanging.put(message())
    hanging.tick()

    started = time.monotonic()
    hanging.end(0.2, time.sleep, lambda: False)

    assert time.monotonic() - started < 5
    assert lines[0] == "the alert command was not run for 1 alerts"
    assert command._runs == hanging._runs == []


def test_without_a_descriptor_it_is_not_run(run: Run, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left open."""

    def none() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", none)
    command = run("true")
    command.put(message())
    command.tick()

    assert lines == ["the alert command (true) for a of a pool can't be run: Too many open files"]
