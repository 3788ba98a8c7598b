"""``oomsafe run -- COMMAND``: every server that the command starts is guarded as if that had been installed by hand.

The command runs with path/ first on PYTHONPATH, so that each Python below it imports path/sitecustomize.py as it starts. That calls
start.py, which waits for the modules of the servers it knows (servers.py), and has their adapters patch them as they are imported.
A process that imports none of them pays for one small module. It may import the adapters, by name and when they are needed.
"""
