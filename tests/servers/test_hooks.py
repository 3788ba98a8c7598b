"""The user's own hooks: called as before, refused as before, and what they raise goes where it always went."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import ssl
import subprocess

import pytest
from needs import need
from serving import Gunicorn, until

HOOKS = """
import os

def say(name):
    os.write(2, f"hook {name} of {os.getpid()}\\n".encode())

def on_starting(server): say("on_starting")
def on_reload(server): say("on_reload")
def when_ready(server): say("when_ready")
def pre_fork(server, worker): say("pre_fork")
def post_fork(server, worker): say("post_fork")
def post_worker_init(worker): say("post_worker_init")
def worker_int(worker): say("worker_int")
def worker_abort(worker): say("worker_abort")
def pre_exec(server): say("pre_exec")
def pre_request(worker, req): say("pre_request")
def post_request(%s): say("post_request")
def child_exit(server, worker): say("child_exit")
def worker_exit(server, worker): say("worker_exit")
def nworkers_changed(server, new_value, old_value): say("nworkers_changed")
def on_exit(server): say("on_exit")
"""

ALL = {line.split("(")[0][4:] for line in HOOKS.splitlines() if line.startswith("def ") and "say(name)" not in line}


def called(gunicorn: Gunicorn) -> list[str]:
    """The names of the hooks that have been called."""
    return [line.split()[1] for line in gunicorn.lines("hook ") if line.startswith("hook ")]


def wait_for_call(gunicorn: Gunicorn, name: str, times: int) -> None:
    """Wait until a hook has been called so many times."""
    until(lambda: called(gunicorn).count(name) >= times, f"{times} calls of {name}: {called(gunicorn)}")


@pytest.mark.parametrize("parameters", ["worker, req", "worker, req, environ", "worker, req, environ, resp"])
@pytest.mark.parametrize("install", [True, False])
def test_every_hook_of_the_user_is_called(serve, parameters, install):
    """One life of a server that has use for each: the same calls with us and without."""
    policy = {"soft_limit": "100MiB"} if install else {}
    gunicorn = serve("sync", 2, settings=HOOKS % parameters, install=install, **policy)
    wait_for_call(gunicorn, "post_worker_init", 2)
    assert gunicorn.get("/")[0] == 200
    wait_for_call(gunicorn, "post_request", 1)
    for number, hook, exits in ((signal.SIGABRT, "worker_abort", 1), (signal.SIGQUIT, "worker_int", 2)):
        os.kill(gunicorn.workers()[0], number)
        wait_for_call(gunicorn, hook, 1)
        wait_for_call(gunicorn, "child_exit", exits)
        wait_for_call(gunicorn, "post_worker_init", 2 + exits)
    gunicorn.signal(signal.SIGTTIN)
    wait_for_call(gunicorn, "post_worker_init", 5)
    gunicorn.signal(signal.SIGHUP)
    wait_for_call(gunicorn, "post_worker_init", 7)
    wait_for_call(gunicorn, "child_exit", 5)
    gunicorn.signal(signal.SIGUSR2)
    wait_for_call(gunicorn, "post_worker_init", 9)
    until(lambda: len(gunicorn.workers()) == 3, "two workers and a new master")
    os.kill(int(gunicorn.lines("hook on_starting of ")[1].split()[-1]), signal.SIGTERM)
    wait_for_call(gunicorn, "child_exit", 7)
    until(lambda: len(gunicorn.workers()) == 2, "the new master has gone")
    assert gunicorn.stop() == 0

    calls = called(gunicorn)
    assert set(calls) == ALL
    counted = {name: calls.count(name) for name in ("on_starting", "on_reload", "when_ready", "pre_exec", "post_request", "on_exit")}
    assert counted == {"on_starting": 2, "on_reload": 1, "when_ready": 2, "pre_exec": 1, "post_request": 1, "on_exit": 2}
    # 2 at first, 2 replacements, 1 by TTIN, 2 by HUP, 2 of the new master
    for name in ("pre_fork", "post_fork", "post_worker_init", "worker_exit", "child_exit"):
        assert calls.count(name) == 9, name


def test_a_hook_given_by_its_name_is_called(serve):
    """gunicorn takes "module.function" as well."""
    gunicorn = serve(settings=NAMED, soft_limit="100MiB").serving()
    assert gunicorn.lines("the named hook")


NAMED = """
import sys
import types
named_hooks = sys.modules["named_hooks"] = types.ModuleType("named_hooks")
def post_fork(server, worker):
    server.log.info("the named hook")
