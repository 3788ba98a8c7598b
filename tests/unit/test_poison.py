"""Which ends count as deaths for memory, where they are counted, and which the kernel's counter covers."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from oomsafe.celery import notes
from oomsafe.celery.notes import Notes
from oomsafe.errors import ScoreboardError
from oomsafe.kernel.oom_kills import Kills, boot_id, machine_kills
from oomsafe.policy.poison import ALONE_FOR, Count, Fate, Run, fate_of, grew, is_poison
from oomsafe.policy.verdicts import Verdict, verdict
from oomsafe.scoreboard import places
from oomsafe.scoreboard.keep import FOLDER, OLD, Keep
from oomsafe.supervisor.deaths import FRESH, OomCounter

runs = st.builds(Run, st.sampled_from(["", "a", "b"]), st.one_of(st.none(), st.integers(0, 5)))


@given(runs, runs, st.sampled_from([True, False, None]), st.booleans())
def test_a_run_without_an_end(began: Run, now: Run, lives: bool | None, leased: bool) -> None:
    """It is a death unless its node lives, or may live, or the same boot of the same machine has killed nothing for memory since."""
    known = bool(began.boot) and began.boot == now.boot and began.kills is not None and now.kills is not None
    none_since = known and (now.kills or 0) <= (began.kills or 0)
    may_live = bool(lives) or (lives is None and leased)
    assert (fate_of(began, now, lives, leased) is Fate.KILLED) == (not may_live and not none_since)
    assert (fate_of(began, now, lives, leased) in (Fate.LIVES, Fate.OPEN)) == may_live


@given(st.lists(st.sampled_from([True, None])), st.integers(0, 5))
def test_who_kills_its_node_alone_has_killed_it_before(crowds: list[bool | None], before: int) -> None:
    """So it is given up after as many deaths as if it had never had company; until then nothing is held against it for sure."""
    count = Count(before)
    for grown in crowds:
        count = count.after_its_node(alone=False, grew=grown)
        assert count.deaths == before
        assert count.suspect
    assert count.after_its_node(alone=True, grew=None) == Count(before + len(crowds) + 1, 0)
    assert ALONE_FOR <= count.alone_for <= Count(0, 2 + count.doubts).alone_for


def test_who_has_not_grown_beside_one_that_has() -> None:
    """It runs as any other the first time; the second time, it must show that it was not its doing."""
    once = Count().after_its_node(alone=False, grew=False)
    assert not once.suspect
    assert once.after_its_node(alone=False, grew=False).suspect


@given(st.dictionaries(st.text(), st.integers(1)))
def test_who_had_grown(grown: dict[str, int]) -> None:
    """The biggest always, whoever had not never; nobody knows where none had."""
    assert grew("\0not there", grown) is (False if grown else None)
    if grown:
        assert grew(max(grown, key=lambda task: grown[task]), grown)


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
        self.counter = OomCounter(lambda: None if self.total is None else Kills(self.total, True), lambda: self.now)


class Machines:
    """Nodes on machines that can't see each other's processes, with one backend: Celery's own, in memory."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OOMSAFE_STATE", str(folder / "state"))
        # what the real ones have: memory is shared by all, as a server would be
        self.backend = Celery(backend="cache+memory://", set_as_current=False).backend
        self.backend.client.cache.clear()  # one for the whole process

    def node(self, boot: str) -> Notes:
        """MainProcess on another machine."""
        made = Notes(self.backend, os.getpid())
        made._boot = boot
        return made


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """Their nodes, and their backend."""
    return Machines(tmp_path, monkeypatch)


