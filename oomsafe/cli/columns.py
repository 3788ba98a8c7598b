"""A table in lines of a given width: the columns that matter least are left out, and no figure is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.text import Text

Row = TypeVar("Row")

#: The cells before each column.
GAP = 2


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One figure of each row."""

    title: str
    cell: Callable[[Row], str | Text]
    left_out: int = 0
    """If there is not enough room, the column with the highest number is left out first; 0: never."""
    right: bool = True
    """Whether its cells are aligned to the right."""


def cells_of(columns: Sequence[Column[Row]], row: Row) -> list[Text]:
    """The cells of one row."""
    return [Text(cell) if isinstance(cell := column.cell(row), str) else cell for column in columns]


def that_fit(columns: Sequence[Column[Row]], rows: Sequence[Sequence[Text]], width: int) -> tuple[list[int], list[int]]:
    """The indices of the columns for which there is room, and their widths."""
    widths = [max(len(column.title), *(row[at].cell_len for row in rows)) for at, column in enumerate(columns)]
    kept = list(range(len(columns)))
    while sum(widths[at] + GAP for at in kept) > width:
        least = max(kept, key=lambda at: columns[at].left_out)
        if not columns[least].left_out:
            break
        kept.remove(least)
    return kept, [widths[at] for at in kept]


def line_of(cells: Sequence[Text], columns: Sequence[Column[Row]], widths: Sequence[int]) -> Text:
    """These cells side by side, each behind a gap."""
    line = Text()
    for cell, column, width in zip(cells, columns, widths, strict=True):
        padding = " " * (width - cell.cell_len)
        line.append(" " * GAP + padding * column.right).append_text(cell).append(padding * (not column.right))
    line.rstrip()
    return line
