"""The systemd unit that this process runs in, and what systemd does when the kernel kills one of its processes."""

from __future__ import annotations

import os
import re
import subprocess

from oomsafe.kernel.cgroup import Cgroup

#: Seconds that systemctl may take: the server boots meanwhile.
PATIENCE = 1.0

SYSTEMCTL = "/usr/bin/systemctl"

#: A service's folder in the cgroup tree; systemd escapes whatever else a name may hold (systemd.unit(5)).
_SERVICE = re.compile(r"[A-Za-z0-9:_.\\@-]+\.service")


def service_of(cgroup: Cgroup) -> str | None:
    """The system service in whose cgroup this is; None: in none, or in one of a user's own systemd."""
    parts = cgroup.path.split("/")
    if any(part.startswith("user@") for part in parts) or not os.path.isdir("/run/systemd/system"):
        return None
    return next((part for part in reversed(parts) if _SERVICE.fullmatch(part)), None)


def oom_policy(service: str) -> str | None:
    """What systemd does when the kernel kills a process of this service: ``stop``, ``continue`` or ``kill`` (systemd.service(5)).

    None: systemctl is not here, or does not answer in time.
    """
    try:
        found = subprocess.run(  # noqa: S603  a fixed program, and a name that is checked
            [SYSTEMCTL, "show", "--property=OOMPolicy", "--value", "--", service],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=PATIENCE, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.decode("ascii", "replace").strip() or None
