"""Metrics as Prometheus reads them, in text: without prometheus_client, which takes 9 MiB and need not be there.

Its text format, version 0.0.4, and OpenMetrics 1.0, for who asks for that.
"""

from __future__ import annotations

from collections.abc import Iterable

from oomsafe.metrics.families import Family

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def expose(families: Iterable[Family], accept: str = "") -> tuple[str, bytes]:
    """(content type, body), as the request's Accept header says: plain text unless it names OpenMetrics."""
    is_open = any(one.partition(";")[0].strip().lower() == "application/openmetrics-text" for one in accept.split(","))
    lines: list[str] = []
    for family in families:
        # the older format calls a counter by the name of its samples
        name = family.name + "_total" if family.kind == "counter" and not is_open else family.name
        lines += [f"# HELP {name} {_escaped(family.text)}", f"# TYPE {name} {family.kind}"]
        lines += [f"{family.name}{suffix}{_labels(labels)} {value!r}" for suffix, labels, value in family.samples]
    if is_open:
        lines.append("# EOF")
    return OPENMETRICS if is_open else PLAIN, "".join(f"{line}\n" for line in lines).encode()


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    pairs = ",".join(f'{name}="{_escaped(value, quotes=True)}"' for name, value in sorted(labels.items()))
    return f"{{{pairs}}}"


def _escaped(text: str, quotes: bool = False) -> str:
    text = text.replace("\\", r"\\").replace("\n", r"\n")
    return text.replace('"', r"\"") if quotes else text
