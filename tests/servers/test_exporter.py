"""The process that serves the metrics, beside a real supervisor: it lives as long as that, and no client can do it harm."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from exporting import exporter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_families
from prometheus_client.parser import text_string_to_metric_families
from serving import ENDING_WITH_US, Server, until

from oomsafe.kernel.process import is_alive, start_time

TOKEN = "an-example-of-a-token"


class Supervised(Server):
    """A supervisor of no server; `policy` is what it has for keywords."""

    def __init__(self, folder: Path, env: dict[str, str], policy: dict[str, Any]) -> None:
        self._policy = folder / "policy"
        self._policy.write_text(json.dumps(policy))
        script = Path(__file__).parent / "supervised.py"
        super().__init__(folder, [*ENDING_WITH_US, sys.executable, str(script)], env)

    def change(self, **policy: Any) -> None:
        """Another policy, by SIGHUP."""
        new = self._policy.with_suffix(".new")
        new.write_text(json.dumps(policy))
        new.rename(self._policy)
        self.signal(signal.SIGHUP)

    def exporter(self, times: int = 1) -> tuple[int, int]:
        """(pid, port) of the process that serves the metrics."""
        return exporter(self, times)


Export = Callable[..., Supervised]


@pytest.fixture
def export(started: Callable[..., Any]) -> Export:
    """export(metrics="127.0.0.1:0", ...), with what is in the environment as `env`."""

    def start(env: dict[str, str] | None = None, **policy: Any) -> Supervised:
        server: Supervised = started(lambda folder: Supervised(folder, env or {}, {"metrics": "127.0.0.1:0", **policy}))
        return server

    return start


def speak(port: int, request: bytes, host: str = "127.0.0.1") -> bytes:
    """Send it, and return all that comes until the other end closes."""
    with socket.create_connection((host, port), timeout=20) as client:
        client.sendall(request)
        return received(client)


def received(client: socket.socket) -> bytes:
    found = b""
    while part := client.recv(65536):
        found += part
    return found


def get(port: int, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, str]:
    """The status, and all of the answer."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items())
    answer = speak(port, f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode()).decode()
    return int(answer.split(" ")[1]), answer


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def gone(pid: int, started: int) -> bool:
    return not is_alive(pid, started)


def test_it_answers_in_both_formats(export: Export) -> None:
    """As prometheus_client reads them: the same samples in both, and nothing for HEAD."""
    _, port = export().exporter()

    status, plain = get(port)
    _, opened = get(port, Accept="application/openmetrics-text; version=1.0.0; q=0.75, text/plain;q=0.5")
    head, body = get(port, method="HEAD")[1].split("\r\n\r\n")

    names = {
        sample.name
        for parse, text in ((text_string_to_metric_families, plain), (open_families, opened))
        for family in parse(text.partition("\r\n\r\n")[2])
        for sample in family.samples
    }
    assert status == 200
    assert "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n" in plain
    assert "Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n" in opened
    assert {"oomsafe_workers", "oomsafe_recycles_total", "oomsafe_pool_budget_bytes"} <= names
    assert (body, head.startswith("HTTP/1.1 200 OK\r\n")) == ("", True)


def test_it_answers_while_its_supervisor_and_all_workers_hang(export: Export) -> None:
    """SIGSTOP holds them; the metrics still say how many workers there are."""
    server = export()
    _, port = server.exporter()
    stopped = [*(worker.pid for worker in until(lambda: server.pool().workers[1:] and server.pool().workers, "two workers")), server.pid]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)

    status, text = get(port)

    assert (status, 'oomsafe_workers{state="starting"} 2\n' in text) == (200, True)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_supervisor(export: Export, how: int) -> None:
    """At once, also where a process that outlives it has the socket between them."""
    server = export({"UNKNOWN_FORK": "1"})
    pid, port = server.exporter()
    started = start_time(pid) or 0

    server.signal(how)

    until(lambda: gone(pid, started), "it is gone", 2)
    server.ended()
    with pytest.raises(ConnectionRefusedError):
        get(port)


def test_it_is_gone_when_the_supervisor_has_closed(export: Export) -> None:
    """Reaped, too: whoever goes on in that process has no zombie."""
    server = export()
    pid, _ = server.exporter()
    server.signal(signal.SIGTERM)

    server.wait_for("closed")

    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT"])
def test_it_leaves_signals_to_the_server(export: Export, number: str) -> None:
    """Those that are sent to a whole process group: it serves while the workers drain."""
    pid, port = export().exporter()

    os.kill(pid, getattr(signal, number))

    assert get(port)[0] == 200


def test_one_that_was_killed_is_started_again(export: Export) -> None:
    """After a second, then after two, with a line each time; and no zombie is left."""
    server = export()
    for times, pause in ((1, "1 s"), (2, "2 s")):
        pid, port = server.exporter(times)
        os.kill(pid, signal.SIGKILL)
        server.wait_for(f"the metrics process (pid {pid}) has ended; next start in {pause}")
        another, port = server.exporter(times + 1)

        assert another != pid
        assert get(port)[0] == 200
        assert not Path(f"/proc/{pid}").exists()


