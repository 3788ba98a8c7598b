"""``python -m oomsafe``: the command line."""

from oomsafe.cli import main

main()
