"""Giving memory back in a worker: which part of its heap is collected."""

from __future__ import annotations

import gc
import sys

from oomsafe.kernel.heap import frozen_blocks
from oomsafe.kernel.process import shared_with_parent
from oomsafe.policy.reclaim import generation


def collect(others_wait: bool) -> None:
    """Collect garbage without copying what is shared with a parent, nor, where `others_wait`, stalling them for more than 0.05 s.

    Here even on an event loop: gc holds the GIL wherever it runs, and finalizers expect this thread.
    """
    frozen = frozen_blocks()
    shared = 0 if frozen is not None else shared_with_parent() or 0
    gc.collect(generation(sys.getallocatedblocks() - (frozen or 0), others_wait, shared))
