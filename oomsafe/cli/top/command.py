"""The command ``oomsafe top``."""

from __future__ import annotations

import os
import sys

import click
from rich.console import Console

from oomsafe.cli.pools import none_found
from oomsafe.cli.status import read_pools, show
from oomsafe.scoreboard.places import living_boards


@click.command()
@click.option("--scoreboard", "path", type=click.Path(), envvar="OOMSAFE_SCOREBOARD", help="Show only the pool with this scoreboard.")
def top(path: str | None) -> None:
    """Show every pool live: workers against their limits, growth and time to limit, work in flight, recycles, deaths.

    Keys: s sorts, p pauses, r recycles the marked worker, t has it trace its allocations, both after a confirmation, ? helps, q quits.
    Without a terminal, the pools are printed once, as by status.
    """
    if not _is_a_terminal():
        pools = read_pools([path] if path else living_boards())
        show(pools, Console())
        if not pools:
            print(none_found(), file=sys.stderr)
        raise SystemExit(0 if pools else 1)
    try:
        from oomsafe.cli.top.screen import Top
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "textual":
            raise
        print("oomsafe: top needs textual: pip install 'oomsafe[top]'; `watch oomsafe status` does without", file=sys.stderr)
        raise SystemExit(2) from None
    raise SystemExit(Top(path).run_to_its_end())


def _is_a_terminal() -> bool:
    """Whether keys can be read, and the screen be drawn: Textual draws on stderr."""
    return os.environ.get("TERM", "dumb") != "dumb" and all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))