def test_it_inherits_nothing_and_is_killed_before_its_supervisor(export: Export) -> None:
    """Neither listeners nor files; its score is its supervisor's and what workers have, and its name says what it is."""
    server = export({"INHERITABLE": "1"})
    pid, _ = server.exporter()

    proc = Path(f"/proc/{pid}")
    open_there = sorted(re.sub(r"\d+", "N", os.readlink(fd)) for fd in (proc / "fd").iterdir())
    mine, own = score(server.pid), score(pid)

    board = "/memfd:oomsafe-scoreboard (deleted)" if os.geteuid() == 0 else f"/dev/shm/oomsafe-N/{server.pid}-N.board"
    expected = ["/dev/null"] * 2 + [re.sub(r"\d+", "N", board), "anon_inode:[eventpoll]", "anon_inode:[pidfd]", "socket:[N]", "socket:[N]"]
    assert sorted(expected) == open_there
    assert own > mine
    assert (proc / "comm").read_text() == "oomsafe-metrics\n"
    until(lambda: {score(worker.pid) for worker in server.pool().workers} == {own}, "the workers have the same score")


@pytest.mark.parametrize("closed", ["0 1 2", "0", "2"])
def test_it_starts_where_standard_descriptors_are_closed(export: Export, closed: str) -> None:
    """As of a daemon: the numbers are the scoreboard's, or the socket's, by then."""
    path = f"/tmp/oomsafe-test-{os.getpid()}-{closed[0]}.sock"
    server = export({"CLOSED": closed}, metrics=f"unix:{path}")
    server.exporter()

    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert b'oomsafe_workers{state="starting"} 2\n' in received(client)
    server.signal(signal.SIGTERM)
    until(lambda: not os.path.exists(path), "its socket is removed")


def test_a_patched_supervisor_has_no_hub(export: Export) -> None:
    """gevent's own subprocess would watch children, in the arbiter too: what starts the process is not patched."""
    server = export({"GEVENT": "1"})
    pid, port = server.exporter()

    os.kill(pid, signal.SIGKILL)
    _, port = server.exporter(2)

    assert get(port)[0] == 200
    caught = re.search(r"SigCgt:\s+(\w+)", Path(f"/proc/{server.pid}/status").read_text())
    assert caught
    assert not int(caught[1], 16) & 1 << signal.SIGCHLD - 1


def test_a_reload_changes_the_address_and_turns_it_off(export: Export) -> None:
    """The same address with another token, another one, none, and one again; nobody finds it in use."""
    server = export()
    first, port = server.exporter()
    server.change(metrics=f"127.0.0.1:{port}", metrics_token=TOKEN)
    second, _ = server.exporter(2)
    assert get(port)[0] == 401
    server.change(metrics=f"127.0.0.1:{port}", metrics_token=TOKEN)
    server.change(metrics="[::1]:0")
    third, other = server.exporter(3)
    assert "metrics on http://[::1]:" in server.log()
    assert b"200 OK" in speak(other, b"GET /metrics HTTP/1.1\r\nHost: [::1]:%d\r\n\r\n" % other, "::1")
    server.change()
    server.wait_for("metrics are off")
    assert not [pid for pid in (first, second, third) if Path(f"/proc/{pid}").exists()]
    server.change(metrics="127.0.0.1:0")

    assert get(server.exporter(4)[1])[0] == 200
    assert not server.lines("can't be served")
    assert not server.lines("oomsafe failed")


def test_a_second_pool_says_who_has_its_address_and_takes_over(export: Export) -> None:
    """One line; the first goes on; when it is gone the second serves."""
    first = export()
    pid, port = first.exporter()
    second = export(metrics=f"127.0.0.1:{port}")

    (line,) = second.wait_for("can't be served")
    assert f"127.0.0.1:{port}: Address already in use (by process {pid}, oomsafe-metrics)" in line
    assert get(port)[0] == 200
    first.stop()
    another, _ = second.exporter()

    assert another != pid
    assert get(port)[0] == 200
    assert len(second.lines("can't be served")) == 1


def test_an_address_that_others_reach_takes_a_token(export: Export) -> None:
    """Without one a line says so, and nothing serves."""
    server = export(metrics="0.0.0.0:0")

    (line,) = server.wait_for("metrics=0.0.0.0:0 is off: other machines can reach that address, so metrics_token must be set")

    assert "or use 127.0.0.1:" in line
    assert [pid for pid in server.workers() if Path(f"/proc/{pid}/comm").read_text() == "oomsafe-metrics\n"] == []


