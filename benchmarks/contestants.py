"""The servers that recycling.py and unserved.py compare: each class with its own event loop, each not recycling (twice), by max
requests, with oomsafe, with its middleware alone, and with an oomsafe that has nothing to recycle.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from dataclasses import dataclass

from common import MIB, PORT, Server

WORKERS = 2

#: Of oomsafe, MiB a worker.
SOFT_LIMIT = 128

#: Seconds; longer than any pause of a client, so that no server closes before a client asks again.
KEEP_ALIVE = 10

#: How a server may recycle, in the order of the tables; the first is the baseline, and what the second differs by from it is noise.
NOT, AGAIN, STOCK, OOMSAFE, MEASURED = "not recycling", "not recycling, again", "max requests", "oomsafe", "oomsafe, not recycling"
WAYS = (NOT, AGAIN, STOCK, OOMSAFE, MEASURED)

#: A plain uvicorn, whose supervisor knows nothing of oomsafe.
MIDDLEWARE = "oomsafe's middleware"

#: Soft limits; one that no worker comes near shows what measuring costs without any recycling.
LIMITS = {OOMSAFE: f"{SOFT_LIMIT}MiB", MIDDLEWARE: f"{SOFT_LIMIT}MiB", MEASURED: "4GiB"}

_CONF = f"""
control_socket_disable = True
keepalive = {KEEP_ALIVE}
"""

_INSTALL = """
import oomsafe.gunicorn
oomsafe.gunicorn.install(globals())
"""


#: Settings of oomsafe, by the names of its policy's fields.
Policy = dict[str, "str | int | float | None"]


@dataclass(frozen=True)
class Tuning:
    """What makes a worker live as long as it should, for one server class under one load."""

    rate: float
    """Requests a second of the load, 0: as many as are answered."""
    requests: int = 0
    """That a worker may answer, 0: any number."""
    leak: int = 0
    """Bytes that each request leaks."""


@dataclass(frozen=True)
class ServerClass:
    """A server, its worker class, its event loop; `loop` None where there is none to choose."""

    shown: str
    argv: tuple[str, ...]
    conf: str = ""
    loop: str | None = None
    uvicorn: bool = False
    """Whether it is uvicorn's own supervisor, not gunicorn's."""
    workers: int = WORKERS

    @property
    def name(self) -> str:
        """As the tables show it."""
        return self.shown if self.loop is None else f"{self.shown}, {self.loop}"

    def missing(self, way: str) -> str | None:
        """Why this contestant can't take part; None: it can."""
        if self.uvicorn and way in LIMITS and importlib.util.find_spec("oomsafe.uvicorn") is None:
            return "this oomsafe has no oomsafe.uvicorn"
        if way == MIDDLEWARE and not self.uvicorn:
            return "gunicorn's configuration installs oomsafe in its master too"
        return None

    def server(
        self,
        way: str,
        tuning: Tuning,
        *,
        timeout: int = 30,
        slow: float = 0,
        boot: float = 0,
        page: int = 0,
        policy: Policy | None = None,
        conf: str = "",
        memory: int | None = None,
    ) -> Server:
        """Start it. `timeout` is gunicorn's, `slow` what /slow takes, `boot` what its app takes to be imported, all in seconds.

        `page` is the bytes that /page keeps, as often as there are workers. `policy` is oomsafe's, over each way's own; None is a default.
        `conf` is more of gunicorn's configuration. `memory` is the limit of a cgroup of its own, in bytes.
        """
        environ = {
            "LEAK_BYTES": str(tuning.leak),
            "PAGE_BYTES": str(page),
            "PAGES": str(self.workers),
            "SLOW_SECONDS": str(slow),
            "BOOT_SECONDS": str(boot),
        }
        if way in LIMITS:
            environ |= _environ({"soft_limit": LIMITS[way], "min_lifetime": 0, **(policy or {})})
        if self.uvicorn:
            return self._uvicorn(way, tuning, environ, boot, memory)
        # gunicorn adds a share of its own of 0..jitter to each worker's; in the mean it comes to `requests`
        limits = {"max_requests": round(tuning.requests * 0.9), "max_requests_jitter": round(tuning.requests * 0.2)}
        lines = [f"{key} = {value}" for key, value in limits.items() if way == STOCK] + [f"timeout = {timeout}"]
        text = "\n".join([_CONF, self.conf, conf, *lines, _INSTALL if way in LIMITS else ""])
        argv = [sys.executable, "-m", "gunicorn", *self.argv]
        return Server(argv, environ=environ, files={"conf.py": text}, boot=boot, memory=memory)

    def _uvicorn(self, way: str, tuning: Tuning, environ: dict[str, str], boot: float, memory: int | None) -> Server:
        module, app, more = "uvicorn", "echo_apps:asgi", ()
        if way == STOCK:
            # drawn anew at each look, ten times a second: the least of them counts
            jitter = str(round(tuning.requests * 0.2))
            more = ("--limit-max-requests", str(tuning.requests), "--limit-max-requests-jitter", jitter)
        elif way == MIDDLEWARE:
            app = "guarded_apps:asgi"
        elif way in LIMITS:
            module = "oomsafe.uvicorn"
        return Server([sys.executable, "-m", module, app, *self.argv, *more], environ=environ, boot=boot, memory=memory)

    @property
    def processes(self) -> int:
        """How many it forks: multiprocessing has a tracker beside the workers."""
        return self.workers + self.uvicorn


