"""A pool as it is to be deployed: what every kind of file is made of."""

from __future__ import annotations

import re
from dataclasses import dataclass

from oomsafe.policy.readers import Metric
from oomsafe.policy.units import MIB

#: An app as gunicorn, uvicorn and Celery take it: ``shop.app:app``, ``shop:create_app()``, ``proj``.
APP = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*(?::[A-Za-z_][A-Za-z0-9_.]*(?:\(\))?)?")

#: A worker class as gunicorn takes it.
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")

#: Where the server listens in a container.
PORT = 8000


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Sizes in bytes."""

    server: str
    """gunicorn, uvicorn or celery."""
    app: str
    """What APP matches."""
    name: str = ""
    """What the pool is called: any text."""
    worker_class: str = ""
    """gunicorn's; empty: its own default."""
    workers: int
    soft: int
    hard: int | None
    """None: no hard limit."""
    min_lifetime: float | None = None
    """Seconds; None: the default."""
    metric: Metric = "anon"
    preload: bool = False
    """Whether gunicorn is to load the app before it forks."""
    memory: int
    """What the pool, and nobody else, may hold."""
    cpus: float | None = None
    """None: not known."""
    score: int = -300
    """The supervisor's oom_score_adj where it can be lowered."""
    directory: str = "/srv/app"
    """Where it starts."""
    folder: str = ""
    """Where the programs are, such as a virtual environment's bin; empty: on PATH."""

    @property
    def about(self) -> str:
        """A comment's text: what this is made for."""
        cpus = "" if self.cpus is None else f" and {self.cpus:g} CPUs"
        return f"by oomsafe advise, for {mib(self.memory)} MiB{cpus}: {self.workers} workers of at most {mib(self.soft)} MiB each"

    @property
    def label(self) -> str:
        """Its name as a DNS label (RFC 1123), which is a name in Kubernetes, compose, ECS and systemd, too."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.split(":")[0].lower())[:40].strip("-") or "app"

    @property
    def settings(self) -> dict[str, str]:
        """oomsafe's settings, by field."""
        found = {
            "soft_limit": f"{mib(self.soft)}MiB",
            "hard_limit": None if self.hard is None else f"{mib(self.hard)}MiB",
            "metric": None if self.metric == "anon" else self.metric,
            "min_lifetime": None if self.min_lifetime is None else f"{self.min_lifetime:g}s",
        }
        return {field: value for field, value in found.items() if value is not None}

    @property
    def environ(self) -> dict[str, str]:
        """The same as variables."""
        return {f"OOMSAFE_{field.upper()}": value for field, value in self.settings.items()}

    @property
    def options(self) -> list[str]:
        """The same as options of oomsafe run."""
        return [word for field, value in self.settings.items() for word in (f"--{field.replace('_', '-')}", value)]

    @property
    def known_class(self) -> str:
        """The worker class if it may stand in a file and is not the default, else empty."""
        return self.worker_class if _CLASS.fullmatch(self.worker_class) and self.worker_class != "sync" else ""

    def command(self, *, listen: bool = False, folder: str = "") -> list[str]:
        """What starts the server; `listen`: on PORT of all addresses, as in a container. `folder` is where its program is."""
        program = f"{folder}/{self.server}" if folder else self.server
        if self.server == "celery":
            return [program, "-A", self.app, "worker", "--concurrency", str(self.workers)]
        words = [program, self.app, "--workers", str(self.workers)]
        if self.server == "uvicorn":
            return [*words, *(["--host", "0.0.0.0", "--port", str(PORT)] if listen else [])]  # noqa: S104  a container's own
        words += ["--worker-class", self.known_class] if self.known_class else []
        words += ["--preload"] if self.preload else []
        return [*words, *(["--bind", f"0.0.0.0:{PORT}"] if listen else [])]

    @property
    def port(self) -> int | None:
        """Where it listens; None: nowhere."""
        return None if self.server == "celery" else PORT


def mib(size: int) -> int:
    """Whole MiB, rounded down."""
    return size // MIB
