"""The rows of `make test-apps`, and of the table in docs/run.md. One more is one more entry here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum


class Fate(Enum):
    """What becomes of an app's workers under ``oomsafe run``: the lines of the log that say so, and those that are not to be there."""

    GUARDED = "recycled"
    STAYS = "one process: measured, and warns"
    MEASURED = "measured; its server recycles"
    ALONE = "left alone"


@dataclass(frozen=True, kw_only=True)
class App:
    """One app with one of its ways to be started."""

    needs: tuple[str, ...]
    """What pip installs. Rows with the same share an environment."""
    command: str
    """As a user writes it. {oomsafe} is `oomsafe run` with its options, {port} where it is to listen."""
    url: str = "/"
    """Its answer must be the same each time; empty: it serves none."""
    fate: Fate = Fate.GUARDED
    says: str = "oomsafe guards 2 workers"
    """A line at boot."""
    leaks: bool = True
    """Whether its workers need our help to leak: its code is not ours."""
    before: tuple[str, ...] = ()
    """Commands that make its database; once for all rows that have the same."""
    env: dict[str, str] = field(default_factory=dict)
    """{folder} is where it runs."""
    servers: tuple[str, ...] = ()
    """Whose versions are shown beside that of the first of `needs`."""
    why: str = ""
    """What of the command or the environment is there for the test alone."""


