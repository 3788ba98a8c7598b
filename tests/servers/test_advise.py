"""`oomsafe advise` as a real process: of live pools, and each file that it writes as the tool reads it that it is for."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from needs import need
from serving import Gunicorn, until
from uvicorning import Uvicorn
from versions import provided

from oomsafe.demo.server_process import environment

OOMSAFE = [sys.executable, "-m", "oomsafe.cli", "advise"]
MIB = 1 << 20

GIVEN = ["--memory", "1GiB", "--worker", "60MiB", "--supervisor", "30MiB", "--balloon", "50MiB", "--cpus", "1.5"]

#: A name in which there is something for every kind of file.
HOSTILE = "shop\" privileged: true #\\'$(id)`id`%h${HOME};é"


def run(*argv: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environ = {**environment(), "COLUMNS": "80", **(env or {})}
    return subprocess.run([*OOMSAFE, *argv], capture_output=True, text=True, timeout=60, env=environ, cwd=cwd, check=False)


def advice(*argv: str) -> dict[str, Any]:
    """The only one there is."""
    ended = run(*argv, "--json")
    assert ended.returncode == 0, ended.stderr
    (found,) = json.loads(ended.stdout)["advice"]
    return found


def file(kind: str, *argv: str) -> str:
    ended = run(*argv, "--file", kind)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def leaks(server: Any, kib: int, times: int) -> None:
    """So many requests that leak, and their worker's figures are published."""
    for _ in range(times):
        assert server.get(f"/leak?kib={kib}")[0] == 200
    until(lambda: sum(worker.counters.work for worker in server.pool().workers) >= times, "they are published")


@pytest.mark.parametrize("kind", ["sync", "uvicorn"])
def test_of_a_live_pool(serve: Callable[..., Gunicorn], serve_uvicorn: Callable[..., Uvicorn], kind: str) -> None:
    """What was measured: fresh size, supervisor, growth, the largest growth, rate; and what if the memory were another."""
    policy: dict[str, Any] = {"soft_limit": "1GiB"}
    server: Any = serve("sync", **policy) if kind == "sync" else serve_uvicorn(app="apps:asgi", **policy)
    server.serving()
    leaks(server, 512, 120)
    until(lambda: time.time() - server.pool().created > 1.0, "it is old enough to have a rate")

    found = advice("--pool", str(server.pid), "--memory", "2GiB", "--cpus", "2")

    facts, advised = found["facts"], found["advice"]
    baselines = [worker.figures.baseline or 0 for worker in server.pool().workers]
    assert found["pool"]["supervisor"] == server.pid
    assert min(baselines) <= facts["fresh"] <= max(baselines)
    assert 5 * MIB < facts["supervisor"] < 100 * MIB
    assert facts["growth"] == pytest.approx(512 * 1024, rel=0.25)
    assert 512 * 1024 <= facts["balloon"] <= 64 * MIB
    assert 0 < facts["rate"] < 1000
    assert (facts["limit"], facts["others"], facts["workers"]) == (2 << 30, 0, 2)
    assert facts["shared"] < 32 * MIB
    assert advised["workers"] == (5 if kind == "sync" else 2)
    assert advised["recycles"] > 0
    still = advice("--pool", str(server.pid), "--over", "0.5s")
    assert (still["facts"]["growth"], still["facts"]["rate"]) == (None, 0)
    text = run("--pool", str(server.pid)).stdout
    assert f"supervisor {server.pid}" in text
    assert max(map(len, text.splitlines())) <= 80 or "/sys/fs/cgroup" in text
    assert "\x1b" not in text


def test_of_what_is_preloaded(serve: Callable[..., Gunicorn]) -> None:
    """What the workers share is measured, counts once, and the pool that follows accepts the limits: a line at its boot has them."""
    more: dict[str, Any] = {"settings": "preload_app = True", "app": "preloaded:wsgi", "env": {"PRELOAD_MIB": "100"}}
    server = serve("sync", **more, soft_limit="1GiB").serving()

    found = advice("--pool", str(server.pid), "--memory", "2GiB", "--cpus", "1")
    text = file("gunicorn", "--pool", str(server.pid), "--memory", "2GiB", "--cpus", "1", "--balloon", "20MiB")

    facts, advised = found["facts"], found["advice"]
    assert 90 * MIB < facts["shared"] < 200 * MIB
    assert facts["fresh"] > facts["shared"]
    assert facts["supervisor"] > facts["shared"]
    assert (advised["workers"], advised["metric"]) == (3, "private")
    assert advised["saved"] == 2 * facts["shared"]
    assert "preload_app = True" in text
    again = serve(text=f"control_socket_disable = True\nbind = '127.0.0.1:0'\n{text}", app="preloaded:wsgi", env={"PRELOAD_MIB": "100"})
    again.serving(3)
    assert advised["soft"] // MIB == int(re.findall(r'soft_limit="(\d+)MiB"', text)[0])
    assert again.lines(f"soft limit {advised['soft'] / MIB:.0f} MiB each of private, hard limit ")
    assert not again.lines("is not used")


