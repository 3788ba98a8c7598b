"""This process's Python heap, as far as the allocator and the collector tell: what of it is frozen, and stays shared after a fork."""

from __future__ import annotations

import gc
import sys

_frozen_blocks: int | None = None


def freeze() -> None:
    """Take all that is there out of the collector's reach, here and in what is forked from now on."""
    global _frozen_blocks
    gc.freeze()
    _frozen_blocks = sys.getallocatedblocks()


def thaw() -> None:
    """Give it back."""
    global _frozen_blocks
    gc.unfreeze()
    _frozen_blocks = None


def frozen_blocks() -> int | None:
    """Blocks of Python's allocator that were there when this process's heap, or its parent's, was frozen; None: it is not."""
    return _frozen_blocks
