"""The figures that ``oomsafe advise`` is given: each is checked, and replaces a measured one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from oomsafe.cli.paste.deployment import APP
from oomsafe.kernel.capacity import read_capacity
from oomsafe.kernel.cpus import cpus_of
from oomsafe.policy.readers import MOST_WORKERS
from oomsafe.policy.sizing.facts import Facts, Style, preloaded
from oomsafe.policy.units import GIB, KIB, LARGEST, MIB, format_duration, parse_duration, parse_size, refused

_SMALL = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*(b|kib|mib|gib)", re.IGNORECASE | re.ASCII)
_FACTORS = {"b": 1, "kib": KIB, "mib": MIB, "gib": GIB}
_NUMBER = re.compile(r"\d{1,12}(?:\.\d{1,9})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Given:
    """Sizes in bytes, times in seconds; None: not given."""

    memory: int | None = None
    others: int | None = None
    cpus: float | None = None
    worker: int | None = None
    supervisor: int | None = None
    growth: float | None = None
    balloon: int | None = None
    rate: float | None = None
    boot: float | None = None
    over: float | None = None
    """The time over which growth and rate are measured."""
    workers: int | None = None
    preload: int | None = None
    server: str | None = None

    def on(self, facts: Facts) -> Facts:
        """`facts`, with what was given in place of what was measured."""
        changed = {
            "limit": self.memory,
            # memory that is given is this pool's own
            "others": self.others if self.memory is None else self.others or 0,
            "cpus": self.cpus,
            "fresh": self.worker,
            "supervisor": self.supervisor,
            "growth": self.growth,
            "balloon": self.balloon,
            "rate": self.rate,
            "boot": self.boot,
            "source": None if self.memory is None else "given",
            "style": None if self.server is None else style_of(self.server),
        }
        facts = replace(facts, **{name: value for name, value in changed.items() if value is not None})  # type: ignore[arg-type]
        return facts if self.preload is None else preloaded(facts, self.preload)

    def without_pool(self) -> Facts:
        """Facts of these figures only: the limit and the processors, if not given, are this process's.

        Raises ConfigError if there is no limit.
        """
        assert self.worker is not None
        capacity = None if self.memory is not None else read_capacity()
        limit = self.memory if capacity is None else capacity.limit
        if limit is None:
            raise refused("--memory", "", "is not given, and no memory limit can be read here", "2GiB")
        source, others = ("given", 0) if capacity is None else (capacity.source, capacity.others)
        return self.on(Facts(limit=limit, source=source, others=others, fresh=self.worker, cpus=cpus_of()))


def style_of(server: str) -> Style:
    """How a server's workers use processors, by the server's name."""
    return Style.BLOCKING if server == "gunicorn" else Style.LOOP


def read_size(field: str, text: str | None, example: str) -> int | None:
    """A size of a MiB or more. Raises ConfigError."""
    if text is None:
        return None
    size = parse_size(field, text, example)
    if isinstance(size, int):
        return size
    raise refused(field, text, "is a share, and of what is not known here", example)


def read_amount(field: str, text: str | None, example: str) -> float | None:
    """A size of any number of bytes, 0 too. Raises ConfigError."""
    if text is None:
        return None
    match = _SMALL.fullmatch(text.strip())
    if match is None:
        parse_size(field, text, example)  # it says better what is wrong
        raise refused(field, text, "is a share, and of what is not known here", example)
    return min(float(match[1]) * _FACTORS[match[2].lower()], float(LARGEST))


def read_number(field: str, text: str | None, example: str, *, positive: bool = False, most: float = math.inf) -> float | None:
    """A number of 0 or more, above 0 if it must be `positive`, of `most` at most. Raises ConfigError."""
    if text is None:
        return None
    if not _NUMBER.fullmatch(text.strip()):
        raise refused(field, text, "is not a number", example)
    number = float(text)
    if positive and not number > 0:
        raise refused(field, text, "is not above zero", example)
    if number > most:
        raise refused(field, text, f"is more than {most:g}", example)
    return number


def read_workers(field: str, text: str | None) -> int | None:
    """A number of workers. Raises ConfigError."""
    number = read_number(field, text, "4", positive=True)
    if number is None:
        return None
    if not number.is_integer() or number > MOST_WORKERS:
        raise refused(field, text, "is not a number of workers", "4")
    return int(number)


def read_time(field: str, text: str | None, example: str, most: float = math.inf) -> float | None:
    """Seconds above 0, as text with a unit, `most` at most. Raises ConfigError."""
    if text is None:
        return None
    seconds = parse_duration(text)
    if seconds is None or not 0 < seconds < math.inf:
        raise refused(field, text, "is not a duration above zero with a unit (s, m, h or d)", example)
    if seconds > most:
        raise refused(field, text, f"is longer than {format_duration(most)}", example)
    return seconds


def read_app(field: str, text: str | None) -> str | None:
    """An app as servers take it. Raises ConfigError."""
    if text is None or APP.fullmatch(text):
        return text
    raise refused(field, text, "is not a module and a name in it", "shop.app:app")
