"""/dev/kmsg: the log of all printk() messages, a record at a time (Documentation/ABI/testing/dev-kmsg)."""

from __future__ import annotations

import os
from collections.abc import Iterator

KMSG = "/dev/kmsg"

#: A record has 1 KiB of text, escaped, and its fields (PRINTK_MESSAGE_MAX is 2048; 8192 before Linux 6.4).
RECORD = 16 << 10


def open_log(path: str = KMSG) -> int:
    """A descriptor for records_of().

    Raises OSError: reading needs root or CAP_SYSLOG where kernel.dmesg_restrict is set, and containers have no such file.
    """
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def records_of(fd: int) -> Iterator[bytes | None]:
    """The records that are there, the oldest first; None where some were overwritten meanwhile. Raises OSError."""
    while True:
        try:
            record = os.read(fd, RECORD)
        except BlockingIOError:
            return
        except BrokenPipeError:  # the next read goes on with the oldest that is left
            yield None
            continue
        if not record:
            return
        yield record
