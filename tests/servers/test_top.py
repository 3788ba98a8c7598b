"""`oomsafe top` in a real terminal, with real pools."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from serving import Gunicorn, until
from terminal import SANE, Terminal

from oomsafe.kernel.process import is_alive, start_time

OOMSAFE = (sys.executable, "-m", "oomsafe.cli")
HANGING = "import time\ndef wsgi(environ, start_response): time.sleep(60)"

Open = Callable[..., Terminal]

#: pid, state, used, limit, bar, share.
ROW = re.compile(r"^ +(\d+) (serving|waiting|starting|draining|leaving) +([\d.]+ MiB) +([\d.]+ [MG]iB) ([█░]+) +(\d+)%")


@pytest.fixture
def top(tmp_path: Path) -> Iterator[Open]:
    """Open `oomsafe top` for one pool."""
    opened: list[Terminal] = []

    def start(gunicorn: Gunicorn | None = None, *argv: str, **more: object) -> Terminal:
        folder = tmp_path / f"t{len(opened)}"
        folder.mkdir()
        only = () if gunicorn is None else ("--scoreboard", gunicorn.pool_path())
        opened.append(Terminal(folder, *OOMSAFE, "top", *only, *argv, **more))  # type: ignore[arg-type]
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.hang_up()


def rows(screen: str) -> list[re.Match[str]]:
    """Its lines that show a worker."""
    return [row for line in screen.splitlines() if (row := ROW.match(line))]


def shows(terminal: Terminal, pids: set[int]) -> list[re.Match[str]]:
    """Wait until exactly these workers stand there."""
    return until(lambda: (found := rows(terminal.screen())) and {int(row[1]) for row in found} == pids and found, f"{pids} on the screen")


def test_the_workers_of_a_pool_against_their_limits(serve: Callable[..., Gunicorn], top: Open) -> None:
    """In 80 x 24; q ends it, and the terminal is as before."""
    gunicorn = serve("sync", soft_limit="100MiB", name="shop").serving()
    terminal = top(gunicorn)

    found = shows(terminal, set(gunicorn.workers()))

    screen = terminal.screen()
    assert f"shop · gunicorn sync · supervisor {gunicorn.pid}" in screen
    assert "holds " in screen
    assert "recycles 0" in screen
    assert max(map(len, screen.splitlines())) <= 80
    for row in found:
        worker = gunicorn.worker(int(row[1]))
        assert worker.figures.soft is not None
        assert float(row[4].split()[0]) == pytest.approx(worker.figures.soft / (1 << 20), abs=0.6)
        assert row[5].count("█") == pytest.approx(int(row[6]) / 100 * len(row[5]), abs=1)
    assert terminal.state != SANE
    terminal.press("q")
    terminal.until("ended 0")
    until(lambda: terminal.state == SANE, "the terminal is as before")
    screen = terminal.until("echok")  # what stty prints comes after that
    assert re.search(r"(?<!-)\becho\b", screen)
    assert re.search(r"(?<!-)\bicanon\b", screen)


def test_every_pool_of_the_machine(serve: Callable[..., Gunicorn], top: Open) -> None:
    """Without an option; a pool that begins later comes by itself."""
    first = serve("sync", 1, soft_limit="1GiB", name="aaa-first").serving(1)
    terminal = top(rows=100)
    terminal.until("aaa-first · gunicorn sync")

    second = serve("sync", 1, soft_limit="1GiB", name="aaa-second").serving(1)

    terminal.until("aaa-second · gunicorn sync")
    pids = {*first.workers(), *second.workers()}
    until(lambda: pids <= {int(row[1]) for row in rows(terminal.screen())}, "the workers of both")


def test_a_growing_worker_has_a_time_to_its_limit(serve: Callable[..., Gunicorn], top: Open) -> None:
    """From its last readings; the one that does not grow has none."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)
    terminal = top(gunicorn)
    (pid,) = gunicorn.workers()
    end = threading.Event()

    def leak() -> None:
        while not end.wait(0.1):
            gunicorn.get("/leak?kib=256")

    thread = threading.Thread(target=leak)
    thread.start()
    try:
        grows = re.compile(rf" {pid} .* \+([\d.]+) ([KM]iB)/s +([\d.]+) (min|h)")
        found = until(lambda: grows.search(terminal.screen()), "a time to its limit")
    finally:
        end.set()
        thread.join()

    size, unit, time_, what = found.groups()
    pace = float(size) * (1 << 20 if unit == "MiB" else 1 << 10)
    worker = gunicorn.worker(pid)
    assert worker.figures.soft is not None
    left = worker.figures.soft - (worker.used or 0)
    assert float(time_) * {"min": 60, "h": 3600}[what] == pytest.approx(left / pace, rel=0.3)
    assert "in flight" in terminal.screen()


