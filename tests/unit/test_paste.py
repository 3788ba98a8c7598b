"""The files that oomsafe advise writes: whatever a pool calls itself, they hold what they are to hold and nothing else."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from oomsafe.cli.paste import FILES
from oomsafe.cli.paste.deployment import APP, Deployment
from oomsafe.policy.units import GIB, MIB

SHOP = Deployment(
    server="gunicorn", app="shop.app:app", name="shop", workers=5, soft=320 * MIB, hard=527 * MIB, memory=2 * GIB, cpus=1.5,
    folder="/srv/bin",
)  # fmt: skip

HOSTILE = "x\"\n  privileged: true\n#\\'$(touch /tmp/owned)`id`%h${HOME};\x1b[2J\u2028é"

names = st.text(max_size=80) | st.just(HOSTILE)


def deployments() -> st.SearchStrategy[Deployment]:
    """Of any server, for a pool with any name and any worker class."""
    return st.builds(
        Deployment,
        server=st.sampled_from(["gunicorn", "uvicorn", "celery"]),
        app=st.sampled_from(["shop.app:app", "shop:create_app()", "proj"]),
        name=names,
        worker_class=names | st.just("gthread"),
        workers=st.integers(1, 100_000),
        soft=st.integers(MIB, GIB),
        hard=st.none() | st.integers(GIB, 2 * GIB),
        min_lifetime=st.none() | st.integers(1, 9).map(float),
        metric=st.sampled_from(["anon", "private"]),
        preload=st.booleans(),
        memory=st.integers(2 * GIB, 1 << 50),
        cpus=st.none() | st.floats(0.01, 512),
        directory=st.just("/srv/a b/%i"),
        folder=st.sampled_from(["", "/srv/bin", "/srv/a b/100%"]),
    )


def run_words(pool: Deployment) -> list[str]:
    """What every file has of the server's command, in this order."""
    return pool.command(listen=True)


@given(deployments())
@example(Deployment(**{**vars(SHOP), "name": HOSTILE, "worker_class": HOSTILE}))
def test_gunicorns_file_sets_what_is_known_and_calls_install(pool: Deployment) -> None:
    """Nothing else is in it."""
    tree = ast.parse(FILES["gunicorn"](pool))

    *settings, imported, call = tree.body
    assert {target.id for line in settings for target in line.targets} <= {"workers", "worker_class", "preload_app"}  # type: ignore[attr-defined]
    assert all(isinstance(line.value, ast.Constant) for line in settings)  # type: ignore[attr-defined]
    assert ast.unparse(imported) == "import oomsafe.gunicorn"
    assert ast.unparse(call).startswith(f"oomsafe.gunicorn.install(globals(), soft_limit='{pool.soft // MIB}MiB'")


@given(deployments(), st.sampled_from(["uvicorn", "celery", "docker"]))
@example(Deployment(**{**vars(SHOP), "name": HOSTILE}), "docker")
def test_a_script_is_one_command(pool: Deployment, kind: str) -> None:
    """Below its comments, and for docker the line about the image."""
    text = FILES[kind](pool)
    lines = [line for line in text.splitlines() if not line.startswith("#")]

    assert len(lines) == (2 if kind == "docker" else 1)
    words = shlex.split(lines[-1])
    assert words[:2] == ["exec", "docker" if kind == "docker" else "oomsafe"]
    assert all(re.fullmatch(r"[A-Za-z0-9_./:=@$()-]+", word) for word in words)
    if kind == "docker":
        assert words[words.index("$image") + 1 :] == ["oomsafe", "run", "--", *run_words(pool)]
    else:
        assert words[-1] == "$@"
    subprocess.run(["sh", "-n"], input=text, text=True, check=True)