named_hooks.post_fork = post_fork
post_fork = "named_hooks.post_fork"
"""


@pytest.mark.parametrize(
    "hook",
    ["def post_fork(server): pass", "def on_starting(server, more): pass", "def worker_exit(*arguments): pass", "child_exit = 5",
     "def post_request(worker): pass", 'pre_fork = "no_such_module.hook"'],
)  # fmt: skip
def test_a_hook_that_gunicorn_would_refuse_is_left_for_it_to_refuse(serve, hook):
    """The same exit status, and the same last line."""
    plain = serve(settings=hook, install=False)
    guarded = serve(settings=hook, soft_limit="100MiB")
    assert plain.ended() == guarded.ended() != 0
    assert plain.log().splitlines()[-1] == guarded.log().splitlines()[-1]


@pytest.mark.parametrize(
    "hook",
    ["on_starting(server)", "when_ready(server)", "pre_fork(server, worker)", "post_fork(server, worker)", "post_worker_init(worker)"],
)
def test_what_a_users_hook_raises_at_the_start_ends_gunicorn_as_ever(serve, hook):
    """With the same exit status as without us."""
    raising = f'def {hook}:\n    raise ValueError("the user\'s own error")\n'
    # with two workers gunicorn may meet the second one's failure while it halts, and exit with 1
    plain = serve("sync", 1, settings=raising, install=False)
    guarded = serve("sync", 1, settings=raising, soft_limit="100MiB")
    assert plain.ended() == guarded.ended() != 0
    assert plain.lines("the user's own error")
    assert guarded.lines("the user's own error")


@pytest.mark.parametrize(("hook", "survives"), [("worker_exit(server, worker)", True), ("child_exit(server, worker)", False)])
def test_what_a_users_hook_raises_at_a_workers_end_goes_where_it_always_went(serve, hook, survives):
    """gunicorn takes it from worker_exit, and dies of it in child_exit: with us as without."""
    raising = f'def {hook}:\n    raise ValueError("the user\'s own error")\n'
    plain = serve(settings=raising, install=False)
    guarded = serve(settings=raising, soft_limit="100MiB")
    for gunicorn in (plain, guarded):
        gunicorn.wait_for("Booting worker", 2)
        until(lambda gunicorn=gunicorn: gunicorn.get("/")[0] == 200, "it serves")
        os.kill(gunicorn.workers()[0], signal.SIGTERM)
        gunicorn.wait_for("the user's own error")
    if survives:
        plain.wait_for("Booting worker", 3)
        guarded.wait_for("Booting worker", 3)
        assert guarded.serving().get("/")[0] == 200
    else:
        assert plain.ended() == guarded.ended() != 0


def test_a_users_raising_worker_exit_does_not_end_recycling(serve):
    """Ours still runs after it: the last figures are on the scoreboard, and the slot is free again."""
    settings = 'def worker_exit(server, worker):\n    raise ValueError("the user\'s own error")\n'
    gunicorn = serve("sync", 1, soft_limit="80MiB", min_lifetime=0, settings=settings).serving(1)
    for recycles in (1, 2):
        gunicorn.get("/fill?mib=84")
        gunicorn.wait_for("the user's own error", recycles)
        until(lambda recycles=recycles: gunicorn.pool().totals.recycles[0] == recycles, "the recycle is counted")
        gunicorn.serving(1)


def test_the_users_ssl_context_is_used(serve, tmp_path):
    """A hook that we do not chain is left alone."""
    need(shutil.which("openssl") is not None, "no openssl to make a certificate with")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    settings = (
        f"keyfile, certfile = {str(key)!r}, {str(certificate)!r}\n"
        "def ssl_context(config, default):\n    import os\n    os.write(2, b'hook ssl_context\\n')\n    return default()\n"
    )
    gunicorn = serve("gthread", 1, soft_limit="100MiB", settings=settings).serving(1)
    port = int(gunicorn.wait_for("Listening at: ")[0].split("127.0.0.1:")[1].split()[0])
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
    connection.request("GET", "/pid")
    assert int(connection.getresponse().read()) in gunicorn.workers()
    connection.close()
    assert gunicorn.lines("hook ssl_context")
