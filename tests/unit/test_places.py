"""Where scoreboards lie, and what is not believed to be one."""

from __future__ import annotations

import errno
import gc
import logging
import os
import re
import signal
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from needs import need
from unit.children import Child, Line, in_child

from oomsafe.errors import ScoreboardError
from oomsafe.kernel.process import start_time
from oomsafe.policy.settings import Policy
from oomsafe.scoreboard import backing, layout, places
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.slot import Figures
from oomsafe.supervisor.supervisor import Supervisor
from oomsafe.worker.guard import Guard


@pytest.fixture
def try_folders(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets where create() tries."""

    def use(*folders: Path) -> None:
        monkeypatch.setattr(places, "folders", lambda: map(str, folders))

    return use


@pytest.fixture(params=["file", "memory"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where a scoreboard lies: in its file, or, as root's, in memory that its file names."""
    if request.param == "memory":
        need(os.geteuid() == 0, "nobody else has another user's descriptors opened")
    monkeypatch.setattr(backing, "may_become_another_user", lambda: request.param == "memory")
    return str(request.param)


def test_only_its_owner_may_enter(board: Scoreboard) -> None:
    """The file is 0600, in a folder that is 0700, and goes with its supervisor."""
    path = board.path
    assert path is not None
    modes = [stat.S_IMODE(os.stat(place).st_mode) for place in (path, os.path.dirname(path))]
    assert os.path.basename(path) == f"{os.getpid()}-{start_time()}.board"

    in_child(board.remove)
    kept = os.path.exists(path)
    board.remove()

    assert modes == [0o600, 0o700]
    assert kept
    assert not os.path.exists(path)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777], ids=oct)
def test_whatever_the_umask(tmp_path: Path, try_folders: Callable[..., None], umask: int) -> None:
    """A careless umask opens nothing; one too strict falls back instead of failing."""
    try_folders(tmp_path / "here")
    before = os.umask(umask)
    try:
        made, _ = Scoreboard.create(1, "test")
    finally:
        os.umask(before)

    if made.path:
        assert not stat.S_IMODE(os.stat(made.path).st_mode) & 0o177
    made.close()


def _open_to_others(path: Path) -> None:
    path.mkdir(mode=0o700)
    path.chmod(0o755)


def _link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def _link_in_place_of_file(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / f"{os.getpid()}-{start_time()}.board{places.UNFINISHED}").symlink_to(path.parent / "target")


@pytest.mark.parametrize(
    "spoil",
    [_open_to_others, _link, lambda path: path.touch(), _link_in_place_of_file],
    ids=["open-to-others", "link", "file", "link-in-place-of-new-file"],
)
def test_what_is_not_ours_is_not_used(tmp_path: Path, try_folders: Callable[..., None], spoil: Callable[[Path], None]) -> None:
    """A folder that somebody else may have made is left alone, with a warning, and the next one is used."""
    spoil(tmp_path / "first")
    try_folders(tmp_path / "first", tmp_path / "second")

    made, warnings = Scoreboard.create(1, "test")

    assert made.path is not None
    assert made.path.startswith(str(tmp_path / "second"))
    assert len(warnings) == 1
    assert str(tmp_path / "first") in warnings[0]
    assert list((tmp_path / "elsewhere").glob("*") if (tmp_path / "elsewhere").exists() else []) == []
    assert not (tmp_path / "target").exists()
    made.close()


def test_a_link_in_its_place(tmp_path: Path, try_folders: Callable[..., None]) -> None:
    """A link of the scoreboard's own name is never followed: what it points to stays as it is."""
    (tmp_path / "first").mkdir(mode=0o700)
    (tmp_path / "target").write_text("precious")
    (tmp_path / "first" / f"{os.getpid()}-{start_time()}.board").symlink_to(tmp_path / "target")
    try_folders(tmp_path / "first")

    made, _ = Scoreboard.create(1, "test")

    assert (tmp_path / "target").read_text() == "precious"
    assert made.path is None or not os.path.islink(made.path)
    made.close()