SINGLE = "oomsafe guards this process: "
MLFLOW = ("mlflow",)
AIRFLOW = ("apache-airflow", "gunicorn")
AIRFLOW_ENV = {"AIRFLOW_HOME": "{folder}", "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}
# flask-caching 2.5 gives a cache of Superset 6.1 an argument that it does not know; rich is missing among its needs
SUPERSET = ("apache-superset", "flask-caching<2.5", "rich", "gunicorn")
SUPERSET_ENV = {"SUPERSET_CONFIG_PATH": "{folder}/superset_config.py", "FLASK_APP": "superset.app:create_app()"}
LITELLM = ("litellm[proxy]", "hypercorn")
# it starts without a key only if told to, and fetches its table of prices from the network
LITELLM_ENV = {"LITELLM_MASTER_KEY": f"sk-{hashlib.sha256(b'oomsafe').hexdigest()}", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
OWN = ("fastapi[standard]", "flask", "django", "celery", "flower", "gunicorn", "uvicorn", "uvicorn-worker", "hypercorn", "granian")
WRAPPED = ("flask", "gunicorn", "ddtrace", "opentelemetry-distro", "opentelemetry-instrumentation-flask")
GUNICORN = 'gunicorn --workers 2 --bind 127.0.0.1:{port} "own:flask()"'
# no agent or collector listens here
DDTRACE_ENV = {"DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false"}
OTEL_ENV = {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}

APPS = {
    "mlflow": App(
        needs=MLFLOW,
        command="{oomsafe} mlflow server --workers 2 --port {port}",
        url="/version",
        servers=("uvicorn",),
        env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        why="without its job runners, a dozen processes that serve nothing",
    ),
    "mlflow-gunicorn": App(
        needs=MLFLOW,
        command='{oomsafe} mlflow server --gunicorn-opts "--timeout 120" --workers 2 --port {port}',
        url="/version",
        servers=("gunicorn",),
        env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    ),
    "airflow": App(
        needs=AIRFLOW,
        command="{oomsafe} airflow api-server --workers 2 --host 127.0.0.1 --port {port}",
        url="/api/v2/version",
        before=("airflow db migrate",),
        env=AIRFLOW_ENV,
        servers=("uvicorn",),
    ),
    "airflow-gunicorn": App(
        needs=AIRFLOW,
        command="{oomsafe} airflow api-server --workers 2 --host 127.0.0.1 --port {port}",
        url="/api/v2/version",
        before=("airflow db migrate",),
        env={**AIRFLOW_ENV, "AIRFLOW__API__SERVER_TYPE": "gunicorn"},
        servers=("gunicorn",),
    ),
    "superset": App(
        needs=SUPERSET,
        command='{oomsafe} gunicorn --workers 2 --timeout 120 --bind 127.0.0.1:{port} "superset.app:create_app()"',
        url="/health",
        before=("superset db upgrade", "superset init"),
        env=SUPERSET_ENV,
        servers=("gunicorn",),
    ),
    "superset-run": App(
        needs=SUPERSET,
        command="{oomsafe} superset run --port {port}",
        url="/health",
        fate=Fate.ALONE,
        says="oomsafe run: Werkzeug's server: a development server; it is left alone",
        before=("superset db upgrade", "superset init"),
        env=SUPERSET_ENV,
        servers=("werkzeug",),
    ),
    "litellm": App(
        needs=LITELLM,
        command="{oomsafe} litellm --num_workers 2 --host 127.0.0.1 --port {port} --timeout_worker_healthcheck 60",
        url="/health/liveliness",
        env=LITELLM_ENV,
        servers=("uvicorn",),
        why="uvicorn kills a worker that has not answered within 5 s, also at boot, and here that takes longer",
    ),
    "litellm-one": App(
        needs=LITELLM,
        command="{oomsafe} litellm --host 127.0.0.1 --port {port}",
        url="/health/liveliness",
        env=LITELLM_ENV,
        fate=Fate.STAYS,
        says=SINGLE,
        servers=("uvicorn",),
    ),
    "litellm-gunicorn": App(
        needs=LITELLM,
        command="{oomsafe} litellm --run_gunicorn --num_workers 2 --host 127.0.0.1 --port {port}",
        url="/health/liveliness",
        env=LITELLM_ENV,
        servers=("gunicorn",),
    ),
    "litellm-hypercorn": App(
        needs=LITELLM,
        command="{oomsafe} litellm --run_hypercorn --host 127.0.0.1 --port {port}",
        url="/health/liveliness",
        env=LITELLM_ENV,
        fate=Fate.MEASURED,
        says="oomsafe run: hypercorn: ",
        servers=("hypercorn",),
    ),
    "litellm-granian": App(
        needs=LITELLM,
        command="{oomsafe} litellm --run_granian --num_workers 2 --host 127.0.0.1 --port {port}",
        url="/health/liveliness",
        env=LITELLM_ENV,
        fate=Fate.MEASURED,
        says="oomsafe run: granian: ",
        servers=("granian",),
    ),
    "datasette": App(
        needs=("datasette",),
        command="{oomsafe} datasette serve --memory --port {port}",
        url="/-/versions.json",
        fate=Fate.STAYS,
        says=SINGLE,
        servers=("uvicorn",),
    ),
    "django-runserver": App(
        needs=OWN,
        command="{oomsafe} python manage.py runserver 127.0.0.1:{port}",
        fate=Fate.ALONE,
        says="oomsafe run: Django's runserver: a development server; it is left alone",
        leaks=False,
        env={"DEBUG": "1"},
        servers=("django",),
    ),
    "django": App(
        needs=OWN,
        command="{oomsafe} gunicorn --workers 2 --bind 127.0.0.1:{port} manage:wsgi",
        leaks=False,
        servers=("django", "gunicorn"),
    ),
    "django-asgi": App(
        needs=OWN,
        command="{oomsafe} uvicorn --workers 2 --port {port} manage:asgi",
        leaks=False,
        servers=("django", "uvicorn"),
    ),
    "fastapi": App(
        needs=OWN,
        command="{oomsafe} fastapi run --workers 2 --host 127.0.0.1 --port {port}",
        leaks=False,
        servers=("fastapi", "uvicorn"),
    ),
    "uvicorn-worker": App(
        needs=OWN,
        command="{oomsafe} gunicorn --workers 2 -k uvicorn_worker.UvicornWorker --bind 127.0.0.1:{port} main:app",
        leaks=False,
        servers=("gunicorn", "uvicorn-worker"),
    ),
    "celery": App(
        needs=OWN,
        command="{oomsafe} celery -A tasks worker --loglevel INFO --concurrency 2",
        url="",
        leaks=False,
        says="oomsafe guards 2 ",
        servers=("celery",),
    ),
    "flower": App(
        needs=OWN,
        command="{oomsafe} celery -A tasks flower --address=127.0.0.1 --port={port}",
        url="/healthcheck",
        fate=Fate.ALONE,
        says="",
        servers=("flower", "tornado"),
    ),
    "hypercorn": App(
        needs=OWN,
        command="{oomsafe} hypercorn --workers 2 --bind 127.0.0.1:{port} own:asgi",
        fate=Fate.MEASURED,
        says="oomsafe run: hypercorn: ",
        leaks=False,
        servers=("hypercorn",),
    ),
    "granian": App(
        needs=OWN,
        command="{oomsafe} granian --interface asgi --workers 2 --port {port} own:asgi",
        fate=Fate.MEASURED,
        says="oomsafe run: granian: ",
        leaks=False,
        servers=("granian",),
    ),
    "granian-wsgi": App(
        needs=OWN,
        command="{oomsafe} granian --interface wsgi --workers 2 --port {port} own:wsgi",
        fate=Fate.MEASURED,
        says="oomsafe run: granian: ",
        leaks=False,
        servers=("granian",),
    ),
    "ddtrace-inside": App(
        needs=WRAPPED, command="{oomsafe} ddtrace-run " + GUNICORN, leaks=False, env=DDTRACE_ENV, servers=("ddtrace", "gunicorn")
    ),
    "ddtrace-outside": App(
        needs=WRAPPED, command="ddtrace-run {oomsafe} " + GUNICORN, leaks=False, env=DDTRACE_ENV, servers=("ddtrace", "gunicorn")
    ),
    "otel-inside": App(
        needs=WRAPPED,
        command="{oomsafe} opentelemetry-instrument " + GUNICORN,
        leaks=False,
        env=OTEL_ENV,
        servers=("opentelemetry-distro", "gunicorn"),
    ),
    "otel-outside": App(
        needs=WRAPPED,
        command="opentelemetry-instrument {oomsafe} " + GUNICORN,
        leaks=False,
        env=OTEL_ENV,
        servers=("opentelemetry-distro", "gunicorn"),
    ),
}
