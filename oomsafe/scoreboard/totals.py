"""The counts of all workers that are gone: the supervisor keeps them in its own memory, and publishes them."""

from __future__ import annotations

from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import Counters


class Totals:
    """The totals of the pool whose scoreboard is `memory`."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._counters = Counters()

    def fold(self, number: int) -> None:
        """Add the counts of this slot's worker to the totals, and clear the slot: atomically for all readers."""
        at = layout.slot_at(number)
        counters_at = at + layout.COUNTERS_AT
        self._counters.add(Counters.unpack(self._memory[counters_at : counters_at + layout.COUNTERS_SIZE].tobytes()))
        self._publish(at)

    def count_recycle(self, reason: str) -> None:
        """Count a worker that its supervisor has ended for this reason of layout.REASONS."""
        self._counters.recycles[layout.REASONS.index(reason)] += 1
        self._publish()

    def _publish(self, emptied: int | None = None) -> None:
        """Write the totals and, in the same moment for all readers, zeros to the slot at `emptied`; None: to none."""
        packed = self._counters.pack()
        (sequence,) = layout.SEQUENCE.unpack_from(self._memory, layout.SEQUENCE_AT)
        sequence += sequence % 2
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, layout.count(sequence + 1))
        self._memory[layout.TOTALS_AT : layout.TOTALS_AT + len(packed)] = packed
        if emptied is not None:
            self._memory[emptied : emptied + layout.SLOT_SIZE] = bytes(layout.SLOT_SIZE)
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, layout.count(sequence + 2))
