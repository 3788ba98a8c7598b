"""The doctor on whole machines, captured as trees: exactly the expected text, which lies beside this file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel.hosts import HOSTS, Host, Show, debian, debian_well

from oomsafe.cli.doctor import record_of
from oomsafe.cli.doctor_facts import read_facts
from oomsafe.cli.doctor_text import doctor_text
from oomsafe.policy.doctor.facts import Facts
from oomsafe.policy.doctor.rules import findings_of

GOLDEN = Path(__file__).parent / "doctor"

#: What is expected, in the order in which it is shown.
CODES = {
    "debian": ["unit-stops", "supervisor-first", "no-limit"],
    "debian_well": [],
    "docker_v1": ["near-the-limit"],
    "docker_v2": [],
    "guaranteed": ["dies-whole"],
    "burstable": ["dies-whole"],
    "besteffort": ["dies-whole", "best-effort"],
    "lxc": [],
    "wsl": [],
    "laptop": [],
}

Make = Callable[[Path], tuple[Host, Show]]


@pytest.fixture(autouse=True)
def _no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    # this machine's, and not the tree's
    monkeypatch.setattr("oomsafe.kernel.host.can_read_kernel_log", lambda root: True)
    monkeypatch.setattr("oomsafe.kernel.host.shm_of", lambda root: (64 << 20, 1 << 20))


def facts_of(root: Path, make: Make) -> Facts:
    """What is read there."""
    host, ask = make(root)
    return read_facts([], root=str(host.root), ask=ask, environment={})


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_each_machine(tmp_path: Path, make: Make) -> None:
    """Its findings, and all that is said of it. With OOMSAFE_GOLDEN=write it writes what it now says, to be read."""
    facts = facts_of(tmp_path, make)

    findings = findings_of(facts)
    said = doctor_text(facts, findings, 400).plain.replace(str(tmp_path), "") + "\n"
    file = GOLDEN / f"{make.__name__}.txt"
    if os.environ.get("OOMSAFE_GOLDEN") == "write":
        file.write_text(said)

    assert [finding.code for finding in findings] == CODES[make.__name__]
    assert said == file.read_text()


@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_as_json(tmp_path: Path, make: Make) -> None:
    """Valid JSON without infinities; nothing of the environment but what steers allocators."""
    facts = facts_of(tmp_path, make)
    text = json.dumps(record_of(facts, findings_of(facts)), allow_nan=False)

    assert [finding["code"] for finding in json.loads(text)["findings"]] == CODES[make.__name__]
    assert "hunter2" not in text


def test_without_proc(tmp_path: Path) -> None:
    """macOS: it says what it can't."""
    facts = read_facts([], root=str(tmp_path), environment={})

    assert findings_of(facts) == []
    assert "can't be read here" in doctor_text(facts, [], 80).plain


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_any_width(tmp_path: Path, width: int) -> None:
    """Only lines to copy may be longer."""
    facts = facts_of(tmp_path, debian)
    findings = findings_of(facts)
    long = [line for line in doctor_text(facts, findings, width).plain.splitlines() if len(line) > max(24, width)]

    assert all(any(change in line for finding in findings for change in finding.change) for line in long)


def test_hidden_processes(tmp_path: Path) -> None:
    """hidepid: what can't be seen is said, and nothing fails."""
    host, ask = debian_well(tmp_path)
    for pid in (1, 500, 501, 502, 503):
        (host.root / f"proc/{pid}").rename(host.root / f"proc/hidden-{pid}")

    facts = read_facts([], root=str(host.root), ask=ask, environment={})

    assert facts.pools == ()
    assert any("hidepid" in line for line in facts.unread)


def test_files_that_can_t_be_read(tmp_path: Path) -> None:
    """Each file of the tree is emptied in turn, or holds garbage: never an exception."""
    host, ask = debian(tmp_path)
    files = [file for file in host.root.rglob("*") if file.is_file()]
    for file in files:
        before = file.read_bytes()
        for content in (b"", b"\xff\x00garbage\n: \n"):
            file.write_bytes(content)
            facts = read_facts([], root=str(host.root), ask=ask, environment={})
            doctor_text(facts, findings_of(facts), 80)
        file.write_bytes(before)
