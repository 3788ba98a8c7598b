"""A machine whose memory others use, too: the pool has what they leave, while they leave it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from needs import need
from prometheus_client.parser import text_string_to_metric_families
from serving import Gunicorn, until

MIB = 1 << 20

APP = """
from apps import wsgi as inner
from oomsafe.metrics.prometheus import metrics_app

def wsgi(environ, start_response):
    return (metrics_app if environ["PATH_INFO"] == "/metrics" else inner)(environ, start_response)
"""


class Machine:
    """One of 2000 MiB, for a server that is started by wrap(): its own meminfo, in a mount namespace."""

    def __init__(self, folder: Path) -> None:
        self._meminfo = folder / "meminfo"
        self.has_left(1000)

    def has_left(self, mib: int) -> None:
        """So much is available."""
        text = f"MemTotal: {2000 << 10} kB\nMemFree: 1024 kB\nMemAvailable: {mib << 10:8} kB\n"
        # in place, and in one write: the mount is of this very file
        with open(self._meminfo, "r+" if self._meminfo.exists() else "w") as file:
            file.write(text)

    def wrap(self, command: list[str]) -> list[str]:
        """`command` on that machine."""
        return ["unshare", "-m", "/bin/sh", "-c", 'mount --bind "$0" /proc/meminfo && exec "$@"', str(self._meminfo), *command]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """With 1000 MiB left."""
    need(os.geteuid() == 0 and os.path.exists("/proc/meminfo"), "only root mounts over /proc/meminfo")
    return Machine(tmp_path)


def softs(gunicorn: Gunicorn) -> list[float]:
    """The workers' soft limits, in MiB."""
    return [(worker.figures.soft or 0) / MIB for worker in gunicorn.pool().workers]


def test_auto_is_a_share_of_what_others_leave(serve: Callable[..., Gunicorn], machine: Machine) -> None:
    """Less when they take more, at once; more when they have left it for a while."""
    gunicorn = serve("gthread", 2, jitter=0, wrap=machine.wrap).serving(2)

    (line,) = gunicorn.lines("oomsafe guards 2 workers")
    assert "of 2.0 GiB (this machine's memory, others use 9" in line
    # 90 % of what is left and the supervisor has by then, less that
    assert all(420 <= soft <= 480 for soft in softs(gunicorn))
    machine.has_left(500)
    until(lambda: all(200 <= soft <= 270 for soft in softs(gunicorn)), "they have less")
    machine.has_left(1000)
    until(lambda: all(soft > 420 for soft in softs(gunicorn)), "they have more again", 20)


@pytest.mark.parametrize("budget", ["400MiB", "50%"])
def test_what_a_pool_holds_can_be_compared_with_its_budget(serve: Callable[..., Gunicorn], machine: Machine, budget: str) -> None:
    """Both are the pool's own, whatever else the machine runs: in metrics, and as a share of what is left."""
    gunicorn = serve(
        "sync", 2, app="measured:wsgi", files={"measured.py": APP}, soft_limit="300MiB", budget=budget, wrap=machine.wrap
    ).serving(2)  # fmt: skip

    def sizes() -> dict[str, float]:
        families = text_string_to_metric_families(gunicorn.get("/metrics")[2].decode())
        return {family.name.removeprefix("oomsafe_pool_"): family.samples[0].value / MIB for family in families if "_pool_" in family.name}

    before = until(lambda: sizes().get("working_set_bytes"), "the supervisor has looked")
    gunicorn.get("/fill?mib=200")
    after = until(lambda: (found := sizes())["working_set_bytes"] > before + 120 and found, "what one has taken counts")

    assert after["working_set_bytes"] < 350 < 380 < after["budget_bytes"] < 700
    assert after["limit_bytes"] == 2000
    # nothing else has been taken: what the pool takes others don't, though meminfo does not say so here
    assert 700 < after["others_bytes"] < 1000
