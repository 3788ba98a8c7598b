"""One request a second that grows without an end, in a pool of four in a memory cgroup: kernel kills, and what innocents notice.

Each server takes part with oomsafe's hard limit and without; sync also with RLIMIT_AS, and uWSGI with its own. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import common
from common import MIB, PORT, Server

#: Processes of a pool; threads of a gthread worker.
WORKERS, THREADS = 4, 8

#: MiB of the cgroup; of a worker's hard limit and soft limit.
CGROUP, HARD, SOFT = 512, 300, 250

#: Requests/s of the four innocent clients together.
RATE = 100.0

#: Seconds; longer than any pause of a client.
KEEP_ALIVE = 10

CONF = f"""
control_socket_disable = True
keepalive = {KEEP_ALIVE}
"""

INSTALL = """
import oomsafe.gunicorn
oomsafe.gunicorn.install(globals())
"""

#: In every gunicorn's configuration: what a worker held at most of memory that is no file's, as the kernel has it when the worker ends.
PEAKS = """
def worker_exit(server, worker):
    with open("/proc/self/status") as status, open("peaks", "a") as peaks:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in status if line.endswith(" kB\\n")}
        print(kib["VmHWM"] - kib["RssFile"], file=peaks)
"""

#: As Odoo limits a worker: the whole address space.
ADDRESS_SPACE = """
def post_fork(server, worker):
    import resource
    with open("/proc/self/statm") as statm:
        now = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, ({size}, resource.RLIM_INFINITY))
