"""What is said of the pool when it boots, and of its last recycle."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from celerying import Start
from serving import Gunicorn, until

from oomsafe.scoreboard.places import board_of

ROOM = "right after boot: soft limit"


def test_the_last_recycle_is_in_status(serve: Callable[..., Gunicorn]) -> None:
    """The line as it stands in the log, and when that was; before there was one, nothing."""
    gunicorn = serve("sync", soft_limit="64MiB", min_lifetime=0, reclaim=False).serving()
    asked = [sys.executable, "-m", "oomsafe.cli", "status", "--scoreboard", gunicorn.pool_path()]

    def told() -> dict[str, object] | None:
        (pool,) = json.loads(subprocess.run([*asked, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout)["pools"]
        found: dict[str, object] | None = pool["last_recycle"]
        return found

    assert told() is None
    began = time.time()
    gunicorn.get("/fill?mib=80")
    (line,) = gunicorn.wait_for(" recycling: ")
    found = until(told, "it is shown")

    assert line.endswith(str(found["line"]))
    assert re.search(r", after 1 request(;|$)", line)
    assert began < float(str(found["at"])) < time.time()
    text = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
    assert " ".join(str(found["line"]).split()) in " ".join(text.split())


def test_a_pool_says_what_it_counts(celery: Start) -> None:
    """A node's tasks are no requests, for a person or a machine."""
    node = celery().ready()
    node.ask("result = proj.leak.delay(1, 1).get(timeout=30)")
    asked = [sys.executable, "-m", "oomsafe.cli", "status", "--scoreboard", until(lambda: board_of(node.pid), "it has a scoreboard")]

    def shown() -> str:
        text = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout
        return text if "1 task since the start" in text else ""

    text = until(shown, "the task is counted")

    assert "tasks" in text
    assert "request" not in text
    (pool,) = json.loads(subprocess.run([*asked, "--json"], capture_output=True, text=True, timeout=60, check=True).stdout)["pools"]
    assert pool["unit"] == "tasks"


def test_a_result_backend_that_drops_the_memory_of_results_is_named(celery: Start) -> None:
    """Once for the node; not where results have it, nor where nobody asked for it."""
    line = "results have no memory figures all the same: quiet_backend.Backend does not store"
    dropping, keeping = (celery(conf={"result_extended": True, **conf}) for conf in ({"result_backend": "quiet_backend.Backend"}, {}))
    silent = celery(conf={"result_backend": "quiet_backend.Backend"})

    assert [len(node.ready().lines("have no memory figures")) for node in (dropping, keeping, silent)] == [1, 0, 0]
    assert dropping.lines(line)


def test_what_workers_have_right_after_boot(serve: Callable[..., Gunicorn]) -> None:
    """Once for all workers, and once more after a reload; a warning where it leaves them little."""
    gunicorn = serve("sync", workers=3, soft_limit="300MiB").serving(3)

    (line,) = gunicorn.lines(ROOM)
    size = r"[\d.]+ MiB"
    assert re.search(rf"\[INFO\] workers have {size} right after boot: soft limit 300 MiB leaves {size}$", line)
    text = gunicorn.conf.read_text()
    ballast = "import apps\ndef post_worker_init(worker): apps.fill(95 << 20)\n"
    gunicorn.conf.write_text(ballast + text.replace("300MiB", "100MiB"))
    gunicorn.signal(signal.SIGHUP)
    second = gunicorn.wait_for(ROOM, 2)[1]
    gunicorn.serving(3)
    assert re.search(rf"\[WARNING\] workers have {size} right after boot: soft limit 100 MiB leaves {size}$", second)
    assert len(gunicorn.lines(ROOM)) == 2
