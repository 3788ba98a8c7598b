"""``oomsafe run``: what a command starts is guarded as if that had been installed by hand, and nothing else is touched."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from clients import Load
from serving import ENDING_WITH_US, Gunicorn, Server, conf, memory_of, until
from versions import no_control_socket, provided

from oomsafe.run.environment import PATH
from oomsafe.scoreboard import layout
from oomsafe.scoreboard.places import board_of

OOMSAFE = (sys.executable, "-m", "oomsafe", "run")
INSTRUMENT = str(Path(sys.executable).with_name("opentelemetry-instrument"))
ENV = {"OOMSAFE_MIN_LIFETIME": "0", "OOMSAFE_SOFT_LIMIT": "100MiB"}

BASE_APPLICATION = """
from gunicorn.app.base import BaseApplication
import apps

class Own(BaseApplication):
    def load_config(self):
        for name, value in {"bind": "127.0.0.1:0", "workers": 2, "control_socket_disable": True, "graceful_timeout": 5}.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self):
        return apps.wsgi

Own().run()
"""

RUN_UVICORN = """
import uvicorn

if __name__ == "__main__":
    uvicorn.run("apps:asgi", workers=2, port=0, access_log=False)
"""

#: Its workers wait while there is a file, before they could answer uvicorn: main modules are imported first, and some take a minute.
SLOW_MAIN = """
import os
import time
import uvicorn

while __name__ == "__mp_main__" and os.path.exists("wait"):
    time.sleep(0.05)

if __name__ == "__main__":
    uvicorn.run("apps:asgi", workers=2, port=0, access_log=False, timeout_worker_healthcheck=60)
"""

SERVER = """
from uvicorn import Config, Server
import apps

class Own(Server):
    pass

Own(Config(apps.asgi, port=0, access_log=False)).run()
"""

#: Two servers in one process: the second one's requests count, too.
TWO_SERVERS = """
import asyncio
import uvicorn
import apps

async def main():
    servers = [uvicorn.Server(uvicorn.Config(apps.asgi, port=0, access_log=False)) for _ in range(2)]
    await asyncio.gather(*(server.serve() for server in servers))

asyncio.run(main())
"""

#: Answers with what of ours its process has imported.
MODULES = """
import sys

async def asgi(scope, receive, send):
    if scope["type"] == "http":
        body = " ".join(name for name in sys.modules if name.startswith("oomsafe.")).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})
