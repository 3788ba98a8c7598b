"""What a command prints: a reader that has seen enough (`| head`) ends the output, and is no failure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


class Out(Console):
    """stdout, for a block of until_closed()."""

    def on_broken_pipe(self) -> None:
        """Where rich would end the process by itself."""
        raise BrokenPipeError


@contextmanager
def until_closed(status: int = 0) -> Iterator[None]:
    """Prints. If nobody reads any more, the command ends with this exit status, and without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(status) from None
