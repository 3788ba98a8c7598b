"""Giving freed memory back to the kernel."""

from __future__ import annotations

from collections.abc import Callable

_trim: Callable[[int], int] | None = None
_searched = False


def trim() -> bool:
    """malloc_trim(0): give the C heap's free pages back (glibc only: False elsewhere). 1 to 9 ms, without the GIL.

    It helps with blocks above 512 bytes; pymalloc gives its arenas back by itself when they are empty.
    """
    global _trim, _searched
    if not _searched:
        _searched = True
        _trim = _find()
    return _trim is not None and bool(_trim(0))


def _find() -> Callable[[int], int] | None:
    try:
        from ctypes import CDLL, c_int, c_size_t  # imported here: 1 MiB that only a worker pays for that gives memory back

        function = CDLL(None).malloc_trim
    except (ImportError, OSError, AttributeError):  # musl, macOS
        return None
    function.argtypes, function.restype = [c_size_t], c_int
    return function
