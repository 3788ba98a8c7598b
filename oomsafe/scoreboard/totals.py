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
        packed = self._counters.pack()
        (sequence,) = layout.SEQUENCE.unpack_from(self._memory, layout.SEQUENCE_AT)
        sequence += sequence % 2
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, layout.count(sequence + 1))
        self._memory[layout.TOTALS_AT : layout.TOTALS_AT + len(packed)] = packed
        self._memory[at : at + layout.SLOT_SIZE] = bytes(layout.SLOT_SIZE)
        layout.write(self._memory, layout.SEQUENCE_AT, layout.SEQUENCE, layout.count(sequence + 2))
