"""Whether a folder lies in memory: what is written there is charged to the cgroup that is short of it (tmpfs, ramfs)."""

from __future__ import annotations

import os

from oomsafe.kernel.files import read_text

#: Filesystems whose files are memory (mount(8)).
IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"})


def lies_in_memory(folder: str, proc: str = "/proc") -> bool:
    """Whether `folder` is on such a filesystem; True also if that can't be found out. Raises OSError if there is no such folder.

    A file's device number is that of its mount's third field (proc(5), mountinfo). Some filesystems give each file another one
    (btrfs, and overlayfs over several), but those in memory do not.
    """
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    text = read_text(f"{proc}/self/mountinfo")
    if text is None:
        return True
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) > 2 and fields[2] == number:
            return after.partition(" ")[0] in IN_MEMORY
    return False
