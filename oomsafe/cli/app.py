"""``oomsafe``: the commands, put together."""

from __future__ import annotations

import click

from oomsafe import __version__
from oomsafe.cli.demo import demo
from oomsafe.cli.status import status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="oomsafe")
def cli() -> None:
    """Keep a Python service up when its workers run out of memory."""


cli.add_command(demo)
cli.add_command(status)
