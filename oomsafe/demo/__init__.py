"""The servers and the load of ``oomsafe demo``: what a stranger sees first, run as processes of their own.

Imported by the command alone; it may import scoreboard and what is below, and starts servers only as other processes do, by their command
lines. Begin with server.py.
"""
