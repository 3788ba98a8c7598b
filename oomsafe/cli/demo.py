"""``oomsafe demo``: a leaking or a ballooning app under load, live, with oomsafe or without."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from oomsafe.cli import balloon as ballooning
from oomsafe.cli import diagnosis as diagnosing
from oomsafe.cli.bars import memory_bar
from oomsafe.demo.app import LEAK, TASK_LEAK
from oomsafe.demo.load import BalloonLoad, Load
from oomsafe.demo.server import ASGI_CLASSES, DemoServer
from oomsafe.policy.text import printable
from oomsafe.policy.units import MIB, format_size

CLASSES = ["sync", "gthread", "gevent", *ASGI_CLASSES]
WORKERS = 2
SOFT_LIMIT = 200 * MIB
#: The limit of the server's cgroup: room for two workers at their limit, and for little more.
LIMIT = 512 * MIB
#: The limit for Celery: a poison task that has taken the rest of it must be the biggest process by far.
TASK_LIMIT = 768 * MIB


@click.command()
@click.option("--seconds", type=click.FloatRange(2, 600), help="How long the load runs.  [default: 20, at most 90 for a diagnosis]")
@click.option("--server", default="gunicorn", show_default=True, type=click.Choice(["gunicorn", "uvicorn", "celery"]))
@click.option("--worker-class", type=click.Choice(CLASSES), help="gunicorn's worker class.  [default: sync, with --balloon asgi]")
@click.option("--balloon", is_flag=True, help="One request that asks for 2 GiB each 1.5 s, beside good ones, in place of the leak.")
@click.option("--leak", is_flag=True, help="A leak, until it is known that it is one, and which line it is.")
@click.option("--fragment", is_flag=True, help="An app that does not leak, but whose memory stays, until it is known why.")
@click.option("--without", is_flag=True, help="Run without oomsafe, to see what the kernel does.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def demo(
    seconds: float | None, server: str, worker_class: str | None, balloon: bool, leak: bool, fragment: bool, without: bool, as_json: bool
) -> None:
    """Run a server with an app that leaks 256 KiB a request (Celery: 1 MiB a task, beside tasks that
    balloon and, in a memory cgroup, poison ones that the kernel kills), under real load.

    With oomsafe, its workers are recycled before anything is killed. Exits with 0 if that
    happened, no request failed, and the supervisor survived. With --balloon: if each request that
    asks for 2 GiB got 503, nothing was killed, no other request failed, and the supervisor survived.
    With --leak or --fragment: if it was found out whether the app leaks (and which line), and nobody noticed.
    """
    diagnosis = leak or fragment
    if balloon + leak + fragment + (without and diagnosis) > 1:
        raise click.UsageError(
            "--balloon, --leak and --fragment show different things: give one of them, and --without only with the first"
        )
    if diagnosis and server == "celery":
        raise click.UsageError("--leak and --fragment only work with gunicorn and uvicorn")
    if balloon and server == "celery":
        raise click.UsageError("--balloon only works with gunicorn and uvicorn: Celery's demo has tasks that balloon anyway")
    if server != "gunicorn" and worker_class:
        raise click.UsageError(f"--worker-class only works with gunicorn: leave it out with --server {server}")
    worker_class = worker_class or _default_class(server, balloon)
    _needs(server, worker_class)
    seconds = seconds or (diagnosing.SECONDS if diagnosis else 20.0)
    console = Console(stderr=as_json)
    try:
        with _server(server, worker_class, balloon, without, leak, fragment) as running:
            load: Any = diagnosing.load(running, fragment) if diagnosis else _load(running, balloon)
            _run(running, load, seconds, console, quiet=as_json, is_over=diagnosing.is_over if diagnosis else never)
            result = {"server": server, "worker_class": worker_class, **_result(running, load, seconds, without)}
            if server == "celery":
                result |= {"ballooned": load.ballooned, "poison": load.poison, "given_up": len(load.given_up)}
            if balloon:
                result |= ballooning.result(running, load, without)
            if diagnosis:
                result |= diagnosing.result(running, fragment)
    except RuntimeError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        print(json.dumps(result))
    else:
        text = diagnosing.summary(result) if diagnosis else (ballooning.summary if balloon else _summary)(result, running, load, without)
        console.print(text, soft_wrap=diagnosis)
    leaked_well = result["failed"] == 0 and result["recycles"] > 0 and result["supervisor_survived"]
    good = diagnosing.is_good(result) if diagnosis else ballooning.is_good(result) if balloon else leaked_well
    raise SystemExit(0 if good or without else 1)


def _server(server: str, worker_class: str, balloon: bool, without: bool, leak: bool, fragment: bool) -> DemoServer:
    if leak or fragment:
        app = "fragment" if fragment else "app"
        return DemoServer(server, worker_class, WORKERS, diagnosing.soft_limit(fragment), LIMIT, app=app, probe=True)
    limit = TASK_LIMIT if server == "celery" else LIMIT
    soft = None if without else ballooning.SOFT_LIMIT if balloon else SOFT_LIMIT
    hard = ballooning.HARD_LIMIT if balloon and not without else None
    return DemoServer(server, worker_class, WORKERS, soft, limit, hard_limit=hard, app="balloon" if balloon else "app")


def _load(server: DemoServer, balloon: bool) -> Any:
    if balloon:
        return BalloonLoad(server.port)
    if server.unit == "request":
        return Load(server.port)
    from oomsafe.demo.task_load import TaskLoad  # imported here, because Celery is only needed with --server celery

    return TaskLoad(server.folder, poison=server.sandbox is not None)


def _default_class(server: str, balloon: bool) -> str:
    if server != "gunicorn":
        return {"uvicorn": "uvicorn", "celery": "prefork"}[server]
    if not balloon:
        return "sync"
    # a sync worker that is killed takes no other request with it: the balloon must have neighbours, to show what a kill costs
    return "asgi" if find_spec("gunicorn") and find_spec("gunicorn.asgi") else "gthread"  # its own asgi class came with gunicorn 24


def _needs(server: str, worker_class: str) -> None:
    """Raise an error that names a missing package, before anything is started."""
    if find_spec(server) is None:
        raise click.ClickException(f"the demo needs {server}: pip install 'oomsafe[{server}]'")
    package = {"gevent": "gevent", "uvicorn_worker.UvicornWorker": "uvicorn_worker"}.get(worker_class)
    if package is not None and find_spec(package) is None:
        raise click.ClickException(f"--worker-class {worker_class} needs {package}: pip install {package}")


def _run(server: DemoServer, load: Any, seconds: float, console: Console, quiet: bool, is_over: Callable[[DemoServer], bool]) -> None:
    """Watch the server under load until the time is up, it `is_over`, or its supervisor has died."""
    if not quiet:
        console.print(_opening(server, load, is_over is not never))
    load.start()
    begin = time.monotonic()
    with Live(console=console, refresh_per_second=10, transient=True, auto_refresh=not quiet) as live:
        try:
            while (spent := time.monotonic() - begin) < seconds and server.observed.supervisor_alive and not is_over(server):
                for line in server.observe():
                    if not quiet:
                        live.console.print(_event(spent, line), soft_wrap=True)
                if not quiet:
                    live.update(_picture(server, load, spent))
                time.sleep(0.02)
        except KeyboardInterrupt:
            pass  # Ctrl-C ends the demo early, with its summary
        finally:
            load.stop()
    server.observe()


def never(_: DemoServer) -> bool:
    """It goes on until its time is up."""
    return False


def _bar(used: int | None, limit: int | None) -> Text:
    share = Text(f" {used / limit:4.0%}") if used is not None and limit else Text()
    return memory_bar(used, limit) + share


def _event(spent: float, line: str) -> Text:
    return Text(f"{spent:5.1f} s  {printable(line, 400)}", style="red" if "SIGKILL" in line else "")


def _opening(server: DemoServer, load: Any, diagnosis: bool) -> str:
    leaks = f"each {server.unit} leaks {format_size(_leak(server))}"
    rate = ballooning.RATE if isinstance(load, BalloonLoad) else diagnosing.RATE if diagnosis else leaks
    if server.sandbox:
        where = f"in a memory cgroup of {format_size(server.limit)}"
    else:
        where = "without a memory cgroup (that needs root), so the kernel will not step in"
        where += " and no poison task is sent" if server.unit == "task" else ""
    at = f"listens on 127.0.0.1:{server.port}" if server.port else "takes tasks from a folder"
    return f"supervisor {server.pid} {at} with {WORKERS} workers, {where}; {rate}"


def _leak(server: DemoServer) -> int:
    """The bytes that one request or task leaks."""
    return TASK_LEAK if server.unit == "task" else LEAK


def _picture(server: DemoServer, load: Any, spent: float) -> Group:
    """The live picture of the pool."""
    observed = server.observed
    table = Table(box=None, padding=(0, 1))
    for column in ("worker", "state", "rss", "against its limit", f"{server.unit}s"):
        table.add_column(column, justify="right" if column in ("rss", f"{server.unit}s") else "left")
    views = {worker.pid: worker for worker in observed.pool.workers} if observed.pool else {}
    for pid, rss in sorted(observed.rss.items()):
        view = views.get(pid)
        limit = (view.figures.soft if view else None) or (SOFT_LIMIT if observed.pool else server.limit // WORKERS)
        served = str(view.counters.work) if view else ""
        table.add_row(str(pid), view.state.value if view else "", format_size(rss), _bar(rss, limit), served)
    recycles = sum(observed.pool.totals.recycles) if observed.pool else 0
    supervisor = "alive" if observed.supervisor_alive else "DEAD"
    counts = {
        f"{server.unit}s": load.requests,
        "failed": load.failed,
        **({"balloons": load.balloons, "refused": load.refused} if isinstance(load, BalloonLoad) else {}),
        "recycles": recycles,
        "killed": observed.killed,
        "supervisor": supervisor,
    }
    line = "   ".join(f"{name} {count}" for name, count in counts.items())
    return Group(Text(f"{spent:4.0f} s   {line}", style="bold"), table)


def _result(server: DemoServer, load: Any, seconds: float, without: bool) -> dict[str, Any]:
    observed = server.observed
    return {
        "seconds": seconds,
        "requests": load.requests,
        "failed": load.failed,
        "recycles": sum(observed.pool.totals.recycles) if observed.pool else 0,
        "soft_limit_bytes": None if without else SOFT_LIMIT,
        "peak_worker_rss_bytes": observed.peak_rss,
        "supervisor_survived": observed.supervisor_alive,
    }


def _summary(result: dict[str, Any], server: DemoServer, load: Any, without: bool) -> Text:
    observed = server.observed
    reasons = observed.pool.totals.by_reason.items() if observed.pool else ()
    recycles = ", ".join(f"{count} for {reason}" for reason, count in reasons if count) or "none"
    failures = ", ".join(f"{count} {name}" for name, count in sorted(load.failures.items()))
    supervisor = f"{server.pid}, {'alive from the first second to the last' if observed.supervisor_alive else 'DEAD'}"
    apart = "; not counting those with a poison task" if observed.poisoned else ""
    rows = {
        f"{server.unit}s": f"{result['requests']}, each answer checked",
        "failed": f"{result['failed']}{f' ({failures})' if failures else ''}",
        "recycles": recycles,
        **({"ballooned": f"{result['ballooned']} tasks, each failed by itself"} if "ballooned" in result else {}),
        **({"poison": _poison(load)} if result.get("poison") else {}),
        "killed by SIGKILL": str(observed.killed),
        "peak of a worker": format_size(observed.peak_rss) + ("" if without else f" (soft limit {format_size(SOFT_LIMIT)}{apart})"),
        "supervisor": supervisor,
    }
    lines = [f"  {name:18} {value}" for name, value in rows.items()]
    return Text("\n".join(["", *lines, "", _verdict(result, server, without)]))


def _poison(load: Any) -> str:
    deaths = ", ".join(f"{load.given_up.count(number)} after {number} deaths" for number in sorted(set(load.given_up)))
    return f"{load.poison} sent; given up: {deaths or 'none'}"


def _verdict(result: dict[str, Any], server: DemoServer, without: bool) -> str:
    """The conclusion, in plain words."""
    leaked, killed, unit = format_size(result["requests"] * _leak(server)), server.observed.killed, server.unit
    if without and not killed and result["supervisor_survived"]:
        return f"The app leaked {leaked} and nothing stopped it: there was no limit for the kernel to enforce. Run it as root to get one."
    if without and not killed:
        end = f"{result['failed']} {unit}s failed"
        return f"A MemoryError of one {unit} ended the supervisor, and with it the service: {end}. Now try it without --without."
    if without:
        end = "" if result["supervisor_survived"] else " The supervisor died, and with it the service."
        return (
            f"The app leaked {leaked}: the kernel's OOM killer took {killed} workers in the middle of their work, and "
            f"{result['failed']} {unit}s failed.{end} Now try it without --without."
        )
    if result["failed"] or not result["supervisor_survived"]:
        return f"NOT GOOD: {unit}s failed or the supervisor died. This should not happen: please report it with the lines above."
    if not result["recycles"]:
        return "No worker reached its limit in this time: run it for longer."
    if result.get("poison"):
        return f"The app leaked {leaked}. {result['recycles']} children were recycled, the poison was given up, and no good task noticed."
    return f"The app leaked {leaked}. {result['recycles']} workers were recycled before anything was killed, and no {unit} noticed."
