"""``oomsafe advise``: how many workers, with which limits, from a live pool or from given figures; and files to paste."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import click

from oomsafe.cli.advice_options import Given, read_amount, read_app, read_number, read_size, read_time, read_workers
from oomsafe.cli.advice_text import advice_text
from oomsafe.cli.output import Out, until_closed
from oomsafe.cli.paste import FILES
from oomsafe.cli.paste.deployment import APP, Deployment
from oomsafe.cli.pool_facts import facts_of
from oomsafe.cli.pools import is_called
from oomsafe.cli.status import read_pools
from oomsafe.errors import ConfigError, ScoreboardError
from oomsafe.kernel.process import is_alive
from oomsafe.policy.sizing.advice import Advice, TooSmall, advise
from oomsafe.policy.sizing.facts import Facts
from oomsafe.policy.text import printable, without_controls
from oomsafe.policy.units import MIB, format_size, refused
from oomsafe.policy.victims import auto_raise
from oomsafe.scoreboard.board import Scoreboard
from oomsafe.scoreboard.live import live
from oomsafe.scoreboard.places import board_of, living_boards
from oomsafe.scoreboard.view import PoolView

#: Of what --json prints.
VERSION = 1

#: Seconds for reading a board again while it is being written; for all of them while their workers have not served yet, each so many.
PATIENCE, NEWS, EACH = 0.25, 2.0, 0.1

SERVERS = ("gunicorn", "uvicorn", "celery")

#: What stands for an app that is not known.
APPS = {"celery": "proj"}

FAILED = 2

#: Seconds that --over may be at most.
LONGEST = 24 * 3600.0

#: More than any machine has.
MOST_CPUS = 65536

#: Below this a supervisor would be exempt together with whatever it starts, or nearly.
LEAST_SCORE = -900


@dataclass(frozen=True)
class Advised:
    """One pool, or given figures, with the advice."""

    facts: Facts
    advice: Advice
    pool: PoolView | None = None


@click.command(name="advise")
@click.option("--memory", metavar="SIZE", help="The memory limit, such as 2GiB.  [default: the pool's, else this machine's or container's]")
@click.option("--others", metavar="SIZE", help="What others use of it.")
@click.option("--cpus", metavar="NUMBER", help="Processors, such as 1.5.")
@click.option("--worker", metavar="SIZE", help="What a worker holds right after boot; without --pool no pool is asked then.")
@click.option("--supervisor", metavar="SIZE", help="What the supervisor holds.")
@click.option("--growth", metavar="SIZE", help="What a request or a task leaks, such as 40KiB.")
@click.option("--rate", metavar="NUMBER", help="Requests or tasks a second, of the whole pool.")
@click.option("--balloon", metavar="SIZE", help="The largest growth in one request or task.")
@click.option("--boot", metavar="TIME", help="How long a worker boots, such as 5s.")
@click.option("--workers", metavar="NUMBER", help="Advise so many workers, whatever the processors.")
@click.option("--preload", metavar="SIZE", help="What if the supervisor loaded so much of each worker before it forks?")
@click.option("--server", type=click.Choice(SERVERS), help="The server.  [default: the pool's, else gunicorn]")
@click.option("--app", metavar="MODULE:NAME", help="The app, for files.  [default: the pool's]")
@click.option("--over", metavar="TIME", help="Measure growth and rate over this time, such as 60s.  [default: since the pool's start]")
@click.option("--pool", "name", metavar="NAME", help="Only the pool with this name, or whose supervisor has this pid.")
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="Only the pool with this scoreboard.")
@click.option("--file", "file", type=click.Choice(list(FILES)), help="Print this file, and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object (docs/sizing.md).")
def advise_command(name: str | None, path: str | None, file: str | None, app: str | None, as_json: bool, **figures: str | None) -> None:
    """How many workers, which limits, and what to expect of them, with the arithmetic: from what each
    live pool shows of itself, or from given figures.

    Figures that are given replace measured ones: what if. With --file gunicorn, uvicorn, celery,
    systemd, kubernetes, docker, compose or ecs: a file to paste. Exits with 2 if it can't say.

    oomsafe advise --memory 2GiB --worker 180MiB --supervisor 60MiB --growth 40KiB --rate 50
    """
    try:
        if file and as_json:
            raise ConfigError("--file and --json: give one of them; a correct example: oomsafe advise --file gunicorn")
        app = read_app("--app", app)
        given = _given(figures, file)
        found = _advised(given, name, path, one=file is not None)
        with until_closed():
            if file is not None:
                sys.stdout.write(FILES[file](_deployment(found[0], given, file, app)))
            elif as_json:
                print(json.dumps({"version": VERSION, "advice": [_record(each) for each in found]}, allow_nan=False))
            else:
                _show(found)
    except (ConfigError, ScoreboardError) as error:
        _say(error)
        raise SystemExit(FAILED) from None


def _given(figures: dict[str, str | None], file: str | None) -> Given:
    """The figures that were given. Raises ConfigError."""
    balloon, others = (read_amount(f"--{name}", figures[name], "200MiB") for name in ("balloon", "others"))
    return Given(
        memory=read_size("--memory", figures["memory"], "2GiB"),
        others=None if others is None else int(others),
        cpus=read_number("--cpus", figures["cpus"], "2", positive=True, most=MOST_CPUS),
        worker=read_size("--worker", figures["worker"], "180MiB"),
        supervisor=read_size("--supervisor", figures["supervisor"], "60MiB"),
        growth=read_amount("--growth", figures["growth"], "40KiB"),
        balloon=None if balloon is None else int(balloon),
        rate=read_number("--rate", figures["rate"], "50"),
        boot=read_time("--boot", figures["boot"], "5s"),
        over=read_time("--over", figures["over"], "60s", most=LONGEST),
        workers=read_workers("--workers", figures["workers"]),
        preload=read_size("--preload", figures["preload"], "100MiB"),
        server=figures["server"] or (file if file in SERVERS and figures["worker"] else None),
    )


def _advised(given: Given, name: str | None, path: str | None, one: bool) -> list[Advised]:
    """For given figures, or for each pool that was asked for; `one`: there must be exactly one. Raises ConfigError, ScoreboardError."""
    if given.worker is not None and name is None and path is None:
        if given.over is not None:
            raise ConfigError("--over measures a live pool, and with --worker none is asked; a correct example: --pool NAME --over 60s")
        return [_one(given.without_pool(), given)]
    pools = _pools(name, path)
    if one and len(pools) > 1:
        names = ", ".join(printable(f"{pool.name or pool.server} ({pool.supervisor})") for pool in pools)
        raise ConfigError(f"--file is for one pool, and there are {len(pools)}: {names}; a correct example: --pool={pools[0].supervisor}")
    earlier: dict[int, tuple[PoolView, float]] = {}
    if given.over:
        earlier = {pool.supervisor: (pool, given.over) for pool in pools}
        time.sleep(given.over)
        pools = _pools(name, path)
    found: list[Advised] = []
    failed: list[ConfigError | ScoreboardError] = []
    for pool in pools:
        try:
            facts = facts_of(pool, given.memory, given.worker, earlier.get(pool.supervisor))
            found.append(_one(given.on(facts), given, pool))
        except (ConfigError, ScoreboardError) as error:
            failed.append(error)
    if not found:
        raise failed[0]
    for each in failed:
        _say(each)
    return found


def _say(error: Exception) -> None:
    print(f"oomsafe advise: {without_controls(str(error))}", file=sys.stderr, flush=True)


def _pools(name: str | None, path: str | None) -> list[PoolView]:
    """The pools that were asked for, at least one. Raises ConfigError, ScoreboardError."""
    found = read_pools(living_boards()) if path is None else [_read(path)]
    named = [pool for pool in found if name is None or is_called(pool, name)]
    if named:
        until = time.monotonic() + NEWS
        return [_once_it_serves(pool, path, until) for pool in named]
    if found:
        names = ", ".join(printable(pool.name or str(pool.supervisor)) for pool in found)
        example = printable(found[0].name or str(found[0].supervisor))
        raise ConfigError(f"--pool={name!a} is none of the pools here: {names}; a correct example: --pool={example}")
    raise ConfigError(
        "no pool of this user is guarded by oomsafe now, and no figures are given; "
        "a correct example: oomsafe advise --memory 2GiB --worker 180MiB"
    )


def _read(path: str) -> PoolView:
    """Raises ScoreboardError."""
    with Scoreboard.open(path) as board:
        return live(board.read(patience=PATIENCE))


def _once_it_serves(pool: PoolView, path: str | None, until: float) -> PoolView:
    """`pool`, or what it is a moment later: all its workers may just have been replaced. Raises ScoreboardError."""
    while not any(worker.figures.baseline for worker in pool.workers) and time.monotonic() < until:
        board = path or board_of(pool.supervisor)
        if board is None or not is_alive(pool.supervisor, pool.supervisor_started):
            break
        time.sleep(EACH)
        pool = _read(board)
    return pool


def _one(facts: Facts, given: Given, pool: PoolView | None = None) -> Advised:
    """Raises ConfigError if the memory is too small, or the server can't do what was asked."""
    if given.preload is not None and (given.server or (pool.server if pool else "")) == "uvicorn":
        raise ConfigError("--preload is for servers that fork: uvicorn's workers share nothing; a correct example: --server gunicorn")
    try:
        return Advised(facts, advise(facts, given.workers), pool)
    except TooSmall as error:
        needs = f"{error.needs // MIB}MiB"
        has = format_size(facts.room)
        if given.workers is None:
            what = f"is less than one worker and its replacement need ({format_size(facts.own)} each right after boot)"
            raise refused("--memory", has, what, needs) from None
        what = f"do not fit in {has}, which holds {error.holds}; {needs} would do (--memory {needs})"
        raise refused("--workers", given.workers, what, str(max(1, error.holds)) if error.holds else f"1 --memory={needs}") from None