def test_pause(serve: Callable[..., Gunicorn], top: Open) -> None:
    """What stands there stays, until it goes on."""
    gunicorn = serve("sync", soft_limit="1GiB").serving()
    terminal = top(gunicorn)
    terminal.until(" 0 requests")

    terminal.press("p")
    terminal.until("PAUSED")
    for _ in range(7):
        gunicorn.get("/")
    until(lambda: gunicorn.pool().totals.work == 7, "they are counted", 10)
    time.sleep(2.5)  # nothing is to be waited for: longer than two refreshes
    assert " 0 requests" in terminal.screen()
    terminal.press("p")

    assert "PAUSED" not in terminal.until(" 7 requests")


def test_sort(serve: Callable[..., Gunicorn], top: Open) -> None:
    """Each key press sorts by the next figure."""
    gunicorn = serve("sync", 3, soft_limit="1GiB").serving(3)
    gunicorn.get("/fill?mib=80")
    by_slot = [worker.pid for worker in sorted(gunicorn.pool().workers, key=lambda worker: worker.slot)]
    terminal = top(gunicorn)
    shows(terminal, set(by_slot))
    until(lambda: float(rows(terminal.screen())[0][3].split()[0]) > 60, "the biggest is the first")

    for name in ("% of limit", "growth", "time to limit", "slot"):
        terminal.press("s")
        terminal.until(f"by {name}")

    assert [int(row[1]) for row in rows(terminal.screen())] == by_slot


def test_recycle_the_marked_one(serve: Callable[..., Gunicorn], top: Open) -> None:
    """After a question, which any other key than y declines; the worker is really replaced."""
    gunicorn = serve("sync", 2, soft_limit="1GiB", name="shop").serving()
    before = gunicorn.workers()
    terminal = top(gunicorn)
    shows(terminal, set(before))

    terminal.press("Down", "r")
    asked = re.search(r"recycle worker (\d+) \(slot (\d+)\) of shop\? y/n", terminal.until("? y/n"))
    assert asked
    terminal.press("n")
    terminal.until("nothing is done")
    assert not gunicorn.lines("operator's order")

    terminal.press("r")
    terminal.until(f"recycle worker {asked[1]} (slot {asked[2]}) of shop? y/n")
    terminal.press("y")
    terminal.until(f"worker {asked[1]} (slot {asked[2]}) of shop is to be recycled")

    gunicorn.wait_for(f"worker {asked[1]} (slot {asked[2]}) recycling: by an operator's order")
    until(lambda: int(asked[1]) not in gunicorn.workers(), "it is gone")
    shows(terminal, set(gunicorn.serving().workers()))
    assert "recycles 1" in terminal.screen()
    assert len(set(gunicorn.workers()) & set(before)) == 1


