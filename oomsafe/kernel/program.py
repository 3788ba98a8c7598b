"""How a process was started, read from outside: its command line, its allocator, its resource limits."""

from __future__ import annotations

import os
import re

from oomsafe.kernel.files import read_bytes, read_text
from oomsafe.policy.doctor.facts import UNLIMITED, Program
from oomsafe.policy.text import printable

#: The environment variables that steer allocators; of the others nothing is kept, they may be secrets.
STEERING = (
    "MALLOC_ARENA_MAX",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "GLIBC_TUNABLES",
    "PYTHONMALLOC",
    "LD_PRELOAD",
    "MALLOC_CONF",
)

#: By what the file of an allocator, or of the C library, is called. Those that replace malloc are looked for first.
_ALLOCATORS = (
    ("jemalloc", re.compile(r"/libjemalloc[^/]*$")), ("mimalloc", re.compile(r"/libmimalloc[^/]*$")),
    ("tcmalloc", re.compile(r"/libtcmalloc[^/]*$")), ("musl", re.compile(r"/(ld-musl-|libc\.musl-)[^/]*$")),
    ("glibc", re.compile(r"/(libc\.so\.6|libc-2\.[^/]*\.so)$")),
)  # fmt: skip

_PYTHON = re.compile(r"/(?:lib)?python(3\.\d{1,2})(t?)(?:\.so[.\d]*|)$|/python(3\.\d{1,2})(t?)/")

#: As the kernel writes it into limits: the soft value, in bytes.
_LIMIT = re.compile(r"^Max (data size|address space) +(\d+|unlimited) ", re.MULTILINE)

#: At most so much of a process's map is read.
MAPS = 1 << 20


def argv_of(pid: int, proc: str = "/proc") -> list[str]:
    """Its command line; empty for a kernel thread, or one that is gone."""
    raw = read_bytes(f"{proc}/{pid}/cmdline") or b""
    return [word.decode("utf-8", "replace") for word in raw.rstrip(b"\0").split(b"\0")] if raw else []


def program_of(pid: int, proc: str = "/proc") -> Program:
    """How it was started. What may not be read, of another user's process, is left out."""
    files = list(dict.fromkeys(re.findall(r" (/\S+)$", _maps(pid, proc), re.MULTILINE)))
    try:
        files.append(os.readlink(f"{proc}/{pid}/exe"))
    except OSError:
        pass  # another user's
    version, free_threaded = _python(files)
    limits = {
        name: UNLIMITED if value == "unlimited" else int(value) for name, value in _LIMIT.findall(read_text(f"{proc}/{pid}/limits") or "")
    }
    return Program(
        python=version,
        free_threaded=free_threaded,
        malloc=next((name for name, pattern in _ALLOCATORS if any(pattern.search(file) for file in files)), ""),
        environment=_environment(pid, proc),
        reuse_port=any(word == "--reuse-port" or word.startswith("--reuse-port=") for word in argv_of(pid, proc)),
        limit_data=limits.get("data size"),
        limit_address_space=limits.get("address space"),
    )


def _maps(pid: int, proc: str) -> str:
    try:
        with open(f"{proc}/{pid}/maps", encoding="utf-8", errors="replace") as file:
            return file.read(MAPS)
    except OSError:
        return ""


def _python(files: list[str]) -> tuple[str, bool]:
    for file in files:
        found = _PYTHON.search(file)
        if found is not None:
            return found[1] or found[3], bool(found[2] or found[4])
    return "", False


def _environment(pid: int, proc: str) -> dict[str, str]:
    found = {}
    for entry in (read_bytes(f"{proc}/{pid}/environ") or b"").split(b"\0"):
        name, _, value = entry.decode("utf-8", "replace").partition("=")
        if name in STEERING:
            found[name] = printable(value)
    return found
