"""What a pool leaves behind for whoever looks at what is left of it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.errors import ConfigError
from oomsafe.kernel import systemd
from oomsafe.kernel.cgroup import Cgroup
from oomsafe.policy.last_words import LONGEST, Note, Present, Worker, epitaph, key_of, last_words, pack, unpack
from oomsafe.policy.settings import Policy
from oomsafe.supervisor.last_words import PAUSE, LastWords, TerminationLog

MIB = 1 << 20


def pool(used: int = 480, *, died: int = 0, doing: str = "in flight: GET /export (4.2 s, +310 MiB)", dies_whole: bool = False) -> Present:
    """Of two workers in 512 MiB."""
    workers = [Worker("worker 11 (slot 0)", 80 * MIB, "nothing was in flight"), Worker("worker 12 (slot 1)", 330 * MIB, doing)]
    deaths = [f"worker {number} was killed" for number in range(died)]
    return Present("gunicorn sync (shop)", 7, 440 * MIB, 512 * MIB, used * MIB, "cgroup v2 /a", dies_whole, workers, deaths, died)


def test_the_words() -> None:
    """Whole, the biggest worker first."""
    assert last_words(pool(died=1, dies_whole=True), "noon").splitlines() == [
        "oomsafe, as of noon: memory is short: if this process is gone, the kernel's OOM killer is the likely reason",
        "gunicorn sync (shop), supervisor 7: the pool holds 440 MiB; the limit is 512 MiB (cgroup v2 /a), 94% of it in use",
        "memory.oom.group is set: the kernel kills all processes here at once (Kubernetes: kubelet's singleProcessOOMKill)",
        "worker 12 (slot 1): 330 MiB; in flight: GET /export (4.2 s, +310 MiB)",
        "worker 11 (slot 0): 80.0 MiB; nothing was in flight",
        "1 worker died before, the last ones:",
        "worker 0 was killed",
    ]
    assert "look for another reason first" in last_words(pool(100), "noon")


def test_they_fit_whatever_is_in_flight() -> None:
    """And are printable: names come from clients."""
    words = last_words(pool(died=8, doing="in flight: " + "\x1b[2J\n" * 5000), "noon")
    assert len(words.encode()) <= LONGEST
    assert "\x1b" not in words
    assert unpack(pack(Note(1, 2, "boot", "ns", "noon", "ä" * 9000))) is not None
    assert len(pack(Note(1, 2, "boot", "ns", "noon", "ä" * 9000))) <= LONGEST


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(lambda any_: json.dumps(any_).encode()))
def test_a_note_that_is_none(raw: bytes) -> None:
    """Anybody may have written it who may write there."""
    note = unpack(raw)
    assert note is None or isinstance(note.words, str)


def test_when_they_are_written_again() -> None:
    """When memory gets short, when somebody dies; not with each figure."""
    assert key_of(pool(101)) == key_of(pool(102, doing="something else"))
    assert len({key_of(one) for one in (pool(101), pool(480), pool(480, doing="nothing"), pool(101, died=1))}) == 4
    assert (pool(101).matters, pool(480).matters, pool(101, died=1).matters) == (False, True, True)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """As kubelet makes it."""
    path = tmp_path / "termination-log"
    path.touch(mode=0o666)
    return path


def test_the_termination_log(log: Path) -> None:
    """Nothing while nothing is wrong, so that Kubernetes shows the container's own log; written anew; empty after an end in order."""
    words = LastWords("a", str(log), {})
    words.tick(lambda: pool(101), 0.2, 100.0)
    assert log.read_text() == ""
    words.tick(lambda: pool(480), 0.94, 100.1)  # at once, though it has just written
    assert log.read_text().startswith("oomsafe, as of ")
    words.tick(lambda: pool(101, died=1), 0.2, 100.2)
    assert "another reason first" in log.read_text()
    words.tick(lambda: pool(101, died=2), 0.2, 100.3)
    assert "1 worker died" in log.read_text()
    words.tick(lambda: pool(101, died=2), 0.2, 100.3 + PAUSE)
    assert "2 workers died" in log.read_text()
    words.goodbye()
    assert log.read_text() == ""


def test_what_somebody_else_has_written_stays(log: Path) -> None:
    """Before, or in between: then it is theirs for good."""
    words = LastWords("a", str(log), {})
    words.tick(lambda: pool(480), 0.94, 100.0)
    log.write_text("the app's own words")
    words.tick(lambda: pool(480, died=1), 0.94, 200.0)
    words.goodbye()
    assert log.read_text() == "the app's own words"
    assert not LastWords("a", str(log), {}).wanted


