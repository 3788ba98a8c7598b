"""What the kernel does with connections queued at a listener that closes."""

from __future__ import annotations

from oomsafe.kernel.files import read_int


def migrates_requests(proc: str = "/proc") -> bool | None:
    """Whether connections queued at one SO_REUSEPORT listener go to another when it closes (net.ipv4.tcp_migrate_req, Linux 5.14).

    None if it can't be read.
    """
    setting = read_int(f"{proc}/sys/net/ipv4/tcp_migrate_req")
    return None if setting is None else setting != 0
