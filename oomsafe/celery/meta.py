"""Where ``result_extended`` is on, a result's meta says what its task took: ``memory: {"peak_growth": ..., "rss_end": ...}``, in bytes."""

from __future__ import annotations

import os
from typing import Any

from celery.states import READY_STATES

from oomsafe.kernel.process import forget_peak, peak_rss_of
from oomsafe.log import attempt
from oomsafe.worker.guard import Guard


class Meta:
    """In a child: of one task after the other."""

    def __init__(self, app: Any, guard: Guard) -> None:
        """From here on what the app's result backend stores has it."""
        self._guard = guard
        # Celery's own setting compares the peak that would be reset here: where that is set, the peak of one task can't be known
        self._resets = not app.conf.worker_max_memory_per_child
        self._before: int | None = None
        backend, inner = app.backend, app.backend._get_result_meta

        def with_memory(*args: Any, **options: Any) -> Any:
            meta = inner(*args, **options)
            if isinstance(meta, dict) and meta.get("status") in READY_STATES:
                memory = attempt("a result's meta", "Celery", self._memory)
                return meta if memory is None else {**meta, "memory": memory}
            return meta

        backend._get_result_meta = with_memory

    def begins(self) -> None:
        """A task does."""
        self._before = self._guard.meter.measure() if self._resets and forget_peak() else None

    def _memory(self) -> dict[str, int | None]:
        rss = self._guard.meter.measure() if self._guard.meter.rss_known else None
        peak = peak_rss_of(os.getpid())
        known = self._before is not None and peak is not None
        return {"peak_growth": max(0, (peak or 0) - (self._before or 0)) if known else None, "rss_end": rss}