def _show(found: Iterable[Advised]) -> None:
    """For a person, an empty line between two."""
    console = Out(highlight=False)
    for number, each in enumerate(found):
        if number:
            console.print()
        # its lines are as wide as they may be: nothing is to wrap or crop them
        console.print(advice_text(_title(each.pool), each.facts, each.advice, console.width), soft_wrap=True)
    files = textwrap.fill(f"files to paste: the same with --file {', '.join(FILES)}", max(20, console.width))
    console.print(files, style="dim", soft_wrap=True)


def _title(pool: PoolView | None) -> str:
    if pool is None:
        return "from the given figures"
    who = "pid" if pool.is_single_process else "supervisor"
    return printable(", ".join(filter(None, [pool.name, pool.server, f"{who} {pool.supervisor}"])), 200)


def _record(advised: Advised) -> dict[str, Any]:
    """As JSON data: sizes in bytes, times in seconds, null for what is not known; a life without an end is null, with 0 recycles."""
    pool = advised.pool
    facts, advice = (_plain(asdict(each)) for each in (advised.facts, advised.advice))
    named = None if pool is None else {"name": pool.name, "server": pool.server, "supervisor": pool.supervisor}
    return {"pool": named, "facts": {**facts, "source": str(advised.facts.source)}, "advice": advice}


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    values = {name: value.value if isinstance(value, Enum) else value for name, value in record.items()}
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()}


