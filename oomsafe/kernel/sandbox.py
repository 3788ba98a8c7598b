"""A memory cgroup for a demo or a test: created below this process's cgroup, and removed afterwards."""

from __future__ import annotations

import os
from types import TracebackType

from oomsafe.kernel.cgroup import Cgroup, find_cgroup


class Sandbox:
    """A child cgroup with a memory limit in bytes and no swap. As a context manager it removes itself.

    Raises OSError if it can't be created: no memory controller, not root, or not delegated.
    """

    def __init__(self, name: str, limit: int | None, inside: Sandbox | None = None) -> None:
        """`limit` None: no limit of its own. Created in the sandbox `inside`; None: in this process's cgroup."""
        self.cgroup: Cgroup = _make(name, limit, inside.cgroup if inside is not None else None)

    def limit(self, size: int) -> None:
        """Change the limit, in bytes. Raises OSError if the kernel refuses it: v1 refuses a limit below what is in use."""
        _limit(self.cgroup, size)

    def command(self, argv: list[str]) -> list[str]:
        """The command line that runs `argv` inside: only that process and its children are charged, not the process that starts it."""
        return ["/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', self.cgroup.path, *argv]

    def remove(self) -> None:
        """Remove the cgroup. Raises OSError while it still has a process."""
        os.rmdir(self.cgroup.path)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def _make(name: str, limit: int | None, inside: Cgroup | None) -> Cgroup:
    own = inside or find_cgroup()
    if own is None:
        raise OSError("no memory controller is mounted")
    if inside is not None and inside.version == 2:
        _write(f"{inside.path}/cgroup.subtree_control", "+memory")
    refused: OSError | None = None
    # on v2 a cgroup with processes can't enable controllers for children (cgroups(7)), but its parent may
    for parent in own.ancestry() if inside is None else [inside.path]:
        child = Cgroup(own.version, f"{parent}/{name}", own.mount)
        try:
            os.mkdir(child.path, 0o755)
        except OSError as error:
            refused = error
            continue
        try:
            if limit is not None:
                _limit(child, limit)
            return child
        except OSError as error:
            refused = error
            os.rmdir(child.path)
    raise refused or OSError("no memory cgroup can be made")


def _limit(cgroup: Cgroup, limit: int) -> None:
    if cgroup.version == 1:
        _write(f"{cgroup.path}/memory.limit_in_bytes", limit)
        optional = {"memory.memsw.limit_in_bytes": limit}
    else:
        _write(f"{cgroup.path}/memory.max", limit)
        optional = {"memory.swap.max": 0}
    for name, value in optional.items():
        if os.path.exists(f"{cgroup.path}/{name}"):
            _write(f"{cgroup.path}/{name}", value)


def _write(path: str, value: int | str) -> None:
    # no O_CREAT: if the controller is not enabled, its files are missing, and must not be created as ordinary ones
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)
