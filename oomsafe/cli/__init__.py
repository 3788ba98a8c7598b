"""The command line: one file a command.

A process of its own, which looks at others; `run` becomes another program. It may import demo, run, scoreboard and what is below, click
and rich. Begin with app.py.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point ``oomsafe``. click and rich come with an extra: a worker never needs them, nor does `run`."""
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
