"""How asyncio servers end. By themselves they close connections that have a request on its way.

It runs in a worker, in the server's own loop, and may import worker and the rooms below it, but no server: servers are passed in. Start
with drain.py.
"""
