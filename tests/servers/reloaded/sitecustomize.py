"""What ddtrace-run does where gevent is installed: asyncio is imported, then dropped, so that whoever imports it next has another copy."""

import asyncio  # noqa: F401
import sys

for name in list(sys.modules):
    if name.partition(".")[0] in ("asyncio", "_asyncio"):
        del sys.modules[name]
