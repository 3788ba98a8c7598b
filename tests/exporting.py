"""The metrics that a process beside a real server's supervisor serves, as a scraper meets them."""

from __future__ import annotations

import http.client
import re
from contextlib import closing
from typing import Protocol

from prometheus_client.parser import text_string_to_metric_families
from serving import until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Logs(Protocol):
    """A server with a log."""

    def lines(self, text: str) -> list[str]:
        """Those that hold `text`."""
        ...


def exporter(server: Logs, times: int = 1) -> tuple[int, int]:
    """(pid, port) of the process that serves the metrics, once that many lines have said so."""
    lines = until(lambda: len(found := server.lines("metrics on ")) >= times and found, "the metrics are served")
    assert isinstance(lines, list)
    found = re.search(r"metrics on (?:http://\S+:(\d+)/metrics|unix:\S+) \(pid (\d+)\)", lines[-1])
    assert found, lines[-1]
    return int(found[2]), int(found[1] or 0)


def scrape(port: int, path: str = "/metrics") -> Samples:
    """Every sample there, by its name and labels."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode()
        assert response.status == 200, body
    return samples_in(body)


def samples_in(text: str) -> Samples:
    """By name and labels, each but once."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, f"twice: {sample}"
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    """Of one sample; 0 where there is none."""
    return samples.get((name, frozenset(labels.items())), 0.0)
