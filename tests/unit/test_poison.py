"""Which ends count as deaths for memory, where they are counted, and which the kernel's counter covers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.oom_kills import Kills, boot_id, machine_kills
from oomsafe.policy.poison import Run, is_a_death, is_poison
from oomsafe.policy.verdicts import Verdict
from oomsafe.pool.deaths import FRESH, Deaths
from oomsafe.pool.keep import FOLDER, OLD, Keep

runs = st.builds(Run, st.sampled_from(["", "a", "b"]), st.one_of(st.none(), st.integers(0, 5)))


@given(runs, runs, st.booleans())
def test_a_run_without_an_end(began: Run, now: Run, lives: bool) -> None:
    """It is a death unless its node lives, or the same boot of the same machine has killed nothing for memory since."""
    known = bool(began.boot) and began.boot == now.boot and began.kills is not None and now.kills is not None
    none_since = known and (now.kills or 0) <= (began.kills or 0)
    assert is_a_death(began, now, lives) == (not lives and not none_since)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_enough(deaths: int, allowed: int) -> None:
    """As many runs as deaths are allowed, and one more."""
    assert is_poison(deaths, allowed) == (deaths >= allowed + 1)


def test_notes_outlive_who_wrote_them(tmp_path: Path) -> None:
    """By key, whole, and only for this user."""
    Keep(str(tmp_path / "state")).set("run-../../etc/passwd\n", b"first")
    Keep(str(tmp_path / "state")).set("run-../../etc/passwd\n", b"second")

    keep = Keep(str(tmp_path / "state"))
    assert keep.get("run-../../etc/passwd\n") == b"second"
    assert keep.get("another") is None
    (note,) = (tmp_path / "state" / FOLDER).iterdir()
    assert (note.stat().st_mode & 0o777, note.parent.stat().st_mode & 0o777) == (0o600, 0o700)

    keep.delete("run-../../etc/passwd\n")
    keep.delete("run-../../etc/passwd\n")
    assert keep.get("run-../../etc/passwd\n") is None


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Whoever has put it there."""
    keep = Keep(str(tmp_path / "state"))
    keep.set("key", b"1")
    (note,) = (tmp_path / "state" / FOLDER).iterdir()
    note.unlink()
    (tmp_path / "secret").write_text("9")
    note.symlink_to(tmp_path / "secret")

    with pytest.raises(OSError, match="symbolic"):
        keep.get("key")
    keep.set("key", b"2")

    assert keep.get("key") == b"2"
    assert (tmp_path / "secret").read_text() == "9"


def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path) -> None:
    """Somebody else may have made it."""
    (tmp_path / "state").mkdir(mode=0o755)
    with pytest.raises(ScoreboardError):
        Keep(str(tmp_path / "state")).set("key", b"1")


def test_old_notes_are_swept(tmp_path: Path) -> None:
    """A day later nobody asks for them."""
    keep = Keep(str(tmp_path / "state"))
    keep.set("old", b"1")
    (note,) = (tmp_path / "state" / FOLDER).iterdir()
    os.utime(note, (note.stat().st_mtime - OLD - 1,) * 2)
    keep.set("new", b"1")

    keep.sweep()

    assert (keep.get("old"), keep.get("new")) == (None, b"1")


class Counter:
    """The kernel's, and the time."""

    def __init__(self, total: int | None) -> None:
        self.total, self.now = total, 0.0
        self.deaths = Deaths(lambda: None if self.total is None else Kills(self.total, True), lambda: self.now)


def test_each_rise_explains_one_death() -> None:
    """Also when it comes before its victim's exit; and not for ever."""
    kernel = Counter(7)
    assert kernel.deaths.judge(1) is Verdict.NOT_THE_KERNEL
    kernel.total = 9
    assert kernel.deaths.judge(1) is Verdict.CONFIRMED
    kernel.deaths.settle(1)
    assert kernel.deaths.judge(1) is Verdict.CONFIRMED
    kernel.deaths.settle(1)
    assert kernel.deaths.judge(1) is Verdict.NOT_THE_KERNEL
    kernel.total = 10
    assert kernel.deaths.judge(2) is Verdict.LIKELY
    kernel.now += FRESH
    assert kernel.deaths.judge(1) is Verdict.NOT_THE_KERNEL
    kernel.total = None
    assert kernel.deaths.judge(1) is Verdict.UNKNOWN


def test_the_machine_s_own_figures(tmp_path: Path) -> None:
    """Read from where the kernel writes them; None and empty where it does not."""
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("3f9d-1\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\n")

    assert (boot_id(str(tmp_path)), machine_kills(str(tmp_path))) == ("3f9d-1", 3)
    assert (boot_id(str(tmp_path / "none")), machine_kills(str(tmp_path / "none"))) == ("", None)
