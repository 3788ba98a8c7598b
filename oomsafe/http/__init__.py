"""What the WSGI, ASGI and Django middlewares share: counting each request once, and the memory headers of its response.

It runs in a worker, for each request, and may import worker and the rooms below it. Start with headers.py.
"""
