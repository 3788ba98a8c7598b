"""A hard limit on this process's memory that the kernel itself enforces: RLIMIT_DATA.

A resource limit (setrlimit(2)) is two numbers. The *soft* value is what the kernel compares with; a process may change its own at any
time. The *hard* value is the highest that the soft one may be set to; without privileges it can only be lowered, so nothing here touches
it. A fork inherits both, an exec keeps them. RLIMIT_DATA limits `data_vm`: the bytes of address space that are mapped private and writable
and are not the main thread's stack, touched or not. If a new mapping would pass the soft value, the kernel refuses it with ENOMEM; malloc
then returns NULL and Python raises MemoryError in the code that asked. Nothing is killed, and what the process has stays. It has it until
the last traceback is gone that leads to it: in `except MemoryError`, not even a small object may be had. DataLimit.release is for that.

In the kernel's sources (Linux 4.7 and newer):

- is_data_mapping (mm/internal.h, in newer kernels mm/vma.h): VM_WRITE, without VM_SHARED and VM_STACK. So heap, arenas, anonymous mmap, the
  stacks of threads, and private writable file mappings count. Not counted: read-only and PROT_NONE mappings, shared memory, shared file
  mappings, the main thread's stack, other processes, the kernel's own memory.
- may_expand_vm (mm/mmap.c, in the newest kernels mm/vma.c): refuses when data_vm + new pages > soft. mmap, brk and mremap ask it for the
  pages that they add; mprotect asks it for pages that become writable (mprotect_fixup): this is how glibc's arenas and thread stacks grow
  into what they have reserved as PROT_NONE. A soft value of 0 is let through up to the hard one (for Valgrind): never set 0.
- brk also compares the heap alone, with its own check (check_data_rlimit).
- Only what is added is checked. Lowering the soft value below data_vm is allowed, takes nothing away, and refuses all growth.
- The first refusal since the machine booted is logged: "VmData … exceed data ulimit …" (pr_warn_once).
- ignore_rlimit_data (a boot parameter, also /sys/module/kernel/parameters) turns all of this but brk's own check into that warning.

Address space is not resident memory, so the soft value can't be the limit itself: it is what is mapped now, plus what may still become
resident. The sixth field of /proc/self/statm is data_vm + stack_vm (task_statm in fs/proc/task_mmu.c), the second one is rss. stack_vm is
the main thread's stack: usually 132 KiB, at most RLIMIT_STACK, and the limit is too high by as much.

What is mapped already can become resident without the kernel being asked. Most of it never does: the stacks of threads, buffers of
libraries. But malloc_trim gives back pages inside the heap and leaves them mapped, and malloc uses them again: a process that had grown to
270 MiB, and held 23 after a trim, could grow to 554 under a limit of 300. Such holes are counted as if they were resident. So is memory
that the kernel has swapped out.
"""

from __future__ import annotations

import sys
import time
from _thread import RLock, stack_size  # the real ones, because gevent replaces threading's
from collections.abc import Callable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import NamedTuple

from oomsafe.kernel.files import read_text

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: A soft value that limits nothing. The kernel's RLIM_INFINITY is -1 in Python, and would compare as the lowest of all.
UNLIMITED = 1 << 64

#: Bytes that may be mapped after the limit has first been set, even if there is no room: two of pymalloc's arenas.
MINIMUM = 2 << 20

#: A process is at its limit if it may map less than this, in bytes.
CLOSE = 16 << 20

#: The soft value is not changed for less than this, in bytes.
SLACK = 256 << 10

#: Bytes that a new thread may need beside its stack until it says that it has started: one of pymalloc's arenas (1 MiB since Python 3.10),
#: the first heap of an arena of malloc's (132 KiB), a chunk of its frames (16 KiB since Python 3.11).
THREAD = 5 << 18

#: Bytes that DataLimit.release makes room for, once.
RESERVE = 2 << 20

