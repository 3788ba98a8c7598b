"""Sizes and durations: parse "512MiB", "80%" and "6h", and format bytes and seconds for people."""

from __future__ import annotations

import re
from typing import NamedTuple

from oomsafe.errors import ConfigError

KIB, MIB, GIB, TIB = (1 << shift for shift in (10, 20, 30, 40))
_FACTORS = {"kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]ib|%)", re.IGNORECASE | re.ASCII)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd])", re.ASCII)

#: The smallest size accepted as a limit. No Python process fits in less, so a smaller int is a forgotten unit.
SMALLEST = MIB

#: The largest: more than any machine has, and small enough for the scoreboard's fields.
LARGEST = 1 << 56


class Percent(NamedTuple):
    """A share of the effective limit: 0 < value <= 100."""

    value: float

    def of(self, total: int) -> int:
        """The share in bytes, rounded down."""
        return int(total * self.value / 100)

    def __str__(self) -> str:
        return f"{self.value:g}%"


#: A parsed size: bytes, or a share of a limit that is only known on the machine.
Size = int | Percent


def parse_size(field: str, value: object, example: str = "300MiB") -> Size:
    """Read an int of bytes, or text with an IEC suffix (KiB, MiB, GiB, TiB) or ``%``.

    Raises ConfigError, which names `field`, `value` and `example`, for anything else: a bare number in
    text may mean anything, and SI suffixes (MB) are 5 % off the units that the kernel counts in.
    """
    if isinstance(value, Percent):
        value = str(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise refused(field, value, "is not a size", example)
    if isinstance(value, int):
        return _checked(field, value, value, example)
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise refused(field, value, _why_not(value), example)
    number, suffix = float(match[1]), match[2].lower()
    if suffix != "%":
        return _checked(field, value, int(min(number, LARGEST) * _FACTORS[suffix]), example)
    if not 0 < number <= 100:
        raise refused(field, value, "is not above 0% and at most 100%", "80%")
    return Percent(number)


def format_size(size: int | None) -> str:
    """Bytes as text with three or four digits: ``84.2 MiB``. None, a missing figure, is ``unknown``."""
    if size is None:
        return "unknown"
    for suffix, factor in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # 1023.6 MiB must not be rounded to "1024 MiB", nor 99.96 MiB to "100.0 MiB"
        if abs(size) >= factor * 1023.5 / 1024:
            number = size / factor
            return f"{number:.0f} {suffix}" if abs(round(number, 1)) >= 100 else f"{number:.1f} {suffix}"
    return f"{size} B"


def one_of(things: str) -> str:
    """``request``, given ``requests``; of several words the first one loses its s: ``piece of work``."""
    first, space, rest = things.partition(" ")
    return f"{first.removesuffix('s')}{space}{rest}"


def counted(number: int, things: str) -> str:
    """``1 request``, ``2 requests``, given ``requests``."""
    return f"{number} {one_of(things) if number == 1 else things}"


def format_change(size: int) -> str:
    """A signed number of bytes as text: ``+1.2 MiB``."""
    return f"{'+' if size >= 0 else '-'}{format_size(abs(size))}"


def parse_duration(text: str) -> float | None:
    """``90s``, ``90m``, ``6h`` or ``1d`` in seconds; None for any other text, including a number without a unit."""
    match = _DURATION.fullmatch(text.strip())
    return None if match is None else float(match[1]) * _SECONDS[match[2]]


def format_duration(seconds: float) -> str:
    """Seconds as text, rounded to three digits: ``12.3 s``, ``90 min``, ``6 h``, ``2 d``."""
    for suffix, factor in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * factor:
            return f"{_short(seconds / factor)} {suffix}"
    return f"{_short(seconds)} s"


def refused(field: str, value: object, why: str, example: str) -> ConfigError:
    """The one-line error for a bad setting: field, value, what is wrong, and an example that would be accepted."""
    bare = example[:1] in "0123456789-TF" and example[-1:] not in "B%smhd" and ":" not in example
    shown = example if bare else f'"{example}"'
    return ConfigError(f"{field}={_shortened(value)} {why}; a correct example: {field}={shown}")


def _shortened(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _checked(field: str, given: object, size: int, example: str) -> int:
    if size <= 0:
        raise refused(field, given, "is not above zero", example)
    if size > LARGEST:
        raise refused(field, given, "is more than any machine has", example)
    if size < SMALLEST:
        raise refused(field, given, f"is {size} bytes, less than any Python process needs: is a unit missing?", example)
    return size


def _why_not(text: str) -> str:
    if text.strip().startswith("-"):
        return "is negative"
    tail = re.fullmatch(r"\d[\d.]*\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    if tail is None:
        return "is not a size"
    if not tail[1]:
        return "has no unit (KiB, MiB, GiB or %)"
    return f"has the unit {tail[1]!r}, which is not one of KiB, MiB, GiB, TiB or %"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
