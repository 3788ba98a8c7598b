"""The machine or the container: what its owner has set for the kernel, what kind it is, what runs on it that kills."""

from __future__ import annotations

import os
import platform

from oomsafe.kernel.files import read_bytes, read_int, read_keyed, read_text
from oomsafe.kernel.kmsg import KMSG
from oomsafe.kernel.net import migrates_requests
from oomsafe.kernel.oom_score import read_score
from oomsafe.policy.doctor.facts import Container, Settings

#: What a service account's token in a pod lies in.
POD = "/var/run/secrets/kubernetes.io"


def settings_of(root: str = "") -> Settings:
    """What the machine's owner has set for the kernel (sysctl, transparent huge pages)."""
    vm = f"{root}/proc/sys/vm"
    chosen = (read_text(f"{root}/sys/kernel/mm/transparent_hugepage/enabled") or "").partition("[")[2].partition("]")[0]
    return Settings(
        panic_on_oom=read_int(f"{vm}/panic_on_oom"),
        oom_kill_allocating_task=read_int(f"{vm}/oom_kill_allocating_task"),
        overcommit_memory=read_int(f"{vm}/overcommit_memory"),
        swappiness=read_int(f"{vm}/swappiness"),
        huge_pages=chosen or None,
        migrates_requests=migrates_requests(f"{root}/proc"),
    )


def container_of(root: str = "", environment: dict[str, str] | None = None) -> Container:
    """What kind of machine this is, by the files that each kind is known by. `environment`: None is this process's own."""
    environment = dict(os.environ) if environment is None else environment
    said = environment.get("container", "") or (read_text(f"{root}/run/systemd/container") or "").strip() or _first_s(root)
    if "KUBERNETES_SERVICE_HOST" in environment or os.path.isdir(f"{root}{POD}"):
        return Container.KUBERNETES
    if os.path.exists(f"{root}/run/.containerenv") or said == "podman":
        return Container.PODMAN
    if os.path.exists(f"{root}/.dockerenv") or said == "docker":
        return Container.DOCKER
    if said.startswith("lxc") or os.path.exists(f"{root}/dev/lxd") or os.path.exists(f"{root}/dev/.lxc"):
        return Container.LXC
    if said == "systemd-nspawn":
        return Container.NSPAWN
    if "microsoft" in (read_text(f"{root}/proc/sys/kernel/osrelease") or "").lower():
        return Container.WSL
    return Container.OTHER if said and said not in ("none", "wsl") else Container.NONE


def _first_s(root: str) -> str:
    """The variable ``container`` of the first process (systemd.io/CONTAINER_INTERFACE); empty: it has none, or may not be read."""
    for entry in (read_bytes(f"{root}/proc/1/environ") or b"").split(b"\0"):
        if entry.startswith(b"container="):
            return entry.partition(b"=")[2].decode("ascii", "replace")
    return ""


def swap_of(root: str = "") -> tuple[int | None, int | None]:
    """(all swap, free swap) in bytes; None: not shown."""
    table = read_keyed(f"{root}/proc/meminfo", factor=1024)
    return table.get("SwapTotal"), table.get("SwapFree")


def first_score(root: str = "") -> int | None:
    """oom_score_adj of the first process: a container's own, which the kubelet sets by its QoS class."""
    return read_score(1, f"{root}/proc")


def can_read_kernel_log(root: str = "") -> bool:
    """Whether /dev/kmsg can be opened and read (kernel.dmesg_restrict, CAP_SYSLOG)."""
    try:
        fd = os.open(f"{root}{KMSG}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.read(fd, 8192)
    except BlockingIOError:
        return True  # there is no record yet
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def measures_pressure(root: str = "") -> bool:
    """Whether the kernel measures pressure (PSI, Linux 4.20)."""
    return read_bytes(f"{root}/proc/pressure/memory") is not None


def shm_of(root: str = "") -> tuple[int | None, int | None]:
    """(size, used) of /dev/shm in bytes; None: there is none."""
    try:
        found = os.statvfs(f"{root}/dev/shm")  # noqa: S108
    except OSError:
        return None, None
    return found.f_frsize * found.f_blocks, found.f_frsize * (found.f_blocks - found.f_bfree)


def release_of(root: str = "") -> str:
    """The kernel's version; empty: not Linux, or not shown."""
    return (read_text(f"{root}/proc/sys/kernel/osrelease") or "").strip() or (platform.release() if not root else "")