def _link(path: Path) -> None:
    path.with_name("elsewhere").touch()
    path.symlink_to(path.with_name("elsewhere"))


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), _link, lambda path: os.mkfifo(path)])
def test_no_file_of_that_name(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """It is not made, no link is followed, and nobody waits for a pipe's reader."""
    path = tmp_path / "log"
    make(path)
    found = TerminationLog(str(path))
    found.write("words")
    assert not found.usable
    assert not path.is_file() or path.read_text() == ""


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    """The environment with a folder for notes."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    return {"OOMSAFE_STATE": str(folder)}


def test_the_last_pool_is_explained_once(state: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has ended without a goodbye; one that has said it has nothing to tell."""
    first = LastWords("a", None, state)
    assert first.of_the_last() is None
    first.tick(lambda: pool(480), 0.94, 100.0)
    assert LastWords("a", None, state).of_the_last() is None  # it lives: this is its process
    assert LastWords("b", None, state).of_the_last() is None  # another pool's

    monkeypatch.setattr("oomsafe.supervisor.last_words.is_alive", lambda pid, started: False)
    line = LastWords("a", None, state).of_the_last()
    assert line is not None
    assert line.startswith("the pool before this one ended without a goodbye")
    assert "the kernel's OOM killer is the likely reason" in line
    assert LastWords("a", None, state).of_the_last() is None

    second = LastWords("a", None, state)
    second.tick(lambda: pool(480), 0.94, 100.0)
    second.goodbye()
    assert LastWords("a", None, state).of_the_last() is None


def test_systemd_s_folder_is_used_where_there_is_no_other(tmp_path: Path) -> None:
    """Others may read in that one: so one below it is made that is this user's alone."""
    folder = tmp_path / "lib"
    folder.mkdir(mode=0o755)
    words = LastWords("a", None, {"STATE_DIRECTORY": f"{folder}:/elsewhere"})
    words.tick(lambda: pool(480), 0.94, 100.0)
    (below,) = folder.iterdir()
    assert (below.name, below.stat().st_mode & 0o777) == ("oomsafe", 0o700)


def test_after_another_boot() -> None:
    """Said so."""
    note = Note(1, 2, "boot", "ns", "noon", "words\nmore\n")
    assert epitaph(note, same_boot=False).endswith("words; more. The machine has been booted since.")


@pytest.mark.parametrize(
    ("path", "service"),
    [
        ("/sys/fs/cgroup/system.slice/shop.service", "shop.service"),
        ("/sys/fs/cgroup/system.slice/shop@a\\x2db.service/supervisor", "shop@a\\x2db.service"),
        ("/sys/fs/cgroup/user.slice/user-1000.slice/user@1000.service/app.slice/shop.service", None),
        ("/sys/fs/cgroup/kubepods/pod1", None),
        ("/sys/fs/cgroup/system.slice/-x y.service", None),
    ],
)
def test_the_service(monkeypatch: pytest.MonkeyPatch, path: str, service: str | None) -> None:
    """By the cgroup; a user's own systemd is another one."""
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    assert systemd.service_of(Cgroup(2, path, "/sys/fs/cgroup")) == service


def test_without_systemctl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks is told so."""
    monkeypatch.setattr(systemd, "SYSTEMCTL", "/nowhere/systemctl")
    with pytest.raises(OSError, match="nowhere"):
        systemd.OomPolicy("shop.service")


@pytest.mark.parametrize(
    ("says", "patience", "answer"),
    [("echo stop", 30.0, "stop"), ("exit 1", 30.0, ""), ("sleep 0.3; echo continue", 30.0, "continue"), ("exec sleep 60", 0.3, "")],
)
def test_nobody_waits_for_systemctl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, patience: float, answer: str) -> None:
    """It is asked, and looked at now and then; one that hangs is ended."""
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setattr(systemd, "SYSTEMCTL", str(program))
    monkeypatch.setattr(systemd, "PATIENCE", patience)
    asked = systemd.OomPolicy("shop.service")
    until = time.monotonic() + 30
    while (found := asked.answer()) is None and time.monotonic() < until:
        time.sleep(0.01)
    assert found == answer


@pytest.mark.parametrize("given", ["shop", "shop:", ":f", "a b:c", 3, "a:b()"])
def test_an_on_death_that_is_none(given: object) -> None:
    """One line that shows a right one."""
    with pytest.raises(ConfigError, match=r"on_death=.* neither a function nor the name of one; .*shop\.alerts:worker_died"):
        Policy(on_death=given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["log", "/var/log/", 3, "/a\n"])
def test_a_termination_log_that_is_none(given: object) -> None:
    """The same."""
    with pytest.raises(ConfigError, match="termination_log"):
        Policy(termination_log=given)  # type: ignore[arg-type]
    assert Policy(termination_log=None).termination_log is None
