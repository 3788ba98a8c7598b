"""Makes docs/top.svg: two real pools under load, and the screen of `oomsafe top` as Textual exports it. Usage: top_screenshot.py [FILE]."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

from oomsafe.cli.top import observer
from oomsafe.cli.top.screen import Top
from oomsafe.demo.server_process import ENDING_WITH_US, ServerProcess, environment, until
from oomsafe.kernel.process import children_of
from oomsafe.scoreboard.places import board_of

COLUMNS, ROWS = 104, 21

#: Seconds under load: growth is told from the last twelve.
LOAD = 14.0

APP = """
import time
kept = []

def wsgi(environ, start_response):
    path = environ["PATH_INFO"]
    if path.startswith("/reports"):
        time.sleep(3)
    else:
        kept.append(b"x" * (96 << 10))
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

async def asgi(scope, receive, send):
    if scope["type"] != "lifespan":
        kept.append(b"x" * (16 << 10))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        return
    while (message := await receive())["type"] == "lifespan.startup":
        await send({"type": "lifespan.startup.complete"})
    await send({"type": f"{message['type']}.complete"})
"""

SHOP = ["gunicorn", "--bind", "127.0.0.1:0", "--workers", "4", "--name", "shop", "app:wsgi"]
API = ["uvicorn", "--port", "0", "--workers", "3", "--no-access-log", "app:asgi"]


def served(stack: ExitStack, command: list[str], soft_limit: str) -> tuple[ServerProcess, str]:
    """A pool, and its address."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "app.py").write_text(APP)
    run = [sys.executable, "-m", "oomsafe", "run", "--soft-limit", soft_limit, "--", sys.executable, "-m", *command]
    env = {**environment(path=[folder]), "OOMSAFE_MIN_LIFETIME": "1", "HOME": str(folder)}
    process = stack.enter_context(ServerProcess([*ENDING_WITH_US, *run], str(folder), env))
    found = until(lambda: re.search(r"http://127\.0\.0\.1:\d+", process.log()), "it listens")
    until(lambda: board_of(process.pid), "it has a scoreboard")
    return process, found[0]


def load(stack: ExitStack, url: str, pause: float) -> None:
    """Ask again and again until the end."""
    end = threading.Event()

    def ask() -> None:
        while not end.wait(pause):
            try:
                urllib.request.urlopen(url, timeout=20).read()
            except OSError:  # the worker that was killed
                pass

    thread = threading.Thread(target=ask)
    thread.start()
    stack.callback(thread.join)
    stack.callback(end.set)


async def photographed() -> str:
    """The screen, some seconds after its start."""
    app = Top()
    async with app.run_test(size=(COLUMNS, ROWS)) as pilot:
        await asyncio.sleep(LOAD)
        await pilot.press("down")
        return app.export_screenshot(title="oomsafe top")


def main() -> None:
    """Write the file."""
    with ExitStack() as stack:
        shop, shop_url = served(stack, SHOP, "100MiB")
        api, api_url = served(stack, API, "80MiB")
        boards = [board for board in (board_of(shop.pid), board_of(api.pid)) if board]
        observer.living_boards = lambda: boards  # type: ignore[attr-defined]  # and not what else this machine runs
        load(stack, f"{api_url}/items", 0.02)
        load(stack, f"{shop_url}/cart", 0.02)
        time.sleep(2)
        os.kill(children_of(shop.pid)[-1], signal.SIGKILL)
        load(stack, f"{shop_url}/reports/2026", 0.0)
        picture = asyncio.run(photographed())
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "top.svg")
    target.write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n")
    print(target)


if __name__ == "__main__":
    main()