def test_pools_that_can_not_be_advised(serve: Callable[..., Gunicorn]) -> None:
    """None has served yet: it says so, and takes a given size in place of the measured one. It is dead: one line."""
    settings = "import pathlib; pathlib.Path('slow.py').write_text('import time; time.sleep(60)')"
    server = serve("sync", app="slow:wsgi", settings=settings, soft_limit="1GiB")
    path = server.pool_path()

    young = run("--scoreboard", path)
    given = run("--scoreboard", path, "--worker", "60MiB", "--memory", "1GiB")
    unknown = run("--pool", "no-such-pool")
    os.kill(server.pid, signal.SIGKILL)
    server.ended()
    dead = run("--scoreboard", path)

    assert (young.returncode, young.stdout) == (2, "")
    assert " has no figures yet: no worker has served; try again in some seconds, or give --worker 180MiB" in young.stderr
    assert given.returncode == 0
    assert "now 2" in " ".join(given.stdout.split())
    assert (unknown.returncode, unknown.stdout) == (2, "")
    # other pools may end while they are read, which has a line too
    assert unknown.stderr.splitlines()[-1].startswith("oomsafe advise: --pool='no-such-pool' is none of the pools here: ")
    assert (dead.returncode, dead.stdout) == (2, "")
    assert [ended.stderr.count("\n") for ended in (young, dead)] == [1, 1]


def test_a_name_that_would_be_more_than_a_name(serve: Callable[..., Gunicorn], tmp_path: Path) -> None:
    """A pool may call itself what it likes: it is one harmless word in each file, and no command for a terminal."""
    server = serve("sync", soft_limit="1GiB", name=HOSTILE).serving()
    pool = ["--pool", str(server.pid), "--memory", "1GiB", "--app", "shop:app"]

    shown = run(*pool)
    texts = {kind: file(kind, *pool) for kind in ("kubernetes", "systemd", "compose", "docker", "ecs", "gunicorn")}

    assert shown.returncode == 0
    assert "\x1b" not in shown.stdout
    for kind, text in texts.items():
        assert not re.search(r'\\"|\$\(|`|\$\{H', text.replace("${1:", "")), kind
    validated_by_kubernetes(tmp_path, texts["kubernetes"])
    verified_by_systemd(tmp_path, texts["systemd"])