def _deployment(advised: Advised, given: Given, file: str, app: str | None) -> Deployment:
    facts, advice, pool = advised.facts, advised.advice, advised.pool
    theirs, _, worker_class = (pool.server if pool else "").partition(" ")
    server = file if file in SERVERS else given.server or (theirs if theirs in SERVERS else "gunicorn")
    name = pool.name if pool else ""
    if app is None and APP.fullmatch(name) and ":" in name:
        app = name
    if app is None:
        app = APPS.get(server, "app:app")
        print(f"oomsafe advise: {app} stands for your own app there: give it, as in --app {app}", file=sys.stderr, flush=True)
    return Deployment(
        server=server,
        app=app,
        name=name or app,
        worker_class=worker_class if theirs == server == "gunicorn" else "",
        workers=advice.workers,
        soft=advice.soft,
        hard=advice.hard,
        min_lifetime=advice.min_lifetime,
        metric=advice.metric,
        preload=facts.preloads and server == "gunicorn",
        memory=facts.room,
        cpus=None if facts.cpus is None else max(0.01, round(facts.cpus, 2)),
        score=max(LEAST_SCORE, -auto_raise(facts.parent, facts.room)),
        directory=_directory(),
        folder=_programs(),
    )


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return "/srv/app"


def _programs() -> str:
    """The folder with oomsafe's program: beside this Python, else on PATH; empty if there is none."""
    beside = os.path.dirname(sys.executable)
    found = shutil.which("oomsafe", path=beside) or shutil.which("oomsafe")
    return os.path.dirname(os.path.abspath(found)) if found else ""
