"""What systemd has set for a service, and for the slices that it is in."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Sequence

from oomsafe.kernel.cgroup import Cgroup
from oomsafe.kernel.systemd import SYSTEMCTL, service_of
from oomsafe.policy.doctor.facts import Unit

_SLICE = re.compile(r"[A-Za-z0-9:_.\\@-]+\.slice")

#: What is asked of systemd for a unit (systemd.exec(5), systemd.resource-control(5), systemd.service(5)).
PROPERTIES = (
    "Id", "OOMPolicy", "MemoryMax", "MemoryHigh", "OOMScoreAdjust", "LimitDATA", "TasksCurrent", "TasksMax",
    "ManagedOOMMemoryPressure", "ManagedOOMSwap", "ManagedOOMPreference",
)  # fmt: skip

#: Seconds that systemctl may take for them.
ASKED = 2.0

Show = Callable[[Sequence[str]], str]
"""Returns what ``systemctl show`` prints of these units."""


def slices_of(cgroup: Cgroup) -> list[str]:
    """The slices that this cgroup is in, the nearest first."""
    return [part for part in reversed(cgroup.path.split("/")) if _SLICE.fullmatch(part)]


def show(names: Sequence[str]) -> str:
    """Their PROPERTIES, as ``systemctl show`` prints them; empty: there is no systemctl, or it took longer than ASKED seconds."""
    argv = [SYSTEMCTL, "show", f"--property={','.join(PROPERTIES)}", "--", *names]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=ASKED, check=False)  # noqa: S603  names are checked
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def unit_of(cgroup: Cgroup, root: str = "", ask: Show = show) -> Unit | None:
    """The service in whose cgroup this is, with what is set for it and for the slices above it; None: it is in none."""
    service = service_of(cgroup, root)
    if service is None:
        return None
    blocks = [dict(line.partition("=")[::2] for line in block.splitlines()) for block in ask([service, *slices_of(cgroup)]).split("\n\n")]
    own = blocks[0] if blocks else {}
    return Unit(
        name=service,
        oom_policy=own.get("OOMPolicy", ""),
        memory_max=own.get("MemoryMax", ""),
        memory_high=own.get("MemoryHigh", ""),
        oom_score_adjust=own.get("OOMScoreAdjust", ""),
        limit_data=own.get("LimitDATA", ""),
        tasks_current=_number(own.get("TasksCurrent")),
        tasks_max=_number(own.get("TasksMax")),
        killed_for_pressure=any("kill" in (block.get("ManagedOOMMemoryPressure"), block.get("ManagedOOMSwap")) for block in blocks),
        preference=own.get("ManagedOOMPreference", ""),
    )


def _number(text: str | None) -> int | None:
    """systemd writes "no limit" as ``infinity``, and what it does not count as ``[not set]``."""
    return int(text) if text and text.isdecimal() and int(text) < 1 << 62 else None