def test_a_run_whose_lease_is_renewed_is_no_death(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often its message comes again meanwhile, and to whom; nor does it count twice when the lease has expired."""
    first, second, third = map(machines.node, "abc")
    first.renew(alone=True, grown={})
    first.begins("one")
    assert second.again("one") == (Count(), 1)
    second.renew(alone=True, grown={})
    second.begins("one")
    assert third.again("one") == (Count(), 2)
    assert third.again("one") == (Count(), 2)

    monkeypatch.setattr(notes, "LEASE", 0.0)

    assert third.again("one") == (Count(2), 0)
    assert third.again("one") == (Count(2), 0)


def test_a_lease_that_is_not_there_yet(machines: Machines) -> None:
    """A child may note its task a moment before MainProcess notes that the node lives."""
    machines.node("a").begins("one")
    assert machines.node("b").again("one") == (Count(), 1)


def test_where_no_machine_tells_its_boot(machines: Machines) -> None:
    """Another machine's node is not looked for among this one's processes: its lease says whether it lives."""
    first, second = machines.node(""), machines.node("")
    first._node = (1 << 22, 5, first._node[2])  # no pid is as high
    first.renew(alone=True, grown={})
    first.begins("one")

    assert second.again("one") == (Count(), 1)


def test_what_had_run_beside_it(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who had grown is held to have done it twice as much as who had not, and is not blamed for sure; nobody is where none had."""
    first, second = map(machines.node, "ab")
    first.renew(alone=False, grown={"big": 300 << 20, "": 40 << 20})
    for task in ("big", "small"):
        first.begins(task)
    monkeypatch.setattr(notes, "LEASE", 0.0)

    assert second.again("big").held == Count(0, 2)
    assert second.again("small").held == Count(0, 1)
    first.renew(alone=False, grown={})
    first.begins("small")
    assert second.again("small").held == Count(0, 3)


def test_deaths_end_with_an_end_of_its_own(machines: Machines) -> None:
    """Or with a message that comes for the first time."""
    node = machines.node("a")
    assert [node.died("one"), node.died("one")] == [1, 2]
    assert node.died("one", anew=True) == 1
    node.ended("one")
    assert node.died("one") == 2
    node.ended_well("one")
    assert node.died("one") == 1


@pytest.mark.parametrize(
    "ids", [("x" * 300 + "1", "x" * 300 + "2"), ("a b", "a\nb"), ("\udcff", "\udcfe"), ("a", "sha256:" + sha256(b"a b").hexdigest())]
)
def test_no_two_ids_share_a_count(machines: Machines, ids: tuple[str, str]) -> None:
    """However long they are, and whatever a stranger has put into them."""
    node = machines.node("a")
    assert [node.died(ids[0]), node.died(ids[0]), node.died(ids[1]), node.again(ids[0]).held.deaths] == [1, 2, 1, 2]
    assert all(notes._PLAIN.fullmatch(key.split("-", 2)[2].removeprefix("sha256:")) for key in machines.backend.client.cache)


def test_where_no_note_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Neither a backend nor a folder: it is said, and a node still counts the deaths of its own children."""
    monkeypatch.setattr(places, "folders", lambda: iter([str(tmp_path / "not" / "there")]))
    monkeypatch.delenv("OOMSAFE_STATE", raising=False)
    node = Notes(None, os.getpid())

    assert [node.died("one"), node.died("one"), node.again("one").held.deaths] == [1, 2, 2]
    assert "it is forgotten with this node" in caplog.text


@pytest.mark.parametrize("note", [b"", b"{}", b"[1]", b"[1,2,[[1]]]", b'["a",1,2,3,"n",1e999]', b"[1e999,0,[]]", b"[[],0,0]", b"\xff"])
def test_a_note_that_is_none_of_ours(machines: Machines, note: bytes) -> None:
    """Says nothing, whatever it was written for."""
    node = machines.node("a")
    for kind in ("run", "deaths"):
        machines.backend.set(f"oomsafe-{kind}-one", note)
    held = node.again("one").held
    assert held.deaths in (0, 1)
    assert held.doubts in (0, 2)


def test_each_rise_explains_one_death() -> None:
    """Also when it comes before its victim's exit; and not for ever."""
    kernel = Counter(7)

    def judged(deaths: int) -> Verdict:
        rises, own, _ = kernel.counter.count()
        return verdict(deaths, rises, own)

    assert judged(1) is Verdict.NOT_THE_KERNEL
    kernel.total = 9
    assert judged(1) is Verdict.CONFIRMED
    kernel.counter.settle(1)
    assert judged(1) is Verdict.CONFIRMED
    kernel.counter.settle(1)
    assert judged(1) is Verdict.NOT_THE_KERNEL
    kernel.total = 10
    assert judged(2) is Verdict.LIKELY
    kernel.now += FRESH
    assert judged(1) is Verdict.NOT_THE_KERNEL
    kernel.total = None
    assert judged(1) is Verdict.UNKNOWN


def test_the_machine_s_own_figures(tmp_path: Path) -> None:
    """Read from where the kernel writes them; None and empty where it does not."""
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("3f9d-1\n")
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\n")

    assert (boot_id(str(tmp_path)), machine_kills(str(tmp_path))) == ("3f9d-1", 3)
    assert (boot_id(str(tmp_path / "none")), machine_kills(str(tmp_path / "none"))) == ("", None)
