"""``oomsafe explain`` as a real process: what it prints, its exit status, bad input; and its JSON against docs/explain.md."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from needs import need
from oom_reports import HOG, LOGGERS, SMALL, killed_line, report

from oomsafe.errors import KernelLogError
from oomsafe.kernel import kernel_log

DMESG = LOGGERS["dmesg"][0]
GROUP = [*report(), "Tasks in /a are going to be killed due to memory.oom.group set", *killed_line("6.8", SMALL)]
REAPED = "oom_reaper: reaped process 27718 (python3), now anon-rss:0kB, file-rss:0kB, shmem-rss:0kB"


def run(*argv: str, log: str | bytes = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Its end; `log` is its standard input."""
    environ = {**{k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR")}, **(env or {})}
    data = log.encode() if isinstance(log, str) else log
    ended = subprocess.run(
        [sys.executable, "-m", "oomsafe.cli", "explain", *argv], input=data, capture_output=True, env=environ, timeout=60
    )
    return subprocess.CompletedProcess(argv, ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def test_it_explains_a_kill() -> None:
    """Who, which limit, who held what, why, and what to do."""
    ended = run(log=DMESG(report(victim=replace(SMALL, adj=1000), processes=(HOG, replace(SMALL, adj=1000)))))

    assert (ended.returncode, ended.stderr) == (0, "")
    words = " ".join(ended.stdout.split())
    for wanted in (
        "A memory cgroup ran out of memory: gunicorn (27700) was killed",
        "limit 200 MiB, 200 MiB in use of /kubepods/burstable/pod1234/app",
        "killed gunicorn (27700): uid 0, 4.7 MiB anonymous, 1.2 MiB files, 0 B shared, 40.0 KiB page tables, oom_score_adj 1000",
        "27700 gunicorn 5.9 MiB 0 B 40.0 KiB 1000 52510 0",
        "27718 python3 110 MiB 0 B 276 KiB 0 28309 0",
        "why It had the most points of 2: 5.9 MiB resident + 40.0 KiB of page tables + 199 MiB for its oom_score_adj of 1000 (1000/1000 of",
        "Without any oom_score_adj, python3 (27718) would have been chosen: it held 110 MiB.",
        "do It was small (5.9 MiB), and killed for its oom_score_adj of 1000",
    ):
        assert wanted in words


@pytest.mark.parametrize(("columns", "widest"), [("40", 40), ("80", 80), ("200", 200), ("10", 60)])
def test_it_keeps_to_the_terminal_s_width(columns: str, widest: int) -> None:
    """No figure is cut: in the narrowest the table is as wide as it must be."""
    long = replace(HOG, comm="oomsafe-w1-a1b2", adj=300)
    ended = run(log=DMESG(GROUP + report("4.9", memcg=False) + report(victim=long, processes=(SMALL, long))), env={"COLUMNS": columns})

    assert ended.returncode == 0
    assert max(map(len, ended.stdout.splitlines())) <= widest
    assert "110 MiB" in ended.stdout


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}, {"TERM": "dumb"}])
def test_no_escape_reaches_a_pipe(env: dict[str, str]) -> None:
    """Nor a colour where none is wanted; a name from the log moves no cursor."""
    evil = replace(HOG, comm="\x1b]0;x\x07\x1b[2J")
    ended = run(log=DMESG(report(victim=evil, processes=(evil, SMALL))), env=env)

    assert ended.returncode == 0
    assert "?]0;x??[2J (27718) was killed" in ended.stdout
    assert not re.search(r"\x1b\]|\x1b\[2J|\x07", ended.stdout)
    assert "\x1b" not in ended.stdout or "FORCE_COLOR" in env


def test_markup_in_a_log_is_text() -> None:
    """A name in rich's markup is shown as it is."""
    evil = replace(HOG, comm="[red]x[/nope]")
    assert "[red]x[/nope] (27718)" in run(log=DMESG(report(victim=evil, processes=(evil,)))).stdout


def test_none_found() -> None:
    """Exit status 1, and one line that says so; JSON says it with an empty array."""
    ended, as_json = run(log="nothing here\n"), run("--json", log="")

    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "no kill of the kernel's OOM killer is in this log\n"
    assert (as_json.returncode, json.loads(as_json.stdout)) == (1, {"version": 1, "events": []})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("a folder", "Is a directory"),
        (b"LPKSHHRH\0\0\0\0", "is a file of the journal's own: journalctl --file"),
        (b"\x1f\x8b\x08\x00rubbish", ""),
        (gzip.compress(b"x" * 100_000)[:-9], "Compressed file ended"),
    ],
)
def test_unreadable(tmp_path: Path, content: bytes | str | None, reason: str) -> None:
    """Exit status 2 and one line; never a traceback."""
    path = tmp_path / "log"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()

    ended = run(str(path))

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert reason in ended.stderr
    assert str(path) in ended.stderr


def test_a_file_of_another_user(tmp_path: Path) -> None:
    """Not readable without being root."""
    need(os.geteuid() == 0, "only root becomes another user")
    path = tmp_path / "log"
    path.write_text("")
    path.chmod(0o600)
    # locale first, which is imported late by some Pythons, from where that user may not read
    code = f"import locale, os; from oomsafe.cli.explain import explain; os.setuid(65534); explain([{str(path)!r}])"

    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert (ended.returncode, ended.stderr) == (2, f"oomsafe explain: {path} can't be read: Permission denied\n")


