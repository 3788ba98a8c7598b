"""What the middlewares of WSGI, ASGI and Django share: how a request is counted once and announced once, and what its response says.

Runs in a worker, for one request; it may import worker and what is below. Begin with headers.py.
"""
