"""Writes metrics in Prometheus's text format 0.0.4 and in OpenMetrics 1.0, without prometheus_client, which takes 9 MiB."""

from __future__ import annotations

from collections.abc import Iterable

from oomsafe.metrics.families import Family

PLAIN = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def expose(families: Iterable[Family], accept: str = "") -> tuple[str, bytes]:
    """(content type, body). `accept` is the request's Accept header; the format is plain text unless that names OpenMetrics."""
    is_open = any(one.partition(";")[0].strip().lower() == "application/openmetrics-text" for one in accept.split(","))
    lines: list[str] = []
    for family in families:
        # in the older format a counter has the name of its samples
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
