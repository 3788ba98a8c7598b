"""Innocent clients that verify each answer, beside one balloon a second. Prints JSON.

Run as a process of its own, beside the server that it loads.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from verifying_client import Client
from verifying_load import Load

#: Innocent clients: half of them keep their connection, half of them ask for what needs 2 MiB.
INNOCENT = (("busy", "/small"), ("busy", "/work"), ("one-shot", "/small"), ("one-shot", "/work"))

#: As many clients that balloon, in turns, as a balloon may take seconds without holding up the next.
CULPRITS = 16


class JsonClient(Client):
    """One whose answers are JSON with its request's token, and nothing missing."""

    def _is_right(self, body: bytes) -> bool:
        try:
            answer = json.loads(body)
        except ValueError:
            return False
        if not isinstance(answer, dict):
            return False
        token = self._expected.decode()
        whole = answer.get("size") == 2 << 20 and answer.get("numbers") == list(range(10_000))
        return bool(answer.get("token") == token and (whole or self._path != "/work"))


class BalloonLoad(Load):
    """Innocents and culprits; how long one waits is told of innocents only."""

    def failed(self, who: str, kind: str, seconds: float) -> None:
        """A request was not answered as it should be, after so long."""
        super().failed("slow" if who == "culprit" else who, kind, seconds)

    def answered(self, who: str, seconds: float) -> None:
        """An answer was right; a balloon without an end has none."""
        super().answered("slow" if who == "culprit" else who, seconds)


def outcome(kind: str) -> str:
    """In the tables' words, what became of a request that failed as `kind`."""
    kind = kind.removesuffix(" (first request)")
    if kind.startswith("status "):
        return kind.removeprefix("status ")
    return "reset" if kind in ("closed unanswered", "reset unanswered", "cut short") else kind


def run(port: int, balloon: str, seconds: float, rate: float, timeout: float) -> dict[str, Any]:
    """Load it, and tell what became of innocents and culprits."""
    load = BalloonLoad(port, timeout=timeout)
    pause = len(INNOCENT) / rate
    for number, (who, path) in enumerate(INNOCENT):
        load.add(who, 1, path, lambda: pause, spread=pause * number, kind=JsonClient)
    load.add("culprit", CULPRITS, balloon, lambda: float(CULPRITS), spread=float(CULPRITS))
    told = load.run(seconds)
    failures: dict[str, Counter[str]] = {"innocent": Counter(), "culprit": Counter()}
    for name, count in told["failures"].items():
        who, _, kind = name.partition(": ")
        failures["culprit" if who == "slow" else "innocent"][outcome(kind)] += count
    asked = told["asked"]
    culprits = asked.pop("culprit", 0)
    return {
        "innocents": sum(asked.values()), "failed": dict(failures["innocent"]), "longest": told["longest"], "p99": told["p99"],
        "culprits": culprits, "outcomes": dict(failures["culprit"]),
    }  # fmt: skip


def main() -> None:
    """Run it against a server on a loopback port."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("port", type=int)
    parser.add_argument("balloon", help="the path that balloons")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rate", type=float, default=100, help="requests/s of all innocents together")
    parser.add_argument("--timeout", type=float, default=15, help="seconds that an answer may take")
    options = parser.parse_args()
    print(json.dumps(run(options.port, options.balloon, options.seconds, options.rate, options.timeout)))


if __name__ == "__main__":
    main()
