"""Whole machines as trees: what /proc, /sys and /run show on each kind of them, with a server and its workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kernel.trees import MIB, NO_LIMIT_V1, Tree, v1_mount, v2_mount

GIB = 1 << 30


class Host(Tree):
    """A Linux machine with settings as Debian has them; the process that asks is 900."""

    def __init__(
        self, root: Path, *, memory: int = 8 * GIB, swap: int = 0, kernel: str = "6.1.0-18-amd64", seen_whole: bool = True
    ) -> None:
        super().__init__(root)
        (root / "dev/shm").mkdir(parents=True)
        self.write("proc/meminfo", f"MemTotal: {memory >> 10} kB\nMemFree: {memory >> 11} kB\nMemAvailable: {memory // 10 * 7 >> 10} kB\n")
        with (root / "proc/meminfo").open("a") as file:
            file.write(f"SwapTotal: {swap >> 10} kB\nSwapFree: {swap >> 10} kB\n")
        for name, value in (("panic_on_oom", 0), ("oom_kill_allocating_task", 0), ("overcommit_memory", 0), ("swappiness", 60)):
            self.write(f"proc/sys/vm/{name}", f"{value}\n")
        self.write("proc/sys/net/ipv4/tcp_migrate_req", "0\n")
        self.write("proc/sys/kernel/osrelease", f"{kernel}\n")
        self.write("proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
        self.write("proc/self/status", "Name:\toomsafe\nCapEff:\t000001ffffffffff\n")
        self.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
        if seen_whole:
            self.write("proc/2/comm", "kthreadd\n")
            self.write("proc/2/cmdline", "")

    def process(
        self, pid: int, parent: int, argv: Sequence[str], mib: int, *, score: int = 0, comm: str = "", swapped: int = 0,
        children: Sequence[int] = (), cgroup: str | None = None, cpus: str = "3",
    ) -> None:  # fmt: skip
        """One process of `mib` anonymous memory, with what is read of it."""
        at, comm = f"proc/{pid}", comm or Path(argv[0].split(":")[0]).name
        self.write(f"{at}/cmdline", "\0".join(argv) + "\0")
        self.write(f"{at}/comm", f"{comm[:15]}\n")
        self.write(
            f"{at}/status",
            f"Name:\t{comm[:15]}\nVmRSS:\t{mib << 10} kB\nRssAnon:\t{mib << 10} kB\nRssFile:\t0 kB\nRssShmem:\t0 kB\n"
            f"VmPTE:\t{mib * 2} kB\nVmSwap:\t{swapped << 10} kB\nCpus_allowed:\t{cpus}\n",
        )
        self.write(f"{at}/oom_score_adj", f"{score}\n")
        self.write(f"{at}/stat", f"{pid} ({comm[:15]}) S {parent} " + "0 " * 17 + f"{pid * 10} " + "0 " * 20 + "\n")
        self.write(f"{at}/environ", "HOME=/\0SECRET=hunter2\0")
        self.write(f"{at}/limits", "Max data size             unlimited            unlimited            bytes     \n")
        self.write(f"{at}/maps", "7f00-7f01 r-xp 00000000 fd:01 42                         /usr/lib/x86_64-linux-gnu/libc.so.6\n"
                                 "5500-5501 r-xp 00000000 fd:01 43                         /usr/bin/python3.11\n")  # fmt: skip
        self.write(f"{at}/task/{pid}/children", " ".join(map(str, children)))
        self.write(f"{at}/cgroup", cgroup or (self.root / "proc/self/cgroup").read_text())

    def gunicorn(
        self, cgroup: str, *, master: int = 30, workers: Sequence[int] = (60, 62), score: int = 0, worker_score: int | None = None,
        parent: int = 1, pid: int = 500, argv: Sequence[str] = (), swapped: int = 0,
    ) -> list[int]:  # fmt: skip
        """A gunicorn of a cgroup; sizes in MiB. Returns its pids."""
        command = ["/venv/bin/python", "/venv/bin/gunicorn", "shop:app", *argv]
        pids = [pid + 1 + number for number in range(len(workers))]
        self.process(pid, parent, command, master, score=score, comm="gunicorn", children=pids, cgroup=cgroup)
        for worker, mib in zip(pids, workers, strict=True):
            self.process(
                worker, pid, command, mib, score=score if worker_score is None else worker_score, comm="gunicorn", cgroup=cgroup,
                swapped=swapped,
            )  # fmt: skip
        return [pid, *pids]

    def lists(self, folder: str, pids: Sequence[int]) -> None:
        """The processes of a cgroup."""
        self.write(f"{folder}/cgroup.procs", "".join(f"{pid}\n" for pid in pids))


UNIT = "0::/system.slice/shop.service\n"

Show = Callable[[Sequence[str]], str]


def shows(service: str, **more: str) -> Show:
    """What systemctl says of a service; of its slices nothing is set."""
    values = {
        "Id": "shop.service", "OOMPolicy": "continue", "MemoryMax": "infinity", "MemoryHigh": "infinity", "OOMScoreAdjust": "0",
        "LimitDATA": "infinity", "TasksCurrent": "9", "TasksMax": "9413", "ManagedOOMMemoryPressure": "auto", "ManagedOOMSwap": "auto",
        "ManagedOOMPreference": "none",
    } | more  # fmt: skip
    own = "".join(f"{name}={value}\n" for name, value in values.items())
    return lambda names: "\n".join([own if name == service else f"Id={name}\n" for name in names])


def nothing(names: Sequence[str]) -> str:
    """There is no systemctl."""
    return ""


def debian(root: Path) -> tuple[Host, Show]:
    """A virtual machine with systemd: gunicorn --preload in a service as people write them, nothing set."""
    host = Host(root, memory=4 * GIB)
    host.at("0::/user.slice/user-0.slice/session-1.scope\n", v2_mount(point="{root}/cg"))
    host.write("run/systemd/system/.is", "")
    host.v2("cg/user.slice/user-0.slice/session-1.scope")
    host.v2("cg/user.slice/user-0.slice")
    host.v2("cg/user.slice", usage=200 * MIB)
    host.v2("cg/system.slice/shop.service", usage=500 * MIB)
    host.v2("cg/system.slice", usage=900 * MIB)
    host.process(1, 0, ["/sbin/init"], 8, comm="systemd", cgroup="0::/init.scope\n")
    host.process(300, 1, ["/usr/sbin/sshd"], 6, score=-1000, cgroup="0::/system.slice/ssh.service\n")
    host.lists("cg/system.slice/shop.service", host.gunicorn(UNIT, master=310, workers=(95, 98, 97)))
    return host, shows("shop.service", OOMPolicy="stop")


def debian_well(root: Path) -> tuple[Host, Show]:
    """The same as it should be: MemoryMax, OOMPolicy=continue, and scores that put workers first."""
    host = Host(root, memory=4 * GIB)
    host.at("0::/user.slice/user-0.slice/session-1.scope\n", v2_mount(point="{root}/cg"))
    host.write("run/systemd/system/.is", "")
    host.v2("cg/user.slice/user-0.slice/session-1.scope")
    host.v2("cg/system.slice/shop.service", GIB, usage=500 * MIB)
    host.v2("cg/system.slice", usage=900 * MIB)
    host.process(1, 0, ["/sbin/init"], 8, comm="systemd", cgroup="0::/init.scope\n")
    host.lists("cg/system.slice/shop.service", host.gunicorn(UNIT, master=310, workers=(95, 98, 97), worker_score=402))
    return host, shows("shop.service", MemoryMax=str(GIB))


def docker_v1(root: Path) -> tuple[Host, Show]:
    """A container on a v1 host: the mount shows its own cgroup only; nearly full."""
    host = Host(root, memory=16 * GIB, seen_whole=False)
    host.at("11:memory:/docker/0123abcd\n", v1_mount(root="/docker/0123abcd"))
    host.v1("cg/memory", 512 * MIB, usage=490 * MIB, inactive=4 * MIB)
    host.write(".dockerenv", "")
    host.lists("cg/memory", [900, *host.gunicorn("11:memory:/docker/0123abcd\n", pid=1, parent=0, workers=(200, 210))])
    return host, nothing


def docker_v2(root: Path) -> tuple[Host, Show]:
    """A container on a v2 host, with a limit and workers that go first."""
    host = Host(root, memory=16 * GIB, seen_whole=False)
    host.at("0::/\n", v2_mount(point="{root}/cg"))
    host.v2("cg", 512 * MIB, usage=200 * MIB)
    host.write("cg/memory.oom.group", "0\n")
    host.write("cg/memory.swap.max", "0\n")
    host.write(".dockerenv", "")
    host.lists("cg", [900, *host.gunicorn("0::/\n", pid=1, parent=0, worker_score=300)])
    return host, nothing


def pod(root: Path, score: int, limit: str | int, worker_score: int) -> tuple[Host, Show]:
    """A container in Kubernetes, with its oom.group of 1."""
    host = Host(root, memory=32 * GIB, seen_whole=False)
    host.at("0::/\n", v2_mount(point="{root}/cg"))
    host.v2("cg", limit, usage=200 * MIB)
    host.write("cg/memory.oom.group", "1\n")
    host.write("var/run/secrets/kubernetes.io/serviceaccount/token", "")
    host.lists("cg", [900, *host.gunicorn("0::/\n", pid=1, parent=0, score=score, worker_score=worker_score)])
    return host, nothing


def guaranteed(root: Path) -> tuple[Host, Show]:
    """QoS class Guaranteed."""
    return pod(root, -997, 512 * MIB, -697)


def burstable(root: Path) -> tuple[Host, Show]:
    """QoS class Burstable: hardly any room above its score."""
    return pod(root, 984, 512 * MIB, 1000)


def besteffort(root: Path) -> tuple[Host, Show]:
    """QoS class BestEffort: no limit, and everybody at 1000."""
    return pod(root, 1000, "max", 1000)


def lxc(root: Path) -> tuple[Host, Show]:
    """A system container, whose lxcfs shows the container's memory as the machine's."""
    host = Host(root, memory=GIB, seen_whole=False)
    host.at("0::/.lxc\n", v2_mount(point="{root}/cg"))
    host.v2("cg/.lxc")
    host.v2("cg", GIB, usage=300 * MIB)
    host.write("run/systemd/container", "lxc\n")
    host.process(1, 0, ["/sbin/init"], 8, comm="systemd", cgroup="0::/init.scope\n")
    return host, nothing


def wsl(root: Path) -> tuple[Host, Show]:
    """WSL 2 without systemd: v1 controllers beside an empty v2 hierarchy."""
    host = Host(root, memory=7 * GIB, swap=2 * GIB, kernel="5.15.153.1-microsoft-standard-WSL2")
    host.at("9:memory:/\n0::/\n", v2_mount(), v1_mount())
    host.v1("cg/memory", NO_LIMIT_V1)
    host.process(1, 0, ["/init"], 1, comm="init", cgroup="9:memory:/\n")
    return host, nothing


def laptop(root: Path) -> tuple[Host, Show]:
    """A desktop with swap and systemd-oomd, a browser, and nothing to guard."""
    host = Host(root, memory=16 * GIB, swap=4 * GIB, kernel="6.8.0-45-generic")
    host.at("0::/user.slice/user-1000.slice/user@1000.service/app.slice/term.scope\n", v2_mount(point="{root}/cg"))
    host.write("run/systemd/system/.is", "")
    host.v2("cg/user.slice/user-1000.slice/user@1000.service/app.slice/term.scope")
    host.process(1, 0, ["/sbin/init"], 8, comm="systemd", cgroup="0::/init.scope\n")
    host.process(
        700, 1, ["/usr/lib/systemd/systemd-oomd"], 5, comm="systemd-oomd", score=-900, cgroup="0::/system.slice/systemd-oomd.service\n"
    )
    host.process(2000, 1, ["/usr/lib/firefox/firefox"], 900, score=100, cgroup="0::/user.slice/x\n")
    return host, nothing


HOSTS = [debian, debian_well, docker_v1, docker_v2, guaranteed, burstable, besteffort, lxc, wsl, laptop]
