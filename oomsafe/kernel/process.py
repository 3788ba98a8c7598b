"""One process's memory, start time and name."""

from __future__ import annotations

import logging
import os
import re
import signal
from typing import Any, NamedTuple

from oomsafe.kernel.files import read_bytes, read_keyed, read_record, read_text
from oomsafe.log import once

PAGE = os.sysconf("SC_PAGE_SIZE")

#: The kernel keeps 15 bytes of a name (TASK_COMM_LEN is 16 with the final zero).
COMM_LENGTH = 15

#: The places of two fields in stat_of(): a process's flags and its start time; and the flag of one that exits (include/linux/sched.h).
FLAGS_FIELD, START_FIELD, PF_EXITING = 6, 19, 0x4

#: Capabilities by number (include/uapi/linux/capability.h).
CAP_SETUID, CAP_SYS_RESOURCE = 7, 24

#: Programs that kill processes when memory runs short, by name (comm, at most 15 bytes).
KILLERS = frozenset({"earlyoom", "systemd-oomd", "oomd", "nohang", "bustd", "low-memory-mon"})

#: smaps_rollup is believed if its Rss is at least this share of statm's, less this many bytes, because statm may be slightly off.
BELIEVED, SLACK = 0.9, 1 << 20

#: How many times smaps_rollup is read until it can be believed.
TRIES = 5


#: Three lines of status that stand together (fs/proc/task_mmu.c, task_mem, since Linux 4.5).
RSS = re.compile(rb"\nRssAnon:\s+(\d+) kB\nRssFile:\s+(\d+) kB\nRssShmem:\s+(\d+) kB\n")


class OwnMemory:
    """This process's resident memory, read through a descriptor that stays open: 0.5 us instead of 2.

    /proc/self/statm belongs to the process that opened it, so after a fork the descriptor would
    describe the parent: its owner is checked. Other code may close the descriptor (os.closerange, a library that daemonises), and
    its number may be given to another file: content that is not a statm is noticed at once, another process's statm by
    check(). Without /proc, psutil is used.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._path, self._status = f"{proc}/self/statm", f"{proc}/self/status"
        self._fd = -1
        self._file: tuple[int, int] | None = None
        """Device and inode of the opened file; None if these don't identify it."""
        self._pid = 0
        self._psutil: Any = None
        self.statm = b""
        """What sizes() has read last; empty without /proc."""

    def sizes(self) -> tuple[int, int] | None:
        """(resident, shared) bytes (statm's second and third field, exact since Linux 6.16); None if they can't be read.

        Shared is backed by a file or by shared memory, whether or not another process has it mapped; the rest is anonymous.
        """
        if self._pid != os.getpid():
            self._open()
        if self._fd < 0:
            return self._ask_psutil()
        try:
            statm = self.statm = os.pread(self._fd, 128, 0)
            return _sizes(statm)
        except (OSError, ValueError):
            return self.sizes() if self.check() else None

    def mapped(self) -> tuple[int, int, int] | None:
        """(resident, shared, data) bytes: data is mapped private and writable, or the main thread's stack (statm's sixth field).

        None if they can't be read.
        """
        if self._pid != os.getpid():
            self._open()
        if self._fd < 0:
            return None
        try:
            _, resident, shared, _, _, data, _ = os.pread(self._fd, 128, 0).split(b" ")
            return int(resident) * PAGE, int(shared) * PAGE, int(data) * PAGE
        except (OSError, ValueError):
            return None

    def shmem(self) -> int | None:
        """Resident bytes of shared memory: /dev/shm, memfd, MAP_SHARED without a file (status, RssShmem, Linux 4.5); None: not known."""
        return _kilobytes(read_record(self._status) or b"", b"RssShmem")

    def check(self) -> bool:
        """Open the file again if the descriptor is no longer ours, or could not be opened before. Returns whether it was opened again.

        Called about once a second; costs one system call.
        """
        if self._pid != os.getpid() or is_still(self._fd, self._file):
            return False
        if self._fd >= 0:
            once(
                "own statm",
                logging.WARNING,
                "other code in this process has closed oomsafe's descriptor of /proc/self/statm: oomsafe opens it again",
            )
        self._open()
        return self._fd >= 0

    def close(self) -> None:
        """Close the descriptor; the next sizes() opens it again."""
        if self._fd >= 0 and self._pid == os.getpid() and is_still(self._fd, self._file):
            os.close(self._fd)
        self._fd, self._pid = -1, 0

    def _open(self) -> None:
        # an old descriptor is not closed: by now its number may belong to other code
        self._pid = os.getpid()
        try:
            self._fd, self._file = open_identified(self._path)
        except OSError:
            self._fd = -1

    def _ask_psutil(self) -> tuple[int, int] | None:
        import psutil  # imported here, so that a worker with /proc does not pay for it

        try:
            if self._psutil is None or self._psutil.pid != os.getpid():
                self._psutil = psutil.Process()
            return int(self._psutil.memory_info().rss), 0
        except (OSError, psutil.Error):  # Linux without /proc: psutil finds no process at all
            return None


