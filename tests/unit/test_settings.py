"""The policy: where each setting comes from, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.test_units import check_error, example_in

from oomsafe.errors import ConfigError
from oomsafe.policy.address import Address, parse_address
from oomsafe.policy.settings import OTHER_VARIABLES, READERS, Policy, came_too_late, load_policy, misplaced, set_in
from oomsafe.policy.units import MIB, Percent

DEFAULTS: dict[str, Any] = {
    "name": None,
    "soft_limit": "auto",
    "hard_limit": None,
    "budget": Percent(90.0),
    "metric": "anon",
    "sustain": 0.0,
    "reclaim": True,
    "freeze_preload": True,
    "jitter": 0.1,
    "min_lifetime": 10.0,
    "max_lifetime": None,
    "max_unavailable": 1,
    "surge": True,
    "grace_period": 30.0,
    "shed": False,
    "shed_exempt": (),
    "worker_oom_score_adj": "auto",
    "draining_oom_score_adj": 300,
    "supervisor_oom_score_adj": None,
    "headers": False,
    "metrics": None,
    "metrics_token": None,
    "on_death": None,
    "termination_log": "/dev/termination-log",
    "task_soft_memory_limit": None,
    "task_memory_limit": None,
    "task_memory_absolute": False,
    "max_oom_redeliveries": 1,
    "probe": "auto",
    "dry_run": False,
}

#: By field: a keyword and what it becomes, a variable's text and what that becomes.
SOURCES: dict[str, tuple[Any, Any, str, Any]] = {
    "name": ("shop", "shop", " the shop, a \u00fc ", "the shop, a \u00fc"),
    "soft_limit": (300 * MIB, 300 * MIB, "200MiB", 200 * MIB),
    "hard_limit": ("400MiB", 400 * MIB, "80%", Percent(80.0)),
    "budget": (Percent(50), Percent(50.0), "2GiB", 2048 * MIB),
    "metric": ("pss", "pss", "uss", "uss"),
    "sustain": (2, 2.0, "1.5 s", 1.5),
    "reclaim": (False, False, "off", False),
    "freeze_preload": (False, False, "off", False),
    "jitter": (0, 0.0, "0.25", 0.25),
    "min_lifetime": (3, 3.0, "60", 60.0),
    "max_lifetime": (3600, 3600.0, "6h", 21600.0),
    "max_unavailable": (3, 3, "25%", Percent(25.0)),
    "surge": (False, False, "no", False),
    "grace_period": ("1m", 60.0, "0.5", 0.5),
    "shed": (True, True, "on", True),
    "shed_exempt": (["/healthz", "/a/ready"], ("/a/ready", "/healthz"), " /healthz, /readyz", ("/healthz", "/readyz")),
    "worker_oom_score_adj": (500, 500, "200", 200),
    "draining_oom_score_adj": (0, 0, "100", 100),
    "supervisor_oom_score_adj": (-500, -500, "-200", -200),
    "headers": ("0123456789abcdef", "0123456789abcdef", "yes", True),
    "metrics": ("127.0.0.1:9400", Address("127.0.0.1", 9400), "[::1]:9401", Address("::1", 9401)),
    "metrics_token": ("0123456789abcdef", "0123456789abcdef", " fedcba9876543210 ", "fedcba9876543210"),
    "on_death": (sum, sum, " shop.alerts:worker_died ", "shop.alerts:worker_died"),
    "termination_log": (None, None, "/run/shop/why", "/run/shop/why"),
    "task_soft_memory_limit": ("300MiB", 300 * MIB, "20%", Percent(20.0)),
    "task_memory_limit": ("400MiB", 400 * MIB, "1GiB", 1024 * MIB),
    "task_memory_absolute": (True, True, "yes", True),
    "max_oom_redeliveries": (0, 0, "3", 3),
    "probe": (True, True, "off", False),
    "dry_run": (True, True, "1", True),
}

SECRET = "tops\u00e9cret-tops\u00e9cret"


def overridden(policy: Policy) -> dict[str, Any]:
    """The fields that are not at their default."""
    return {name: getattr(policy, name) for name in DEFAULTS if getattr(policy, name) != getattr(Policy(), name)}


def test_defaults() -> None:
    """Every field has the default that is written down here."""
    assert {field.name: getattr(Policy(), field.name) for field in dataclasses.fields(Policy)} == DEFAULTS
    assert list(READERS) == list(DEFAULTS)
    assert overridden(Policy()) == {}


@pytest.mark.parametrize("field", SOURCES)
def test_keyword_beats_environment_beats_default(field: str) -> None:
    """The nearest source wins, and only for its own field."""
    keyword, from_keyword, text, from_text = SOURCES[field]
    environ = {f"OOMSAFE_{field.upper()}": text}

    plain, warnings = load_policy({}, {})
    by_environment, _ = load_policy(environ, {})
    by_keyword, _ = load_policy(environ, {field: keyword})

    assert (getattr(plain, field), warnings) == (DEFAULTS[field], [])
    assert {field: from_text} == overridden(by_environment)
    assert {field: from_keyword} == overridden(by_keyword)


@pytest.mark.parametrize("field", SOURCES)
@pytest.mark.parametrize("text", ["", "  "], ids=["empty", "blank"])
def test_an_empty_variable_is_unset(field: str, text: str) -> None:
    """Compose files and CI set variables to nothing: that is no setting."""
    policy, warnings = load_policy({f"OOMSAFE_{field.upper()}": text}, {})

    assert (Policy(), []) == (policy, warnings)


@pytest.mark.parametrize(
    ("name", "near"),
    [("soft_limt", "soft_limit"), ("maxunavailable", "max_unavailable"), ("dryrun", "dry_run"), ("SOFT_LIMIT", ""), ("zzz", "")],
)
def test_unknown_keyword(name: str, near: str) -> None:
    """A misspelt keyword is an error that names the nearest."""
    with pytest.raises(ConfigError) as caught:
        load_policy({}, {name: 1})

    assert f"unknown setting {name}" + (f" (did you mean {near}?)" if near else "") == str(caught.value)


def test_unknown_keyword_stays_on_its_line() -> None:
    """Whatever the keyword holds."""
    with pytest.raises(ConfigError) as caught:
        Policy(**{"soft\r\n\x1blimit" + "x" * 500: 1})

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_unknown_variable() -> None:
    """A misspelt variable is a warning with the nearest name, and the rest holds."""
    policy, warnings = load_policy({"OOMSAFE_SOFT_LIMT": "1", "OOMSAFE_JITTER": "0", "SOFT_LIMIT": "x"}, {})

    assert policy.jitter == 0
    (warning,) = warnings
    assert warning.startswith("ignoring unknown variable OOMSAFE_SOFT_LIMT (did you mean OOMSAFE_SOFT_LIMIT")


def test_variables_that_are_no_settings() -> None:
    """Those that other parts of oomsafe read are not warned of."""
    assert ([], Policy()) == load_policy(dict.fromkeys(OTHER_VARIABLES, "x"), {})[::-1]


BAD: dict[str, list[Any]] = {
    "name": ["", "a\nb", "\x1b[2J", "\u202eevil", "x" * 65, "\u00fc" * 33, 7, b"shop", ["shop"]],
    "soft_limit": ["AUTO!", "300", 300, "", None, True, 1.5, "0%"],
    "hard_limit": ["300MB", 0, False, "101%", 2.0, "automatic"],
    "budget": ["auto", "", None, "none", -1, "90"],
    "metric": ["RSS", "vms", "", None, 1, True, ["rss"]],
    "sustain": [-1, "-0.1", "nan", "inf", float("nan"), float("inf"), "10 sec", "-10s", "", None, True, [1], 10**400],
    "reclaim": ["maybe", 2, 0, 1, None, 1.0, ""],
    "freeze_preload": ["never", 1, None, ""],
    "jitter": [-0.1, 0.91, "10%", "nan", None, True],
    "min_lifetime": [-1, "ten", None, False, "1e999"],
    "max_lifetime": [
        0,
        -1,
        "0s",
        "6",
        "21600",
        "-6h",
        "6H",
        "6 hours",
        "1h30m",
        "1w",
        "inf",
        float("nan"),
        float("inf"),
        True,
        [6],
        10**400,
    ],
    "max_unavailable": [0, -1, "0", "0%", "101%", "1.5", 1.0, None, True, "", "%", "nan%", Percent(0), Percent(200)],
    "shed": ["maybe", 1, None],
    "shed_exempt": ["", "healthz", "/healthz,", "/healthz?deep=1", "/a b", "/a#b", "/a\nb", "/\u00fc", "/" + "a" * 255, None, True, 7,
        ["healthz"], [""], [7], [None], [["/healthz"]], {"/healthz": True}, b"/healthz"],
    "worker_oom_score_adj": [-1, 1001, "1e2", 300.0, None, True, ""],
    "draining_oom_score_adj": [-1, 1001, "auto", None, True, "3" * 20],
    "supervisor_oom_score_adj": [-1001, 1001, "-", 0.5, True, "auto"],
    "headers": ["short", "é" * 20, "tab\there-0123456789", None, 1, "0123456789abcde", b"0123456789abcdef"],
    "metrics": [
        "9400", ":9400", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:-1", "example.com:9400", "::1:9400",
        "[127.0.0.1]:9400", "[::1]", "[fe80::1%eth0]:9400", "http://127.0.0.1:9400/metrics", "unix:relative", "unix:/folder/", "unix:",
        "unix:/" + "x" * 107, "unix:/line\nbreak", "*:9400", "rss", 9400, True, 1.5, ["127.0.0.1:9400"], ("127.0.0.1", 9400),
        "127.0.0.1:\uff19\uff14\uff10\uff10",
    ],
    "metrics_token": ["short", "é" * 20, "with a space in it, but long", "0123456789abcde", 1, True, b"0123456789abcdef"],
    "probe": ["2", None, 0, "always", []],
    "dry_run": ["2", None, 0, "ja", []],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [pytest.param(f, v, id=f"{f}-{v!r:.30}") for f, vs in BAD.items() for v in vs])
def test_bad_value(field: str, value: Any) -> None:
    """One line that names the field, and an example that the same field takes."""
    with pytest.raises(ConfigError) as caught:
        Policy(**{field: value})

    check_error(str(caught.value), field)
    Policy(**{field: example_in(str(caught.value), field)})


@pytest.mark.parametrize("text", ["\uff11\uff10", "\u0663", "1_0", "1e1"], ids=["fullwidth", "arabic", "underscore", "exponent"])
def test_digits_are_ascii_in_shares_too(text: str) -> None:
    """A share of the workers is read by the rule of sizes: what soft_limit refuses as a percentage, it refuses."""
    with pytest.raises(ConfigError):
        Policy(soft_limit=f"{text}%")
    with pytest.raises(ConfigError):
        Policy(max_unavailable=f"{text}%")


@pytest.mark.parametrize(
    ("field", "text"),
    [(field, value) for field, values in BAD.items() for value in values if isinstance(value, str) and value],
    ids=repr,
)
def test_bad_variable(field: str, text: str) -> None:
    """The error names the variable that somebody set, and its example can be put into that variable."""
    variable = f"OOMSAFE_{field.upper()}"

    with pytest.raises(ConfigError) as caught:
        load_policy({variable: text}, {})

    check_error(str(caught.value), variable)
    load_policy({variable: str(example_in(str(caught.value), variable))}, {})


@given(st.sampled_from(sorted(READERS)), st.text() | st.binary() | st.floats() | st.integers() | st.none() | st.lists(st.integers()))
def test_any_value_is_taken_or_refused_in_one_line(field: str, value: Any) -> None:
    """Law: each reader gives a value or raises ConfigError, and what it gave it takes again unchanged."""
    try:
        checked = READERS[field](field, value)
    except ConfigError as error:
        check_error(str(error), field)
        READERS[field](field, example_in(str(error), field))
    else:
        assert checked == READERS[field](field, checked)


@pytest.mark.parametrize(
    "value", [SECRET, "short-secret", "se\ncret-se\ncret-se\ncret", b"bytes-secret-bytes-secret", ["list-secret"]], ids=repr
)
def test_a_secret_is_never_shown(value: object) -> None:
    """What was meant as a secret does not get into a log by being wrong."""
    with pytest.raises(ConfigError) as by_keyword:
        Policy(headers=value)  # type: ignore[arg-type]

    assert "cret" not in str(by_keyword.value).partition(" is neither")[0]
    assert "headers='***'" in str(by_keyword.value)


def test_a_secret_in_a_variable_is_never_shown() -> None:
    """Nor by being wrong in the environment."""
    with pytest.raises(ConfigError) as caught:
        load_policy({"OOMSAFE_HEADERS": "short-secret"}, {})

    assert "short" not in str(caught.value)


@pytest.mark.parametrize("field", ["headers", "metrics_token"])
def test_a_secret_is_not_in_the_repr(field: str) -> None:
    """A policy that is printed, or that stands in a traceback, keeps its secret."""
    assert "0123456789abcdef" not in repr(Policy(**{field: "0123456789abcdef"}))


@pytest.mark.parametrize("token", ["short-secret", "a secret with spaces", b"bytes-secret-bytes-secret"], ids=repr)
def test_a_token_is_never_shown(token: Any) -> None:
    """Nor one that is wrong."""
    with pytest.raises(ConfigError) as caught:
        Policy(metrics_token=token)

    assert "metrics_token='***' is not" in str(caught.value)


@pytest.mark.parametrize("off", [None, False, "none", "off", "no", "0", "false"], ids=repr)
def test_metrics_can_be_turned_off(off: Any) -> None:
    """In the usual words, for a reload that has an environment."""
    assert Policy(metrics=off).metrics is None


def test_who_means_metric_is_told_so() -> None:
    """The two names differ by one letter."""
    with pytest.raises(ConfigError, match="set by OOMSAFE_METRIC\\)"):
        load_policy({"OOMSAFE_METRICS": "rss"}, {})


ADDRESSES = [
    ("127.0.0.1:9400", "127.0.0.1:9400", True), ("localhost:9400", "127.0.0.1:9400", True), ("[::1]:0", "[::1]:0", True),
    ("127.9.9.9:1", "127.9.9.9:1", True), ("0.0.0.0:9400", "0.0.0.0:9400", False), ("[::]:9400", "[::]:9400", False),
    ("[0:0:0:0:0:0:0:1]:9400", "[::1]:9400", True), ("10.0.0.1:65535", "10.0.0.1:65535", False),
    ("unix:/run/a.sock", "unix:/run/a.sock", True), (" LOCALHOST:9400 ", "127.0.0.1:9400", True),
]  # fmt: skip


@pytest.mark.parametrize(("text", "canonical", "private"), ADDRESSES)
def test_an_address_is_read(text: str, canonical: str, private: bool) -> None:
    """And says whether only this machine reaches it."""
    address = parse_address(text)

    assert (str(address), address.is_private) == (canonical, private)
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("soft", "hard"),
    [("300MiB", "300MiB"), ("301MiB", "300MiB"), (300 * MIB, "200MiB"), ("80%", "80%"), ("90%", "80%")],
)
def test_soft_limit_must_be_below_hard_limit(soft: Any, hard: Any) -> None:
    """A pair that is wrong on every machine is refused."""
    with pytest.raises(ConfigError, match=r"soft_limit=.* is not below hard_limit=") as caught:
        Policy(soft_limit=soft, hard_limit=hard)

    check_error(str(caught.value), "soft_limit")


@pytest.mark.parametrize(("soft", "hard"), [("299MiB", "300MiB"), ("90%", "300MiB"), ("300MiB", "80%"), ("auto", "2MiB"), ("9%", "10%")])
def test_a_pair_that_may_be_right(soft: Any, hard: Any) -> None:
    """A pair that only the machine can tell is taken."""
    assert Policy(soft_limit=soft, hard_limit=hard).hard_limit is not None


@pytest.mark.parametrize("hard", ["200MiB", 100 * MIB])
def test_the_example_for_a_wrong_pair_is_right(hard: Any) -> None:
    """The example, put in, makes the pair right."""
    with pytest.raises(ConfigError) as caught:
        Policy(soft_limit="400MiB", hard_limit=hard)

    Policy(soft_limit=example_in(str(caught.value), "soft_limit"), hard_limit=hard)  # type: ignore[arg-type]


def test_a_policy_can_not_be_changed() -> None:
    """It is a value."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Policy().jitter = 0.5  # type: ignore[misc]

    assert Policy(jitter=0) == Policy(jitter=0)
    assert hash(Policy(jitter=0)) == hash(Policy(jitter=0))


