"""A real kernel kill is alerted to: by a real Prometheus with the rules as they are, and by a real `oomsafe watch`."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from exporting import exporter
from needs import need
from serving import Gunicorn, until
from watching import Watching, events_in, script

from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, environment, free_ports
from oomsafe.kernel.sandbox import Sandbox

# they take the machine's memory cgroups, kernel log and processors: one after the other
pytestmark = pytest.mark.xdist_group("oom")

MIB = 1 << 20
RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "oomsafe.rules.yml"

#: Short intervals, so that the test is; the rules are the ones that are shipped.
CONFIG = """\
global: {{ scrape_interval: 1s, evaluation_interval: 1s }}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: shop
    static_configs: [{{ targets: ["127.0.0.1:{port}"] }}]
"""


class Prometheus(ServerProcess):
    """It scrapes one port, and can be asked over HTTP."""

    GRACE = 10.0

    def __init__(self, folder: Path, scraped: int) -> None:
        (self.port,) = free_ports()
        config = folder / "prometheus.yml"
        config.write_text(CONFIG.format(rules=RULES, port=scraped))
        options = [f"--config.file={config}", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{self.port}"]
        super().__init__([*ENDING_WITH_US, "prometheus", *options], folder, environment(), log="prometheus.log")

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its HTTP API."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Of an expression with at most one result."""
        found = self.ask("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def alerts(self) -> list[dict[str, Any]]:
        """Those that are pending or firing."""
        return list(self.ask("alerts")["alerts"])

    def health(self) -> set[str]:
        """Of its rules: unknown, ok, err."""
        return {rule["health"] for group in self.ask("rules")["groups"] for rule in group["rules"]}


@pytest.fixture
def prometheus(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[[int], Prometheus]]:
    """prometheus(port): one that scrapes that port, and is ready."""
    need(shutil.which("prometheus") is not None, "prometheus is not installed")
    with contextlib.ExitStack() as stack:

        def start(port: int) -> Prometheus:
            made = stack.enter_context(Prometheus(tmp_path, port))
            stack.callback(lambda: request.node.add_report_section("teardown", "log of prometheus", made.tail()))
            made.wait_for("Server is ready to receive web requests.")
            return made

        yield start


@pytest.fixture
def pool(cgroup: Callable[[int], Sandbox], serve: Callable[..., Gunicorn]) -> Callable[[], Gunicorn]:
    """Two workers in a cgroup of 400 MiB, with metrics."""

    def start() -> Gunicorn:
        sandbox = cgroup(400 * MIB)
        policy = {"soft_limit": "380MiB", "jitter": 0, "metrics": "127.0.0.1:0", "name": "shop"}
        return serve("sync", app="ending_apps:wsgi", wrap=sandbox.command, **policy).serving()

    return start


def hog(server: Gunicorn) -> None:
    """A request that takes memory until the kernel kills."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        server.get("/hog")


def test_prometheus_fires_for_a_real_kill(pool: Callable[[], Gunicorn], prometheus: Callable[[int], Prometheus]) -> None:
    """The kill's alert, at once; nothing before it, and no other alert. Every rule can be evaluated on what a real pool serves."""
    server = pool()
    asked = prometheus(exporter(server)[1])
    until(lambda: (asked.value('count_over_time(oomsafe_deaths_total{verdict="oom_confirmed"}[1m])') or 0) >= 3, "it has scraped thrice")
    until(lambda: asked.health() == {"ok"}, "all rules are evaluated")
    before = asked.alerts()

    hog(server)

    fires = until(lambda: [alert for alert in asked.alerts() if alert["state"] == "firing"], "it fires")
    assert before == []
    (alert,) = fires
    assert alert["labels"] == {
        "alertname": "OomsafeKernelKill", "instance": f"127.0.0.1:{exporter(server)[1]}", "job": "shop", "severity": "critical",
        "verdict": "oom_confirmed",
    }  # fmt: skip
    assert alert["annotations"]["summary"].startswith("shop on 127.0.0.1:")
    assert "1 workers were killed" in alert["annotations"]["description"]
    assert asked.health() == {"ok"}
    used = asked.value("job:oomsafe_pool_used:max")
    assert used is not None and 0 < used < 1
    margin = asked.value("oomsafe_supervisor_margin_bytes")
    assert margin is not None and margin > 0


def test_the_command_of_a_watch_gets_a_real_kill(pool: Callable[[], Gunicorn], tmp_path: Path) -> None:
    """One object, with the line about the death; none before."""
    server = pool()
    got = tmp_path / "got"
    command = script(tmp_path, "notify", f"cat >> {got}")
    with Watching(tmp_path, "--scoreboard", server.pool_path(), "--on-alert", command) as watch:
        watch.follows(server.pid)
        before = got.exists()

        hog(server)

        events = until(lambda: got.exists() and events_in(got.read_text()), "it is passed on")
        server.stop()
        assert watch.process.wait(20) == 0

    assert not before
    assert isinstance(events, list)
    (event,) = events
    assert (event["alert"], event["state"], event["severity"]) == ("kernel_kill", "firing", "critical")
    assert (event["figures"]["oom_confirmed"], event["figures"]["oom_likely"]) == (1, 0)
    assert "was killed by the kernel's OOM killer (confirmed" in event["text"]
    assert "GET /hog" in event["text"]
    assert event["pool"]["name"] == "shop"
    assert 0 <= event["at"] - event["since"] < 5
    later = events_in(got.read_text())[1:]
    assert [(other["alert"], other["state"], other["text"].split(";")[0]) for other in later] == [
        ("kernel_kill", "resolved", "the pool has ended")
    ]
    assert watch.log() == ""
