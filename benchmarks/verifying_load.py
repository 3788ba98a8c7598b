"""Many verifying clients at once, in one thread: kept-alive and busy, kept-alive and idle, one-shot. Prints JSON.

Run as a process of its own, beside the server that it loads.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import selectors
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from verifying_client import Client, clock

#: Seconds between two looks for answers that are overdue.
SWEEP = 0.1

#: What is between two requests of an idle client, in seconds; a server's keep-alive time must be longer.
IDLE = (0.2, 1.5)

#: Seconds without any answer that count as unserved; after they had to wait together, clients ask together, and pause for as long.
PAUSE = 0.5

#: The latencies that are told: the share of all that are not longer.
SHARES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


class Unserved(NamedTuple):
    """Seconds in which nobody was answered though somebody asked."""

    total: float = 0.0
    longest: float = 0.0


def unserved(begin: float, answers: Sequence[float], end: float, least: float = PAUSE) -> Unserved:
    """What lies between one answer and the next, where that is more than `least` seconds; `answers` are moments in order."""
    moments = [begin, *answers, end]
    pauses = [after - before for before, after in itertools.pairwise(moments) if after - before > least]
    return Unserved(sum(pauses), max(pauses, default=0.0))


class Load:
    """All clients together, for one run."""

    def __init__(self, port: int, *, timeout: float = 10) -> None:
        self.port, self.timeout = port, timeout
        """Seconds that an answer may take."""
        self.selector = selectors.DefaultSelector()
        self.clients: list[Client] = []
        self.waiting: set[Client] = set()
        self.asked: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.connections = 0
        self.announced = 0
        """Answers that told a client that wanted to keep its connection to give it up."""
        self.closed_idle = 0
        """Connections that the server closed while nothing was asked on them."""
        self.longest = 0.0
        """Seconds that a request waited at most, for its answer or its failure."""
        self._latencies = array("d")
        self._answers = array("d")
        self._timers: list[tuple[float, int, Client]] = []
        self._sequence = 0

    def add(
        self, who: str, count: int, path: str, pause: Callable[[], float | None], *, spread: float = 0, kind: type[Client] = Client
    ) -> None:
        """`count` clients more; they begin over `spread` seconds."""
        for number in range(count):
            self.clients.append(kind(self, who, path, pause, clock() + spread * number / count))

    def wake(self, due: float, client: Client) -> None:
        """Have `client` ask when it is `due`."""
        self._sequence += 1
        heapq.heappush(self._timers, (due, self._sequence, client))

    def answered(self, who: str, seconds: float) -> None:
        """An answer was right. Slow ones are slow because they were asked to be: they have no place among the latencies."""
        if who != "slow":
            self._latencies.append(seconds)
            self._answers.append(clock())
            self.longest = max(self.longest, seconds)

    def failed(self, who: str, kind: str, seconds: float) -> None:
        """A request was not answered as it should be, after so long."""
        self.failures[f"{who}: {kind}"] += 1
        if who != "slow":
            self.longest = max(self.longest, seconds)

    def run(self, seconds: float) -> dict[str, Any]:
        """Ask for so long, or until nobody has anything left to ask; wait for the last answers, tell what happened."""
        begin = swept = clock()
        end = begin + seconds
        while ((now := clock()) < end and self._timers) or self.waiting:
            while now < end and self._timers and self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2].ask()
            patience = min(self._timers[0][0] - clock(), SWEEP) if self._timers and now < end else SWEEP
            for key, _ in self.selector.select(max(0.0, patience)):
                key.data.ready()
            if now - swept > SWEEP:
                swept = now
                self._sweep(now)
        for client in self.clients:
            client.close()
        self.selector.close()
        return {**self._told(seconds), "unserved": unserved(begin, self._answers, clock())._asdict()}

    def _sweep(self, now: float) -> None:
        for client in [client for client in self.waiting if now - client.since > client.timeout]:
            client.fail("timeout")

    def _told(self, seconds: float) -> dict[str, Any]:
        ms = sorted(latency * 1e3 for latency in self._latencies)
        at = {name: ms[min(len(ms) - 1, int(len(ms) * share))] if ms else 0.0 for name, share in SHARES.items()}
        return {
            "requests": self.asked.total(), "failed": self.failures.total(), "rate": len(ms) / seconds, **at,
            "asked": dict(self.asked), "failures": dict(self.failures), "connections": self.connections,
            "announced": self.announced, "closed_idle": self.closed_idle, "longest": self.longest,
        }  # fmt: skip


def mixed(port: int, path: str, *, rate: float = 0, busy: int = 12, idle: int = 4, one_shot: int = 2, timeout: float = 10) -> Load:
    """The three kinds at once: busy and one-shot clients at `rate` requests a second together, 0: as fast as they are answered."""
    load = Load(port, timeout=timeout)
    pause = (busy + one_shot) / rate if rate else 0.0
    dice = random.Random(port)
    load.add("busy", busy, path, lambda: pause, spread=pause)
    load.add("idle", idle, path, lambda: dice.uniform(*IDLE), spread=sum(IDLE) / 2)
    load.add("one-shot", one_shot, path, lambda: pause, spread=pause)
    return load


def main() -> None:
    """Run it against a server on a loopback port."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rate", type=float, default=0, help="requests/s, 0: as many as are answered")
    parser.add_argument("--slow", type=int, default=0, help="clients that ask /slow once, at the beginning")
    parser.add_argument("--timeout", type=float, default=10, help="seconds that an answer may take")
    options = parser.parse_args()
    load = mixed(options.port, options.path, rate=options.rate, timeout=options.timeout)
    load.add("slow", options.slow, "/slow", lambda: None)
    print(json.dumps(load.run(options.seconds)))


if __name__ == "__main__":
    main()
