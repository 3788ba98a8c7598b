"""The first sitecustomize of each Python that a command under ``oomsafe run`` starts. Any Python must be able to read it."""

import os
import sys


def _begin():
    here = os.path.dirname(os.path.abspath(__file__))
    # out of the way of this process's own imports; its children find it in the environment
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    try:
        from oomsafe.run.start import start
    except ImportError as error:
        # the command itself, and not one of the small programs that it may call
        if os.environ.get("OOMSAFE_RUN") == str(os.getpid()):
            sys.stderr.write(
                "oomsafe run: oomsafe is not installed in {0} ({1}), so nothing that it runs is guarded; "
                "install it in that environment\n".format(sys.prefix, error)
            )
    else:
        start()
    _next()


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
