"""An ordinary gunicorn configuration; only the import and the last line are new."""

import oomsafe.gunicorn

bind = "127.0.0.1:8000"
workers = 2
preload_app = False


def post_fork(server, worker):
    """Your own hooks still work."""
    worker.log.info("forked")


# a worker above 150 MiB ends once its request is answered, and another takes its place
oomsafe.gunicorn.install(globals(), soft_limit="150MiB", min_lifetime=2, headers=True)