def test_a_reader_that_has_seen_enough() -> None:
    """Is no failure, and no traceback."""
    for argv in ([], ["--json"], ["--file", "systemd"]):
        process = subprocess.Popen([*OOMSAFE, *GIVEN, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read().decode() in (
            "",
            "oomsafe advise: app:app stands for your own app there: give it, as in --app app:app\n",
        )
        assert process.wait(20) == 0
        process.stderr.close()


def verified_by_systemd(folder: Path, text: str) -> None:
    need(shutil.which("systemd-analyze") is not None, "systemd-analyze is not installed")
    unit = folder / "shop.service"
    unit.write_text(text)
    ended = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60, check=False)
    # what it can't read it passes over, with a warning
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


def test_a_unit_as_systemd_reads_it(tmp_path: Path) -> None:
    """Without a warning; it has the programs of this very environment. With a mistake in it, there is one."""
    text = file("systemd", *GIVEN, "--app", "shop.app:app")

    assert f"ExecStart={Path(sys.executable).parent}/oomsafe run --soft-limit " in text
    assert f" -- {Path(sys.executable).parent}/gunicorn shop.app:app " in text
    verified_by_systemd(tmp_path, text)
    with pytest.raises(AssertionError):
        verified_by_systemd(tmp_path, text.replace("OOMPolicy=continue", "OOMPolicy=nonsense"))


def validated_by_kubernetes(folder: Path, text: str) -> None:
    need(find_spec("kubernetes_validate") is not None, "kubernetes-validate is not installed")
    manifest = folder / "manifest.yaml"
    manifest.write_text(text)
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", str(manifest)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("server", ["gunicorn", "celery"])
def test_a_manifest_as_kubernetes_reads_it(tmp_path: Path, server: str) -> None:
    """By its own schemas, and no unknown field; a field more is found."""
    text = file("kubernetes", *GIVEN, "--app", "shop:app", "--server", server)

    validated_by_kubernetes(tmp_path, text)
    assert ("containerPort" in text) == (server == "gunicorn")
    with pytest.raises(AssertionError):
        validated_by_kubernetes(tmp_path, text.replace("terminationMessagePath:", "terminationMessageFile:"))


@pytest.mark.parametrize("server", ["gunicorn", "celery"])
def test_a_compose_file_by_its_schema(tmp_path: Path, server: str) -> None:
    """The one that the Compose specification publishes; a field more is found."""
    need(find_spec("check_jsonschema") is not None, "check-jsonschema is not installed")
    # newer ones want a newer click than the lowest that oomsafe does with
    works = subprocess.run([sys.executable, "-m", "check_jsonschema", "--version"], capture_output=True, check=False).returncode == 0
    provided(works, "check-jsonschema does not run with this click")
    path = tmp_path / "compose.yaml"

    def check(text: str) -> int:
        path.write_text(text)
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).returncode

    text = file("compose", *GIVEN, "--app", "shop:app", "--server", server)
    assert check(text) == 0
    assert check(text.replace("mem_limit:", "memory_limit:")) != 0


def test_a_script_as_docker_reads_it(tmp_path: Path) -> None:
    """It knows each option, and only then finds that there is no daemon here; and it takes an image, or says that it wants one."""
    if shutil.which("docker") is None:
        pytest.skip("docker is not installed: its options are only parsed by tests/unit/test_paste.py")
    script = tmp_path / "run.sh"

    def start(text: str, *argv: str) -> str:
        script.write_text(text)
        environ = {**environment(), "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
        return subprocess.run(["sh", script, *argv], capture_output=True, text=True, timeout=60, env=environ, check=False).stderr

    text = file("docker", *GIVEN, "--app", "shop:app")
    assert "Cannot connect to the Docker daemon" in start(text, "shop:1")
    assert "which image? sh THIS_FILE IMAGE" in start(text)
    assert "unknown flag: --memory-swop" in start(text.replace("--memory-swap", "--memory-swop"), "shop:1")


def test_a_configuration_as_gunicorn_reads_it(tmp_path: Path) -> None:
    """With --check-config, and a real app; a mistake in it is found."""
    conf = tmp_path / "gunicorn.conf.py"

    def check(text: str) -> int:
        conf.write_text(text)
        command = [sys.executable, "-m", "gunicorn", "--check-config", "-c", str(conf), "oomsafe.demo.app:app"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment(), cwd=tmp_path, check=False).returncode

    text = file("gunicorn", *GIVEN, "--app", "oomsafe.demo.app:app")
    assert check(text) == 0
    assert check(text.replace("soft_limit", "soft_limits")) != 0


def on_path() -> dict[str, str]:
    """With the programs of this environment first."""
    return {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def test_a_script_that_starts_uvicorn(serve_uvicorn: Callable[..., Uvicorn], tmp_path: Path) -> None:
    """With the limits that were advised, and more options of its own."""
    script = tmp_path / "uvicorn.sh"
    script.write_text(file("uvicorn", *GIVEN, "--app", "apps:asgi"))

    server = serve_uvicorn("--port", "0", "--no-access-log", app="", start=[], python=["sh", str(script)], env=on_path()).serving()

    # (921 - 30 - 60) / 2
    assert server.lines("oomsafe guards 2 workers (apps:asgi): soft limit 415 MiB each, hard limit ")
    assert server.get("/pid")[0] == 200


def test_a_script_that_starts_celery(celery: Any, tmp_path: Path) -> None:
    """With the limits that were advised, and more options of its own."""
    script = tmp_path / "celery.sh"
    script.write_text(file("celery", *GIVEN, "--app", "proj"))

    def through_script(command: list[str]) -> list[str]:
        return ["sh", str(script), *command[command.index("worker") + 1 :]]

    node = celery(install=False, env=on_path(), wrap=through_script).ready()

    assert node.lines("oomsafe guards 2 workers (celery@")
    assert node.lines(": soft limit 415 MiB each, hard limit ")