@given(deployments())
@example(Deployment(**{**vars(SHOP), "name": HOSTILE, "worker_class": HOSTILE}))
def test_kubernetes_gets_the_fields_that_were_meant(pool: Deployment) -> None:
    """With the values that were meant, as YAML reads them."""
    found = yaml.safe_load(FILES["kubernetes"](pool))

    (container,) = found["spec"]["template"]["spec"].pop("containers")
    label = found["metadata"]["name"]
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", label)
    assert set(container) - {"ports"} == {
        "name", "image", "command", "env", "resources", "terminationMessagePath", "terminationMessagePolicy",
    }  # fmt: skip
    assert container["command"] == ["oomsafe", "run", "--", *run_words(pool)]
    assert {each["name"]: each["value"] for each in container["env"]} == pool.environ
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"] == f"{pool.memory // MIB}Mi"
    assert found == {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": label},
        "spec": {
            "replicas": 1, "selector": {"matchLabels": {"app": label}},
            "template": {"metadata": {"labels": {"app": label}}, "spec": {"terminationGracePeriodSeconds": 40}},
        },
    }  # fmt: skip


@given(deployments())
@example(Deployment(**{**vars(SHOP), "name": HOSTILE}))
def test_compose_gets_one_service(pool: Deployment) -> None:
    """Of the fields that were meant."""
    found = yaml.safe_load(FILES["compose"](pool))

    ((label, service),) = found.pop("services").items()
    assert not found
    assert re.fullmatch(r"[a-z0-9-]+", label)
    assert set(service) - {"ports", "cpus"} == {
        "image", "command", "environment", "mem_limit", "memswap_limit", "stop_grace_period", "restart",
    }  # fmt: skip
    assert service["environment"] == pool.environ
    assert service["command"] == ["oomsafe", "run", "--", *run_words(pool)]


#: What ECS documents for a container definition, as far as it is used, with each field's type.
ECS: dict[str, Any] = {
    "name": str, "image": str, "essential": bool, "command": list, "environment": list, "memory": int, "stopTimeout": int, "cpu": int,
    "portMappings": list,
}  # fmt: skip


@given(deployments())
@example(Deployment(**{**vars(SHOP), "name": HOSTILE}))
def test_ecs_gets_a_task_definition(pool: Deployment) -> None:
    """Each field has its documented type; a family's name may have letters, digits, - and _ only."""
    found = json.loads(FILES["ecs"](pool))

    (container,) = found.pop("containerDefinitions")
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,255}", found["family"])
    assert found == {"family": container["name"], "requiresCompatibilities": ["EC2"]}
    assert all(type(value) is ECS[name] for name, value in container.items())
    assert container["memory"] == pool.memory // MIB
    try:
        import botocore.session
        import botocore.validate
    except ImportError:
        return
    model = botocore.session.get_session().get_service_model("ecs").operation_model("RegisterTaskDefinition")
    report = botocore.validate.ParamValidator().validate({**found, "containerDefinitions": [container]}, model.input_shape)
    assert not report.has_errors(), report.generate_report()


@given(deployments())
@example(Deployment(**{**vars(SHOP), "name": HOSTILE, "worker_class": HOSTILE}))
def test_a_unit_has_the_lines_that_were_meant(pool: Deployment) -> None:
    """One of each; no specifier, variable or continuation comes from outside."""
    text = FILES["systemd"](pool)
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "["))]
    values = dict(line.split("=", 1) for line in lines)

    assert [line.split("=")[0] for line in lines] == [
        "Description", "After", "WorkingDirectory", "ExecStart", "Restart", "KillMode", "TimeoutStopSec", "MemoryMax", "MemoryHigh",
        "OOMPolicy", "OOMScoreAdjust", "StateDirectory", "StateDirectoryMode", "WantedBy",
    ]  # fmt: skip
    assert not any("%" in line.replace("%%", "") or line.endswith("\\") for line in lines)
    assert values["MemoryMax"] == f"{pool.memory // MIB}M"
    assert re.fullmatch(r"[A-Za-z0-9._:@ -]*, guarded by oomsafe", values["Description"])
    assert "$" not in values["ExecStart"]


@pytest.mark.parametrize("app", ["app:app", "shop.app:app", "proj", "shop:create_app()", "a.b.c:d.e"])
def test_apps(app: str) -> None:
    """As servers take them."""
    assert APP.fullmatch(app)


@pytest.mark.parametrize("app", ["", "-c evil", "a b:c", "a:b;id", 'a":b', "a:b\n", "$(id)", "a:create(1)", "../a:b", "é:b"])
def test_what_is_no_app(app: str) -> None:
    """It would be an option, or more than one word, or mean something to a shell."""
    assert not APP.fullmatch(app)