def test_a_folder_of_somebody_else(tmp_path: Path, try_folders: Callable[..., None]) -> None:
    """Its mode is right, its owner is not."""
    need(os.geteuid() == 0, "only root can make a folder that belongs to somebody else")
    (tmp_path / "first").mkdir(mode=0o700)
    os.chown(tmp_path / "first", 12345, 12345)
    try_folders(tmp_path / "first")

    made, warnings = Scoreboard.create(1, "test")

    assert made.path is None
    assert "belongs to user 12345" in warnings[0]
    made.close()


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs with room for a folder, and for no scoreboard."""
    need(os.geteuid() == 0, "only root can mount a tmpfs")
    point = tmp_path / "full"
    point.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", point], capture_output=True, check=False)
    need(mounted.returncode == 0, "no tmpfs can be mounted here")
    yield point
    subprocess.run(["umount", "-l", point], check=True)


@pytest.mark.parametrize("kind", ["file"], indirect=True)
def test_a_full_tmpfs(full: Path, tmp_path: Path, try_folders: Callable[..., None]) -> None:
    """A /dev/shm that has no room is found out at boot, not by a SIGBUS later: the next folder is used, with a warning."""
    try_folders(full / "oomsafe-0", tmp_path / "second")

    def use() -> tuple[str | None, list[str]]:
        made, warnings = Scoreboard.create(1, "test")
        for _ in range(made.slots):
            slot = made.reserve()
            assert slot is not None
            slot.claim()
            slot.publish(Figures(), layout.Counters())
        made.remove()
        return made.path or "used", warnings

    used, warnings = in_child(use)

    assert used == "used"
    assert ["No space left" in warning for warning in warnings] == [True]
    assert list((full / "oomsafe-0").iterdir()) == []


@pytest.mark.parametrize("kind", ["file"], indirect=True)
def test_no_room_without_a_mount(tmp_path: Path, try_folders: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where nothing can be mounted: posix_fallocate refuses once."""
    try_folders(tmp_path / "first", tmp_path / "second")
    real, asked = os.posix_fallocate, []

    def once(fd: int, offset: int, size: int) -> None:
        asked.append(fd)
        if len(asked) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", once)

    made, warnings = Scoreboard.create(1, "test")

    assert str(made.path).startswith(str(tmp_path / "second"))
    assert "No space left" in warnings[0]
    made.close()


def test_no_folder_at_all(try_folders: Callable[..., None]) -> None:
    """The pool has its scoreboard in memory, workers inherit it, and a warning tells that nobody else sees it."""
    try_folders()

    made, warnings = Scoreboard.create(1, "test")
    slot = made.reserve()
    assert slot is not None

    def work(line: Line) -> None:
        slot.claim()
        slot.publish(Figures(rss=42), layout.Counters())
        line.say(made.try_lock())
        line.hear()

    with Child(work) as child:
        assert child.hear() is True
        seen = made.read().workers[0]
        assert (child.pid, 42) == (seen.pid, seen.figures.rss)
        assert not made.try_lock()

    assert made.path is None
    assert len(warnings) == 1
    assert "in memory only" in warnings[0]
    made.close()


def test_two_supervisors_in_one_process(new_board: Callable[..., Scoreboard], try_folders: Callable[..., None], tmp_path: Path) -> None:
    """A second scoreboard of one process does not take the place of the first."""
    try_folders(tmp_path / "same")
    first, _ = Scoreboard.create(1, "first")
    second, _ = Scoreboard.create(1, "second")

    assert Scoreboard.open(str(first.path)).read().server == "first"
    assert first.path != second.path
    first.close()
    second.close()


def test_opens_what_another_made(board: Scoreboard) -> None:
    """Whoever may read the file reads the pool, and can't write to it; so it goes on when the file is gone."""
    opened = Scoreboard.open(str(board.path))

    assert opened.read().server == "test"
    board.remove()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(opened._fd, b"x", 0)
    assert opened.read().server == "test"
    opened.close()


def test_a_spawned_worker_writes(board: Scoreboard) -> None:
    """What it publishes is on its pool's scoreboard, and the lock is the pool's."""
    slot = board.reserve()
    assert slot is not None

    def work(line: Line) -> None:
        joined = Scoreboard.join(str(board.path))
        mine = joined.slot(slot.number, slot.generation)
        mine.claim()
        mine.publish(Figures(rss=42), layout.Counters())
        line.say(joined.try_lock())
        line.hear()

    with Child(work) as child:
        assert child.hear() is True
        (seen,) = board.read().workers
        assert (child.pid, 42) == (seen.pid, seen.figures.rss)
        assert not board.try_lock()


@pytest.mark.parametrize("kind", ["memory"], indirect=True)
def test_nobody_cuts_memory_short(board: Scoreboard) -> None:
    """Whatever descriptor a worker has inherited: who has the scoreboard mapped would be killed by SIGBUS."""

    def cut() -> str:
        try:
            os.ftruncate(board._named._fd, 0)  # type: ignore[union-attr]
        except OSError as error:
            return str(error.strerror)
        return "cut"

    assert in_child(cut) == "Operation not permitted"
    assert board.read().server == "test"