def test_trace_the_marked_one(serve: Callable[..., Gunicorn], top: Open) -> None:
    """After a question: it is probed, which the screen shows until there is a finding; where that is refused, it says why."""
    gunicorn = serve("sync", 2, soft_limit="1GiB", name="shop", env={"OOMSAFE_PROBE": "false"}).serving()
    terminal = top(gunicorn)
    shows(terminal, set(gunicorn.workers()))

    terminal.press("Down", "t")
    asked = re.search(r"trace allocations of worker (\d+) \(slot (\d+)\) of shop\? y/n", terminal.until("? y/n"))
    assert asked
    terminal.press("n")
    terminal.until("nothing is done")
    terminal.press("t")
    terminal.until("? y/n")
    terminal.press("y")
    terminal.until(f"worker {asked[1]} (slot {asked[2]}) of shop is to trace its allocations")
    terminal.until(f"worker {asked[1]} is probed: ")
    gunicorn.wait_for("traces its allocations with")

    terminal.press("t")
    terminal.until("? y/n")
    terminal.press("y")
    terminal.until("a worker of this pool is probed already")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_the_terminal_as_it_was(serve: Callable[..., Gunicorn], top: Open, number: signal.Signals, status: int) -> None:
    """And the exit status says which."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)
    terminal = top(gunicorn)
    shows(terminal, set(gunicorn.workers()))

    os.kill(terminal.pid, number)

    terminal.until(f"ended {status}")
    until(lambda: terminal.state == SANE, "the terminal is as before")
    screen = terminal.until("echok")  # what stty prints comes after that
    assert re.search(r"(?<!-)\bicanon\b", screen)
    assert "Traceback" not in screen


def test_ctrl_c_ends_it(top: Open) -> None:
    """Also where there is no pool."""
    terminal = top(None, "--scoreboard", "/nowhere/1-1.board")
    terminal.until("/nowhere/1-1.board: No such file or directory")

    terminal.press("C-c")

    terminal.until("ended 0")


def test_a_connection_that_breaks(serve: Callable[..., Gunicorn], top: Open) -> None:
    """No process is left behind."""
    gunicorn = serve("sync", 1, soft_limit="1GiB").serving(1)
    terminal = top(gunicorn)
    shows(terminal, set(gunicorn.workers()))
    pid = terminal.pid
    started = start_time(pid) or 0

    terminal.hang_up()

    until(lambda: not is_alive(pid, started), "it has ended")


def test_forty_columns_and_more(serve: Callable[..., Gunicorn], top: Open) -> None:
    """What matters most stays; other columns come with the room for them."""
    gunicorn = serve("sync", 2, soft_limit="1GiB", name="shop").serving()
    pids = set(gunicorn.workers())
    terminal = top(gunicorn, columns=40)

    line = r"^ +%d .*[\d.]+ MiB +\d+%% +\S+$"
    until(lambda: all(re.search(line % pid, terminal.screen(), re.MULTILINE) for pid in pids), "what matters most")
    narrow = terminal.screen()
    assert max(map(len, narrow.splitlines())) <= 40
    assert "limit " not in narrow.splitlines()[1].replace("to limit", "")
    terminal.resize(120, 30)
    shows(terminal, pids)
    assert "busy in flight" in terminal.until("busy in flight")
    terminal.resize(20, 5)
    until(lambda: max(map(len, terminal.screen().splitlines())) <= 20, "it fits")
    terminal.resize(80, 24)
    shows(terminal, pids)


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=["colour", "NO_COLOR"])
def test_colours(serve: Callable[..., Gunicorn], top: Open, env: dict[str, str]) -> None:
    """The terminal's own, and none where the user wants none."""
    gunicorn = serve("sync", 1, soft_limit="100MiB").serving(1)
    terminal = top(gunicorn, env=env)
    shows(terminal, set(gunicorn.workers()))

    styles = re.findall(r"\x1b\[([\d;]*)m", terminal.screen(styled=True))

    colours = {code for style in styles for code in style.split(";") if re.fullmatch(r"[349][0-8]|10\d", code)}
    assert bool(colours) == (not env)