"""

ENVIRON = {"OOMSAFE_HARD_LIMIT": f"{HARD}MiB", "OOMSAFE_SOFT_LIMIT": f"{SOFT}MiB"}


# --- the contestants


def gunicorn(worker: str, app: str, *more: str, guarded: bool, conf: str = "") -> Server:
    """A gunicorn in a memory cgroup of its own."""
    text = "\n".join([CONF, PEAKS, conf, INSTALL if guarded else ""])
    argv = [sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{PORT}", "-c", "conf.py", "-w", str(WORKERS), "-k", worker]
    argv += [*more, f"balloon_apps:{app}"]
    return Server(argv, environ=ENVIRON if guarded else {}, files={"conf.py": text}, memory=CGROUP * MIB)


def uvicorn(app: str, *, guarded: bool) -> Server:
    """A uvicorn with its own supervisor."""
    argv = [sys.executable, "-m", "oomsafe.uvicorn" if guarded else "uvicorn", f"balloon_apps:{app}", "--port", PORT]
    argv += ["--workers", str(WORKERS), "--log-level", "warning", "--no-access-log", "--timeout-keep-alive", str(KEEP_ALIVE)]
    return Server(argv, environ=ENVIRON if guarded else {}, memory=CGROUP * MIB)


def uwsgi(*more: str) -> Server:
    """A uWSGI with a limit of its own."""
    argv = [common.tool("uwsgi"), "--http-socket", f"127.0.0.1:{PORT}", "--master", "--die-on-term", "--disable-logging", "--need-app"]
    argv += ["--add-header", "Connection: close"]  # which it does
    argv += ["--virtualenv", sys.prefix, "--pythonpath", str(common.HERE), "--module", "balloon_apps:wsgi"]
    return Server([*argv, "--processes", str(WORKERS), *more], memory=CGROUP * MIB)


CLASSES: dict[str, Callable[..., Server]] = {
    "gunicorn sync": functools.partial(gunicorn, "sync", "wsgi"),
    f"gunicorn gthread ({THREADS} threads)": functools.partial(gunicorn, "gthread", "wsgi", "--threads", str(THREADS)),
    "gunicorn gevent": functools.partial(gunicorn, "gevent", "wsgi"),
    "gunicorn asgi": functools.partial(gunicorn, "asgi", "asgi"),
    "gunicorn UvicornWorker": functools.partial(gunicorn, "uvicorn_worker.UvicornWorker", "asgi"),
    "uvicorn, async endpoints": functools.partial(uvicorn, "asgi"),
    "uvicorn, endpoints in threads": functools.partial(uvicorn, "threads"),
}


def contestants() -> dict[str, Callable[[], Server]]:
    """All of them, by the name that the table shows."""
    found: dict[str, Callable[[], Server]] = {}
    for name, start in CLASSES.items():
        found[f"{name}: oomsafe"] = functools.partial(start, guarded=True)
        found[f"{name}: without"] = functools.partial(start, guarded=False)
    sync = functools.partial(CLASSES["gunicorn sync"], guarded=False)
    found["gunicorn sync: RLIMIT_AS 1.5 GiB"] = functools.partial(sync, conf=ADDRESS_SPACE.format(size=1536 * MIB))
    found["gunicorn sync: RLIMIT_AS, 250 MiB more"] = functools.partial(sync, conf=ADDRESS_SPACE.format(size=f"now + {250 * MIB}"))
    found[f"uWSGI --evil-reload-on-rss {HARD}"] = functools.partial(uwsgi, "--evil-reload-on-rss", str(HARD))
    return found


# --- a round


def anonymous(pid: int) -> int:
    """Bytes that a process held at most of memory that is no file's, roughly."""
    return common.status_of(pid, "VmHWM") - common.status_of(pid, "RssFile")


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one round of one contestant came to."""

    kills: int
    """By the kernel, in the cgroup."""
    gone: int
    """Workers that were gone at the end."""
    ended: bool
    """Whether the supervisor was."""
    peak: float
    """The largest worker's, of memory that is no file's, MiB."""
    innocents: int
    failed: dict[str, int]
    longest: float
    """Seconds that an innocent waited."""
    culprits: int
    outcomes: dict[str, int]


def measure(start: Callable[[], Server], balloon: str, options: argparse.Namespace) -> Round:
    """One round."""
    seconds, timeout = options.seconds, common.TIMEOUT
    with start() as server:
        server.settle(WORKERS)
        watch = common.Watch(server, anonymous, every=0.05)
        watch.start()
        command = [sys.executable, str(common.HERE / "balloon_load.py"), str(server.port), balloon]
        command += ["--seconds", str(seconds), "--rate", str(RATE), "--timeout", str(timeout)]
        patience = seconds + 2 * timeout + common.PATIENCE
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, check=True, env=common.environment())
        watch.stop()
        watch.look()
        gone, kills, ended = len(watch.peaks.keys() - server.forked()), server.kernel_kills(), not server.alive
        server.end()
        peaks = server.folder / "peaks"
        written = [int(kib) * 1024 for kib in peaks.read_text().split()] if peaks.exists() else []
        if options.v:
            print(server.log(), file=sys.stderr)
    seen: dict[str, Any] = json.loads(done.stdout)
    seen.pop("p99")
    return Round(kills=kills, gone=gone, ended=ended, peak=max([*watch.peaks.values(), *written]) / MIB, **seen)


# --- the table


HEAD = [
    "", "kernel kills", "innocents failed: reset", "5xx", "503", "other", "of", "longest wait, s", "culprits' ends",
    "peak of a worker, MiB", "/ hard limit", "workers that ended",
]  # fmt: skip


def line(name: str, rounds: Sequence[Round]) -> list[str]:
    """One contestant: sums over its rounds; longest and peak are the largest, with the median where there are several."""
    failed, outcomes = Counter[str](), Counter[str]()
    for one in rounds:
        failed.update(one.failed)
        outcomes.update(one.outcomes)
    refused, reset = failed.pop("503", 0), failed.pop("reset", 0)
    errors = sum(failed.pop(kind) for kind in list(failed) if re.fullmatch("5..", kind))
    missing = sum(one.culprits for one in rounds) - outcomes.total()
    ends = [f"{count} {kind}" for kind, count in outcomes.most_common()] + ([f"{missing} answered"] if missing else [])
    peak = max(one.peak for one in rounds)
    kills = f"{sum(one.kills for one in rounds)}" + (" (THE SUPERVISOR ENDED)" if any(one.ended for one in rounds) else "")
    return [
        name, kills, str(reset), str(errors), str(refused), ", ".join(f"{count} {kind}" for kind, count in failed.items()) or "0",
        f"{sum(one.innocents for one in rounds):,}".replace(",", " "), f"{largest([one.longest for one in rounds], 1)}",
        ", ".join(ends), largest([one.peak for one in rounds]), f"{peak / HARD:.2f}", str(sum(one.gone for one in rounds)),
    ]  # fmt: skip


def largest(values: Sequence[float], digits: int = 0) -> str:
    """The largest, and where there are several, their median and least."""
    text = f"{max(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} (median {statistics.median(values):.{digits}f}, least {min(values):.{digits}f})"


def main() -> None:
    """Run the rounds, print a table for each kind of balloon."""
    parser = common.arguments(__doc__ or "", rounds=1, seconds=60)
    parser.add_argument("--only", default="", help="only the rows that this regular expression finds")
    parser.add_argument("--balloon", choices=["blocks", "dict", "both"], default="both", help="blocks: bytearrays of 1 MiB")
    parser.add_argument("-v", action="store_true", help="print each server's log")
    options = parser.parse_args()
    about = common.machine("gunicorn", "gevent", "uvicorn", "uvicorn-worker", "starlette", "uwsgi", "oomsafe")
    chosen = {name: start for name, start in contestants().items() if re.search(options.only, name)}
    parts, raw = [], {}
    with common.quiet_interrupt():
        for balloon in ("blocks", "dict") if options.balloon == "both" else (options.balloon,):
            seen = common.interleaved(options.rounds, list(chosen), lambda name: measure(chosen[name], f"/{balloon}", options))  # noqa: B023
            parts.append((f"Balloon: {balloon}", common.table(HEAD, [line(name, rounds) for name, rounds in seen.items()])))
            raw[balloon] = {name: [vars(one) for one in rounds] for name, rounds in seen.items()}
    title = f"One balloon a second, {WORKERS} workers in a memory cgroup of {CGROUP} MiB, hard limit {HARD} MiB, {options.seconds:g} s"
    common.report(title, about, parts, raw, options.json)


if __name__ == "__main__":
    main()
