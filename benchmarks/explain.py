"""How long ``oomsafe explain`` takes for a log, and how much memory, beside what articles tell one to type: grep, and awk for the table.

The logs are made of a real report of this machine's kernel (else of the one of the tests), no two alike: nothing but reports; the same in
syslog's, in ISO and in the journal's JSON form; tables of 3 000 processes; and a syslog of other programs with a report now and then.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

MIB = 1 << 20
REPORT = Path(__file__).parents[1] / "tests" / "unit" / "kernel_logs" / "linux-6.18-memcg.txt"
STAMP = re.compile(r"^\[ *(\d+)\.(\d+)\] ", re.MULTILINE)

#: By name: the command that reads {log}.
CONTESTANTS = {
    "oomsafe explain": [sys.executable, "-m", "oomsafe.cli", "explain", "{log}"],
    "oomsafe explain --json": [sys.executable, "-m", "oomsafe.cli", "explain", "--json", "{log}"],
    "grep -i 'killed process'": ["grep", "-i", "killed process", "{log}"],
    "egrep -i 'oom|out of memory|killed process'": ["grep", "-iE", "oom|out of memory|killed process", "{log}"],
    "awk for the table, sort": ["sh", "-c", "awk '/rss/{t=1} /Killed/{t=0} t{print $0}' {log} | sort -k6 -n"],
}


def variants(text: str, size: int) -> Iterator[str]:
    """Copies of a report until there are `size` bytes; each is another kill at another time."""
    written, number = 0, 0
    while written < size:
        copy = STAMP.sub(lambda match, later=number * 20: f"[{int(match[1]) + later}.{match[2]}] ", text)  # type: ignore[misc]
        copy = re.sub(r"anon-rss:(\d+)kB", lambda match, more=number: f"anon-rss:{int(match[1]) + more}kB", copy)  # type: ignore[misc]
        written, number = written + len(copy), number + 1
        yield copy


def logs(size: int) -> dict[str, Callable[[], Iterator[str]]]:
    """By name: what writes it."""
    text = REPORT.read_text()
    lines = text.splitlines()
    header = next(at for at, line in enumerate(lines) if "total_vm" in line)
    rows = [re.sub(r"\[ {0,9}\d+\]  ", f"[{pid:7d}]  ", lines[header + 1]) for pid in range(1, 3001)]
    table = "\n".join([lines[0], lines[header], *rows, *lines[-2:]]) + "\n"
    noise = "".join(
        f"Nov 20 17:{at // 60 % 60:02}:{at % 60:02} host app[{at}]: GET /path/{at} 200 in {at % 97} ms\n" for at in range(40_000)
    )

    def as_json(copy: str) -> str:
        items = ({"_TRANSPORT": "kernel", "_HOSTNAME": "host", "PRIORITY": "6", "MESSAGE": line[15:]} for line in copy.splitlines())
        return "".join(json.dumps(item) + "\n" for item in items)

    return {
        "reports, dmesg": lambda: variants(text, size),
        "reports, syslog": lambda: (STAMP.sub(r"Nov 20 17:00:06 host kernel: [\1.\2] ", copy) for copy in variants(text, size * 2 // 3)),
        "reports, dmesg iso": lambda: (STAMP.sub("2026-11-20T17:00:06,788324+00:00 ", copy) for copy in variants(text, size * 4 // 5)),
        "reports, journal's JSON": lambda: (as_json(copy) for copy in variants(text, size * 2 // 5)),
        "tables of 3 000": lambda: variants(table, size),
        "a report in 3 MB of syslog": lambda: (noise + copy for copy in variants(text, size * len(text) // (len(text) + len(noise)))),
    }


def measured(command: list[str], output: str) -> tuple[float, float, int]:
    """(seconds, seconds of processor time, peak RSS in bytes) of a command whose output goes to a file.

    The kernel counts the peak from that of the process that has forked it, so this one stays small.
    """
    begin = time.perf_counter()
    with open(output, "wb") as out:  # not /dev/null, at which grep stops at the first match
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
    _, _, usage = os.wait4(process.pid, 0)
    process.returncode = 0
    return time.perf_counter() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def counted(path: str) -> int:
    """The events in an output, else its lines."""
    outcomes = killed = lines = 0
    with open(path, "rb") as file:
        while piece := file.read(MIB):
            outcomes += piece.count(b'"outcome"')
            killed += piece.count(b"ran out of memory")
            lines += piece.count(b"\n")
    return outcomes or killed or lines


def main() -> None:
    """A table for people."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=100, help="MiB of each log")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.size} MiB of log, {options.rounds} rounds; load at start {os.getloadavg()[0]:.1f}\n")
    print("| log | | events or lines | seconds | of processor time | peak RSS, MiB |\n| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        path, output = os.path.join(folder, "log"), os.path.join(folder, "output")
        for name, write in logs(options.size * MIB).items():
            with open(path, "w") as file:
                file.writelines(write())
            size = os.path.getsize(path) / MIB
            for contestant, command in CONTESTANTS.items():
                argv = [word.replace("{log}", path) for word in command]
                rounds = [measured(argv, output) for _ in range(options.rounds)]
                count = counted(output)
                wall, cpu = (statistics.median(one[at] for one in rounds) for at in (0, 1))
                peak = max(one[2] for one in rounds) / MIB
                print(f"| {name}, {size:.0f} MiB | {contestant} | {count} | {wall:.1f} | {cpu:.1f} | {peak:.0f} |", flush=True)


if __name__ == "__main__":
    main()
