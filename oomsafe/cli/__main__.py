"""``python -m oomsafe.cli``."""

from oomsafe.cli import main

main()