"""

#: What a Python below it says of itself.
TELL = """
import json, os, signal, sys
print(json.dumps({
    "modules": sorted(name for name in sys.modules if name.startswith("oomsafe")), "path": sys.path, "argv": sys.argv,
    "ignored": [n for n in (signal.SIGPIPE, signal.SIGXFSZ) if signal.getsignal(n) == signal.SIG_IGN],
    "settings": {n: t for n, t in os.environ.items() if n in ("OOMSAFE_SOFT_LIMIT", "OOMSAFE_SURGE", "OOMSAFE_SUSTAIN")},
    "sitecustomize": getattr(sys.modules.get("sitecustomize"), "__file__", None),
}))
"""


class Under(Server):
    """A command under ``oomsafe run``."""

    def __init__(self, folder: Path, *command: str, listens: str, options: tuple[str, ...] = (), env: Any = None, files: Any = None):
        self.LISTENS = listens
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        super().__init__(folder, [*ENDING_WITH_US, *OOMSAFE, *options, "--", *command], {**ENV, **(env or {})})


@pytest.fixture
def under(started: Any) -> Callable[..., Under]:
    """Start one: under("gunicorn", "app:app", listens="Listening at: ")."""
    return lambda *command, **more: started(lambda folder: Under(folder, *command, **more))


GUNICORN = ("-w", "2", "-b", "127.0.0.1:0", *no_control_socket(), "--keep-alive", "30", "--graceful-timeout", "5", "apps:wsgi")
WAYS = {
    "gunicorn": ((sys.executable, "-m", "gunicorn", *GUNICORN), "Listening at: ", {}),
    "base-application": ((sys.executable, "own.py"), "Listening at: ", {"own.py": BASE_APPLICATION}),
    "python -m uvicorn": ((sys.executable, "-m", "uvicorn", "--workers", "2", "--port", "0", "apps:asgi"), "Uvicorn running on ", {}),
    "uvicorn.run": ((sys.executable, "own.py"), "Uvicorn running on ", {"own.py": RUN_UVICORN}),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_starts_a_server_it_is_guarded(under, way):
    """Five recycles under load, and no request is lost."""
    command, listens, files = WAYS[way]
    server = under(*command, listens=listens, files=files).serving()

    with Load(server, "/leak?kib=512") as load:
        server.wait_for(" recycling: ", times=5, seconds=60)

    assert load.failed == []
    assert load.served > 100
    assert len(server.lines(": soft limit 100 MiB each")) == 1
    server.serving().signal(signal.SIGTERM)
    assert server.ended() in (0, -signal.SIGTERM)


@pytest.mark.parametrize("text", [SERVER, TWO_SERVERS], ids=["one", "two"])
def test_a_server_in_a_program_is_measured(under, text):
    """It is the process's only one, so it stays, and says what becomes of it."""
    server = under(sys.executable, "own.py", listens="Uvicorn running on ", files={"own.py": text}, env={"OOMSAFE_HEADERS": "on"})

    (line,) = server.wait_for("oomsafe guards this process")
    assert "soft limit 100 MiB" in line
    assert "nothing here would start another" in line
    assert int(server.get("/pid")[1]["x-memory-rss"]) > 1 << 20


def test_a_worker_of_uvicorn_loads_nothing_of_a_supervisor(under):
    """It is spawned, and imports uvicorn's main: what of ours comes with that is memory, once a worker."""
    command = (sys.executable, "-m", "uvicorn", "--workers", "2", "--port", "0", "own:asgi")
    server = under(*command, listens="Uvicorn running on ", files={"own.py": MODULES}).serving()

    modules = server.get("/")[2].decode().split()

    assert "oomsafe.uvicorn.server" in modules
    assert [name for name in modules if name.startswith("oomsafe.supervisor")] == []


def test_the_supervisor_goes_on_while_uvicorn_waits_for_a_worker_that_boots(under):
    """Nobody would replace a worker meanwhile, or see that the pool is over its budget."""
    provided("timeout_worker_healthcheck" in inspect.signature(uvicorn.Config).parameters, "this uvicorn waits for 5 s at most")
    server = under(sys.executable, "own.py", listens="Uvicorn running on ", files={"own.py": SLOW_MAIN}).serving()
    wait = server.folder / "wait"
    wait.touch()
    before = {worker.pid for worker in server.pool().workers}

    os.kill(min(before), signal.SIGKILL)
    until(lambda: len(server.workers()) == 3 and min(before) not in server.workers(), "another one boots")  # and the resource tracker
    ticks = set()
    until(lambda: ticks.add(last_tick(server.pid)) or len(ticks) > 3, "the supervisor ticks")

    wait.unlink()
    server.serving()
    assert server.lines("stood still") == []


def last_tick(supervisor: int) -> int:
    """When a supervisor has last looked at its workers, as its scoreboard has it."""
    board = board_of(supervisor)
    assert board
    (when,) = layout.DECIDED.unpack_from(memory_of(board), layout.DECIDED_AT)
    return int(when)


def test_an_installation_by_hand_wins(started, tmp_path):
    """Nothing is hooked twice, and a variable that does nothing for it is said."""
    text = conf(soft_limit="90MiB", min_lifetime=0)
    gunicorn = started(lambda folder: Gunicorn(folder, text, "apps:wsgi", prefix=(*OOMSAFE, "--soft-limit", "70MiB", "--")))

    gunicorn.serving()
    assert len(gunicorn.lines(": soft limit 90.0 MiB each")) == 1
    (line,) = gunicorn.wait_for("OOMSAFE_SOFT_LIMIT does nothing")
    assert "the app's own code or configuration sets soft_limit" in line


