"""The apps of the rows that bring none of their own: each request keeps 256 KiB."""

kept = []


def leak():
    kept.append(b"\xff" * (256 << 10))
    return "hello"


def flask():
    from flask import Flask

    app = Flask(__name__)
    app.add_url_rule("/", view_func=leak)
    return app


def fastapi():
    from fastapi import FastAPI
    from fastapi.responses import PlainTextResponse

    app = FastAPI()
    app.get("/", response_class=PlainTextResponse)(leak)
    return app


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body = leak().encode()
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def wsgi(_, start_response):
    body = leak().encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