@pytest.mark.parametrize(
    ("environ", "late"),
    [
        ({}, None),
        ({"OOMSAFE_SOFT_LIMIT": "80MiB"}, None),
        ({"OOMSAFE_SOFT_LIMIT": "80MiB", "OOMSAFE_BUDGET": " ", "OOMSAFE_SCOREBOARD": "/x", "SOFT_LIMIT": "1"}, None),
        ({"OOMSAFE_SOFT_LIMIT": "90MiB"}, "OOMSAFE_SOFT_LIMIT does nothing: it was set by the app"),
        ({"OOMSAFE_JITTER": "0", "OOMSAFE_BUDGET": "1GiB"}, "OOMSAFE_BUDGET, OOMSAFE_JITTER do nothing: they were set by the app"),
    ],
)
def test_variables_that_come_too_late(environ: dict[str, str], late: str | None) -> None:
    """What has been read already, what is empty, and what is no field is not late."""
    read = set_in({"OOMSAFE_SOFT_LIMIT": "80MiB", "OOMSAFE_SINGLE": "exit", "OOMSAFE_BUDGET": ""})

    line = came_too_late(read, environ, "give it to the server")

    assert read == {"OOMSAFE_SOFT_LIMIT": "80MiB"}
    assert line == (late and f"{late}, which is loaded after the pool's policy has been read; give it to the server")


