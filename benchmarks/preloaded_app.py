"""The app of preload.py: 700 MiB of Python objects that every request reads a little of, and a cache that fills up."""

import os
import random

#: About 420 bytes each, of which gc walks one object in every three.
ENTRIES = 1_700_000
DATA = {number: [number, str(number) * 4, (number, number + 1), {}] for number in range(ENTRIES)}

#: What a request adds to its worker's cache, and where that stops; bytes.
ADDS, CACHE = 48 << 10, 380 << 20
KEPT: list[bytes] = []


def app(environ, start_response):
    """Twenty entries, of the twentieth part that is in demand."""
    first = random.randrange(ENTRIES // 20)
    total = sum(sum(DATA[number][2]) for number in range(first, first + 20))
    if len(KEPT) * ADDS < CACHE:
        KEPT.append(b"x" * ADDS)
    body = f"{os.getpid()} {total}".encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
