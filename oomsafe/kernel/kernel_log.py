"""The kernel's log of this machine, as bytes: its ring buffer, or the journal, which also has what was before the last boot."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time
from collections.abc import Generator, Sequence

from oomsafe.errors import KernelLogError
from oomsafe.kernel.kmsg import KMSG, open_log, records_of

#: Seconds without any output after which a program that reads a log is given up.
PATIENCE = 30.0

JOURNALCTL = ("journalctl", "--no-pager", "--output=short-iso", "_TRANSPORT=kernel")
DMESG = ("dmesg",)


def ring_buffer(path: str = KMSG) -> Generator[bytes, None, None]:
    """What the kernel's ring buffer has now: records of /dev/kmsg (dev-kmsg in the kernel's ABI docs), else the output of dmesg.

    Raises KernelLogError.
    """
    try:
        fd = open_log(path)
    except OSError as error:
        if isinstance(error, PermissionError) or shutil.which(DMESG[0]) is None:
            raise KernelLogError(_refused(path, error)) from None
        yield from output_of(DMESG, "--journal may work, or as root")
        return
    try:
        yield from _records(fd, path)
    finally:
        os.close(fd)


def _records(fd: int, path: str) -> Generator[bytes, None, None]:
    try:
        for record in records_of(fd):
            # lines that begin with a space are metadata of the record
            yield b"** some printk messages dropped **\n" if record is None else record.partition(b"\n")[0] + b"\n"
    except OSError as error:
        raise KernelLogError(_refused(path, error)) from None


def journal() -> Generator[bytes, None, None]:
    """All kernel messages in the journal, those before the last boot too. Raises KernelLogError."""
    yield from output_of(JOURNALCTL, "only root and members of the group systemd-journal (or adm) see the kernel's messages")


def boot_time() -> float | None:
    """When this machine was booted, in seconds since 1970: what the ring buffer's clock counts from, sleep aside."""
    try:
        return time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    except (AttributeError, OSError):
        return None


def output_of(command: Sequence[str], hint: str) -> Generator[bytes, None, None]:
    """What a program prints, in pieces, as it comes.

    Raises KernelLogError if it is missing, fails without output, or prints nothing for PATIENCE seconds.

    `hint`: what may help if it fails.
    """
    program = shutil.which(command[0])
    if program is None:
        raise KernelLogError(f"{command[0]} is not installed here: give a FILE, or pipe a log in")
    environ = {**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0", "SYSTEMD_PAGER": ""}
    with (
        subprocess.Popen(  # noqa: S603 - a fixed command
            [program, *command[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
        ) as process
    ):
        try:
            said, some = yield from _pumped(process, command[0])
            if not some and (process.wait(PATIENCE) != 0 or said):
                detail = said.decode("utf-8", "replace").strip().partition("\n")[0]
                raise KernelLogError(f"{command[0]} gave nothing ({detail or f'exit status {process.returncode}'}): {hint}")
        except subprocess.TimeoutExpired:
            raise KernelLogError(f"{command[0]} does not end") from None
        finally:
            process.kill()


def _pumped(process: subprocess.Popen[bytes], name: str) -> Generator[bytes, None, tuple[bytes, bool]]:
    """Its output; then (the beginning of its error output, whether there was any output)."""
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout.fileno(), process.stderr.fileno()
    said, some, waiting = b"", False, [out, err]
    while waiting:
        ready, _, _ = select.select(waiting, [], [], PATIENCE)
        if not ready:
            raise KernelLogError(f"{name} printed nothing for {PATIENCE:.0f} s")
        for fd in ready:
            piece = os.read(fd, 1 << 16)
            if not piece:
                waiting.remove(fd)
            elif fd == err:
                said = (said + piece)[:4096]
            else:
                some = True
                yield piece
    return said, some


def _refused(path: str, error: OSError) -> str:
    text = error.strerror or str(error)
    if isinstance(error, PermissionError):
        return f"{path} can't be read ({text}): kernel.dmesg_restrict=1 allows it only to root and with CAP_SYSLOG; --journal may work"
    return f"{path} can't be read ({text}): give a FILE, pipe a log in, or try --journal"
