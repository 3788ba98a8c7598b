"""Small kernel files: read completely, in as few system calls as their kind allows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from needs import need
from unit.children import in_child

from oomsafe.kernel import files
from oomsafe.kernel.files import ONE_PIECE, read_bytes, read_int, read_record


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of a file got."""
    got: list[int] = []
    pread = os.pread

    def counting(fd: int, size: int, at: int) -> bytes:
        piece = pread(fd, size, at)
        got.append(len(piece))
        return piece

    monkeypatch.setattr(files.os, "pread", counting)
    return got


@pytest.mark.parametrize("length", [0, 1, ONE_PIECE - 1, ONE_PIECE, ONE_PIECE + 1, 3 * ONE_PIECE])
def test_a_record_of_any_length(tmp_path: Path, length: int) -> None:
    """Complete, whatever falls together with the end of a read."""
    (tmp_path / "file").write_bytes(bytes(index % 251 for index in range(length)))

    assert read_record(str(tmp_path / "file")) == (tmp_path / "file").read_bytes()
    assert read_record(str(tmp_path / "missing")) is None


@pytest.mark.parametrize("name", ["status", "stat", "statm", "oom_score_adj"])
def test_the_kernel_writes_a_record_in_one_piece(reads: list[int], name: str) -> None:
    """One read of these gets all, and a second one would get nothing."""
    need(os.path.exists(f"/proc/self/{name}"), "no /proc here")
    record = read_record(f"/proc/{os.getppid()}/{name}")
    after_record = len(reads)
    read_bytes(f"/proc/{os.getppid()}/{name}")

    assert (after_record, record is not None and record.endswith(b"\n")) == (1, True)
    assert [bool(length) for length in reads] == [True, True, False]


def test_a_number_takes_one_read(reads: list[int]) -> None:
    """The score of a process."""
    need(os.path.exists("/proc/self/oom_score_adj"), "no /proc here")

    assert read_int("/proc/self/oom_score_adj") is not None
    assert len(reads) == 1


def test_a_status_that_is_longer_than_one_read() -> None:
    """A real one: a process in two thousand groups."""
    need(os.geteuid() == 0, "only root may set groups")

    def of_many_groups() -> tuple[bytes | None, bytes | None]:
        os.setgroups(range(100_000, 102_000))
        return read_record("/proc/self/status"), read_bytes("/proc/self/status")

    record, whole = in_child(of_many_groups)

    assert len(record) > 3 * ONE_PIECE
    names, groups = zip(*((line.partition(b":")[0], line) for line in record.splitlines()), strict=True)
    assert list(names) == [line.partition(b":")[0] for line in whole.splitlines()]
    assert [line for line in groups if line.startswith(b"Groups:")] == [line for line in whole.splitlines() if line.startswith(b"Groups:")]


def test_a_file_of_many_records_comes_in_pieces(reads: list[int]) -> None:
    """So a read that is not full need not be the last: this is why not every file is read as a record."""
    need(os.path.exists("/proc/self/smaps"), "no /proc here")
    smaps = read_bytes("/proc/self/smaps") or b""

    assert len([length for length in reads if length]) > 1
    assert smaps.count(b"VmFlags:") > 3
