"""OOMSAFE_ variables that the server sets, after its configuration was loaded, hold; those that the app sets don't, which is said."""

from __future__ import annotations

import signal

import pytest
from celerying import Start
from serving import APPS, conf, until
from versions import no_control_socket

#: An app with an environment of its own, as python-dotenv's load_dotenv() makes it.
LATE = "import os\nos.environ['OOMSAFE_SOFT_LIMIT'] = '77MiB'\nos.environ['OOMSAFE_JITTER'] = '0'\nfrom {} import {} as app"
TOO_LATE = "OOMSAFE_SOFT_LIMIT does nothing: it was set by the app, which is loaded after the pool's policy has been read; give it to "
GIVEN = ("-e", "OOMSAFE_SOFT_LIMIT=80MiB")
NO_FILE = ("-c", "python:oomsafe.gunicorn.conf", "-b", "127.0.0.1:0", "--workers", "2", *no_control_socket(), *GIVEN)


def test_gunicorn_s_e_without_a_file(serve):
    """With what gunicorn sets for the file's place, which comes too late for that."""
    gunicorn = serve(argv=(*NO_FILE, "-e", "OOMSAFE_GUNICORN_CONF=mine.py", "-e", "OOMSAFE_SOFT_LIMT=3")).serving()

    assert gunicorn.lines(": soft limit 80.0 MiB each")
    assert len(gunicorn.lines("OOMSAFE_GUNICORN_CONF does nothing in -e or raw_env")) == 1
    assert len(gunicorn.lines("ignoring unknown variable OOMSAFE_SOFT_LIMT (did you mean OOMSAFE_SOFT_LIMIT")) == 1
    assert not gunicorn.lines(TOO_LATE)


@pytest.mark.parametrize("given", ["mine.py", "file:mine.py", "python:mine"])
def test_another_configuration_without_a_file(serve, given):
    """Named as gunicorn's -c is."""
    gunicorn = serve(argv=NO_FILE, env={"OOMSAFE_GUNICORN_CONF": given, "PYTHONPATH": f".:{APPS}"}, files={"mine.py": "proc_name = 'mine'"})

    assert gunicorn.serving().lines("oomsafe guards 2 workers (mine): soft limit 80.0 MiB each")


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("nowhere.py", "does not exist"),
        ("file:nowhere.py", "does not exist"),
        ("python:nowhere", "can't be imported: there is no such module"),
        ("python:nowhere.at.all", "can't be imported: there is no such module"),
        ("python:", "can't be imported: there is no such module"),
        ("python:.mine", "can't be imported: there is no such module"),
    ],
)
def test_a_configuration_that_is_not_there(serve, given, why):
    """One line; gunicorn does not start."""
    gunicorn = serve(argv=NO_FILE, env={"OOMSAFE_GUNICORN_CONF": given})

    assert gunicorn.ended() != 0
    assert gunicorn.log().strip() == f"oomsafe: OOMSAFE_GUNICORN_CONF={given!r} {why}"


def test_gunicorn_s_raw_env(serve):
    """A keyword wins; SIGHUP reads it anew, keeps what is in force for one that can't be right, and forgets what is not there any more."""
    settings = "raw_env = ['OOMSAFE_SOFT_LIMIT=80MiB', 'OOMSAFE_BUDGET=70%']"
    gunicorn = serve(settings=settings, budget="1GiB").serving()
    good = gunicorn.conf.read_text()
    (line,) = gunicorn.lines("oomsafe guards 2 workers")
    assert "soft limit 80.0 MiB each, budget 1.0 GiB of" in line

    for raw_env, expected in (("['OOMSAFE_SOFT_LIMIT=85MiB']", "85.0 MiB"), ("['OOMSAFE_SOFT_LIMIT=85']", "85.0 MiB"), ("[]", "")):
        before = len(gunicorn.lines("oomsafe guards 2 workers"))
        gunicorn.conf.write_text(good + f"raw_env = {raw_env}\n")
        gunicorn.signal(signal.SIGHUP)
        line = gunicorn.wait_for("oomsafe guards 2 workers", before + 1)[-1]
        gunicorn.serving()
        assert (f"soft limit {expected} each" if expected else "(auto)") in line
    (refused,) = gunicorn.lines("OOMSAFE_SOFT_LIMIT='85' has no unit")
    assert refused.endswith("(the policy stays as it was)")
    assert not gunicorn.lines(TOO_LATE)