def test_settings_in_a_framework_s_place() -> None:
    """In any case, but only what would be a setting; OOMSAFE itself is Django's."""
    names: list[Any] = ["OOMSAFE", "OOMSAFE_SOFT_LIMIT", "oomsafe_budget", "oomsafe_x", "DEBUG", 3]

    assert misplaced(names, "the settings", "write {field}, or {variable}") == [
        "OOMSAFE_SOFT_LIMIT in the settings does nothing: write soft_limit, or OOMSAFE_SOFT_LIMIT",
        "oomsafe_budget in the settings does nothing: write budget, or OOMSAFE_BUDGET",
    ]


@pytest.mark.parametrize(
    ("least", "most", "example"),
    [(10, "10s", "6h"), ("1m", 59.5, "6h"), ("6h", "1h", "43200s")],
    ids=["equal", "below", "both long"],
)
def test_max_lifetime_must_be_above_min_lifetime(least: Any, most: Any, example: str) -> None:
    """A worker can't have to go before it may."""
    with pytest.raises(ConfigError, match=r"max_lifetime=.* is not above min_lifetime=") as caught:
        Policy(min_lifetime=least, max_lifetime=most)

    check_error(str(caught.value), "max_lifetime")
    assert example == example_in(str(caught.value), "max_lifetime")
    Policy(min_lifetime=least, max_lifetime=example)


def test_a_lifetime_without_a_unit_says_so() -> None:
    """One line with the variable, its value and a correct example."""
    with pytest.raises(ConfigError) as caught:
        load_policy({"OOMSAFE_MAX_LIFETIME": "6"}, {})

    assert str(caught.value) == "OOMSAFE_MAX_LIFETIME='6' has no unit (s, m, h or d); a correct example: OOMSAFE_MAX_LIFETIME=\"6h\""
