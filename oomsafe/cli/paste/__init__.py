"""Files to paste, with the limits that ``oomsafe advise`` advises: pure functions from a Deployment to text.

Each word of a name that another process has written is reduced to harmless characters (deployment.py), and quoted as the file's own syntax
demands besides.
"""

from __future__ import annotations

from collections.abc import Callable

from oomsafe.cli.paste.containers import compose, docker, ecs, kubernetes
from oomsafe.cli.paste.deployment import Deployment
from oomsafe.cli.paste.servers import celery, gunicorn, uvicorn
from oomsafe.cli.paste.systemd import systemd

#: The text of each kind of file.
FILES: dict[str, Callable[[Deployment], str]] = {
    "gunicorn": gunicorn,
    "uvicorn": uvicorn,
    "celery": celery,
    "systemd": systemd,
    "kubernetes": kubernetes,
    "docker": docker,
    "compose": compose,
    "ecs": ecs,
}
