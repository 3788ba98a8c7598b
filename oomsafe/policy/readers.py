"""One reader for each kind of setting: takes a keyword's value or a variable's text, returns a checked value.

All have the signature ``(field, value) -> checked value``, and raise ConfigError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from oomsafe.policy.units import Percent, Size, parse_duration, parse_size, refused

if TYPE_CHECKING:
    from oomsafe.policy.address import Address

Metric = Literal["anon", "private", "rss", "pss", "uss"]
METRICS: tuple[Metric, ...] = ("anon", "private", "rss", "pss", "uss")

#: The metrics that count clean file pages, which the kernel drops before it kills a process.
COUNT_CLEAN = frozenset({"rss", "pss", "uss"})

_YES = frozenset({"1", "true", "yes", "on"})
_NO = frozenset({"0", "false", "no", "off"})
_NONE = frozenset({"none", ""})

#: A path as an app gets it: decoded, without what follows a question mark.
_PATH = re.compile(r"/[!-\"$-+\--<=>@-~]{0,254}")

#: ``package.module:function``.
_FUNCTION = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")

#: The lowest and highest oom_score_adj (linux/oom.h, OOM_SCORE_ADJ_MIN and _MAX).
SCORE_MIN, SCORE_MAX = -1000, 1000

#: More workers than a pool can have.
MOST_WORKERS = 100_000

#: Bytes of a pool's name, in UTF-8.
LONGEST_NAME = 64

#: A shorter secret can be found by brute force.
SHORTEST_SECRET = 16


def read_size(field: str, value: object) -> Size:
    """A size; None is refused."""
    return parse_size(field, value, "90%" if field.lower().endswith("budget") else "300MiB")


def read_soft_limit(field: str, value: object) -> Size | Literal["auto"]:
    """A size, or "auto"."""
    return "auto" if value == "auto" else parse_size(field, value)


def read_hard_limit(field: str, value: object) -> Size | Literal["auto"] | None:
    """A size, or "auto", or None."""
    return "auto" if value == "auto" else read_task_limit(field, value)


def read_task_limit(field: str, value: object) -> Size | None:
    """A size, or None."""
    return None if _is_none(value) else parse_size(field, value, "500MiB")


def read_metric(field: str, value: object) -> Metric:
    """One of the ways to count a process's memory."""
    for metric in METRICS:
        if value == metric:
            return metric
    raise refused(field, value, "is not one of anon, private, rss, pss or uss", "anon")


def read_seconds(field: str, value: object) -> float:
    """Seconds, 0 or more, as a number or as text with a unit."""
    number = _number(value)
    if number is None and isinstance(value, str):
        number = parse_duration(value)
    if number is None or number < 0:
        raise refused(field, value, "is not a number of seconds, 0 or more", "10")
    return number


def read_paths(field: str, value: object) -> tuple[str, ...]:
    """Paths of requests: a list, or text with commas between them."""
    found = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, (list, tuple, set, frozenset)) else [None]
    paths = tuple(path.strip() if isinstance(path, str) else "" for path in found)
    if all(_PATH.fullmatch(path) for path in paths):
        return tuple(sorted(set(paths)))
    raise refused(field, value, "is not a list of paths that begin with / and have no query", "/healthz,/readyz")


def read_lifetime(field: str, value: object) -> float | None:
    """Seconds above 0, or text with a unit, or None. Text without one is refused: "6" may mean anything."""
    if _is_none(value):
        return None
    number = parse_duration(value) if isinstance(value, str) else _number(value)
    if number is None:
        without = isinstance(value, str) and _number(value) is not None
        raise refused(field, value, f"{'has no unit' if without else 'is not a duration'} (s, m, h or d)", "6h")
    if not 0 < number < math.inf:
        raise refused(field, value, "is not above zero", "6h")
    return number


def read_share(field: str, value: object) -> float:
    """A share from 0 to 0.9."""
    number = _number(value)
    if number is None or not 0 <= number <= 0.9:
        raise refused(field, value, "is not a share from 0 to 0.9", "0.1")
    return number


def read_switch(field: str, value: object) -> bool:
    """A bool, or a word for one: 1, true, yes, on, 0, false, no, off."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _YES | _NO:
        return value.strip().lower() in _YES
    raise refused(field, value, "is not true or false", "True")


def read_switch_or_auto(field: str, value: object) -> bool | Literal["auto"]:
    """A bool, a word for one, or auto."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    if not isinstance(value, (bool, str)) or (isinstance(value, str) and value.strip().lower() not in _YES | _NO):
        raise refused(field, value, "is not true, false or auto", "auto")
    return read_switch(field, value)