def test_a_reload_keeps_the_guard(under):
    """gunicorn reads its configuration anew."""
    command, listens, files = WAYS["gunicorn"]
    server = under(*command, listens=listens, files=files).serving()
    before = set(server.workers())

    server.signal(signal.SIGHUP)
    server.wait_for("oomsafe guards 2 workers", times=2)

    until(lambda: not before & set(server.workers()), "other workers serve")
    server.serving()


@pytest.mark.parametrize("by_hand", [True, False])
def test_it_can_be_turned_off(started, by_hand):
    """By one variable, also what is installed by hand, and whatever else is wrong with its settings; it is said."""
    env = {"OOMSAFE_DISABLE": "1", "OOMSAFE_BUDGET": "none of it"}
    prefix = (*OOMSAFE, "--")
    gunicorn = started(lambda folder: Gunicorn(folder, conf(install=by_hand), "apps:wsgi", prefix=prefix, env=env))

    assert gunicorn.get("/pid")[0] == 200
    assert gunicorn.lines("oomsafe run: off (OOMSAFE_DISABLE is set)")
    assert bool(gunicorn.lines("oomsafe is off (OOMSAFE_DISABLE is set): nothing is measured, and no limit holds")) is by_hand
    assert gunicorn.lines("oomsafe guards") == []


def test_opentelemetry_around_it_and_inside_of_it(under):
    """Its sitecustomize imports no other one, and does not get far with a broken configuration."""
    gunicorn = Path(sys.executable).with_name("gunicorn")
    broken = {"OTEL_TRACES_EXPORTER": "no-such-exporter", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}

    inside = under(INSTRUMENT, str(gunicorn), *GUNICORN, listens="Listening at: ", env=broken).serving()
    assert inside.lines("oomsafe guards 2 workers")
    assert inside.lines("Failed to auto initialize OpenTelemetry")


