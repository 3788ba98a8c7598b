"""The servers and the load of ``oomsafe demo``, run as processes of their own.

Only the command imports this room, and tests and benchmarks, which start their servers with server_process.py, too; a worker never does.
It may import scoreboard and the rooms below it, and starts servers only by their command lines, as a user does. Start with
server_process.py.
"""
