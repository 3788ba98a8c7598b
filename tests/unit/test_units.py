"""Sizes as people write them, and as they are shown."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oomsafe.errors import ConfigError
from oomsafe.policy.units import (
    GIB,
    KIB,
    MIB,
    SMALLEST,
    TIB,
    Percent,
    counted,
    format_change,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

FACTORS = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}


@pytest.mark.parametrize(
    ("given_value", "expected"),
    [
        pytest.param(300 * MIB, 300 * MIB, id="int-of-bytes"),
        pytest.param(SMALLEST, SMALLEST, id="the-smallest"),
        pytest.param("300MiB", 300 * MIB, id="MiB"),
        pytest.param("2048KiB", 2 * MIB, id="KiB"),
        pytest.param("1.5GiB", 3 * GIB // 2, id="fraction"),
        pytest.param("2TiB", 2 * TIB, id="TiB"),
        pytest.param("  300 mib ", 300 * MIB, id="spaces-and-case"),
        pytest.param("80%", Percent(80.0), id="percent"),
        pytest.param("100%", Percent(100.0), id="all-of-it"),
        pytest.param("0.5 %", Percent(0.5), id="half-a-percent"),
        pytest.param(Percent(80), Percent(80.0), id="read-before"),
    ],
)
def test_reads_a_size(given_value: object, expected: object) -> None:
    """An int is bytes; text needs an IEC suffix or a percent sign."""
    assert expected == parse_size("soft_limit", given_value)


REFUSED = [
    pytest.param("300", id="no-unit"),
    pytest.param("300MB", id="SI-unit"),
    pytest.param("300M", id="half-a-unit"),
    pytest.param("300B", id="bytes-as-text"),
    pytest.param("-5MiB", id="negative"),
    pytest.param("0", id="zero-text"),
    pytest.param("0MiB", id="zero-MiB"),
    pytest.param("0.0000001MiB", id="rounds-to-zero"),
    pytest.param("512KiB", id="less-than-any-process"),
    pytest.param("150%", id="more-than-all"),
    pytest.param("0%", id="no-percent"),
    pytest.param("-1%", id="negative-percent"),
    pytest.param("%", id="bare-percent"),
    pytest.param("nan", id="nan"),
    pytest.param("nan%", id="nan-percent"),
    pytest.param("infMiB", id="inf-MiB"),
    pytest.param("", id="empty"),
    pytest.param("   ", id="blank"),
    pytest.param("1e3MiB", id="exponent"),
    pytest.param("1_000MiB", id="underscore"),
    pytest.param("1,000MiB", id="thousands"),
    pytest.param("\u0663\u0660\u0660MiB", id="arabic-digits"),
    pytest.param("\uff13\uff10\uff10MiB", id="fullwidth-digits"),
    pytest.param("300\u212aiB", id="kelvin-sign"),
    pytest.param("300MiB\r\nX: y", id="control-characters"),
    pytest.param("\x1b[31m300MiB", id="escape"),
    pytest.param("9" * 400 + "TiB", id="more-than-a-float"),
    pytest.param(True, id="bool"),
    pytest.param(300.5, id="float"),
    pytest.param(float("nan"), id="float-nan"),
    pytest.param(None, id="None"),
    pytest.param(b"300MiB", id="bytes"),
    pytest.param(["300MiB"], id="list"),
    pytest.param(0, id="zero"),
    pytest.param(-300 * MIB, id="negative-int"),
    pytest.param(300, id="int-of-a-forgotten-unit"),
    pytest.param(SMALLEST - 1, id="just-too-small"),
]


def example_in(message: str, field: str) -> object:
    """The value that an error recommends, as it would be written in Python."""
    found = re.fullmatch(rf".*; a correct example: {field}=(.+)", message)
    assert found, message
    return eval(found[1], {"__builtins__": {}})


def check_error(message: str, field: str) -> None:
    """One printable line that begins with the field."""
    assert message.startswith(f"{field}=")
    assert all(" " <= character <= "~" for character in message), message
    assert len(message) < 250


@pytest.mark.parametrize("value", REFUSED)
def test_refuses_what_is_no_size(value: object) -> None:
    """The error is one line with the field, the value, and an example that is taken."""
    with pytest.raises(ConfigError) as caught:
        parse_size("soft_limit", value)

    message = str(caught.value)
    check_error(message, "soft_limit")
    assert f"soft_limit={ascii(value)[:50]}" in message
    parse_size("soft_limit", example_in(message, "soft_limit"))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        pytest.param("300", "has no unit", id="no-unit"),
        pytest.param("300MB", "the unit 'MB'", id="SI-unit"),
        pytest.param("-5MiB", "is negative", id="negative"),
        pytest.param(300, "is 300 bytes", id="forgotten-unit"),
        pytest.param("150%", "at most 100%", id="percent"),
        pytest.param(0, "is not above zero", id="zero"),
    ],
)
def test_says_why(value: object, reason: str) -> None:
    """The line tells what is wrong with this very value."""
    with pytest.raises(ConfigError, match=re.escape(reason)):
        parse_size("soft_limit", value)


@given(st.text() | st.integers() | st.floats() | st.none() | st.booleans() | st.binary())
def test_any_value_is_read_or_refused_in_one_line(value: object) -> None:
    """Nothing but a size or a ConfigError ever comes out, and every error's example is taken."""
    try:
        size = parse_size("budget", value)
    except ConfigError as error:
        check_error(str(error), "budget")
        parse_size("budget", example_in(str(error), "budget"))
    else:
        assert size.value > 0 if isinstance(size, Percent) else size >= SMALLEST


