"""The app of echo_apps.py with oomsafe's middleware around it, for a server that knows nothing of oomsafe."""

from __future__ import annotations

import echo_apps

from oomsafe.asgi import MemoryMiddleware

asgi = MemoryMiddleware(echo_apps.asgi)