#: A soft value that a supervisor sets from outside has these lowest bits, so that the worker knows it for one whenever it looks, and does
#: not take it for the application's. The kernel compares pages (value >> PAGE_SHIFT), and ulimit(1) sets whole KiB.
PAGE, MARK = 4096, 0x5A5

#: Seconds after which follow() no longer waits for a suspension or a grant to end. A new process gets its limits at the start of the call
#: that makes it, so a call that takes longer (os.system) needs no suspension any more.
LONGEST = 5.0

#: Bytes of room that a trial of the limit leaves to other threads meanwhile, and bytes that it asks for beyond.
TRIAL, BEYOND = 16 << 20, 8 << 20


#: What setting a limit, or measuring at it, may raise. Our own failure must not become that of a thread or a process which is started.
REFUSED = (OSError, ValueError, MemoryError)


class Enforcement(NamedTuple):
    """Whether this kernel enforces RLIMIT_DATA for this process."""

    enforced: bool | None
    """None: it could not be found out."""
    reason: str
    """Why it is not, or not known; empty if it is."""


class Reading(NamedTuple):
    """What a limit is set by, in bytes."""

    data: int
    """What is mapped and counts: the sixth field of /proc/self/statm."""
    anonymous: int
    """What of it is resident: the second field less the third, with the main thread's stack."""
    room: int
    """What the process may still get: its hard limit less what it holds by the metric of its limits. Negative above the limit."""


class Outside(NamedTuple):
    """What a supervisor has done to this process's limit from outside."""

    most: int | None
    """What the process may have mapped at most now, in bytes; None: whatever its own limit is."""
    before: int | None
    """The soft value that it has found, and puts back: not one of the application's. None: there is none."""


#: Without a supervisor that does so.
NOBODY = Outside(None, None)


