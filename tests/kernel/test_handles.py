"""What a process has open besides memory, and what a fork of it would have to copy."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oomsafe.kernel.handles import own_device
from oomsafe.kernel.process import Resident, page_tables_of, resident_of, rss_of


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], None),
        (["/dev/null", "socket:[77]", "anon_inode:[eventpoll]", "/srv/nvidia0", "/dev/nvme0n1"], None),
        (["/dev/null", "/dev/nvidia0"], "/dev/nvidia0"),
        (["/dev/nvidiactl"], "/dev/nvidiactl"),
        (["/dev/kfd"], "/dev/kfd"),
        (["/dev/dri/renderD128"], "/dev/dri/renderD128"),
        (["/dev/infiniband/uverbs0"], "/dev/infiniband/uverbs0"),
    ],
)
def test_a_device_that_may_access_memory(tmp_path: Path, targets: list[str], expected: str | None) -> None:
    """By what the descriptors point to, whatever else is open."""
    folder = tmp_path / "self" / "fd"
    folder.mkdir(parents=True)
    for number, target in enumerate(targets):
        os.symlink(target, folder / str(number))
    (folder / "closed").touch()  # by the time that it is read

    assert own_device(str(tmp_path)) == expected


def test_without_proc(tmp_path: Path) -> None:
    """Nothing is known."""
    assert own_device(str(tmp_path)) is None
    assert resident_of(proc=str(tmp_path)) is None
    assert page_tables_of(proc=str(tmp_path)) is None


def test_this_process() -> None:
    """What is resident adds up, and its page tables map it: eight bytes for each page at least, where no page is huge."""
    found = resident_of()
    tables = page_tables_of()

    assert found is not None and tables is not None
    assert abs(sum(found) - (rss_of("self") or 0)) < 4 << 20
    assert 20 << 10 < tables < 1 << 30


def test_captured_figures(tmp_path: Path) -> None:
    """As Linux 6.18 prints them."""
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "status").write_text(
        "Name:\tpython\nVmRSS:\t   31232 kB\nRssAnon:\t   25336 kB\nRssFile:\t    5644 kB\nRssShmem:\t     252 kB\n"
        "VmData:\t   97404 kB\nVmPTE:\t     212 kB\nVmSwap:\t       0 kB\n"
    )

    assert resident_of(7, str(tmp_path)) == Resident(25336 << 10, 5644 << 10, 252 << 10)
    assert page_tables_of(7, str(tmp_path)) == 212 << 10
