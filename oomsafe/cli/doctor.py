"""``oomsafe doctor``: what decides here who dies when memory ends, and what of it to change."""

from __future__ import annotations

import dataclasses
import json
import logging
from enum import Enum
from typing import Any

import click

from oomsafe.cli.doctor_facts import read_facts
from oomsafe.cli.doctor_text import doctor_text
from oomsafe.cli.output import Out, until_closed
from oomsafe.cli.status import read_pools
from oomsafe.policy.doctor.facts import Facts, Ranking
from oomsafe.policy.doctor.rules import Finding, findings_of
from oomsafe.policy.limits import Source
from oomsafe.scoreboard.places import living_boards, supervisor_of

#: The version of the JSON object.
VERSION = 1

#: How many processes of a ranking are in the JSON object.
RANKED = 16

FOUND, BLIND = 1, 2


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/doctor.md).")
def doctor(as_json: bool) -> None:
    """Say what decides on this machine, or in this container, who dies when memory ends, and what of it to change.

    Looks at the kernel's settings, at limits, scores, systemd, Kubernetes, and at each gunicorn, uvicorn
    and Celery pool, whether oomsafe guards it or not. Root sees those of all users. Changes nothing.
    Exits with 0 if there is nothing to change, with 1 if there is, and with 2 if it can't look.
    """
    # what can't be read is part of what is printed
    logging.getLogger("oomsafe").addHandler(logging.NullHandler())
    boards = living_boards()
    pools = read_pools(boards)
    read = {pool.supervisor for pool in pools}
    facts = read_facts(pools, {pid for pid in map(supervisor_of, boards) if pid not in read})
    findings = findings_of(facts)
    status = BLIND if facts.system != "Linux" else FOUND if findings else 0
    with until_closed(status):
        if as_json:
            print(json.dumps(record_of(facts, findings), allow_nan=False))
        else:
            console = Out(highlight=False)
            # its lines are as wide as they may be: nothing is to wrap or crop them
            console.print(doctor_text(facts, findings, console.width), soft_wrap=True)
    raise SystemExit(status)


def record_of(facts: Facts, findings: list[Finding]) -> dict[str, Any]:
    """As JSON data: sizes in bytes, null for what is not known."""
    return {"version": VERSION, "findings": [_plain(finding) for finding in findings], "facts": _plain(facts)}


def _plain(value: Any) -> Any:
    if isinstance(value, Ranking):
        order = [{**_plain(one), "points": int(one.points(value.total, value.page))} for one in value.order[:RANKED]]
        return {"level": _plain(value.level), "total": value.total, "unseen": value.unseen, "order": order}
    if isinstance(value, Source):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value