def test_files(tmp_path: Path) -> None:
    """Plain and gzipped, as logrotate leaves them; - is standard input."""
    text = DMESG(report())
    (tmp_path / "kern.log").write_text(text)
    (tmp_path / "kern.log.2.gz").write_bytes(gzip.compress(text.encode()) + gzip.compress(b"more\n"))

    plain, zipped, piped = run(str(tmp_path / "kern.log")), run(str(tmp_path / "kern.log.2.gz")), run("-", log=text)

    assert plain.stdout == zipped.stdout == piped.stdout != ""
    assert "pipe it through zcat" in run(log=gzip.compress(text.encode())).stderr


def test_two_sources_are_one_too_many() -> None:
    """A usage error."""
    assert run("-", "--journal").returncode == 2
    assert "give one of FILE, --journal and --dmesg" in run("--dmesg", "--journal").stderr


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`| head -1` ends it without a word."""
    log = "".join(DMESG(report(victim=replace(HOG, pid=9_000 + at))).replace("[ 1740.", f"[{at + 2000:5d}.") for at in range(300))
    (tmp_path / "log").write_text(log)
    for argv in ((), ("--json",)):
        command = [sys.executable, "-m", "oomsafe.cli", "explain", str(tmp_path / "log"), *argv]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stderr
            process.stdout.read(10)
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(30) == 0


def test_the_ring_buffer_of_this_machine() -> None:
    """It can be read, or one line says which permission is missing."""
    ended = run("--dmesg", "--json")

    if ended.returncode == 2:
        assert "CAP_SYSLOG" in ended.stderr or "can't be read" in ended.stderr
    else:
        assert json.loads(ended.stdout)["version"] == 1


def test_an_unreadable_ring_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither /dev/kmsg nor dmesg."""
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(
        KernelLogError, match=r"no-kmsg can't be read .No such file or directory.: give a FILE, pipe a log in, or try --journal"
    ):
        list(kernel_log.ring_buffer(str(tmp_path / "no-kmsg")))


def fake(folder: Path, name: str, script: str) -> None:
    """A program of this name."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("script", "status", "said"),
    [
        (f"cat <<'E'\n{LOGGERS['journalctl short-iso'][0](report())}E", 0, ""),
        ("exit 0", 1, "no kill of the kernel's OOM killer is in this log"),
        ("echo 'No journal files were opened due to insufficient permissions.' >&2; exit 1", 2, "members of the group systemd-journal"),
        (
            "echo 'Hint: You are currently not seeing messages from other users and the system.' >&2",
            2,
            "members of the group systemd-journal",
        ),
        ("exit 3", 2, "exit status 3"),
    ],
)
def test_the_journal(tmp_path: Path, script: str, status: int, said: str) -> None:
    """What journalctl prints; if it gives nothing, its own words and who may read it."""
    fake(tmp_path, "journalctl", script)

    ended = run("--journal", env={"PATH": f"{tmp_path}:/usr/bin:/bin"})

    assert ended.returncode == status
    assert said in ended.stderr
    assert ended.stderr.count("\n") <= 1
    assert bool(ended.stdout) == (status == 0)


def test_no_journal(tmp_path: Path) -> None:
    """journalctl is not installed."""
    ended = run("--journal", env={"PATH": str(tmp_path)})

    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "journalctl is not installed here" in ended.stderr


def test_a_journal_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given up, and ended."""
    fake(tmp_path, "journalctl", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(kernel_log, "PATIENCE", 0.2)

    with pytest.raises(KernelLogError, match="journalctl printed nothing for 0 s"):
        list(kernel_log.journal())


def keys(value: Any, prefix: str = "") -> Iterator[str]:
    """The path of each key: events[].victim.pid."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            yield from keys(inner, f"{prefix}{key}.")
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner, f"{prefix.removesuffix('.')}[].")


def test_the_json_is_the_documented_one() -> None:
    """Each key of docs/explain.md, and no other; and its version."""
    log = DMESG([*GROUP, REAPED]) + DMESG(report("4.9", memcg=False)).replace("[ 1740.", "[ 9740.")
    log += "".join(f"[ 9999.000000] {line}\n" for line in report()[:-1]) + "[ 9999.000000] Out of memory and no killable processes...\n"
    page = (Path(__file__).parents[2] / "docs" / "explain.md").read_text()
    documented = set(re.findall(r"^\| `([a-z_\[\].]+)` \|", page.partition("## JSON")[2], re.MULTILINE))

    ended = run("--json", log=log)

    record = json.loads(ended.stdout)
    assert set(keys(record)) == documented
    assert f'"version": {record["version"]}' in page
    assert [event["outcome"] for event in record["events"]] == ["group killed", "killed", "none killable"]


def test_a_missing_figure_is_null() -> None:
    """Only the last line is left: nothing else is made up."""
    (event,) = json.loads(run("--json", log=DMESG(killed_line("4.4", HOG)[1:])).stdout)["events"]

    assert (event["scope"], event["cgroup"], event["invoker"], event["total_pages"], event["without_scores"]) == ("unknown", *[None] * 4)
    assert event["victim"] == {
        "pid": 27718, "comm": "python3", "uid": None, "total_vm": 124_329_984, "anon": 111_726_592, "file": 3_944_448, "shmem": None,
        "pgtables": None, "oom_score_adj": None, "slot": None, "cgroup": None,
    }  # fmt: skip
    assert set(event["machine"].values()) == {None}
