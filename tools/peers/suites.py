"""The suites that `make test-peers` runs. One more is one more entry here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One peer's tests, run in the folder of its source distribution."""

    dist: str
    """On the package index; its sdist must have the tests. Its version is that of the project's environment, else the newest."""
    wires: str
    """What of it calls an app: names of functions in wiring.py."""
    needs: tuple[str, ...]
    """What pip installs for its tests, beside the distribution itself; paths are relative to the sdist."""
    args: tuple[str, ...] = ("tests",)
    """Of pytest, or of `script`. pytest's addopts are those of our run, not theirs."""
    folder: str = "."
    """Where the tests are started."""
    script: str = ""
    """A runner of their own on top of unittest, instead of pytest."""
    service: str = ""
    """"redis": one is started for the suite, on a port of its own."""


SUITES = {
    "flask": Suite(dist="flask", wires="werkzeug", needs=("--group=pyproject.toml:tests", "pytest<9.1")),
    "starlette": Suite(dist="starlette", wires="starlette httpx", needs=("starlette[full]", "--group=pyproject.toml:dev")),
    "fastapi": Suite(dist="fastapi", wires="starlette httpx", needs=("fastapi[all]", "--group=pyproject.toml:tests")),
    "uvicorn": Suite(dist="uvicorn", wires="uvicorn httpx", needs=("uvicorn[standard]", "--group=pyproject.toml:dev")),
    "gunicorn": Suite(
        dist="gunicorn",
        wires="gunicorn",
        # of its own list, but for the C parser, which it can do without
        needs=("pytest", "pytest-asyncio", "gevent", "h2", "uvloop", "inotify", "packaging"),
        args=("tests", "--ignore=tests/docker", "--assert=plain"),
    ),
    "django": Suite(
        dist="django",
        wires="django asgiref",
        # of its own list, what these tests use: one of the others has no wheel
        needs=("aiosmtpd", "asgiref", "docutils", "jinja2", "Pillow", "PyYAML", "tblib", "tzdata"),
        folder="tests",
        script="runtests.py",
        args=("--parallel=1", "--settings=test_sqlite")
        + ("asgi", "wsgi", "handlers", "middleware", "middleware_exceptions", "requests_tests", "responses", "view_tests", "test_client"),
    ),
    "djangorestframework": Suite(
        dist="djangorestframework",
        wires="django",
        needs=("--group=pyproject.toml:test", "--group=pyproject.toml:optional"),
        args=("tests", "--no-migrations"),
    ),
    "celery": Suite(dist="celery", wires="celery", needs=("-r", "requirements/test.txt"), args=("t/unit",)),
    "celery-integration": Suite(
        dist="celery",
        wires="celery",
        needs=("-r", "requirements/test.txt"),
        args=("t/integration/test_tasks.py",),
        service="redis",
    ),
}