def _sizes(statm: bytes) -> tuple[int, int]:
    """(resident, shared) bytes. Raises ValueError if `statm` is not seven numbers, as it is since Linux 2.6 (proc(5))."""
    _, resident, shared, _, _, _, _ = statm.split(b" ")
    return int(resident) * PAGE, int(shared) * PAGE


def _kilobytes(status: bytes, name: bytes) -> int | None:
    """The value in bytes of a line of status, ``name: 12 kB``; None if there is no such line."""
    words = status.partition(b"\n" + name + b":")[2].split(None, 1)
    return int(words[0]) * 1024 if words and words[0].isdigit() else None


def open_identified(path: str) -> tuple[int, tuple[int, int] | None]:
    """A new descriptor, and its _identity(); None if that does not identify the file. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    file = _identity(fd)
    # if /proc invents new inodes each time, comparing them would make us open the file each time
    return fd, file if file == _identity(fd) else None


def is_still(fd: int, file: tuple[int, int] | None) -> bool:
    """Whether the descriptor is still of this file, whose _identity() is None if it is not known; False for -1."""
    if fd < 0 or file is None:
        return fd >= 0
    try:
        return _identity(fd) == file
    except OSError:
        return False


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def rss_of(pid: int | str, proc: str = "/proc") -> int | None:
    """Resident bytes of any process (any user may read statm); None if it is gone."""
    words = (read_record(f"{proc}/{pid}/statm") or b"").split()
    try:
        return int(words[1]) * PAGE
    except (ValueError, IndexError):
        return None


def sizes_of(pid: int | str = "self", proc: str = "/proc") -> tuple[int, int] | None:
    """(resident, held) bytes of any process; None if it is gone. Held is anonymous and shared memory (status, Linux 4.5).

    Held leaves out file pages, because the kernel drops clean ones by itself. If the kernel does not tell them apart, held is rss.
    """
    status = read_record(f"{proc}/{pid}/status") or b""
    found = RSS.search(status)
    if found is not None:
        anonymous, file, shmem = map(int, found.groups())
        return 1024 * (anonymous + file + shmem), 1024 * (anonymous + shmem)
    rss = rss_of(pid, proc)
    return None if rss is None else (rss, rss)


def held_of(pid: int | str = "self", proc: str = "/proc") -> int | None:
    """The second of sizes_of()."""
    sizes = sizes_of(pid, proc)
    return None if sizes is None else sizes[1]


def peak_rss_of(pid: int, proc: str = "/proc") -> int | None:
    """The peak of a process's resident bytes (status, VmHWM). Never use it as a trigger, because it never falls.

    Since Linux 6.2 it may be off by max(32, 2 * cpus) * cpus pages. None if the process is gone.
    """
    return read_keyed(f"{proc}/{pid}/status", factor=1024).get("VmHWM")


class Resident(NamedTuple):
    """A process's resident memory, in bytes."""

    anon: int
    files: int
    shared: int


def resident_of(pid: int | str = "self", proc: str = "/proc") -> Resident | None:
    """A process's resident memory by kind (status, Linux 4.5); None if it is gone, or the kernel does not tell the kinds apart."""
    found = RSS.search(read_record(f"{proc}/{pid}/status") or b"")
    return None if found is None else Resident(*(1024 * int(size) for size in found.groups()))


def page_tables_of(pid: int | str = "self", proc: str = "/proc") -> int | None:
    """The bytes of a process's page tables (VmPTE in status), which a fork copies; None if they can't be read."""
    return _kilobytes(read_record(f"{proc}/{pid}/status") or b"", b"VmPTE")