def test_a_token(export: Export) -> None:
    """Who has not got it learns nothing, not even what is where; it stands neither in the log nor in the arguments."""
    server = export(metrics="0.0.0.0:0", metrics_token=TOKEN)
    pid, port = server.exporter()

    wrong = ["", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", "Bearer", f"Bearer {TOKEN} {TOKEN}", "Bearer \xe9"]
    answers = [get(port, path, Authorization=value) for value in wrong for path in ("/metrics", "/other")]

    assert {status for status, _ in answers} == {401}
    assert all("oomsafe_" not in text and "WWW-Authenticate: Bearer\r\n" in text for _, text in answers)
    assert [get(port, Authorization=f"{scheme} {TOKEN}", Host="any.example")[0] for scheme in ("Bearer", "bearer")] == [200, 200]
    assert TOKEN not in server.log() + Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:1", 200), ("127.0.0.1", 200), ("[::1]:9400", 200), ("[::1]", 200), ("127.0.0.2:9400", 403),
        ("evil.example", 403), ("evil.example:9400", 403), ("127.0.0.1.evil.example", 403), ("", 403), ("localhost.", 403),
        ("127.0.0.1:9400@evil.example", 403),
    ],
)  # fmt: skip
def test_no_page_reads_it_through_a_browser(export: Export, host: str, status: int) -> None:
    """A page whose name has come to mean this machine (DNS rebinding) sends its own name."""
    answer = get(export().exporter()[1], Host=host)

    assert (status, "oomsafe_workers" in answer[1]) == (answer[0], status == 200)
    assert "evil" not in answer[1]
    assert "access-control-allow" not in answer[1].lower()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200), (b"GET /metrics?name[]=x HTTP/1.1\nHost: localhost\n\n", 200),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", 404), (b"GET /metrics/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 404),
        (b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"DELETE /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 405), (b"nonsense\r\n\r\n", 400), (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400), (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost : localhost\r\n\r\n", 400), (b"GET /metrics HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400), (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 300_000, 431), (b"x" * 3_000_000, 431),
    ],
    ids=lambda part: repr(part)[:40],
)  # fmt: skip
def test_what_is_no_such_request(export: Export, request_: bytes, status: int) -> None:
    """Is answered in one line, however long it is, and the next one is served."""
    _, port = export().exporter()

    answer = speak(port, request_)

    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:80]
    assert get(port)[0] == 200


def test_slow_clients_and_floods_keep_nobody_out(export: Export) -> None:
    """200 connections that send nothing, or half a request, or take no answer, and as many that go: another is answered at once."""
    server = export()
    pid, port = server.exporter()
    with ExitStack() as stack:
        for number in range(200):
            client = stack.enter_context(closing(socket.create_connection(("127.0.0.1", port), timeout=20)))
            if number % 4:
                client.sendall((b"GET /metrics HT", b"GET /metrics HTTP/1.1\r\n\r\n", b"\r\n\r\n")[number % 4 - 1])
            if number % 7 == 0:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                client.close()  # a reset
            if number % 20 == 0:
                began = time.monotonic()
                assert get(port)[0] == 200
                assert time.monotonic() - began < 2
        assert len(list(Path(f"/proc/{pid}/fd").iterdir())) <= 40
        assert get(port)[0] == 200
        until(lambda: len(list(Path(f"/proc/{pid}/fd").iterdir())) <= 7, "all are closed that have said nothing for five seconds")
    assert get(port)[0] == 200
    assert server.exporter()[0] == pid


@pytest.fixture
def folder() -> Iterator[Path]:
    """For a socket: pytest's own are longer than a socket's path may be."""
    path = Path(f"/tmp/oomsafe-sockets-{os.getpid()}")
    path.mkdir(mode=0o700)
    yield path
    for left in path.iterdir():
        left.unlink()
    path.rmdir()


def ask_at(path: Path) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: whatever\r\n\r\n")
        return received(client)


def test_a_socket_in_the_file_system(export: Export, folder: Path) -> None:
    """0600; a killed process leaves it, and the next one takes its place; nothing is left at the end."""
    path = folder / "metrics.sock"
    server = export(metrics=f"unix:{path}")
    pid, _ = server.exporter()
    assert f"metrics on unix:{path} (pid {pid})" in server.log()
    assert b"oomsafe_workers" in ask_at(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    os.kill(pid, signal.SIGKILL)
    server.exporter(2)
    assert b"oomsafe_workers" in ask_at(path)
    server.stop()

    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("what", ["file", "link to a socket", "served", "folder that is missing"])
def test_what_lies_there_is_left_alone(export: Export, folder: Path, what: str) -> None:
    """A file, a link, the socket of somebody who listens: one line, and all is as it was."""
    path = folder / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as other:
        if what == "file":
            path.write_text("precious")
        elif what == "folder that is missing":
            path = folder / "missing" / "metrics.sock"
        else:
            other.bind(str(folder / "other.sock") if what.startswith("link") else str(path))
            if what.startswith("link"):
                path.symlink_to(folder / "other.sock")
            else:
                other.listen()
        before = sorted((found.name, found.lstat().st_ino) for found in folder.iterdir())
        server = export(metrics=f"unix:{path}")

        (line,) = server.wait_for("can't be served")
        server.stop()

        assert f"metrics can't be served on unix:{path}: " in line
        assert before == sorted((found.name, found.lstat().st_ino) for found in folder.iterdir())


def test_it_takes_little(export: Export) -> None:
    """Resident after a hundred answers: less than 20 MiB."""
    pid, port = export().exporter()
    for _ in range(100):
        get(port)

    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    assert int(found[1]) < 20 << 10, status