class DataLimit:
    """This process's hard limit: RLIMIT_DATA's soft value, kept at what is mapped plus what may still become resident.

    `measure` returns a Reading of now, or None if that is not known. It must be quick, because it is called around starts of threads and
    processes, from any thread.

    The limit belongs to one process: a fork must call leave(), and an exec must happen while the limit is suspended.
    All methods may be called from any thread and from signal handlers. Only follow() and lift() raise.
    """

    release: Callable[[], None]
    """Makes room for RESERVE bytes, by unmapping that much: the first thing to call in `except MemoryError`. A later tick maps it again,
    when there is room. It is a built-in function that allocates nothing, does nothing the second time, and never raises."""

    def __init__(self, measure: Callable[[], Reading | None], outside: Callable[[], Outside] = lambda: NOBODY) -> None:
        """Not in force until follow(). Raises OSError if the reserve can't be mapped.

        `outside` returns what a supervisor has done to the limit from outside, if there is one.
        """
        self._measure = measure
        self._by_supervisor = outside
        self._reserve = self._map_reserve()
        self._lock = RLock()
        self._last: Reading | None = None
        self._vacated = 0
        """Bytes of holes that were resident once."""
        self._unused = 0
        """Bytes that were mapped at the limit, and have not been resident."""
        self._wanted: int | None = None
        """The soft value by the last follow(); None: the limit is not in force."""
        self._most: int | None = None
        """Bytes of Reading.data that the work in hand may reach; None: no work has such a limit."""
        self._put: int | None = None
        """The soft value that was set last from here; any other is somebody else's."""
        self._putting: int | None = None
        """The soft value that is being set from here: if a signal handler raises there, it may be in force, or the one before."""
        self._known: tuple[int, int] | None = None
        """The values that the process has, if nobody else has set any since. None: not known, or they are for now only."""
        self._outside = UNLIMITED
        """The soft value that is due when no work is confined."""
        self._theirs = UNLIMITED
        """The soft value of the application: what the process had before, or what it has set since."""
        self._reported: int | None = None
        self._suspended = 0
        self._granted = 0
        self._beyond = 0
        """Bytes that are mapped beyond the limit: a grant comes on top of them. Others may have taken what was granted before."""
        self._since = 0.0
        """When the last suspension or grant began (monotonic)."""

    def follow(self, now: Reading) -> int | None:
        """Let the process map as much more as it has room for now. Call it at each tick, before and after memory is given back.

        It costs one system call, and a second one if the value changes. A process without room gets MINIMUM once, not again at each tick.
        A soft value that the application has set itself is never raised: if it is lower than ours, it stays, and is returned, once.
        Otherwise returns None. Raises OSError or ValueError if the kernel refuses.
        """
        with self._lock:
            if (self._suspended or self._granted) and time.monotonic() - self._since > LONGEST:
                self._suspended = self._granted = self._beyond = 0
            self._count_holes(now)
            goal, least = now.data + now.room - self.holes, now.data + MINIMUM
            if goal < least:
                goal = least if self._wanted is None else max(goal, min(self._wanted, least))
            self._wanted = goal
            applied = self._apply(SLACK)
            if self._reserve.closed and goal >= now.data + 2 * RESERVE:
                self._reserve = self._map_reserve()
            return applied

    def confine(self, most: int) -> None:
        """Until free(), refuse what would take Reading.data beyond `most` bytes, beside the limit of follow(). One system call.

        Raises as follow() does.
        """
        with self._lock:
            if self._reserve.closed and self._wanted is None:
                self._reserve = self._map_reserve()
                most += RESERVE
            self._most = most
            self._switch(most if most < self._outside else self._outside)

    def free(self) -> None:
        """Undo confine(). One system call. A second time changes nothing. Raises as follow() does."""
        with self._lock:
            self._most = None
            self._switch(self._outside)

    def lift(self) -> None:
        """Give the process back the soft value that it had before, or that the application has set since. Raises as follow() does."""
        with self._lock:
            self._wanted = None
            self._suspended = self._granted = self._beyond = 0
            self._apply()
            self.release()

    def leave(self) -> None:
        """In a fork: this limit is the parent's. The fork has the soft value of the application from now on."""
        self._lock = RLock()  # a thread that did not come along may have held it
        self._most = None
        try:
            self.lift()
        except REFUSED:
            pass

    def suspend(self) -> None:
        """Put the application's own soft value in force until resume(): a process is about to be started, and inherits it."""
        try:
            with self._lock:
                # in this order, so that a signal handler that does the same between the two leaves the limit suspended
                self._suspended += 1
                self._since = time.monotonic()
                self._apply()
        except REFUSED:
            pass

    def resume(self) -> None:
        """Undo suspend(); the last of several puts the limit back, as it must be by now."""
        try:
            with self._lock:
                self._suspended = max(0, self._suspended - 1)
                if not self._suspended:
                    self._again()
        except REFUSED:
            pass

    def grant(self, size: int) -> int | None:
        """Let the process map `size` bytes more until withdraw(): a thread is about to be started. Returns Reading.data, if it is known."""
        try:
            with self._lock:
                now = self._measure()
                self._granted += size
                self._since = time.monotonic()
                due = self._due
                if now is not None and due is not None:
                    self._beyond = max(0, min(now.data - due, CLOSE))
                self._apply()
                return None if now is None else now.data
        except REFUSED:
            return None

    def withdraw(self, size: int, before: int | None = None, ballast: int = 0) -> None:
        """Undo grant(), or a part of it.

        `before`: what grant() returned. What has been mapped since, up to `size` and apart from `ballast` bytes, is a thread's stack: it
        takes nothing from the room, and is no hole.
        """
        try:
            with self._lock:
                self._granted = max(0, self._granted - size)
                self._beyond = self._beyond if self._granted else 0
                self._again(0 if before is None else size, before or 0, ballast)
        except REFUSED:
            pass

    def is_close(self, size: int) -> bool:
        """Whether `size` bytes more, or less than that, would pass the limit. False if it is not in force, or can't be measured."""
        due, now = self._due, self._measure()
        return due is not None and now is not None and due - now.data <= size

    @property
    def holes(self) -> int:
        """Bytes that are not resident, and may become so without the kernel being asked: they count as if they were."""
        return 0 if self._last is None else max(0, min(self._vacated + self._unused, self._last.data - self._last.anonymous))

    @property
    def _due(self) -> int | None:
        """The soft value that is due now, without grants; None: no limit is in force."""
        wanted, most = self._wanted, self._most
        if wanted is None:
            return most
        capped = self._by_supervisor().most
        return min(value for value in (wanted, most, capped) if value is not None)

    @property
    def soft(self) -> int | None:
        """The soft value by the last follow(), without grants; None: the limit is not in force."""
        return self._wanted

    def _map_reserve(self) -> mmap:
        """Raises OSError if not even that much can be mapped."""
        reserve = mmap(-1, RESERVE, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self.release = reserve.close
        return reserve

    def _again(self, most: int = 0, before: int = 0, ballast: int = 0) -> None:
        """The same as the next tick would do, now; without a measurement, the last soft value stays."""
        # at once, because other threads run while this one measures (a system call releases the GIL); a new stack must be counted first
        if not most:
            self._apply()
        now = None if self._due is None else self._measure()
        if now is None:
            return
        stack = min(most, max(0, now.data - before - ballast))
        if stack and self._most is not None:
            self._most += stack
        if self._wanted is None:
            self._apply()
            return
        if stack:
            self._wanted += stack
            self._last = self._last and self._last._replace(data=self._last.data + stack)
        self.follow(now)

    def _count_holes(self, now: Reading) -> None:
        """What is no longer resident and still mapped is a hole; what becomes resident and was mapped already fills one.

        What is mapped and was never resident is none: a library's buffer, an array that nobody has written to. But at the limit it counts,
        because it was granted, and because it can't be told from the holes of one thread while another one grows.
        """
        last, self._last = self._last, now
        if last is None:
            return
        resident, mapped = now.anonymous - last.anonymous, now.data - last.data
        if mapped >= resident:
            vacated = min(mapped - resident, max(0, -resident))
            self._vacated += vacated
            if self._wanted is not None and self._wanted - now.data < CLOSE:
                self._unused += mapped - resident - vacated
        else:
            filled = min(resident - mapped, max(0, resident))
            self._vacated = max(0, self._vacated - max(0, filled - self._unused))
            self._unused = max(0, self._unused - (resident - mapped))

    def _apply(self, slack: int = 1) -> int | None:
        """Set what is due now, if it differs from what is set by at least `slack` bytes. Returns what follow() returns."""
        soft, hard = _limits()
        if soft == self._putting:
            self._put = soft
        elif soft != self._put and soft % PAGE != MARK and soft != self._by_supervisor().before:
            self._theirs, self._put = soft, None  # what was set from here is gone: should it come back, the application has set it
        ceiling = min(self._theirs, hard)
        value, due = ceiling, self._due
        self._outside = ceiling if self._wanted is None else min(self._wanted, ceiling)
        if due is not None and not self._suspended:
            value = min(due + self._beyond + self._granted, ceiling)
        if abs(value - soft) >= slack:
            self._putting = value
            resource.setrlimit(resource.RLIMIT_DATA, (_raw(value), _raw(hard)))
            self._put = soft = value
        self._putting = self._put
        self._known = None if self._suspended or self._granted else (_raw(soft), _raw(hard))
        if self._wanted is None or self._wanted <= ceiling or ceiling == self._reported:
            return None
        self._reported = ceiling
        return ceiling

    def _switch(self, value: int) -> None:
        """The same as _apply(), which would set `value`, in one system call. Called once for each task, and twice."""
        known = self._known
        if known is None or self._putting != self._put:
            self._apply()
            return
        new = (value if value < UNLIMITED else -1, known[1])
        self._putting = value
        try:
            found = resource.prlimit(0, resource.RLIMIT_DATA, new)
        except (OSError, ValueError):  # the application has lowered the hard value
            self._apply()
            return
        if found == known:
            self._known, self._put = new, value
        else:  # somebody else has set the values that are found
            resource.setrlimit(resource.RLIMIT_DATA, found)
            self._apply()


def enforcement(data: int | None, modules: str = "/sys/module") -> Enforcement:
    """Whether the limit will hold in this process, found out by trying it: 20 us. `data` is the sixth field of its statm, in bytes.

    gVisor writes 0 there, and nobody says what another sandbox enforces. So for a moment the soft value is set TRIAL bytes above what is
    mapped, and a mapping that is BEYOND bytes larger must be refused. What is mapped is never touched. Call this before follow().
    """
    if not sys.platform.startswith("linux"):
        return Enforcement(False, f"only Linux holds RLIMIT_DATA against what a process maps; this is {sys.platform}")
    if resource is None or not hasattr(resource, "RLIMIT_DATA"):
        return Enforcement(False, "this Python knows no RLIMIT_DATA")
    ignored = f"{modules}/kernel/parameters/ignore_rlimit_data"
    if (read_text(ignored) or "").strip() in ("Y", "1"):
        return Enforcement(False, f"this kernel only warns: {ignored} is Y")
    if not data:
        return Enforcement(None, "the sixth field of /proc/self/statm is not there, or 0, as gVisor writes it")
    try:
        return _trial(data)
    except (OSError, ValueError) as error:
        return Enforcement(None, f"it could not be tried: {error}")


def soft_of(pid: int) -> int | None:
    """The soft value of another process's RLIMIT_DATA, in bytes, at most UNLIMITED; None if the process is gone.

    Raises PermissionError if that is another user's and this process has no CAP_SYS_RESOURCE (prlimit(2)), AttributeError where there is no
    such call.
    """
    try:
        soft, _ = resource.prlimit(pid, resource.RLIMIT_DATA)
    except ProcessLookupError:
        return None
    return soft if soft >= 0 else UNLIMITED


def marked(value: int) -> int:
    """The soft value, less than a page above this one, by which a process knows that its supervisor has set it."""
    return value - value % PAGE + MARK


def put_soft(pid: int, value: int) -> int | None:
    """Set the soft value of another process's RLIMIT_DATA, in bytes; return what it was. None, and so on: as soft_of()."""
    try:
        _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        ceiling = hard if hard >= 0 else UNLIMITED
        before, _ = resource.prlimit(pid, resource.RLIMIT_DATA, (_raw(min(value, ceiling)), hard))
    except ProcessLookupError:
        return None
    return before if before >= 0 else UNLIMITED


def thread_size() -> int:
    """The bytes of address space that the start of a thread takes: its stack, and THREAD.

    Its stack is what threading.stack_size() says, otherwise the soft value of RLIMIT_STACK, 8 MiB unless changed (pthread_create(3)).
    """
    size = stack_size()
    if size:
        stack_size(size)  # reading it has set it back to its default
    else:
        soft = resource.getrlimit(resource.RLIMIT_STACK)[0]
        size = soft if 0 <= soft < 1 << 40 else 8 << 20  # unlimited: glibc takes 2 MiB, on some machines more
    return size + THREAD


def _trial(data: int) -> Enforcement:
    soft, hard = _limits()
    value = min(data + TRIAL, soft, hard)
    size = max(0, value - data) + BEYOND
    if not _can_map(size):
        return Enforcement(None, f"it could not be tried: not even without it can {size >> 20} MiB be mapped")
    resource.setrlimit(resource.RLIMIT_DATA, (_raw(value), _raw(hard)))
    try:
        passed = _can_map(size)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (_raw(soft), _raw(hard)))
    return Enforcement(False, "tried, and a mapping beyond RLIMIT_DATA was not refused") if passed else Enforcement(True, "")


def _can_map(size: int) -> bool:
    try:
        mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS).close()
    except OSError:
        return False
    return True


def _limits() -> tuple[int, int]:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    return soft if soft >= 0 else UNLIMITED, hard if hard >= 0 else UNLIMITED


def _raw(value: int) -> int:
    return value if value < UNLIMITED else resource.RLIM_INFINITY