@pytest.mark.parametrize("kind", ["memory"], indirect=True)
@pytest.mark.parametrize(
    ("text", "why"),
    [
        pytest.param("oomsafe memory of {pid} {started} is 0\n", "has lost the descriptor", id="another-file"),
        pytest.param("oomsafe memory of {pid} {started} is 987654\n", "can't be opened", id="no-descriptor"),
        pytest.param("oomsafe memory of 1 1 is 5\n", "is not a scoreboard of a living supervisor", id="another-supervisor"),
        pytest.param("oomsafe memory of {pid} {started} is {unsealed}\n", "is not a scoreboard of a living supervisor", id="not-sealed"),
        pytest.param("oomsafe memory of {pid} {started} is 5/../5\n", "is not a scoreboard of version", id="garbage"),
    ],
)
def test_what_a_file_may_name(board: Scoreboard, text: str, why: str) -> None:
    """A worker that has inherited it can write to it: only its supervisor's sealed memory is read, and that one puts it right."""
    assert board.path is not None
    unsealed = os.memfd_create("oomsafe-scoreboard")
    before = Path(board.path).read_text()
    Path(board.path).write_text(text.format(pid=os.getpid(), started=start_time(), unsealed=unsealed))

    with pytest.raises(ScoreboardError, match=why):
        Scoreboard.open(board.path)

    board.mend()
    assert before == Path(board.path).read_text()
    Scoreboard.open(board.path).close()
    os.close(unsealed)


@pytest.mark.parametrize("kind", ["memory"], indirect=True)
def test_root_follows_no_user_s_file_into_his_processes(board: Scoreboard) -> None:
    """Opening what a user has open may have effects: a device, a file system of his own."""
    assert board.path is not None
    os.chown(board.path, 12345, 12345)

    with pytest.raises(ScoreboardError, match="of a living supervisor of this user"):
        Scoreboard.open(board.path)


@pytest.mark.parametrize("spoil", ["folder", "file"])
def test_whose_a_folder_is(tmp_path: Path, spoil: str) -> None:
    """Anybody may have made the folder of another user's name first, or have linked another's file into his own."""
    need(os.geteuid() == 0, "only root may read another user's")
    folder = tmp_path / "oomsafe-12345"
    path = folder / "1-1.board"
    folder.mkdir(mode=0o700)
    size, header = backing.blank(2, 2, "theirs")
    path.write_bytes(bytes(header).ljust(size, b"\0"))
    for theirs in (folder, path):
        os.chown(theirs, 12345, 12345)
    before = Scoreboard.snapshot(str(path)).server

    os.chown(folder if spoil == "folder" else path, 54321, 54321)

    with pytest.raises(ScoreboardError, match="its folder belongs to user 54321" if spoil == "folder" else "not a scoreboard of this user"):
        Scoreboard.open(str(path))
    assert before == "theirs"


HEADER = layout.IDENTITY.pack(layout.MAGIC, layout.VERSION, 4, layout.SLOT_SIZE)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"x", id="one-byte"),
        pytest.param(b"\0" * 40000, id="zeros"),
        pytest.param(os.urandom(40000), id="garbage"),
        pytest.param(HEADER, id="only-identity"),
        pytest.param(HEADER.ljust(layout.HEADER_SIZE, b"\0"), id="no-slots"),
        pytest.param(HEADER.ljust(layout.HEADER_SIZE + 4 * layout.SLOT_SIZE - 1, b"\0"), id="truncated"),
        pytest.param(struct.pack("<8s3I", layout.MAGIC, 1, 4, layout.SLOT_SIZE).ljust(40000, b"\0"), id="version-1"),
        pytest.param(struct.pack("<8s3I", layout.MAGIC, 1, 4, 4096).ljust(40000, b"\0"), id="other-slots"),
        pytest.param(struct.pack("<8s3I", layout.MAGIC, 1, 0xFFFFFFFF, layout.SLOT_SIZE).ljust(40000, b"\0"), id="too-many-slots"),
    ],
)
def test_what_is_no_scoreboard(tmp_path: Path, content: bytes) -> None:
    """It is refused in one line with its path, and no descriptor stays open."""
    path = tmp_path / "1-1.board"
    path.write_bytes(content)
    gc.collect()  # what earlier tests have left may close its own just then
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(ScoreboardError, match=rf"1-1\.board is not a scoreboard of version {layout.VERSION}"):
        Scoreboard.open(str(path))

    assert before == len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None, lambda path: path.symlink_to("/dev/null")])
def test_what_is_no_file(tmp_path: Path, make: Callable[[Path], None], board: Scoreboard) -> None:
    """Nor is a folder, nothing, or a link."""
    make(tmp_path / "odd")
    (tmp_path / "link").symlink_to(str(board.path))

    for name in ("odd", "link"):
        with pytest.raises(ScoreboardError):
            Scoreboard.open(str(tmp_path / name))


