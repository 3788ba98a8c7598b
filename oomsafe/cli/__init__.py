"""The command line: one file for each command.

It runs in its own process, and reads the scoreboards of others; `run` replaces itself with another program. It may import demo, run,
scoreboard and the rooms below them, click and rich. Start with app.py.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point ``oomsafe``. click and rich come with an extra, because workers and `run` don't need them."""
    if sys.argv[1:2] == ["run"]:
        from oomsafe.cli.run import run

        run(sys.argv[2:])
    try:
        from oomsafe.cli.app import cli
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(f"oomsafe: the command line needs {error.name}: pip install 'oomsafe[cli]'", file=sys.stderr)
        raise SystemExit(2) from None
    cli()
