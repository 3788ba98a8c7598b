"""A Debian machine in qemu: built once and kept, booted as often as a scenario needs one; nothing in it outlives a boot.

No initramfs: Debian's cloud kernel has NVMe and ext4 built in. No mounts, no loop devices: mkfs.ext4 fills images from folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PROJECT = HERE.parent.parent

#: The host's, by the program that each brings.
QEMU = "qemu-system-x86_64"
TOOLS = {QEMU: "qemu-system-x86", "debootstrap": "debootstrap", "mkfs.ext4": "e2fsprogs"}

#: Debian 12: Linux 6.1, systemd 252, Python 3.11.
SUITE, PYTHON = "bookworm", "3.11"
PACKAGES = ("systemd", "systemd-sysv", "dbus", "udev", "python3", "iproute2", "procps")
KERNEL = "linux-image-cloud-amd64"

#: What the scenarios drive beside oomsafe.
EXTRAS = ("gunicorn", "uvicorn", "celery", "cli")

#: Files of the root, beside Debian's. The second disk has oomsafe and the scenarios.
FILES = {
    "etc/hostname": "oomsafe-vm\n",
    f"usr/local/lib/python{PYTHON}/dist-packages/oomsafe-disk.pth": "/oomsafe/lib\n",
    "etc/systemd/system/scenario.service": """\
[Unit]
After=multi-user.target dbus.service
[Service]
Type=oneshot
ExecStartPre=/bin/mount -t ext4 -o ro /dev/nvme0n2 /oomsafe
ExecStart=/usr/bin/python3 -u /oomsafe/guest/guest.py
ExecStopPost=/bin/systemctl poweroff --force --force
[Install]
WantedBy=default.target
""",
}

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oomsafe-vm"


class CantRun(Exception):
    """This host can't run the machines; says what is missing."""


@dataclass(frozen=True)
class Machine:
    """What a boot needs: qemu's accelerator, a kernel, the root's image and the project's."""

    accelerator: str
    kernel: Path
    root: Path
    project: Path

    def boot(self, words: list[str], memory: int, out: Path, seconds: float) -> Iterator[dict[str, object]]:
        """Boot with `memory` MiB and `words` for the guest; yield what it says, and end when the machine is off.

        `out` is a folder for the console's log and the results. Raises TimeoutError after `seconds`.
        """
        out.mkdir(parents=True, exist_ok=True)
        results = out / "results.jsonl"
        append = ["root=/dev/nvme0n1", "rw", "console=ttyS0", "quiet", "systemd.show_status=0", *words]
        # where others have the host's processors, the kernel takes a late timer for a broken one; a panic ends qemu at once
        append += ["no_timer_check", "panic=-1", "systemd.default_timeout_start_sec=900", "systemd.getty_auto=no"]
        command = [QEMU, "-machine", "q35", "-nographic", "-no-reboot", "-m", str(memory), "-smp", "2", "-nic", "none"]
        command += ["-accel", self.accelerator, "-cpu", "max", "-kernel", str(self.kernel), "-append", " ".join(append)]
        command += ["-device", "nvme,id=disks,serial=oomsafe"]
        for number, image in enumerate((self.root, self.project), 1):
            command += ["-drive", f"file={image},format=raw,if=none,id=disk{number},snapshot=on"]
            command += ["-device", f"nvme-ns,drive=disk{number},nsid={number}"]
        command += ["-serial", f"file:{out / 'console.log'}", "-serial", f"file:{results}", "-monitor", "none"]
        results.write_text("")
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, stdout=(out / "qemu.log").open("wb")) as qemu:
            try:
                qemu.wait(seconds)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the machine is still up after {seconds:.0f} s") from None
            finally:
                qemu.kill()
        yield from _objects(results.read_text(errors="replace"))


def build() -> Machine:
    """The machine with this checkout in it; what is in the cache is taken from there. Raises CantRun."""
    _need_tools()
    base = _cached("base", [SUITE, PACKAGES, KERNEL, FILES], _build_base)
    libraries = _cached("libraries", [EXTRAS, metadata.requires("oomsafe")], _build_libraries)
    project = Path(tempfile.mkdtemp(prefix="oomsafe-vm-")) / "project.img"
    _build_project(libraries, project)
    return Machine(_accelerator(base / "vmlinuz"), base / "vmlinuz", base / "root.img", project)


