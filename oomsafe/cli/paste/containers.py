"""Files for what runs containers: Kubernetes, docker, compose, ECS. Text in YAML is quoted as JSON, which YAML contains (YAML 1.2, 1.2)."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

from oomsafe.cli.paste.deployment import Deployment, mib

#: To be replaced by the user's own.
IMAGE = "registry.example.com/{label}:1"

#: Seconds until a container that was asked to stop is killed: a little more than oomsafe's grace_period.
STOPS = 40

_KUBERNETES = """\
# {about}
# Since 1.28, Kubernetes has the kernel kill all of a container at once (memory.oom.group, cgroup v2). A node where one killed worker shall
# stay one killed worker needs this in its kubelet's configuration (1.32 and later):  singleProcessOOMKill: true
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {label}
spec:
  replicas: 1
  selector:
    matchLabels:
      app: {label}
  template:
    metadata:
      labels:
        app: {label}
    spec:
      terminationGracePeriodSeconds: {stops}
      containers:
        - name: {label}
          image: {image}
          command: {command}
          env:
{env}
{ports}          resources:
            # as much as the limit: a node that runs out of memory evicts first who uses more than he has requested
            requests:
              memory: {memory}
{cpu}            limits:
              memory: {memory}
          # oomsafe writes here what the pool died of, and kubectl describe pod shows it
          terminationMessagePath: "/dev/termination-log"
          terminationMessagePolicy: "FallbackToLogsOnError"
"""

_COMPOSE = """\
# {about}
services:
  {label}:
    image: {image}
    command: {command}
    environment:
{env}
    mem_limit: {memory}
    # no swap beyond it
    memswap_limit: {memory}
{cpus}{ports}    stop_grace_period: {stops}
    restart: "unless-stopped"
"""

_DOCKER = """\
#!/bin/sh
# {about}
# sh THIS_FILE IMAGE
image=${{1:?which image? sh THIS_FILE IMAGE}}
exec docker run --rm {flags} "$image" {command}
"""


def kubernetes(pool: Deployment) -> str:
    """A Deployment of apps/v1."""
    memory = _quoted(f"{mib(pool.memory)}Mi")
    return _KUBERNETES.format(
        about=pool.about,
        label=_quoted(pool.label),
        image=_image(pool),
        command=json.dumps(_command(pool)),
        env="\n".join(
            f"            - name: {_quoted(name)}\n              value: {_quoted(value)}" for name, value in pool.environ.items()
        ),
        ports=f"          ports:\n            - containerPort: {pool.port}\n" if pool.port else "",
        memory=memory,
        cpu="" if pool.cpus is None else f"              cpu: {_quoted(f'{math.ceil(pool.cpus * 1000)}m')}\n",
        stops=STOPS,
    )


def compose(pool: Deployment) -> str:
    """A file for docker compose, with one service."""
    return _COMPOSE.format(
        about=pool.about,
        label=_quoted(pool.label),
        image=_image(pool),
        command=json.dumps(_command(pool)).replace("$", "$$"),  # compose replaces variables
        env="\n".join(f"      {name}: {_quoted(value)}" for name, value in pool.environ.items()),
        memory=_quoted(f"{mib(pool.memory)}m"),
        cpus="" if pool.cpus is None else f"    cpus: {pool.cpus:g}\n",
        ports=f'    ports:\n      - "{pool.port}:{pool.port}"\n' if pool.port else "",
        stops=_quoted(f"{STOPS}s"),
    )


def docker(pool: Deployment) -> str:
    """A script around docker run."""
    memory = f"{mib(pool.memory)}m"
    flags = ["--memory", memory, "--memory-swap", memory, "--stop-timeout", str(STOPS)]
    flags += [] if pool.cpus is None else ["--cpus", f"{pool.cpus:g}"]
    flags += [word for name, value in pool.environ.items() for word in ("--env", f"{name}={value}")]
    flags += ["--publish", f"{pool.port}:{pool.port}"] if pool.port else []
    return _DOCKER.format(about=pool.about, flags=shlex.join(flags), command=shlex.join(_command(pool)))


def ecs(pool: Deployment) -> str:
    """A task definition for aws ecs register-task-definition --cli-input-json."""
    container: dict[str, Any] = {
        "name": pool.label,
        "image": IMAGE.format(label=pool.label),
        "essential": True,
        "command": _command(pool),
        "environment": [{"name": name, "value": value} for name, value in pool.environ.items()],
        "memory": mib(pool.memory),
        "stopTimeout": STOPS,
    }
    if pool.cpus is not None:
        container["cpu"] = math.ceil(pool.cpus * 1024)
    if pool.port:
        container["portMappings"] = [{"containerPort": pool.port, "protocol": "tcp"}]
    return json.dumps({"family": pool.label, "requiresCompatibilities": ["EC2"], "containerDefinitions": [container]}, indent=2) + "\n"


def _command(pool: Deployment) -> list[str]:
    # the limits are in the environment, where they are changed without a new image
    return ["oomsafe", "run", "--", *pool.command(listen=True)]


def _image(pool: Deployment) -> str:
    return _quoted(IMAGE.format(label=pool.label))


def _quoted(text: str) -> str:
    return json.dumps(text)
