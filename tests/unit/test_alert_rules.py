"""deploy/prometheus: promtool's own tests of the rules; every rule has them; every name in a rule is one that oomsafe serves."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from needs import need
from unit.retiring import several

from oomsafe.metrics import families
from oomsafe.metrics.families import families_of
from oomsafe.policy.alerts import ASKED_FOR, KILLS, TERMS, Alert
from oomsafe.policy.ends import End
from oomsafe.policy.state import State
from oomsafe.scoreboard.layout import Counters
from oomsafe.scoreboard.slot import Figures
from oomsafe.scoreboard.view import PoolView, WorkerView

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
RULES = [rule for group in yaml.safe_load((FOLDER / "oomsafe.rules.yml").read_text())["groups"] for rule in group["rules"]]
TESTS = yaml.safe_load((FOLDER / "oomsafe.rules.test.yml").read_text())["tests"]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = {rule["record"]: rule for rule in RULES if "record" in rule}

#: What a rule may also name: the metric that Prometheus adds for each target.
THEIRS = {"up"}

#: Prometheus only knows that a target does not answer: that may be a scrape that was lost. `oomsafe watch` knows that a pool is gone.
WAITS = {Alert.POOL_GONE: 60.0}

#: Figures in expressions that are no thresholds: at least one worker, a factor for what is missing, a target that is down.
OTHER_FIGURES = {Alert.RECYCLE_STORM: {1.0}, Alert.LIMIT_REFUSED: {1.0}}


@pytest.mark.parametrize("argv", [("check", "rules", "oomsafe.rules.yml"), ("test", "rules", "oomsafe.rules.test.yml")])
def test_promtool(argv: tuple[str, ...]) -> None:
    """The rules are valid, and each fires and is silent when it should."""
    need(shutil.which("promtool") is not None, "promtool (Debian's package prometheus) is not installed")

    ended = subprocess.run(["promtool", *argv], cwd=FOLDER, capture_output=True, text=True, check=False, timeout=120)

    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_each_alert_has_a_rule() -> None:
    """And each rule an alert of `oomsafe watch`, of the same severity."""
    expected = {alert.rule: terms.severity for alert, terms in TERMS.items()}

    assert expected == {name: rule["labels"]["severity"] for name, rule in ALERTS.items()}


@pytest.mark.parametrize("alert", list(TERMS), ids=str)
def test_the_figures_are_those_of_oomsafe_watch(alert: Alert) -> None:
    """How long it must last, within what time a count rises, and what the figure is compared with."""
    rule, terms = ALERTS[alert.rule], TERMS[alert]
    text = re.sub(r'"[^"]*"|[a-z_]\w*', "", rule["expr"])
    windows = {seconds_of(found) for found in re.findall(r"\[(\w+)\]", rule["expr"])}
    figures = {float(found) for found in re.findall(r"(?<![\w.\[])\d+(?:\.\d+)?(?![\w\]])", text)}

    assert WAITS.get(alert, terms.lasts) == seconds_of(rule.get("for", "0s"))
    assert windows == ({terms.within} if terms.within else {3600.0} if alert is Alert.POOL_GONE else set())
    assert figures - {0.0} - OTHER_FIGURES.get(alert, set()) == {terms.threshold} - {0.0}


def test_kills_and_recycles_are_those_of_oomsafe_watch() -> None:
    """By their labels."""
    assert f'verdict=~"{"|".join(KILLS)}"' in ALERTS[Alert.KERNEL_KILL.rule]["expr"]
    assert [f'reason!="{reason}"' for reason in ASKED_FOR] == re.findall(r'reason!="\w+"', ALERTS[Alert.RECYCLE_STORM.rule]["expr"])


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_each_alert_is_tested_firing_and_silent(name: str) -> None:
    """By promtool."""
    cases = [case for test in TESTS for case in test.get("alert_rule_test", ()) if case["alertname"] == name]

    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


@pytest.mark.parametrize("name", sorted(RECORDS))
def test_each_recording_rule_is_tested(name: str) -> None:
    """By promtool, with a result."""
    cases = [case for test in TESTS for case in test.get("promql_expr_test", ()) if case["expr"] == name]

    assert [case for case in cases if case["exp_samples"]]


def test_no_test_is_of_a_rule_that_is_gone() -> None:
    """A silent test of a rule that is not there would pass."""
    tested = {case["alertname"] for test in TESTS for case in test.get("alert_rule_test", ())}

    assert tested == set(ALERTS)


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_each_alert_says_what_to_do(name: str) -> None:
    """It has a severity, a summary with the instance, a description, and a link to its section."""
    rule = ALERTS[name]
    (alert,) = [alert for alert in Alert if alert.rule == name]

    assert "$labels.instance" in rule["annotations"]["summary"]
    assert rule["annotations"]["description"].endswith(f" docs/alerts.md#{alert}")
    assert len(rule["annotations"]["description"].split()) > 12
    assert f"\n### {alert}\n" in (ROOT / "docs" / "alerts.md").read_text()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_a_rule_names_only_what_oomsafe_serves(rule: dict[str, Any], served: dict[str, dict[str, set[str]]]) -> None:
    """Each metric, each label and each value of a label."""
    expression = rule["expr"]
    bare = re.sub(r'\{[^}]*\}|"[^"]*"', "", expression)
    names = set(re.findall(r"(?<![\w:])oomsafe_\w+", bare)) | (set(re.findall(r"\b\w+:\w+:\w+", bare)) - set(RECORDS))

    assert names <= set(served)
    assert names or set(re.findall(r"\w+:\w+:\w+", bare)) & set(RECORDS)
    for name, matchers in re.findall(r"(\w+)\{([^}]*)\}", expression):
        for label, operator, value in re.findall(r'(\w+)(=~|!~|!=|=)"([^"]*)"', matchers):
            assert label in served[name], (name, label)
            assert set(value.split("|")) <= served[name][label], (name, label, operator, value)


def test_a_rule_with_a_wrong_name_is_found(served: dict[str, dict[str, set[str]]]) -> None:
    """So the test above can tell."""
    for expression in ("oomsafe_gone > 0", 'oomsafe_deaths_total{verdict="oom_sure"} > 0', 'oomsafe_deaths_total{reason="signal"} > 0'):
        with pytest.raises(AssertionError):
            test_a_rule_names_only_what_oomsafe_serves({"expr": expression}, served)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, set[str]]]:
    """By the name of each sample of a pool of which everything is known, its labels, and their values."""
    monkeypatch.setattr(families, "margin_of", lambda pool: 5.0)
    monkeypatch.setattr(families, "_beside", lambda pool: {"dirty": replace(pool, supervisor=0)})
    figures = Figures(rss=9, anon=8, private=7, pss=7, uss=6, peak_rss=9, baseline=3, soft=10, hard=20)
    worker = WorkerView(
        slot=0, pid=1, started=1, generation=1, state=State.SERVING, figures=figures, published=1.0, measured=1.0, used=7,
        counters=Counters(), in_flight=[],
    )  # fmt: skip
    pool = PoolView("test", 0, 0, 1.0, 1, 1, 100, 90, [worker], Counters(), 0.0, 50, 5, "memory.max", "shop", metric="anon")
    pool = replace(pool, ends={end.value: 0 for end in End}, culprits={"other": 0}, retired=several(3))
    found: dict[str, dict[str, set[str]]] = {name: {} for name in THEIRS}
    for family in families_of(pool):
        for sample in family.samples:
            labels = found.setdefault(family.name + sample.suffix, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def seconds_of(text: str) -> float:
    """``10m`` in seconds."""
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]