def _environ(policy: Policy) -> dict[str, str]:
    return {f"OOMSAFE_{name.upper()}": str(value) for name, value in policy.items() if value is not None}


def classes(loops: list[str], workers: int = WORKERS) -> list[ServerClass]:
    """All of them; those that run on an event loop once for each of `loops`."""
    _gunicorn = functools.partial(_gunicorn_class, workers)
    found = [
        _gunicorn("sync", "sync"),
        _gunicorn("gthread (4 threads)", "gthread", "--threads", "4"),
        _gunicorn("gevent", "gevent"),
    ]
    for loop in loops:
        worker = f"uvicorn_workers.{loop.capitalize()}Worker"
        found.append(_gunicorn("asgi", "asgi", conf=f'asgi_loop = "{loop}"', loop=loop))
        found.append(_gunicorn("UvicornWorker", worker, loop=loop))
        argv = ("--port", PORT, "--workers", str(workers), "--loop", loop, "--log-level", "warning")
        argv += ("--no-access-log", "--timeout-keep-alive", str(KEEP_ALIVE))
        found.append(ServerClass(f"uvicorn --workers {workers}", argv, loop=loop, uvicorn=True, workers=workers))
    return found


def _gunicorn_class(workers: int, shown: str, worker: str, *more: str, conf: str = "", loop: str | None = None) -> ServerClass:
    app = "echo_apps:wsgi" if loop is None else "echo_apps:asgi"
    argv = ("-b", f"127.0.0.1:{PORT}", "-c", "conf.py", "-w", str(workers), "-k", worker, *more, app)
    return ServerClass(f"gunicorn {shown}", argv, conf, loop, workers=workers)


def loops(asked: str) -> list[str]:
    """The event loops to use: asyncio, uvloop, both, or auto: uvloop where it is installed."""
    if asked == "auto":
        return ["uvloop" if uvloop_there() else "asyncio"]
    return ["asyncio", "uvloop"] if asked == "both" else [asked]


@functools.cache
def uvloop_there() -> bool:
    """Whether uvloop is installed."""
    return importlib.util.find_spec("uvloop") is not None


def tuned(rate: float, load: float, resident: int, every: float) -> Tuning:
    """For a pool that answers `rate` requests a second: one recycle each `every` seconds, whichever way.

    `load` is the rate that clients keep to, 0: none. A worker answers its share of the rate for
    `every` times the workers; in that time it leaks what is between `resident` bytes and its soft limit.
    """
    requests = max(1, round((load or rate) * every))
    # oomsafe lowers each worker's soft limit by up to a tenth: in the mean by a twentieth
    room = SOFT_LIMIT * 0.95 * MIB - resident
    return Tuning(load, requests, max(1, round(room / requests)))