def read_count(field: str, value: object) -> int | Percent:
    """A number of workers from 1, or a percentage of them."""
    if isinstance(value, Percent):
        value = str(value)
    if isinstance(value, str) and value.strip().endswith("%"):
        number = _number(value.strip()[:-1])
        if number is not None and 0 < number <= 100:
            return Percent(number)
    count = _whole(value)
    if count is None or not 1 <= count <= MOST_WORKERS:
        raise refused(field, value, "is not a number of workers from 1, nor a share such as 25%", "1")
    return count


def read_redeliveries(field: str, value: object) -> int:
    """A number of times, 0 or more."""
    count = _whole(value)
    if count is None or not 0 <= count <= 1000:
        raise refused(field, value, "is not a whole number from 0 to 1000", "1")
    return count


def read_worker_score(field: str, value: object) -> int | Literal["auto"]:
    """An increment of oom_score_adj, or "auto". A negative one would make the kernel kill the supervisor first."""
    return "auto" if value == "auto" else read_score(field, value)


def read_score(field: str, value: object) -> int:
    """An increment of oom_score_adj, 0 or more."""
    return _score(field, value, 0, "300")


def read_supervisor_score(field: str, value: object) -> int | None:
    """An absolute oom_score_adj, or None."""
    return None if _is_none(value) else _score(field, value, SCORE_MIN, "-500")


def read_headers(field: str, value: object) -> bool | str:
    """A bool, or a secret."""
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _YES | _NO):
        return read_switch(field, value)
    if isinstance(value, str) and len(value) >= SHORTEST_SECRET and value.isascii() and value.isprintable():
        return value
    # the value is not shown, because it may be most of a secret
    raise refused(field, "***", f"is neither True or False nor a secret of {SHORTEST_SECRET} or more ASCII characters", "True")


def read_address(field: str, value: object) -> Address | None:
    """Where to listen, or None."""
    if _is_none(value) or value is False or (isinstance(value, str) and value.strip().lower() in _NO):
        return None
    from oomsafe.policy.address import Address, parse_address  # here: a worker without metrics need not pay for ipaddress

    try:
        if isinstance(value, (str, Address)):
            return parse_address(str(value))
    except ValueError as error:
        near = f" (what memory is counted by is set by {field[:-1]})" if value in METRICS else ""
        raise refused(field, value, f"{error}{near}", "127.0.0.1:9400") from None
    raise refused(field, value, "is not an address", "127.0.0.1:9400")


def read_token(field: str, value: object) -> str | None:
    """A secret that can stand in a header, or None."""
    if _is_none(value):
        return None
    if isinstance(value, str) and len(value.strip()) >= SHORTEST_SECRET and re.fullmatch(r"[!-~]+", value.strip()):
        return value.strip()
    raise refused(
        field, "***", f"is not a secret of {SHORTEST_SECRET} or more ASCII characters without spaces", "change-me-to-a-long-random-text"
    )


def read_function(field: str, value: object) -> Callable[..., Any] | str | None:
    """A function, or the text that names one, or None."""
    if callable(value):
        return value
    if _is_none(value):
        return None
    if isinstance(value, str) and _FUNCTION.fullmatch(value.strip()):
        return value.strip()
    raise refused(field, value, "is neither a function nor the name of one", "shop.alerts:worker_died")


def read_file(field: str, value: object) -> str | None:
    """An absolute path, or None."""
    if _is_none(value):
        return None
    if isinstance(value, str) and value.startswith("/") and value.isprintable() and not value.endswith("/"):
        return value
    raise refused(field, value, "is not the absolute path of a file", "/dev/termination-log")


def read_name(field: str, value: object) -> str | None:
    """What a pool is called, or None."""
    if value is None:
        return None
    text = value.strip() if isinstance(value, str) else ""
    if not text or not text.isprintable():
        raise refused(field, value, "is not a name of printable characters", "shop")
    if len(text.encode()) > LONGEST_NAME:
        raise refused(field, value, f"is longer than {LONGEST_NAME} bytes", "shop")
    return text


def _score(field: str, value: object, lowest: int, example: str) -> int:
    number = _whole(value)
    if number is None or not lowest <= number <= SCORE_MAX:
        raise refused(field, value, f"is not a whole number from {lowest} to {SCORE_MAX}", example)
    return number


def _is_none(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.strip().lower() in _NONE)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?[0-9]+(\.[0-9]+)?\s*", value):
        return None
    try:
        number = float(value)
    except OverflowError:  # of an int
        return None
    return number if math.isfinite(number) else None


def _whole(value: object) -> int | None:
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*[+-]?[0-9]{1,9}\s*", value) else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
