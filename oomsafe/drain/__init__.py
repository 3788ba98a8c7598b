"""The ends of asyncio servers, which by themselves close connections that have a request on its way.

Runs in a worker, in the server's own loop; it may import worker and what is below, and no server: those it is handed. Begin with drain.py.
"""
