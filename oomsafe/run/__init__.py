"""``oomsafe run -- COMMAND``: guards every server that the command starts, as if oomsafe had been installed in it by hand.

The command runs with path/ first on PYTHONPATH, so that every Python process below it imports path/sitecustomize.py at its start. That
calls start.py, which waits for the modules of the servers it knows, and calls their adapters (servers.py for servers without one) to patch
these modules once they are imported. A process that imports none of them only pays for one small module. This package may import the
adapters, by name and only when they are needed.
"""