def test_gunicorn_does_not_start_with_one_that_cannot_be_right(serve, tmp_path):
    """One line, and no file of its is left behind."""
    gunicorn = serve(
        text=conf(settings=f"pidfile = {str(tmp_path / 'pid')!r}"), argv=["-c", "oomsafe.conf.py", "-e", "OOMSAFE_SOFT_LIMIT=80"]
    )

    assert gunicorn.ended() == 1
    (line,) = gunicorn.log().splitlines()
    assert line.startswith("oomsafe: OOMSAFE_SOFT_LIMIT='80' has no unit")
    assert not (tmp_path / "pid").exists()


def test_a_gunicorn_app_s_own(serve):
    """Said once, by the first worker; what the app sets to what it is already is not late."""
    files = {"late.py": LATE.format("apps", "wsgi")}
    gunicorn = serve(app="late:app", files=files, soft_limit="90MiB", settings="raw_env = ['OOMSAFE_JITTER=0']").serving()

    (line,) = gunicorn.lines(TOO_LATE)
    assert "-e (raw_env), or to install()" in line
    gunicorn.signal(signal.SIGTTIN)
    gunicorn.serving(3)
    assert len(gunicorn.lines(TOO_LATE)) == 1


def test_uvicorn_s_env_file(serve_uvicorn):
    """The environment that it is started with wins, as with any other variable; the app's own is too late."""
    files = {
        "env": "OOMSAFE_SOFT_LIMIT=80MiB\nOOMSAFE_JITTER=0\nOOMSAFE_BUDGET=80%\nOOMSAFE_SURG=1\n",
        "late.py": LATE.format("uvicorn_apps", "asgi"),
    }
    uvicorn = serve_uvicorn("--env-file", "env", app="late:app", files=files, budget="1GiB").serving()

    (line,) = uvicorn.lines("oomsafe guards 2 workers")
    assert "soft limit 80.0 MiB each, budget 1.0 GiB of" in line
    assert len(uvicorn.lines("ignoring unknown variable OOMSAFE_SURG ")) == 1
    assert len(uvicorn.wait_for(TOO_LATE)) == 1


def test_a_single_uvicorn_s_env_file(serve_uvicorn):
    """Its headers are on, and an error ends it with one line."""
    files = {"env": "OOMSAFE_HEADERS=on\n", "bad": "OOMSAFE_HEADERS=short\n"}
    uvicorn = serve_uvicorn("--env-file", "env", workers=1, files=files).up()
    refused = serve_uvicorn("--env-file", "bad", files=files)

    assert "x-memory-rss" in uvicorn.get("/")[1]
    assert refused.ended() == 1
    assert len(refused.lines("oomsafe: OOMSAFE_HEADERS")) == 1
    assert not refused.lines("Traceback")


def test_celery(celery: Start):
    """What the app's module sets after install() holds; what is in Celery's configuration is not ours, and said."""
    env = {"SET_LATE": "OOMSAFE_SOFT_LIMIT=80MiB"}
    node = celery("redis", conf={"oomsafe_budget": "1GiB"}, env=env).ready()

    until(lambda: node.lines(": soft limit 80.0 MiB each"), "it guards its children")
    (line,) = node.lines("oomsafe_budget in Celery's configuration does nothing: ")
    assert line.endswith("write oomsafe.celery.install(app, budget=...), or set OOMSAFE_BUDGET in the environment")
