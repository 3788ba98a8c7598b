"""gunicorn's configuration, and scripts that start uvicorn and Celery."""

from __future__ import annotations

import shlex
from dataclasses import replace

from oomsafe.cli.paste.deployment import Deployment


def gunicorn(pool: Deployment) -> str:
    """A configuration file, or what to put at the end of the one that is there."""
    keywords = ", ".join(f'{field}="{value}"' for field, value in pool.settings.items())
    lines = [
        f"# {pool.about}",
        f"# gunicorn -c THIS_FILE {pool.app}",
        f"workers = {pool.workers}",
        *([f'worker_class = "{pool.known_class}"'] if pool.known_class else []),
        *(["preload_app = True"] if pool.preload else []),
        "",
        "import oomsafe.gunicorn",
        "",
        "# the last line: what stands below it would replace oomsafe's hooks",
        f"oomsafe.gunicorn.install(globals(), {keywords})",
    ]
    return "\n".join(lines) + "\n"


def uvicorn(pool: Deployment) -> str:
    """A script; what it is given goes to uvicorn."""
    return _script(replace(pool, server="uvicorn"), "--port 8080")


def celery(pool: Deployment) -> str:
    """A script; what it is given goes to Celery."""
    return _script(replace(pool, server="celery"), "--queues reports")


def _script(pool: Deployment, example: str) -> str:
    command = shlex.join(["oomsafe", "run", *pool.options, "--", *pool.command()])
    return f'#!/bin/sh\n# {pool.about}\n# with more options of {pool.server}: sh THIS_FILE {example}\nexec {command} "$@"\n'