def run(*command: str, options: tuple[str, ...] = (), cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """One that ends by itself, under ``oomsafe run``."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith("OOMSAFE_")}
    whole = [*OOMSAFE, *options, "--", *command]
    return subprocess.run(whole, env={**ours, **env}, cwd=cwd, capture_output=True, text=True, timeout=60, input="from stdin\n")


def told(*options: str, **env: str) -> dict[str, Any]:
    """What a Python below it says of itself."""
    done = run(sys.executable, "-c", TELL, options=options, **env)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_opentelemetry_outside_of_it():
    """What wraps us wraps the command as well, also a version that takes itself out of the environment while it starts."""
    none = {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}
    command = [INSTRUMENT, *OOMSAFE, "--", sys.executable, "-c", TELL]
    done = subprocess.run(command, env={**os.environ, **none}, capture_output=True, text=True, timeout=60, check=True)

    found = json.loads(done.stdout)
    assert "auto_instrumentation" in found["sitecustomize"]
    assert "oomsafe.run.start" in found["modules"]


def test_a_process_that_serves_nothing_has_one_small_module_more():
    """Its imports, arguments and signals are its own, and so is its place: no process stands before it."""
    plain = json.loads(subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=True).stdout)
    found = told("--soft-limit", "123MiB", "--no-surge", "--sustain=3")

    assert found["modules"] == ["oomsafe", "oomsafe.run", "oomsafe.run.start"]
    assert (found["path"], found["argv"], found["ignored"]) == (plain["path"], plain["argv"], plain["ignored"])
    assert found["settings"] == {"OOMSAFE_SOFT_LIMIT": "123MiB", "OOMSAFE_SURGE": "false", "OOMSAFE_SUSTAIN": "3"}


def test_the_sitecustomize_that_is_there_already_is_imported(tmp_path):
    """As Python itself would have: in ``oomsafe run``, which is one, and in the command."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.stdout.write('theirs ')")
    done = run(sys.executable, "-c", "import sitecustomize; print(sitecustomize.__file__)", PYTHONPATH=str(tmp_path))
    assert done.stdout == f"theirs theirs {tmp_path}/sitecustomize.py\n"

    (tmp_path / "sitecustomize.py").write_text("1 / 0")
    broken = run(sys.executable, "-c", "print('goes on')", PYTHONPATH=str(tmp_path))
    plain = subprocess.run([sys.executable, "-c", "1"], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert (broken.stdout, broken.stderr) == ("goes on\n", plain.stderr * 2)
    assert "ZeroDivisionError" in broken.stderr


def test_streams_and_status_are_the_commands_own():
    """Also the status of one that a signal has ended."""
    assert run("sh", "-c", "read line; echo got $line; echo err >&2; exit 7").returncode == 7
    done = run("sh", "-c", "read line; echo got $line; kill -TERM $$")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "got from stdin\n")


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        (("gunciorn", "app:app"), 127, "COMMAND not found: 'gunciorn'; an example: oomsafe run -- gunicorn app:app"),
        (("gunicorn app:app",), 127, "is one word with spaces in it; leave the quotes out: oomsafe run -- gunicorn app:app"),
        (("/etc/passwd",), 126, "COMMAND '/etc/passwd' is not executable; chmod +x, or name its interpreter"),
        (("/etc",), 126, "COMMAND '/etc' is not executable"),
        (("./lost",), 127, "COMMAND './lost' can't be run: the interpreter in its first line does not exist"),
        (("/etc/passwd/x",), 127, "COMMAND not found: '/etc/passwd/x'"),
        (("./empty",), 126, "COMMAND './empty' can't be run: Exec format error"),
    ],
)
def test_a_command_that_cannot_be_run(tmp_path, command, status, line):
    """One line, and the status that a shell has for it."""
    for name, text in (("lost", "#!/no/such/python\n"), ("empty", "\x7fELF")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    done = run(*command, cwd=tmp_path)

    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("oomsafe run: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "env", "line"),
    [
        (("--soft-limit", "300"), {}, "--soft-limit='300'"),
        ((), {"OOMSAFE_SOFT_LIMIT": "300"}, "OOMSAFE_SOFT_LIMIT='300'"),
        (("--soft-limit", "300MiB", "--hard-limit", "200MiB"), {}, "is not below hard_limit="),
        (("--sof-limit", "300MiB"), {}, "no such option: --sof-limit (did you mean --soft-limit"),
        (("--soft-limit",), {}, "--soft-limit needs a value: --soft-limit=VALUE"),
        (("--surge=yes",), {}, "--surge takes no value"),
    ],
)
def test_settings_that_cannot_be_right_start_nothing(options, env, line):
    """The line names what the user wrote."""
    done = run("echo", "started", options=options, **env)

    assert (done.returncode, done.stdout) == (2, "")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_environment_without_oomsafe_says_so():
    """For the command itself, once; not for each small program that it may call."""
    base = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    done = run(str(base), "-c", f"import subprocess; subprocess.run([{str(base)!r}, '-c', 'print(1)']); print(2)")

    assert done.returncode == 0
    assert done.stdout.split() == ["1", "2"]
    assert done.stderr.count("\n") == 1
    assert f"oomsafe is not installed in {sys.base_prefix}" in done.stderr


def test_an_environment_with_a_broken_oomsafe_says_so(tmp_path):
    """Or with one for a newer Python: what the command does is not changed, and what it calls says nothing."""
    (tmp_path / "oomsafe").mkdir()
    (tmp_path / "oomsafe" / "__init__.py").write_text("no Python\n")
    base = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    code = f"import subprocess; subprocess.run([{str(base)!r}, '-c', 'print(1)']); print(2)"
    command = [*OOMSAFE, "--", "env", f"PYTHONPATH={PATH}:{tmp_path}", str(base), "-c", code]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    assert done.stdout.split() == ["1", "2"]
    assert done.stderr.count("\n") == 1
    assert f"oomsafe in {sys.base_prefix} is broken (SyntaxError(" in done.stderr


def test_a_wrapper_in_another_environment_is_no_reason_to_call_the_server_unguarded():
    """As uv and poetry are: the line is about that Python alone."""
    base = Path(sys.base_prefix, "bin", f"python{sys.version_info[0]}.{sys.version_info[1]}")
    done = run(str(base), "-c", f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {TELL!r}])")

    assert "oomsafe.run.start" in json.loads(done.stdout)["modules"]
    assert done.stderr.endswith("a server that runs in this Python is not guarded\n")


