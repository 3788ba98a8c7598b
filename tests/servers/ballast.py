"""apps.wsgi behind an import that costs BALLAST_MIB, as a big model does.

The ballast stays out of forks (MADV_DONTFORK), so with preload_app it is the master's alone: the
master is then the biggest process of its pool, and the kernel's first choice.
"""

from __future__ import annotations

import ctypes
import mmap
import os

from apps import wsgi

_ballast = mmap.mmap(-1, int(os.environ["BALLAST_MIB"]) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for _page in range(0, len(_ballast), mmap.PAGESIZE):
    _ballast[_page] = 1
_ballast.madvise(mmap.MADV_DONTFORK)
# in a fork nothing is there: it must not be unmapped, for something else may be by then
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_ballast))

__all__ = ["wsgi"]
