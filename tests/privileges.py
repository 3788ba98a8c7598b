"""Servers whose workers are of another user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from needs import need

#: Room for a folder, and for nothing in it.
TINY = "mount -t tmpfs -o size=4k,nr_inodes=2 tmpfs /dev/shm"
READ_ONLY = "mount -t tmpfs -o ro tmpfs /dev/shm"


def may_mount() -> bool:
    """Whether a private /dev/shm can be made here."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "sh", "-c", TINY], capture_output=True, check=False).returncode == 0


def opened_to_others(folder: Path) -> list[str]:
    """A prefix for a command that will run this Python as another user.

    Where that one can't enter Python's folder (a pyenv in /root), it can in a mount namespace that
    shows nothing else of what is closed.
    """
    base = Path(sys.base_prefix)
    closed = [path for path in reversed(base.parents) if not path.stat().st_mode & 0o001]
    if not closed:
        return []
    need(may_mount(), f"{closed[0]} is closed to other users, and no mount namespace can be made to open it")
    (folder / "base").mkdir()
    mounts = [
        f"mount --bind {base} {folder}/base", f"mount -t tmpfs -o mode=755 tmpfs {closed[0]}", f"mkdir -p {base}",
        f"mount --move {folder}/base {base}", 'exec "$@"',
    ]  # fmt: skip
    return ["unshare", "-m", "sh", "-c", " && ".join(mounts), "sh"]


def adj(pid: int) -> int:
    """A process's oom_score_adj."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def read_only_everywhere(folder: Path) -> list[str]:
    """A prefix for a command that can write nowhere but to `folder`: its root and all mounts are read-only, /dev/shm is empty."""
    script = f"""
        mount --bind {folder} {folder} && mount -t tmpfs -o ro tmpfs /dev/shm && mount -o remount,ro,bind / || exit 1
        while read -r _ at _; do
            case $at in / | {folder} | /proc* | /sys*) ;; *) mount -o remount,ro,bind "$at" 2>/dev/null ;; esac
        done < /proc/mounts
        cd / && exec "$@"
    """
    return ["unshare", "-m", "sh", "-c", script, "sh"]
