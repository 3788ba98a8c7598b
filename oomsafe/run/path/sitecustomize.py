"""The first sitecustomize of each Python that a command under ``oomsafe run`` starts. Any Python must be able to read it."""

import os
import sys


def _begin():
    here = os.path.dirname(os.path.abspath(__file__))
    # out of the way of this process's own imports; its children find it in the environment
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    missing = _start()
    # of the command itself, and not of each small program that it may call
    if missing and os.environ.get("OOMSAFE_RUN") == str(os.getpid()):
        # it may be a wrapper (uv, poetry) that runs the server in another environment
        sys.stderr.write("oomsafe run: {0}; a server that runs in this Python is not guarded\n".format(missing))
    _next()


def _start():
    """Why this Python can't; empty: it waits for servers."""
    if sys.version_info < (3, 10):
        return "oomsafe needs Python 3.10, and this is {0}.{1} ({2})".format(sys.version_info[0], sys.version_info[1], sys.prefix)
    try:
        from oomsafe.run.start import start
    except ImportError as error:
        return "oomsafe is not installed in {0} ({1}): install it in that environment".format(sys.prefix, error)
    except Exception as error:
        return "oomsafe in {0} is broken ({1!r})".format(sys.prefix, error)
    start()
    return ""


def _next():
    """Import the sitecustomize that this one has been found before: another wrapper's, the distribution's, the user's."""
    ours = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", "sitecustomize") != "sitecustomize":
            raise
    finally:
        if ours is not None:
            sys.modules.setdefault("sitecustomize", ours)


_begin()