def test_development_servers_are_left_alone_and_say_so(under, tmp_path):
    """Flask's and Django's."""
    flask = under(sys.executable, "-m", "flask", "--app", "own", "run", "--port", "0", listens="Running on ", files={"own.py": FLASK})
    assert flask.get("/")[2] == b"hello"
    assert flask.lines("oomsafe run: Werkzeug's server: a development server; it is left alone")

    command = (sys.executable, "own.py", "runserver", "--noreload", "127.0.0.1:0")
    django = under(*command, listens=" development server at ", files={"own.py": DJANGO})
    django.wait_for("oomsafe run: Django's runserver: a development server; it is left alone")
    django.wait_for(" development server at ")
    assert django.lines("oomsafe guards") == flask.lines("oomsafe guards") == []


def test_hypercorn_is_measured(under):
    """And says how it recycles."""
    command = (sys.executable, "-m", "hypercorn", "--bind", "127.0.0.1:0", "apps:asgi")
    hypercorn = under(*command, listens="Running on ", env={"OOMSAFE_HEADERS": "on"})

    assert int(hypercorn.get("/pid")[1]["x-memory-rss"]) > 1 << 20
    assert len(hypercorn.lines("oomsafe run: hypercorn: its workers' memory is measured; it recycles them by --max-requests")) == 1


def test_an_app_that_imports_hypercorn_is_not_served_by_it(under):
    """Quart does: a line about hypercorn's workers would be wrong."""
    text = "import hypercorn.asyncio\nfrom apps import wsgi\n"
    command = (sys.executable, "-m", "gunicorn", *GUNICORN[:-1], "own:wsgi")
    server = under(*command, listens="Listening at: ", files={"own.py": text}).serving()

    assert server.get("/pid")[0] == 200
    assert server.lines("hypercorn") == []


FLASK = """
from flask import Flask

app = Flask(__name__)
app.add_url_rule("/", view_func=lambda: "hello")
"""

DJANGO = """
import sys
from django.conf import settings
from django.core.management import execute_from_command_line

urlpatterns = []
if __name__ == "__main__":
    settings.configure(DEBUG=True, ROOT_URLCONF="own", SECRET_KEY="x", USE_TZ=True)
    execute_from_command_line(sys.argv)
"""


def test_a_celery_node_is_guarded(celery):
    """Its children are recycled between two tasks, and no result is lost."""
    env = {"OOMSAFE_SOFT_LIMIT": "120MiB", "OOMSAFE_MIN_LIFETIME": "0"}
    node = celery(install=False, env=env, wrap=lambda command: [*OOMSAFE, "--", *command]).ready()

    tasks = "results = [proj.leak.delay(number, 1280) for number in range(600)]; result = [r.get(timeout=60) for r in results]"
    assert node.ask(tasks, seconds=120) == list(range(600))

    assert len(node.lines(" recycling: ")) >= 4  # whichever child has which task
    assert node.lines(": soft limit 120 MiB each")
