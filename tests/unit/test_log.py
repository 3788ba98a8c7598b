"""Where oomsafe's lines go, in a process of its own for each case: what an app does to logging it does to the whole process."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: A server with its own logger, as gunicorn, uvicorn and Celery have one, and oomsafe's lines with it.
SERVER = """
import logging, logging.config, os, sys
theirs = logging.getLogger("server.error")
theirs.propagate = False
theirs.setLevel(logging.INFO)
theirs.addHandler(logging.StreamHandler(sys.stdout))
theirs.handlers[0].setFormatter(logging.Formatter("server: %(message)s"))
"""
SAYING = """
from oomsafe.log import log, log_with, once
{before}
log_with(theirs)
{after}
log.info("info")
log.warning("warning")
once("key", logging.WARNING, "kernel")
"""
DICT = 'logging.config.dictConfig({{"version": 1, {} "handlers": {{"app": {{"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}}}}}})'
ROOT = '"root": {"handlers": ["app"], "level": "DEBUG"},'
FILE = """
open("alembic.ini", "w").write('''[loggers]
keys=root
[handlers]
keys=
[formatters]
keys=
[logger_root]
level=WARNING
handlers=
''')
logging.config.fileConfig("alembic.ini")
"""
ALL = ["server: info", "server: warning", "server: kernel"]
FROM_WARNING = ALL[1:]
APPS_OWN = ["info", "warning", "kernel"]
OF_OOMSAFE = '"loggers": {"oomsafe": %s},'


def run(script: str, folder: str) -> list[str]:
    """The lines that it writes."""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    assert ran.stderr == ""
    return ran.stdout.splitlines()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("app", "lines"),
    [
        pytest.param("pass", ALL, id="nothing"),
        pytest.param(DICT.format(ROOT), ALL, id="dictConfig"),
        pytest.param(FILE, ALL, id="fileConfig"),
        pytest.param(DICT.format(ROOT) + "\n" + FILE, ALL, id="both"),
        pytest.param("logging.basicConfig(force=True, level='ERROR')", ALL, id="basicConfig"),
        pytest.param(DICT.format(ROOT + OF_OOMSAFE % '{"level": "WARNING"}'), FROM_WARNING, id="its level"),
        pytest.param("logging.getLogger('oomsafe').setLevel('WARNING');" + DICT.format(ROOT), FROM_WARNING, id="its level, by hand"),
        pytest.param(DICT.format(OF_OOMSAFE % '{"handlers": ["app"], "level": "DEBUG"}'), APPS_OWN, id="its handlers"),
        pytest.param(
            DICT.format(ROOT + OF_OOMSAFE % '{"handlers": ["app"], "level": "DEBUG", "propagate": False}'),
            APPS_OWN,
            id="its handlers alone",
        ),
        pytest.param("logging.getLogger('oomsafe').disabled = True", [], id="disabled by name"),
        pytest.param("logging.disable(logging.WARNING)", [], id="all of logging is off"),
        pytest.param("theirs.setLevel('WARNING')", FROM_WARNING, id="the server's level"),
    ],
)
def test_each_line_comes_once_where_the_server_s_come(app: str, lines: list[str], when: str, tmp_path: object) -> None:
    """Whatever the app does to logging; what the user says of our logger by name holds."""
    said = SAYING.format(**{"before": "", "after": "", when: app})

    assert run(SERVER + said, str(tmp_path)) == lines


def test_a_logger_that_was_there_before_us(tmp_path: object) -> None:
    """Its level was set, and it was disabled with all others, before oomsafe was imported; its class is the app's own."""
    app = """
class Own(logging.Logger):
    def own(self):
        return self.name
logging.setLoggerClass(Own)
early = logging.getLogger("oomsafe")
early.setLevel("WARNING")
"""
    after = "assert early is log and early.own() == 'oomsafe'"

    assert run(SERVER + app + DICT.format(ROOT) + SAYING.format(before="", after=after), str(tmp_path)) == FROM_WARNING


def test_a_level_that_comes_late(tmp_path: object) -> None:
    """What was not said for the root's level is, once there is a server's."""
    before = "log.info('too early')\nassert not log.isEnabledFor(logging.INFO)"

    assert run(SERVER + SAYING.format(before=before, after=""), str(tmp_path)) == ALL