@given(st.from_regex(r"\s*[-+]?[0-9.,_e]{0,40}\s*([kKmMgGtT]i?[bB]?|%)?\s*", fullmatch=True))
def test_anything_like_a_size_is_read_or_refused(value: str) -> None:
    """So too for text that is nearly a size."""
    try:
        parse_size("budget", value)
    except ConfigError as error:
        check_error(str(error), "budget")


@given(st.integers(1, 4096), st.sampled_from(sorted(FACTORS)), st.sampled_from(["", " "]))
def test_reading_is_multiplying(number: int, suffix: str, space: str) -> None:
    """A number and a suffix are that many of it."""
    size = number * FACTORS[suffix]
    if size >= SMALLEST:
        assert size == parse_size("soft_limit", f"{number}{space}{suffix}")


@given(st.integers(SMALLEST, 1 << 50))
@example(int(99.96 * (1 << 20)))
@example(int(1023.6 * (1 << 20)))
def test_what_is_shown_reads_back(size: int) -> None:
    """Round trip: what format_size shows, parse_size reads, to the last digit shown."""
    back = parse_size("soft_limit", format_size(size))

    assert isinstance(back, int)
    assert math.isclose(size, back, rel_tol=0.051)
    assert format_size(size) == format_size(back)


@given(st.floats(0.001, 100, allow_nan=False))
def test_a_share_is_read_as_it_is_shown(value: float) -> None:
    """Round trip of percentages: a Percent that was read once is read again unchanged."""
    share = parse_size("soft_limit", f"{value:.3f}%") if round(value, 3) > 0 else Percent(1.0)

    assert share == parse_size("soft_limit", share)


@given(st.integers(0, 1 << 50), st.floats(0.01, 100))
def test_a_share_is_never_more_than_the_whole(total: int, value: float) -> None:
    """0 <= share <= total, rounded down."""
    assert 0 <= Percent(value).of(total) <= total


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(None, "unknown", id="missing"),
        pytest.param(0, "0 B", id="zero"),
        pytest.param(1023, "1023 B", id="bytes"),
        pytest.param(KIB, "1.0 KiB", id="KiB"),
        pytest.param(int(84.2 * MIB), "84.2 MiB", id="MiB"),
        pytest.param(300 * MIB, "300 MiB", id="three-digits"),
        pytest.param(GIB - 1, "1.0 GiB", id="never-1024.0-MiB"),
        pytest.param(3 * TIB, "3.0 TiB", id="TiB"),
        pytest.param(-84 * MIB, "-84.0 MiB", id="negative"),
    ],
)
def test_shows_a_size(size: int | None, expected: str) -> None:
    """Three or four digits with an IEC suffix; a missing figure is called so."""
    assert expected == format_size(size)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, "+0 B"), (int(1.2 * MIB) + 1, "+1.2 MiB"), (-KIB, "-1.0 KiB")],
    ids=["none", "growth", "shrinking"],
)
def test_shows_a_change(size: int, expected: str) -> None:
    """A change always has its sign."""
    assert expected == format_change(size)


@given(st.integers(-(1 << 50), 1 << 50))
def test_a_shown_size_is_short(size: int) -> None:
    """A figure never takes more than 11 characters: tables stay in shape."""
    assert re.fullmatch(r"-?\d{1,4}(\.\d)? ([KMGT]i)?B", format_size(size))
    assert len(format_size(size)) <= 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", 90.0), ("90m", 5400.0), ("6h", 21600.0), ("1d", 86400.0), (" 1.5 h ", 5400.0), ("0s", 0.0),
        ("90", None), ("6H", None), ("-6h", None), ("1h30m", None), ("6 hours", None), ("\uff16h", None), ("", None), ("h", None),
    ],
)  # fmt: skip
def test_reads_a_duration(text: str, expected: float | None) -> None:
    """A number and one unit."""
    assert parse_duration(text) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0 s"), (0.25, "0.25 s"), (12.34, "12.3 s"), (119.9, "120 s"), (120, "2 min"), (5400, "90 min"), (21600, "6 h"),
        (20520, "5.7 h"), (86400, "24 h"), (172800, "2 d"), (1e9, "11574 d"),
    ],
)  # fmt: skip
def test_shows_a_duration(seconds: float, expected: str) -> None:
    """Three digits are enough."""
    assert format_duration(seconds) == expected


@given(st.floats(0, 1e7))
def test_a_shown_duration_is_near(seconds: float) -> None:
    """Law: what is shown is what is meant, to half a percent."""
    number, unit = format_duration(seconds).split()

    assert abs(float(number) * {"s": 1, "min": 60, "h": 3600, "d": 86400}[unit] - seconds) <= seconds * 0.005 + 1e-9


@pytest.mark.parametrize(
    ("number", "things", "expected"),
    [
        (0, "requests", "0 requests"),
        (1, "requests", "1 request"),
        (2, "requests", "2 requests"),
        (1, "pieces of work", "1 piece of work"),
        (3, "pieces of work", "3 pieces of work"),
        (1, "requests (they are not counted)", "1 request (they are not counted)"),
    ],
)
def test_counted(number: int, things: str, expected: str) -> None:
    """One is one."""
    assert counted(number, things) == expected
