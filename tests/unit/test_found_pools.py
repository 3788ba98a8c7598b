"""Which server a command line starts."""

from __future__ import annotations

import pytest

from oomsafe.cli.found_pools import server_of

LINES = {
    "gunicorn app:app": "gunicorn",
    "/venv/bin/python /venv/bin/gunicorn -w 4 app:app": "gunicorn",
    "python3.12 -m gunicorn app:app": "gunicorn",
    "/usr/bin/python3 -m uvicorn --workers 4 app:app": "uvicorn",
    "/venv/bin/celery -A proj worker -l INFO": "celery",
    "python -m celery -A proj worker": "celery",
    "/venv/bin/python /venv/bin/celery -A proj beat": None,
    "hypercorn -w 2 app:app": "hypercorn",
    "/venv/bin/python /venv/bin/granian --workers 2 app:app": "granian",
    "/usr/bin/uwsgi --ini app.ini": "uwsgi",
    "vim gunicorn": None,
    "grep -r gunicorn": None,
    "/usr/bin/python3 manage.py runserver": None,
    "": None,
}


@pytest.mark.parametrize(("line", "server"), LINES.items())
def test_command_lines(line: str, server: str | None) -> None:
    """As ps shows them; a word that merely names a server starts none."""
    assert server_of(line.split()) == server


@pytest.mark.parametrize(
    ("title", "server"),
    [
        ("gunicorn: master [app:app]", "gunicorn"),
        ("[celeryd: celery@vm:MainProcess] -active- (worker -l INFO)", "celery"),
        ("uWSGI", None),
        ("uwsgi master", "uwsgi"),
    ],
)
def test_titles(title: str, server: str | None) -> None:
    """What a process calls itself by setproctitle."""
    assert server_of([title]) == server
