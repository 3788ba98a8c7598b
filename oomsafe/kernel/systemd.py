"""The systemd unit that this process runs in, and what systemd does when the kernel kills one of its processes."""

from __future__ import annotations

import os
import re
import subprocess
import time
from contextlib import suppress

from oomsafe.kernel.cgroup import Cgroup

#: Seconds that systemctl may take.
PATIENCE = 60.0

#: Seconds that its end may take once it has closed its output, or was killed.
ENDING = 0.5

SYSTEMCTL = "/usr/bin/systemctl"

#: A service's folder in the cgroup tree; systemd escapes whatever else a name may hold (systemd.unit(5)).
_SERVICE = re.compile(r"[A-Za-z0-9:_.\\@-]+\.service")


def service_of(cgroup: Cgroup, root: str = "") -> str | None:
    """The system service in whose cgroup this is; None: in none, or in one of a user's own systemd."""
    parts = cgroup.path.split("/")
    if any(part.startswith("user@") for part in parts) or not os.path.isdir(f"{root}/run/systemd/system"):
        return None
    return next((part for part in reversed(parts) if _SERVICE.fullmatch(part)), None)


class OomPolicy:
    """Asks systemctl what systemd does when the kernel kills a process of this service, and never waits for it: see answer()."""

    def __init__(self, service: str) -> None:
        """Raises OSError if there is no systemctl."""
        self.service = service
        self._until = time.monotonic() + PATIENCE
        self._process = subprocess.Popen(  # noqa: S603  a fixed program, and a name that is checked
            [SYSTEMCTL, "show", "--property=OOMPolicy", "--value", "--", service],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._output = self._process.stdout
        os.set_blocking(self._output.fileno(), False)
        self._said = b""

    def answer(self) -> str | None:
        """``stop``, ``continue`` or ``kill`` (systemd.service(5)); empty: it gave none, or took too long; None: not yet."""
        try:
            while piece := os.read(self._output.fileno(), 256):
                self._said = (self._said + piece)[:256]
        except BlockingIOError:
            if time.monotonic() < self._until:
                return None
            self._process.kill()
            self._said = b""
        self._output.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING)  # it ends now, and the server itself may have reaped it
        return self._said.decode("ascii", "replace").strip()