def test_names_from_outside_are_text(serve: Callable[..., Gunicorn], top: Open) -> None:
    """Neither markup nor escape sequences of a pool's name or a request's path have an effect."""
    settings = f"import pathlib; pathlib.Path('hanging.py').write_text({HANGING!r})"
    gunicorn = serve("sync", 1, app="hanging:wsgi", settings=settings, soft_limit="1GiB", name="[red]shop[/red]").serving(1)
    connection = gunicorn.connect()
    connection.request("GET", "/[bold]%1b%5d0;owned%07/[/nothing]")
    terminal = top(gunicorn, columns=160)

    screen = terminal.until("owned")

    assert "GET /[bold]?]0;owned?/[/nothing]" in screen
    assert "[red]shop[/red] · gunicorn sync" in screen
    connection.close()


def test_a_pool_that_ends_while_it_is_shown(serve: Callable[..., Gunicorn], top: Open) -> None:
    """One line says so, and the other goes on."""
    gunicorn = serve("sync", 1, soft_limit="1GiB", name="aaa-shop").serving(1)
    terminal = top(rows=60)
    terminal.until("aaa-shop · gunicorn sync")

    gunicorn.stop()

    screen = terminal.until(f"its supervisor {gunicorn.pid} has ended")
    assert "Traceback" not in screen
    terminal.press("q")
    terminal.until("ended 0")


def test_a_file_that_is_no_scoreboard(top: Open, tmp_path: Path) -> None:
    """One line."""
    (tmp_path / "board").write_bytes(bytes(9000))

    screen = top(None, "--scoreboard", str(tmp_path / "board"), columns=200).until("is not a scoreboard")

    assert len([line for line in screen.splitlines() if "board" in line]) == 1


def test_help(serve: Callable[..., Gunicorn], top: Open) -> None:
    """The keys, and back, with the mark where it was; and more about the marked worker above the foot."""
    gunicorn = serve("sync", soft_limit="1GiB").serving()
    terminal = top(gunicorn)
    found = shows(terminal, set(gunicorn.workers()))
    terminal.press("s", "s", "s", "s", "End")  # by slot, where they don't change places
    last = max(gunicorn.pool().workers, key=lambda worker: worker.slot)
    about = f"worker {last.pid} (slot {last.slot}): rss "
    terminal.until(about)

    terminal.press("?")
    screen = terminal.until("replace the marked worker, after a question")
    assert not rows(screen)
    assert about not in screen
    terminal.press("?")

    terminal.until(about)
    assert len(found) == len(shows(terminal, set(gunicorn.workers())))


def piped(*argv: str, tail: str = "") -> subprocess.CompletedProcess[str]:
    """Without a terminal."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OOMSAFE_")}
    command = f"{' '.join(OOMSAFE)} top {' '.join(argv)} {tail}"
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, env=environ, check=False)


def test_without_a_terminal(serve: Callable[..., Gunicorn]) -> None:
    """One plain table, as by status; a reader that closes its pipe early is no error worth a traceback."""
    gunicorn = serve("sync", soft_limit="1GiB").serving()

    ended = piped("--scoreboard", gunicorn.pool_path())
    cut = piped("--scoreboard", gunicorn.pool_path(), tail="| head -c 1")

    assert ended.returncode == 0
    assert "\x1b" not in ended.stdout
    assert all(re.search(rf"^ +{pid}  serving ", ended.stdout, re.MULTILINE) for pid in gunicorn.workers())
    assert cut.stderr == ""


def test_without_a_pool(tmp_path: Path) -> None:
    """Exit status 1, and one line."""
    ended = piped("--scoreboard", str(tmp_path / "none"))

    assert ended.returncode == 1
    assert "no pool of this user is guarded by oomsafe now" in ended.stderr
    assert ended.stdout == ""


def test_without_textual(tmp_path: Path) -> None:
    """It says what to install; a pipe does without."""
    (tmp_path / "textual.py").write_text("raise ModuleNotFoundError('No module named textual', name='textual')")
    (tmp_path / "t").mkdir()
    with Terminal(tmp_path / "t", *OOMSAFE, "top", env={"PYTHONPATH": str(tmp_path)}) as terminal:
        assert "pip install 'oomsafe[top]'" in terminal.until("ended 2")
