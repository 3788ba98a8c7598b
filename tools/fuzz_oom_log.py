"""Feeds the OOM log parser with what atheris makes of the tests' reports, guided by coverage. Run on request, not by `make test`:

    python3 -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris . && /tmp/fuzz/bin/python tools/fuzz_oom_log.py -max_total_time=600

Anything that is raised, an output that is not printable, and an input of 64 KiB that takes longer than 10 s is a finding.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile

import atheris

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))

with atheris.instrument_imports(include=["oomsafe"]):
    from oomsafe.policy.kill_advice import advice, reasons
    from oomsafe.policy.oomlog.reader import read_events
    from oomsafe.policy.why_killed import account_of

from oom_reports import LOGGERS, RELEASES, report


def one_input(data: bytes) -> None:
    """Every stage, and everything that is said of each event."""
    for event in read_events([data]):
        account = account_of(event)
        said = [*reasons(account), *advice(account)]
        assert all(" " <= character <= "~" for sentence in said for character in sentence)
        json.dumps([list(holder.__dict__.values()) for holder in account.holders], allow_nan=False)


def main() -> None:
    """libFuzzer's own options, behind a corpus of one report for each logger and kernel."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, (write, _) in enumerate(LOGGERS.values()):
            for release in RELEASES:
                with open(os.path.join(corpus, f"{number}-{release}"), "w", encoding="utf-8") as file:
                    file.write(write(report(release)))
        atheris.Setup([*sys.argv, "-timeout=10", "-max_len=65536", corpus], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
