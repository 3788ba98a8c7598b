"""Loaded into a peer's test process: puts a middleware where its test clients call an app, and notes how each test ends.

As a plugin of pytest (`-p wiring`), or before a runner on top of unittest (`python -m wiring runtests.py ...`). In the environment:
PEERS_WAY is plain (nothing is wrapped), empty (a wrapper that does nothing) or oomsafe, PEERS_WIRES names functions
of this file, PEERS_NOTES is the file with one line a note.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
import unittest

# read at once: tests play with the environment
WAY, NOTES = os.environ["PEERS_WAY"], os.environ["PEERS_NOTES"]
PID = os.getpid()
calls = 0


def note(*words):
    if os.getpid() == PID:  # not in what a test has forked
        with open(NOTES, "a") as notes:
            print(*words, file=notes)


def count(function):
    """`function`, counting its calls: a wiring that wraps nothing would be green for ever."""

    @functools.wraps(function)
    def counting(*args, **kwargs):
        global calls
        calls += 1
        return function(*args, **kwargs)

    return counting


# --- the two wrappers ---


class Transparent:
    def __init__(self, app):
        self.app = app

    def __getattr__(self, name):
        if name == "app" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.app, name)


class EmptyASGI(Transparent):
    async def __call__(self, scope, receive, send):
        return await self.app(scope, receive, send)


class EmptyWSGI(Transparent):
    def __call__(self, environ, start_response):
        return self.app(environ, start_response)


def empty_django(get_response):
    from asgiref.sync import iscoroutinefunction

    if not iscoroutinefunction(get_response):
        return count(get_response)

    counted = count(get_response)

    async def later(request):
        return await counted(request)

    return later


empty_django.sync_capable = empty_django.async_capable = True

if WAY == "oomsafe":
    from oomsafe import asgi, wsgi
    from oomsafe.worker.current import guard_for
    from oomsafe.worker.meter import Meter

    ASGI, WSGI = asgi.MemoryMiddleware, wsgi.MemoryMiddleware
    DJANGO = "oomsafe.django.MemoryMiddleware"
    Meter.begin = count(Meter.begin)  # what is counted is measured
else:
    ASGI, WSGI, DJANGO = EmptyASGI, EmptyWSGI, "wiring.empty_django"
    EmptyASGI.__call__, EmptyWSGI.__call__ = count(EmptyASGI.__call__), count(EmptyWSGI.__call__)


# --- where a peer calls an app ---


def after(cls, method):
    """Have the decorated function called with the object when `cls.method` is done with it."""

    def decorate(function):
        original = getattr(cls, method)

        @functools.wraps(original)
        def wrapped(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            function(self)
            return result

        setattr(cls, method, wrapped)

    return decorate


def starlette():
    from starlette.testclient import TestClient

    if WAY == "oomsafe":
        # its tests forbid a loop to read a file, as the making of a guard does, once: nothing would be measured
        guard_for({}, "requests")

    @after(TestClient, "__init__")
    def wrap(client):
        client.app = client._transport.app = ASGI(client.app)


def httpx():
    for name in ("httpx", "httpx2"):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue

        @after(module.ASGITransport, "__init__")
        def wrap_asgi(transport):
            transport.app = ASGI(transport.app)

        @after(module.WSGITransport, "__init__")
        def wrap_wsgi(transport):
            transport.app = WSGI(transport.app)


def werkzeug():
    from werkzeug import test

    original = test.run_wsgi_app
    test.run_wsgi_app = lambda app, *args, **kwargs: original(WSGI(app), *args, **kwargs)


def uvicorn():
    from uvicorn.config import Config

    @after(Config, "load")
    def wrap(config):
        config.loaded_app = ASGI(config.loaded_app)


def asgiref():
    from asgiref.testing import ApplicationCommunicator

    @after(ApplicationCommunicator, "__init__")
    def wrap(communicator):
        communicator.application = ASGI(communicator.application)


def django():
    """The middleware listed first, as the README says, for every handler: the test client's, WSGI's, ASGI's; and WSGI's as a whole."""
    from django.core.handlers import base, wsgi

    class Settings:
        def __getattr__(self, name):
            found = getattr(settings, name)
            return [DJANGO, *found] if name == "MIDDLEWARE" else found

    settings, base.settings = base.settings, Settings()
    handle = wsgi.WSGIHandler.__call__
    wsgi.WSGIHandler.__call__ = lambda self, environ, start_response: WSGI(functools.partial(handle, self))(environ, start_response)


def gunicorn():
    """Each worker's app, at the time it is called: its tests set the attribute themselves."""
    from gunicorn.asgi.protocol import ASGIProtocol
    from gunicorn.workers.base import Worker

    @after(ASGIProtocol, "__init__")
    def wrap(protocol):
        protocol.app = ASGI(protocol.app)

    Worker.wsgi = property(lambda worker: WSGI(vars(worker)["wsgi"]), lambda worker, app: vars(worker).update(wsgi=app))


def celery():
    """Every app that is made. What its children do is not counted here, only that they are guarded."""
    from celery import Celery

    from oomsafe.celery import install

    @after(Celery, "__init__")
    @count
    def wrap(app):
        if WAY == "oomsafe":
            install(app)


if WAY != "plain":
    for wire in os.environ["PEERS_WIRES"].split():
        globals()[wire]()


# --- how each test ends: in pytest ---


def pytest_runtest_logreport(report):
    if report.failed:
        note("failed" if report.when == "call" else "error", report.nodeid)
    elif report.when == "call" or report.skipped:
        note("xfailed" if hasattr(report, "wasxfail") else report.outcome, report.nodeid)


def pytest_collectreport(report):
    if report.failed:
        note("error", report.nodeid)


def pytest_sessionfinish(exitstatus):
    if exitstatus <= 1:  # else it was interrupted
        note("calls", calls)


# --- and in unittest ---


def _noting(add, outcome):
    @functools.wraps(add)
    def noting(self, test, *args):
        if outcome != "subtest":
            note(outcome, test.id())
        elif args[-1] is not None:
            note("failed", test.id())
        return add(self, test, *args)

    return noting


def main():
    outcomes = {"Success": "passed", "Failure": "failed", "Error": "error", "Skip": "skipped", "ExpectedFailure": "xfailed"}
    for name, outcome in {**outcomes, "UnexpectedSuccess": "failed", "SubTest": "subtest"}.items():
        setattr(unittest.TestResult, f"add{name}", _noting(getattr(unittest.TestResult, f"add{name}"), outcome))
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        note("calls", calls)


if __name__ == "__main__":
    sys.modules["wiring"] = sys.modules["__main__"]  # Django imports the empty middleware from there
    main()