def test_a_pipe_does_not_hold_us_up(tmp_path: Path) -> None:
    """Root looks into everybody's folders: a pipe that somebody has put there must not make it wait for ever."""
    os.mkfifo(tmp_path / "1-1.board")

    def look() -> str:
        signal.alarm(2)
        try:
            Scoreboard.open(str(tmp_path / "1-1.board"))
        except ScoreboardError:
            return "refused"
        return "opened"

    assert in_child(look) == "refused"


def test_somebody_elses(board: Scoreboard) -> None:
    """A user can't be made to believe another user's scoreboard."""
    need(os.geteuid() == 0, "only root can be somebody else")
    os.chmod(str(board.path), 0o644)
    os.chmod(os.path.dirname(str(board.path)), 0o755)

    def as_another() -> str:
        # from inside: the folders above are pytest's own, and closed
        os.chdir(os.path.dirname(str(board.path)))
        os.setuid(12345)
        try:
            Scoreboard.open(os.path.basename(str(board.path)))
        except ScoreboardError as error:
            return str(error)
        return "opened"

    assert "is not a scoreboard of this user" in in_child(as_another)


def _dead() -> str:
    with Child(lambda line: line.say(start_time())) as child:
        started = child.hear()
        child.reap()
    return places.board_name(child.pid, started)


def test_what_the_dead_left_is_swept(tmp_path: Path, try_folders: Callable[..., None]) -> None:
    """A new pool removes the files of killed supervisors, and nothing else."""
    folder = tmp_path / "here"
    folder.mkdir(mode=0o700)
    with Child(lambda line: (line.say(start_time()), line.hear())) as living:  # type: ignore[func-returns-value]
        alive = places.board_name(living.pid, living.hear())
        reused = places.board_name(living.pid, 1)
        kept = {alive, "notes.txt", "x-1.board", "1-2.board.bak"}
        for name in kept | {_dead(), reused}:
            (folder / name).touch()
        try_folders(folder)

        made, warnings = Scoreboard.create(1, "test")

        assert (kept | {os.path.basename(str(made.path))}, []) == ({path.name for path in folder.iterdir()}, warnings)
        assert sorted([str(made.path), str(folder / alive)]) == sorted(places.living_boards())
    made.close()


def test_what_another_container_holds_is_left(tmp_path: Path, try_folders: Callable[..., None]) -> None:
    """They share the folder, and its pids mean nothing here: that its file is locked does."""
    try_folders(tmp_path / "oomsafe")
    first, _ = Scoreboard.create(1, "test")
    held = Path(first.path or "").rename(tmp_path / "oomsafe" / _dead())

    second, _ = Scoreboard.create(1, "test")
    assert held.exists()

    first.close()
    second.remove()
    Scoreboard.create(1, "test")
    assert not held.exists()


def test_places_to_try(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Memory first, then the runtime folder, then temporary files; what is no absolute folder is left out."""
    monkeypatch.undo()
    with monkeypatch.context() as here:
        here.setattr(places, "SHM", str(tmp_path))
        here.setenv("XDG_RUNTIME_DIR", "relative")
        here.setattr(places.tempfile, "gettempdir", lambda: str(tmp_path / "missing"))

        assert [str(tmp_path / f"oomsafe-{os.geteuid()}")] == list(places.folders())


def test_a_supervisor_without_any_scoreboard(monkeypatch: pytest.MonkeyPatch, said: Callable[[], list[str]]) -> None:
    """Not even memory: workers protect themselves unseen, and an error says so."""

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    supervisor = Supervisor(Policy(), "test", 1)

    slot = supervisor.reserve()
    guard = Guard.of_seat(supervisor.seat(slot), supervisor.board, slot, unit="requests", recycle=lambda: None)
    with guard.work("one"):
        pass
    supervisor.release(None)
    supervisor.close()

    assert supervisor.board is None
    assert guard.meter.counters.work == 1
    assert any(line.startswith("no scoreboard (") for line in said())
    assert logging.getLogger("oomsafe").handlers == []


def test_what_is_tried_next_is_named(try_folders: Callable[..., None], tmp_path: Path) -> None:
    """Each line about a folder that can't have the scoreboard says which is next."""
    taken, good = tmp_path / "taken", tmp_path / "good"
    taken.touch()
    try_folders(taken, good)
    made, warnings = Scoreboard.create(1, "test")
    made.remove()
    made.close()
    try_folders(taken)
    without, last = Scoreboard.create(1, "test")
    without.close()

    assert [re.sub(r"\(.*\)", "(...)", line) for line in warnings] == [f"no scoreboard in {taken} (...): trying {good}"]
    assert re.sub(r"\(.*\)", "(...)", last[0]) == f"no scoreboard in {taken} (...): trying memory"
