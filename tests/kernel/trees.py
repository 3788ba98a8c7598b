"""Kernel trees as they were seen on real machines, written below a test's own folder."""

from __future__ import annotations

from pathlib import Path

MIB = 1 << 20
NO_LIMIT_V1 = 9223372036854771712


class Tree:
    """A root with proc and cgroup file systems in it. `{root}` in a text stands for the root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc = str(root / "proc")
        (root / "proc/self").mkdir(parents=True)

    def write(self, path: str, text: str) -> None:
        """One file, with its folders."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("{root}", str(self.root)))

    def at(self, cgroup: str, *mounts: str) -> None:
        """/proc/self/cgroup and /proc/self/mountinfo."""
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", "22 1 254:1 / / rw,relatime - ext4 /dev/vda rw\n" + "\n".join(mounts) + "\n")

    def v2(
        self,
        folder: str,
        limit: str | int = "max",
        usage: int = 100 * MIB,
        inactive: int = 30 * MIB,
        kills: int = 0,
        high: str | int = "max",
    ) -> None:
        """The memory files of one v2 cgroup."""
        self.write(f"{folder}/memory.max", f"{limit}\n")
        self.write(f"{folder}/memory.high", f"{high}\n")
        self.write(f"{folder}/memory.current", f"{usage}\n")
        self.write(f"{folder}/memory.stat", f"anon 1000\nfile 2000\ninactive_file {inactive}\nactive_file 5\n")
        self.write(f"{folder}/memory.events", f"low 0\nhigh 0\nmax 7\noom 3\noom_kill {kills}\noom_group_kill 0\n")

    def v1(
        self,
        folder: str,
        limit: int = NO_LIMIT_V1,
        usage: int = 100 * MIB,
        inactive: int = 30 * MIB,
        kills: int = 0,
        own: int | None = None,
    ) -> None:
        """The memory files of one v1 cgroup; `own` is its own limit, where that is not the smallest of all."""
        self.write(f"{folder}/memory.limit_in_bytes", f"{limit if own is None else own}\n")
        self.write(f"{folder}/memory.usage_in_bytes", f"{usage}\n")
        self.write(
            f"{folder}/memory.stat",
            f"cache 1\nrss 2\ninactive_file 77\nhierarchical_memory_limit {limit}\ntotal_cache 3\ntotal_inactive_file {inactive}\n",
        )
        self.write(f"{folder}/memory.oom_control", f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")


def v1_mount(controllers: str = "memory", root: str = "/", point: str = "{root}/cg/memory") -> str:
    """A line of mountinfo."""
    return f"35 31 0:32 {root} {point} rw,nosuid shared:9 - cgroup cgroup rw,{controllers}"


def v2_mount(root: str = "/", point: str = "{root}/cg/unified") -> str:
    """A line of mountinfo."""
    return f"41 31 0:38 {root} {point} rw,nosuid shared:4 master:1 - cgroup2 cgroup2 rw,nsdelegate"