def _accelerator(kernel: Path) -> str:
    """kvm where a kernel comes up under it, else tcg: a /dev/kvm that is emulated itself may run nothing."""
    command = [QEMU, "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nographic", "-no-reboot", "-nic", "none"]
    # it has no disk: a kernel that works ends at once, in a panic
    command += ["-kernel", str(kernel), "-append", "panic=-1 console=ttyS0"]
    try:
        with open("/dev/kvm", "r+b"):
            up = b"Kernel panic" in subprocess.run(command, check=False, capture_output=True, timeout=15).stdout
    except (OSError, subprocess.TimeoutExpired):
        up = False
    return "kvm" if up else "tcg,thread=multi"


def _need_tools() -> None:
    if platform.machine() != "x86_64":
        raise CantRun(f"the machine is an x86_64, and this host is {platform.machine()}: its kernel would not be found")
    if os.geteuid() != 0:
        raise CantRun("only root can unpack a Debian root (debootstrap)")
    missing = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if missing and shutil.which("apt-get") is None:
        raise CantRun(f"{', '.join(missing)} must be installed, and there is no apt-get to do it")
    if missing:
        print(f"installing {' '.join(missing)} with apt-get", flush=True)
        _quietly("apt-get", "update")
        _quietly("apt-get", "install", "--yes", "--no-install-recommends", *missing, env={"DEBIAN_FRONTEND": "noninteractive"})


def _cached(name: str, key: object, make: Callable[[Path], None]) -> Path:
    """The folder in the cache for `key`, filled by `make` if it is not there: whole, or not at all."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"building {folder}", flush=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=CACHE) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(made)
            made.rename(folder)
    return folder


def _build_base(folder: Path) -> None:
    """vmlinuz and root.img."""
    root = folder / "root"
    _quietly("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", SUITE, str(root))
    name = f"$(apt-cache depends {KERNEL} | sed -n 's/.*Depends: //p' | head -n 1)"
    _quietly("chroot", str(root), "sh", "-c", f"apt-get update && cd /root && apt-get download {name}")
    (package,) = (root / "root").glob("*.deb")
    _quietly("dpkg-deb", "--extract", str(package), str(folder / "kernel"))
    (image,) = (folder / "kernel/boot").glob("vmlinuz-*")
    image.rename(folder / "vmlinuz")
    _quietly("chroot", str(root), "apt-get", "clean")
    for name in (package, folder / "kernel", root / "var/lib/apt/lists", root / "usr/share/doc", root / "usr/share/locale"):
        _quietly("rm", "-rf", str(name))
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    (root / "oomsafe").mkdir()
    _quietly("chroot", str(root), "systemctl", "enable", "scenario.service")
    _image(root, folder / "root.img", 900)
    _quietly("rm", "-rf", str(root))


def _build_libraries(folder: Path) -> None:
    # for the machine's Python, whichever the host has
    target = ["--python-version", PYTHON, "--platform", "manylinux2014_x86_64", "--only-binary", ":all:"]
    _pip("--target", str(folder), *target, f"{PROJECT}[{','.join(EXTRAS)}]")


def _build_project(libraries: Path, image: Path) -> None:
    """A disk with oomsafe installed as its users install it, beside its dependencies, and with the scenarios."""
    disk = image.parent / "disk"
    shutil.copytree(libraries, disk / "lib")
    _pip("--target", str(disk / "lib"), "--no-deps", "--upgrade", str(PROJECT))
    shutil.copytree(HERE / "guest", disk / "guest")
    _image(disk, image, 200)
    shutil.rmtree(disk)


def _image(folder: Path, image: Path, mib: int) -> None:
    _quietly("mkfs.ext4", "-q", "-F", "-d", str(folder), str(image), f"{mib}M")


def _pip(*words: str) -> None:
    _quietly(sys.executable, "-m", "pip", "install", "--quiet", "--root-user-action=ignore", *words)


def _quietly(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a command whose output matters only when it fails. Raises CantRun."""
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, **(env or {})})
    if ran.returncode:
        raise CantRun(f"{' '.join(command)}\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")


def _objects(text: str) -> Iterator[dict[str, object]]:
    for line in text.splitlines():
        with suppress(ValueError):  # the machine died in the middle of it
            yield json.loads(line)
