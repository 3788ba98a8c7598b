"""Apps whose requests ask for more memory than they may have, under every framework; and ones that ask for little."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

MIB = 1 << 20

leaked = []


def balloon(kind):
    """Grow to a GiB, in one of the ways that programs do."""
    kept = []
    if kind == "huge":
        return bytearray(1024 * MIB)
    if kind == "text":
        return json.loads("[" + "[1,2,3,4]," * 5_000_000 + "0]")
    if kind == "fits":
        return [bytearray(MIB) for _ in range(250)]
    if kind == "list":
        return [[number] for number in range(12_000_000)]
    if kind == "dict":
        return {number: str(number) * 3 for number in range(6_000_000)}
    for _ in range(1024):
        kept.append(bytearray(MIB))
        if kind == "slow":
            time.sleep(0.001)
    return kept


def reported(kind):
    """Read the values of all variables, as error trackers do, and Django's mails to ADMINS; keep the error for a while."""
    global last
    try:
        return balloon(kind)
    except MemoryError as error:
        last = error
        trace = error.__traceback__
        while trace:
            assert trace.tb_frame.f_locals
            trace = trace.tb_next
        raise


def peak():
    """Bytes of anonymous memory that this worker has had at most, roughly: its peak less its files, and what it has now."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kib = {name: int(lines[name].split()[0]) for name in ("VmHWM", "RssFile", "RssAnon")}
    return f"{(kib['VmHWM'] - kib['RssFile']) << 10} {kib['RssAnon'] << 10} {os.getpid()}"


def answer(name):
    """The body for a path."""
    if name == "peak":
        return peak()
    if name == "pid":
        return str(os.getpid())
    if name == "limit":
        return subprocess.run(["sh", "-c", "ulimit -d"], capture_output=True, text=True, check=True).stdout.strip()
    if name == "caught":
        try:
            balloon("small")
        except MemoryError:
            return "went on"
    if name == "work":
        return str(len(bytes(2 * MIB)) + len(json.dumps(list(range(20_000)))))
    if name == "leak":
        leaked.append(b"x" * (MIB // 4))
        return "leaked"
    if name == "reported":
        reported("small")
    if name == "broken":
        raise ValueError("the app's own")
    if name not in ("", "hello"):
        balloon(name)
    return "hello"


def wsgi(environ, start_response):
    """The bare one."""
    name = environ["PATH_INFO"][1:]
    if name.startswith("parts-"):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return parts(name)
    body = answer(name).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]


def parts(name):
    """A body that fails before its first part, or after."""
    if name == "parts-late":
        yield b"a part"
    balloon("small")
    yield b"never"


async def asgi(scope, receive, send):
    """The bare one."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    name = scope["path"][1:]
    start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
    if name == "parts-late":
        await send(start)
        await send({"type": "http.response.body", "body": b"a part", "more_body": True})
        balloon("small")
    if name == "upload":
        body = bytearray()
        while (message := await receive()).get("more_body"):
            body += message["body"]
        name = "hello"
    body = answer(name).encode()
    await send(start)
    await send({"type": "http.response.body", "body": body})


def make_flask():
    from flask import Flask

    app = Flask(__name__)
    app.add_url_rule("/<name>", "view", answer)
    return app


def make_starlette():
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    def in_a_thread(request):
        return PlainTextResponse(answer(request.path_params["name"]))

    async def in_the_event_loop(request):
        return in_a_thread(request)

    return Starlette(routes=[Route("/sync/{name}", in_a_thread), Route("/{name}", in_the_event_loop)])


def make_fastapi():
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    async def in_the_event_loop(name):
        return answer(name)

    app = FastAPI()
    app.add_api_route("/sync/{name}", lambda name: answer(name), methods=["GET"])
    app.add_api_route("/{name}", in_the_event_loop, methods=["GET"], response_class=PlainTextResponse)
    return app


def make_django(kind):
    from django.conf import settings

    # as in production: whoever is mailed gets a report of each error, which reads the values of all variables
    mail = {"ADMINS": [("Ops", "ops@example.com")], "EMAIL_BACKEND": "django.core.mail.backends.dummy.EmailBackend"}
    settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"], SECRET_KEY="none", DEBUG=False, **mail)
    import django
    from django.http import HttpResponse
    from django.urls import path

    django.setup()
    globals()["urlpatterns"] = [path("<name>", lambda request, name: HttpResponse(answer(name)))]
    if kind == "django_wsgi":
        from django.core.wsgi import get_wsgi_application

        return get_wsgi_application()
    from django.core.asgi import get_asgi_application

    return get_asgi_application()


def __getattr__(name):
    """Each framework only where it is asked for: all of them would take every worker a second to import."""
    makers = {"flask": make_flask, "starlette": make_starlette, "fastapi": make_fastapi}
    if name in ("django_wsgi", "django_asgi"):
        globals()[name] = make_django(name)
    elif name in makers:
        globals()[name] = makers[name]()
    else:
        raise AttributeError(name)
    return globals()[name]
