"""A probe's files: on a disk with room, private, bounded; and one that a worker made up is not believed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.filesystem import lies_in_memory
from oomsafe.scoreboard import recordings
from oomsafe.scoreboard.recordings import KEPT, RECORDING, REPORT, Recordings, open_probe_file, read_report


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder there is."""
    folder = tmp_path / "state"
    monkeypatch.setenv("OOMSAFE_STATE", str(folder))
    monkeypatch.setattr(recordings, "_folders", lambda: iter([str(folder)]))
    monkeypatch.setattr(recordings, "lies_in_memory", lambda _: False)  # wherever the tests' own folder lies
    return folder


def test_they_are_private(state: Path) -> None:
    """Whatever the umask."""
    old = os.umask(0)
    try:
        files = Recordings(812, 3)
        files.new_recording()
        files.write({"brief": "x"})
    finally:
        os.umask(old)

    assert sorted(path.name for path in (state / "probes").iterdir()) == ["probe-812-3.bin", "probe-812-3.json"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state / "probes").iterdir()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (state, state / "probes")} == {0o700}
    assert read_report(files.report) == {"brief": "x"}


def test_a_link_is_not_followed(state: Path, tmp_path: Path) -> None:
    """Neither for writing nor for reading."""
    files, target = Recordings(812, 3), tmp_path / "target"
    target.write_text("{}")
    os.symlink(target, files.recording)
    os.symlink(target, files.report)

    with pytest.raises(FileExistsError):
        files.new_recording()
    with pytest.raises(ScoreboardError):
        read_report(files.report)
    files.write({})
    assert target.read_text() == "{}"


def test_only_the_latest_are_kept(state: Path) -> None:
    """So many probes'."""
    for number in range(KEPT + 5):
        files = Recordings(812, number)
        files.new_recording()
        files.write({})
        for path in (files.recording, files.report):
            os.utime(path, (number, number))
    Recordings(812, 99)

    left = {path.name for path in (state / "probes").iterdir()}
    assert len(left) == 2 * KEPT
    assert "probe-812-0.json" not in left
    assert f"probe-812-{KEPT + 4}.json" in left


def test_a_disk_that_is_almost_full(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is left alone."""
    monkeypatch.setattr(recordings.os, "statvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))

    with pytest.raises(ScoreboardError, match="the disk is almost full"):
        Recordings(812, 3)


def test_memory_is_no_disk(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written there is charged to whoever is short of it."""
    monkeypatch.setattr(recordings, "lies_in_memory", lambda _: True)

    with pytest.raises(ScoreboardError, match="is no disk, but memory"):
        Recordings(812, 3)


def test_a_folder_that_others_may_enter(state: Path) -> None:
    """It is not used."""
    state.mkdir(mode=0o755)

    with pytest.raises(ScoreboardError, match="not used"):
        Recordings(812, 3)


@pytest.mark.parametrize("path", ["/etc/passwd", "probe-1-1.json", "/tmp/probe-1-1.json/../passwd", "/tmp/x/probe-1-1.json.new", ""])
def test_other_paths_are_not_opened(path: str) -> None:
    """A scoreboard may say anything."""
    with pytest.raises(ScoreboardError):
        open_probe_file(path, REPORT)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "[" * 100_000, "{" + " " * (1 << 20) + "}"])
def test_what_is_no_report(state: Path, text: str) -> None:
    """Too long, or of another shape."""
    files = Recordings(812, 3)
    files.write({})
    Path(files.report).write_text(text)

    with pytest.raises(ScoreboardError, match="is no report of a probe"):
        read_report(files.report)


def test_a_file_that_others_may_read(state: Path) -> None:
    """It is not ours."""
    files = Recordings(812, 3)
    files.new_recording()
    os.chmod(files.recording, 0o644)

    with pytest.raises(ScoreboardError, match="not a private file"):
        open_probe_file(files.recording, RECORDING)


MOUNTS = """\
22 1 {disk} / / rw,relatime - ext4 /dev/vda1 rw
30 22 {other} / /dev/shm rw,nosuid,nodev - {kind} tmpfs rw
"""


@pytest.mark.parametrize(("kind", "expected"), [("tmpfs", True), ("ramfs", True), ("ext4", False), ("overlay", False)])
def test_what_lies_in_memory(tmp_path: Path, kind: str, expected: bool) -> None:
    """By the mount that has the folder's device number."""
    device = tmp_path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(MOUNTS.format(disk="9999:1", other=number, kind=kind))

    assert lies_in_memory(str(tmp_path), proc=str(tmp_path)) is expected


def test_a_device_of_no_mount_is_no_memory_and_without_mounts_all_is(tmp_path: Path) -> None:
    """btrfs gives each subvolume a number of its own; a filesystem in memory does not."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(MOUNTS.format(disk="9999:1", other="9999:2", kind="tmpfs"))

    assert lies_in_memory(str(tmp_path), proc=str(tmp_path)) is False
    assert lies_in_memory(str(tmp_path), proc=str(tmp_path / "nowhere")) is True


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_dev_shm_is_memory() -> None:
    """The real one."""
    assert lies_in_memory("/dev/shm") is True
