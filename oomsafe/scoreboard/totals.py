"""What all workers that are gone have counted: the supervisor keeps it for itself, and writes it for others to read."""

from __future__ import annotations

from oomsafe.scoreboard import layout
from oomsafe.scoreboard.layout import Counters


class Totals:
    """Of the pool whose scoreboard is this memory."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        self._counters = Counters()

    def fold(self, number: int) -> None:
        """Take in what the worker of this slot has counted, and clear the slot: in one step for all who read."""
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
