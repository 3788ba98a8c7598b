"""This process's Python heap: freezing it, so that it stays shared after a fork, and how much of it is frozen."""

from __future__ import annotations

import gc
import sys

_frozen_blocks: int | None = None


def freeze() -> None:
    """Exclude all present objects from garbage collection, in this process and in its later forks."""
    global _frozen_blocks
    gc.freeze()
    _frozen_blocks = sys.getallocatedblocks()


def thaw() -> None:
    """Undo freeze()."""
    global _frozen_blocks
    gc.unfreeze()
    _frozen_blocks = None


def frozen_blocks() -> int | None:
    """Blocks of Python's allocator that existed when this process's heap, or its parent's, was frozen; None: it is not frozen."""
    return _frozen_blocks
