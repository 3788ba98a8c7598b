"""``oomsafe``: the group of all commands."""

from __future__ import annotations

import click

from oomsafe import __version__
from oomsafe.cli.advise import advise_command
from oomsafe.cli.demo import demo
from oomsafe.cli.doctor import doctor
from oomsafe.cli.explain import explain
from oomsafe.cli.probe import probe
from oomsafe.cli.recycle import recycle
from oomsafe.cli.retired import retired
from oomsafe.cli.status import status
from oomsafe.cli.top import top
from oomsafe.cli.watch import watch


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="oomsafe")
def cli() -> None:
    """Keep a Python service up when its workers run out of memory."""


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(arguments: tuple[str, ...]) -> None:
    """Run a command, and guard every server that it starts: oomsafe run -- gunicorn app:app."""
    from oomsafe.cli.run import run

    run(arguments)


cli.add_command(advise_command)
cli.add_command(demo)
cli.add_command(doctor)
cli.add_command(explain)
cli.add_command(probe)
cli.add_command(recycle)
cli.add_command(retired)
cli.add_command(status)
cli.add_command(top)
cli.add_command(watch)