def forget_peak(proc: str = "/proc") -> bool:
    """Reset this process's peak rss to what it holds now (clear_refs, 5; Linux 4.0); False if that fails."""
    try:
        fd = os.open(f"{proc}/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b"5")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def children_of(pid: int, proc: str = "/proc") -> list[int]:
    """The pids of a process's children, whichever thread forked them; empty if the process is gone.

    The kernel lists them for each thread (CONFIG_PROC_CHILDREN); without that list, psutil is used.
    """
    try:
        threads = os.listdir(f"{proc}/{pid}/task")
    except OSError:
        threads = []
    # None: that thread has ended, and its children belong to another by now
    listed = [found for thread in threads if (found := read_bytes(f"{proc}/{pid}/task/{thread}/children")) is not None]
    if listed:
        return list(dict.fromkeys(int(child) for found in listed for child in found.split() if child.isdigit()))
    import psutil  # imported here, so that only a kernel without the list, or a host without /proc, pays for it

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def descendants_of(pid: int, proc: str = "/proc") -> list[int]:
    """The pids of a process's children, their children, and so on; empty if the process is gone."""
    found = children_of(pid, proc)
    for child in found:
        found.extend(children_of(child, proc))
    return found


class Shares(NamedTuple):
    """A process's resident memory apart from what it shares, in bytes."""

    pss: int
    """Each page divided by the number of processes that have it mapped."""
    uss: int
    """Pages that no other process has mapped."""
    private: int
    """uss without file pages."""
    held: int
    """pss without file pages."""


def shared_out(pid: int | str = "self", proc: str = "/proc") -> Shares | None:
    """The process's Shares from smaps_rollup (Linux 4.14); None if it may not be read (needs ptrace-read), or can't be believed.

    The kernel holds the process's mmap_lock while it walks all pages, 2.5 ms a GiB: call this rarely.
    """
    table = _rollup(pid, proc)
    if table is None:
        return None
    private, pss = table.get("Private_Dirty", 0), table["Pss"]
    # dirty pages beyond the anonymous and shared memory are recently written file pages
    files = max(0, private + table.get("Shared_Dirty", 0) - (held_of(pid, proc) or 0))
    # since Linux 5.4 pss is split by kind
    held = table["Pss_Anon"] + table.get("Pss_Shmem", 0) if "Pss_Anon" in table else pss
    return Shares(pss, private + table.get("Private_Clean", 0), max(0, private - files), held)


def file_dirty_of(pid: int | str = "self", proc: str = "/proc") -> int | None:
    """Bytes of file pages that this process may have written to, and that must reach the disk before they can be dropped (smaps).

    Only writable shared mappings count: pages mapped for reading are dirty, too, while the file is fresh, but this process did not
    write them. If shared memory is mapped for reading, the result may be too low. None if smaps may not be
    read. It costs as much as shared_out(), plus 10 us for each mapping.
    """
    smaps = read_bytes(f"{proc}/{pid}/smaps")
    if not smaps:
        return None
    dirty, counts = 0, False
    for line in smaps.splitlines():
        name, _, rest = line.partition(b" ")
        if not name.endswith(b":"):
            counts = rest[1:2] == b"w" and rest[3:4] == b"s"  # "55d0-7ffd rw-s 00000000 fd:01 42 /a/file"
        elif counts and name in (b"Shared_Dirty:", b"Private_Dirty:"):
            dirty += int(rest.split()[0]) * 1024
    shmem = _kilobytes(read_record(f"{proc}/{pid}/status") or b"", b"RssShmem")
    return max(0, dirty - (shmem or 0))


def _rollup(pid: int | str, proc: str) -> dict[str, int] | None:
    """smaps_rollup in bytes.

    Linux 6.1 leaves out mappings while another thread of the process maps memory, down to 3 % of the truth; Rss in the file is
    too low by as much. So Rss is compared with statm, and the file is read again if they differ; None if they still differ,
    or if it may not be read.
    """
    for _ in range(TRIES):
        before = rss_of(pid, proc)
        table = read_keyed(f"{proc}/{pid}/smaps_rollup", factor=1024)
        if "Pss" not in table:
            return None
        least = min(before or 0, rss_of(pid, proc) or 0)
        if table.get("Rss", 0) >= BELIEVED * least - SLACK:
            return table
    return None


def awaits_writing(proc: str = "/proc") -> int | None:
    """Bytes of file pages on the whole machine that must be written before they can be dropped; None if that is not known."""
    table = read_keyed(f"{proc}/meminfo", factor=1024)
    return table["Dirty"] + table.get("Writeback", 0) if "Dirty" in table else None


def anonymous_of(pid: int, proc: str = "/proc") -> int | None:
    """Resident anonymous bytes (statm: resident less shared), which a fork shares; None: not known."""
    words = (read_record(f"{proc}/{pid}/statm") or b"").split()
    try:
        return (int(words[1]) - int(words[2])) * PAGE
    except (ValueError, IndexError):
        return None


def shared_with_parent(pid: int | str = "self", proc: str = "/proc") -> int | None:
    """Resident bytes that were written to and that another process has mapped too, as after a fork (smaps_rollup, Linux 4.14).

    They include shared memory that was written to. None if they may not be read. It costs as much as shared_out().
    """
    return (_rollup(pid, proc) or {}).get("Shared_Dirty")


def start_time(pid: int | str = "self", proc: str = "/proc") -> int | None:
    """When the process started, in clock ticks since boot (proc(5), stat field 22); None if it is gone.

    The pid and this time together identify one process; the kernel reuses pids.
    """
    try:
        return int(stat_of(pid, proc)[19])
    except (ValueError, IndexError):
        return None


def stat_of(pid: int | str, proc: str = "/proc") -> list[bytes]:
    """What stands behind the name in a process's stat (proc(5)): its state at 0, its parent at 1, its session at 3, its minor
    faults at 7, its start time at 19.

    Empty if the process is gone.
    """
    # the name in parentheses may itself hold spaces and parentheses
    return (read_record(f"{proc}/{pid}/stat") or b"").rpartition(b") ")[2].split()


def thread_faults(proc: str = "/proc") -> dict[int, int]:
    """The number of minor page faults of each of this process's threads, by thread id; empty if they can't be read.

    Without a page fault a thread makes nothing resident, so these times the page size is what it has touched (stat, field 10, minflt, of
    /proc/self/task/TID). A transparent huge page is one fault.
    """
    folder, found = f"{proc}/self/task", {}
    try:
        threads = os.listdir(folder)
    except OSError:
        return {}
    for thread in threads:
        try:
            found[int(thread)] = int(stat_of(thread, folder)[7])
        except (IndexError, ValueError):
            continue  # it has ended
    return found


def parent_of(pid: int, proc: str = "/proc") -> tuple[int, str] | None:
    """(pid, name) of a process's parent, the name as it came from there (stat, comm: proc(5)); None when one of them is gone."""
    words = stat_of(pid, proc)
    parent = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    name = read_text(f"{proc}/{parent}/comm") if parent else None
    return None if name is None else (parent, name.rstrip("\n"))


def start_of_child(pid: int, proc: str = "/proc") -> int | None:
    """start_time() of a child that this process has not reaped yet, zombies included; None for any other process."""
    words = stat_of(pid, proc)
    try:
        return int(words[19]) if int(words[1]) == os.getpid() else None
    except (ValueError, IndexError):
        return None


def may_become_another_user(proc: str = "/proc") -> bool:
    """Whether this process, or a fork of it, may change to another user: it is root, or has CAP_SETUID (capabilities(7))."""
    if os.geteuid() == 0:
        return True
    return has_capability(CAP_SETUID, proc) or False


def has_capability(number: int, proc: str = "/proc") -> bool | None:
    """Whether this process has the capability with this number now (CapEff in status, proc(5)); None: not known."""
    words = (read_record(f"{proc}/self/status") or b"").partition(b"\nCapEff:")[2].split(maxsplit=1)
    try:
        return bool(int(words[0], 16) >> number & 1)
    except (ValueError, IndexError):
        return None


def is_alive(pid: int, started: int, proc: str = "/proc") -> bool:
    """Whether the process `pid` with this start_time() still runs; a zombie does not. `started` 0: the start time is not checked."""
    words = stat_of(pid, proc)
    if not words:
        # without /proc, all that can be known is whether the pid is in use
        return not os.path.isdir(f"{proc}/self") and _pid_taken(pid)
    return len(words) > 19 and words[0] not in (b"Z", b"X") and (not started or int(words[19]) == started)


def is_dying(pid: int, started: int, proc: str = "/proc") -> bool:
    """Whether this process has been sent SIGKILL and has not been reaped yet. False where that is not known.

    The signal is pending (SigPnd, ShdPnd in proc(5), status) until the process gets to run; then it is exiting (PF_EXITING in its flags).
    """
    fields = stat_of(pid, proc)
    if len(fields) < START_FIELD + 1 or int(fields[START_FIELD]) != started:
        return False
    if fields[0] in (b"Z", b"X") or int(fields[FLAGS_FIELD]) & PF_EXITING:
        return True
    pending = re.findall(r"^(?:SigPnd|ShdPnd):\s*([0-9a-f]+)", read_text(f"{proc}/{pid}/status") or "", re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGKILL - 1) & 1 for mask in pending)


def userspace_killers(proc: str = "/proc") -> list[str]:
    """The programs running here that kill others when memory runs short, by name: each kills by SIGTERM or SIGKILL, and keeps a log."""
    try:
        pids = [name for name in os.listdir(proc) if name.isdigit()]
    except OSError:
        return []
    names = {(read_text(f"{proc}/{pid}/comm") or "").strip() for pid in pids}
    return sorted(names & KILLERS)


def set_comm(name: str, proc: str = "/proc") -> bool:
    """Name this process's main thread, as ps, top and the kernel's OOM report show it: at most 15 bytes."""
    try:
        fd = os.open(f"{proc}/self/comm", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, name.encode("ascii", "replace")[:COMM_LENGTH])
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _pid_taken(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # EPERM: it belongs to another user
        return True
    return True
