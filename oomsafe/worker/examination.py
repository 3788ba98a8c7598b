"""What this worker is examined for while it serves, beside its work: which lines of code keep memory, and what its memory is.

The first is a probe, in this worker itself, which is replaced afterwards; the second an inspection, by a fork of it. Neither is imported
before it is ordered.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from oomsafe.log import attempt

if TYPE_CHECKING:
    from oomsafe.policy.probe import Endpoint
    from oomsafe.scoreboard.header import Header
    from oomsafe.scoreboard.slot import Slot
    from oomsafe.worker.baseline import Beginning
    from oomsafe.worker.inspector import Inspector
    from oomsafe.worker.meter import Meter
    from oomsafe.worker.probe import Probe


class Examination:
    """One worker's. Its methods are called under its guard's lock, but for probe(), which code of the application may call.

    `header`: of the scoreboard that the worker is on; None: it is on none. `who` names it in the log, `unit` its work.
    """

    def __init__(self, meter: Meter, slot: Slot, header: Header | None, who: str, unit: str) -> None:
        self._meter, self._slot, self._header, self._who, self._unit = meter, slot, header, who, unit
        self._probe: Probe | None = None
        self._inspector: Inspector | None = None

    # --- a probe

    def probe(self, work: int, seconds: float) -> bool:
        """Trace allocations for so many pieces of work and so many seconds at most. False: this process is traced already."""
        if self.traces:
            return False
        from oomsafe.worker.probe import Probe  # imported here, because only a worker that is probed needs it

        slot = self._slot
        self._probe = Probe(self._meter, self._who, slot.number, slot.generation, self._unit, self._header, _endpoints, work, seconds)
        return True

    @property
    def traces(self) -> bool:
        """Whether a probe has been ordered, and is not over."""
        return self._probe is not None and not self._probe.finished

    @property
    def was_probed(self) -> bool:
        """Whether there ever was a probe: what a tracer leaves is no matter of the application's."""
        return self._probe is not None

    @property
    def waits_for_replacement(self) -> bool:
        """Whether the window of a probe is over, so that another worker should take this one's place."""
        return self._probe is not None and self._probe.waits_for_replacement

    def follow_probe(self, now: float, room: int | None, *, replaced: bool) -> None:
        """Begin a probe that is ordered, and go on with it. About once a second.

        `room`: bytes left up to the soft limit; None: there is none. `replaced`: whether anybody replaces this process.
        """
        if not self.traces and (order := self._slot.take_probe_order()) is not None:
            self.probe(*order)
        probe = self._probe
        if probe is None or probe.finished:
            return
        probe.follow(now, room)
        if not replaced and probe.is_its_moment(now):
            probe.finish(ends=False)

    # --- an inspection

    @property
    def inspects(self) -> bool:
        """Whether an inspection is ordered, or goes on: then follow_inspection() is to be called soon."""
        return self._inspector is not None or self._slot.is_to_be_inspected

    def follow_inspection(self, now: float, began: Beginning) -> bool:
        """Have a fork count what this worker holds, if that is ordered, and reap it. Returns whether there is one."""
        if self._header is None:
            return False
        if self._inspector is None:
            from oomsafe.worker.inspector import Inspector  # imported here, because only a worker that is inspected needs it

            self._inspector = Inspector(self._header, self._slot, self._meter, self._who, began)
        self._inspector.follow(now)
        if not self._inspector.is_busy and self._slot.take_inspection_order():
            self._inspector.begin("it leaves" if self._meter.leaving else "its allocations are traced" if self.traces else "")
        if self._inspector.is_busy:
            return True
        self._inspector = None
        return False

    # --- the end

    def end(self) -> None:
        """The worker has no work any more, and ends."""
        if self._inspector is not None:
            attempt("the end of an inspection", "the server", self._inspector.end)
        if self._probe is not None and self.slows:
            attempt("the end of a probe", "the server", partial(self._probe.finish, ends=True))

    @property
    def slows(self) -> bool:
        """Whether a tracer has slowed this worker, and holds memory of its own."""
        return self._probe is not None and self._probe.slows

    def leave(self) -> None:
        """In a fork of the worker: the inspection's fork is not this process's child."""
        self._inspector = None


def _endpoints() -> list[Endpoint]:
    from oomsafe.worker.current import called_by_routes
    from oomsafe.worker.endpoints import endpoints_of

    return endpoints_of(called_by_routes())
